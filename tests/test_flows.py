"""The three flows: resumed to the same bits, judged again, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlrnn import demo, flows
from rlrnn.checkpoint import CheckpointError, Checkpoints
from rlrnn.config import AgentConfig, FitConfig, RunConfig, TrainConfig, TuneConfig
from rlrnn.control import Signals
from rlrnn.data.synthetic import markov_problem
from rlrnn.flows import evaluate, fit, train, tune
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.running import Stopped
from rlrnn.tasks import DataConfig, Tasks
from rlrnn.tracking import NotARunError, RunExistsError, read_metrics
from shared import Cut, at_row, cut, timeless

AGENT = AgentConfig(
    hidden_size=8, net_arch=[8], n_steps=32, batch_size=64, n_epochs=2, gamma=0.9
)
# 3 rollouts of 4 decisions: each ends in the middle of an episode of 6
TUNE = TuneConfig(
    tasks=Tasks(
        kinds=["markov"],
        cells=["gru"],
        hidden_sizes=[8],
        batches=[4],
        budget=(8_000.0, 9_000.0),
        decisions=6,
    ),
    episodes=8,
    envs=4,
    group=2,
    validate_every=2,
    validation_tasks=1,
    eval_tasks=1,
    agent=replace(AGENT, n_steps=4, batch_size=8, gamma=1.0),
    checkpoint_every=2,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def short_chains() -> Iterator[None]:
    """A shorter chain takes less time to draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rlrnn.tasks.markov_problem",
            lambda rng, _, *rest: markov_problem(rng, 20_000, *rest),
        )
        yield


def place(folder: Path) -> RunConfig:
    return RunConfig(folder=str(folder), track="disabled")


def train_config(folder: Path) -> TrainConfig:
    """Four updates."""
    return TrainConfig(
        env="rlrnn/RepeatPreviousEasy-v0",
        envs=4,
        steps=4 * 128,
        eval_episodes=4,
        agent=AGENT,
        checkpoint_every=2,
        run=place(folder),
    )


def fit_config(folder: Path, text: Path, controller: str = "prior") -> FitConfig:
    """Twelve decisions."""
    return FitConfig(
        data=DataConfig(path=str(text), batch=2),
        model=ModelConfig(hidden_size=8),
        training=TrainingConfig(budget=8_000.0, decisions=12),
        controller=controller,
        run=place(folder),
    )


def tune_config(folder: Path) -> TuneConfig:
    return replace(TUNE, run=place(folder))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = ["eins", "zwei", "drei", "vier", "fünf"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choice(words, 1200)), "utf-8")
    return path


Flow = Callable[..., dict[str, Any]]
Start = tuple[Flow, Any]  # a flow, and its config but for the run


def tune_here(config: TuneConfig, resume: Path | None = None) -> dict[str, Any]:
    return tune(config, resume, progress=False)


def play(start: Start, folder: Path, resume: Path | None = None) -> dict[str, Any]:
    flow, config = start
    config = replace(config, run=place(folder))
    return flow(config) if resume is None else flow(config, resume=resume)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, text: Path
) -> dict[str, tuple[Start, Path, dict[str, Any]]]:
    """One whole run of each kind; `learned` is steered by what `tune` made."""
    root = tmp_path_factory.mktemp("finished")
    starts: dict[str, Start] = {
        "train": (train, train_config(root)),
        "tune": (tune_here, tune_config(root)),
        "prior": (fit, fit_config(root, text)),
        "learned": (fit, fit_config(root, text, str(root / "tune/controller.zip"))),
    }
    return {
        name: (start, root / name, play(start, root / name))
        for name, start in starts.items()
    }


KINDS = ["train", "tune", "prior", "learned"]


def summary_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text("utf-8"))
    assert isinstance(found, dict)
    return found


def assert_same_tree(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, but for what the clock says."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            clock = key == "t" and "r" in a or str(key).startswith("time/")
            if not clock:
                assert_same_tree(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tree(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.tobytes() == b.tobytes(), where
    else:
        assert repr(a) == repr(b), where  # NaN too


def assert_same_run(a: Path, b: Path) -> None:
    rows, others = (list(map(timeless, read_metrics(f))) for f in (a, b))
    assert rows == others
    assert timeless(summary_of(a)) == timeless(summary_of(b))
    last, other = (Checkpoints(f / "checkpoints").latest() for f in (a, b))
    assert last[0] == other[0]
    assert_same_tree(last[1]["tree"], other[1]["tree"])


# --- resuming -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [2, 5])
def test_interrupted_and_resumed_is_the_same_run(
    finished: Any, tmp_path: Path, kind: str, row: int
) -> None:
    start, whole, _ = finished[kind]
    with at_row(row, cut), pytest.raises(Cut):
        play(start, tmp_path / "run")
    play(start, tmp_path / "run", resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("number", "row"), [(signal.SIGTERM, 1), (signal.SIGINT, 4)])
def test_a_signal_saves_and_the_run_goes_on(
    finished: Any, tmp_path: Path, kind: str, number: signal.Signals, row: int
) -> None:
    start, whole, _ = finished[kind]
    before = signal.getsignal(number)
    with at_row(row, lambda: signal.raise_signal(number)):
        with pytest.raises(Stopped, match=f"--resume {tmp_path}/run") as stopped:
            play(start, tmp_path / "run")
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    rows = read_metrics(tmp_path / "run")
    play(start, tmp_path / "run", resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    # nothing that was logged had to be done again
    assert (
        list(map(timeless, rows))
        == list(map(timeless, read_metrics(whole)))[: len(rows)]
    )


def test_a_signal_in_the_middle_of_a_rollout_loses_no_update(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, whole, _ = finished["train"]
    from rlrnn.envs.recall import RepeatPrevious

    step, count = RepeatPrevious.step, 0

    def counting(self: Any, actions: Any) -> Any:
        nonlocal count
        count += 1
        if count == 32 + 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, actions)

    monkeypatch.setattr(RepeatPrevious, "step", counting)
    with pytest.raises(Stopped):
        play(start, tmp_path / "run")
    assert Checkpoints(tmp_path / "run/checkpoints").latest()[0] == 128
    play(start, tmp_path / "run", resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_that_is_resumed_stays_as_it_is(
    finished: Any, tmp_path: Path, kind: str
) -> None:
    start, whole, _ = finished[kind]
    play(start, tmp_path / "run")
    play(start, tmp_path / "run", resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_kill_9_and_resume(finished: Any, tmp_path: Path) -> None:
    start, whole, _ = finished["prior"]
    text, folder = start[1].data.path, tmp_path / "run"
    script = f"""
import os, signal
from pathlib import Path
import rlrnn.flows, rlrnn.tracking as tracking
from rlrnn.config import *
log, rows = tracking.Run.log, []
def dying(run, row):
    log(run, row)
    rows.append(row)
    if len(rows) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
tracking.Run.log = dying
rlrnn.flows.fit(FitConfig(
    data=DataConfig(path={text!r}, batch=2),
    model=ModelConfig(hidden_size=8),
    training=TrainingConfig(budget=8_000.0, decisions=12),
    controller="prior",
    run=RunConfig(folder={str(folder)!r}, track="disabled"),
))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (folder / "summary.json").exists()
    play(start, folder, resume=folder)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("kind", ["train", "tune", "prior"])
def test_resume_refuses_another_config(
    finished: Any, tmp_path: Path, kind: str
) -> None:
    (flow, config), whole, _ = finished[kind]
    other = replace(config, seed=1, run=place(whole))
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"^seed is 1, but .* was made with 0"):
        flow(other, resume=whole)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_another_text(tmp_path: Path, text: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_bytes(text.read_bytes())
    config = fit_config(tmp_path / "run", mine)
    with at_row(4, cut), suppress(Cut):
        fit(config)
    mine.write_bytes(text.read_bytes()[::-1].replace(b"\xbc\xc3", "ü".encode()))
    with pytest.raises(ValueError, match="is not the text that"):
        fit(config, resume=tmp_path / "run")


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_may_be_deleted(
    finished: Any, tmp_path: Path, name: str
) -> None:
    start, whole, _ = finished["prior"]
    folder = tmp_path / "run"
    with at_row(6, cut), suppress(Cut):
        play(start, folder)
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    data = bytearray((last / name).read_bytes())
    data[-2] ^= 1
    (last / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} has SHA-256 .* delete {last}"):
        play(start, folder, resume=folder)
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    play(start, folder, resume=folder)
    assert_same_run(folder, whole)


# --- what a run leaves ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_its_files(finished: Any, kind: str) -> None:
    (_, config), folder, summary = finished[kind]
    made = {
        "train": ("agent.zip", "returns.png"),
        "tune": ("controller.zip", "tuning.png", "traces.png", "card.md"),
    }.get(kind, ("model.zip", "fit.png"))
    names = {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", *made}
    assert {path.name for path in folder.iterdir()} == names
    assert summary.pop("folder") == str(folder)
    assert timeless(summary) == timeless(summary_of(folder))
    assert_is_a_plot(folder / made[1])
    steps = Checkpoints(folder / "checkpoints").steps()
    assert config.run.keep <= len(steps) <= config.run.keep + 1  # the best


def assert_is_a_plot(path: Path) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert image.format == "PNG"
    assert min(pixels.shape[:2]) > 300
    coloured = (np.ptp(pixels.astype(int), axis=-1) > 60).sum()
    assert coloured > 100, "no line was drawn"


def test_each_decision_is_a_row(finished: Any) -> None:
    _, folder, summary = finished["learned"]
    first, *rows = read_metrics(folder)
    assert (first["decision"], "decision/reward" in first) == (0, False)
    assert [row["decision"] for row in rows] == list(range(1, 13))
    signals = Signals(**{name: np.ones(1) for name in Signals.__annotations__})
    losses = {"fit/train_loss", "fit/probe_loss", "fit/grad_norm"}
    others = signals.to_row().keys() - {x.split("/")[1] for x in losses}
    set_ = {"set_lr", "set_lr_end", "set_truncation", "prior_lr", "reward"}
    moves = {"rate_factor", "truncation_factor", "fallback"}
    expected = {f"decision/{name}" for name in others | set_ | moves} | losses
    for row in rows:
        more = {"fit/valid_loss"} if row is rows[-1] else set()
        more |= {"decision/outside"} if row["decision/fallback"] else set()
        assert row.keys() == expected | more | {"decision", "tokens"}
    tokens = column([first, *rows], "tokens")
    assert tokens == sorted(tokens) and tokens[-1] == summary["tokens"]
    probe = column([first, rows[-1]], "fit/probe_loss")
    total = sum(column(rows, "decision/reward"))
    assert total == pytest.approx(np.log(probe[0] / probe[1]))


def column(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows]


def test_each_update_is_a_pair_of_rows(finished: Any) -> None:
    for kind, steps in (("train", 128), ("tune", 16)):
        rows = read_metrics(finished[kind][1])
        rows = [row for row in rows if "tune/loss_below_prior" not in row]
        played, learned = rows[::2], rows[1::2]
        count = len(learned)
        assert [row["env_steps"] for row in played] == [
            steps * (i + 1) for i in range(count)
        ]
        assert [row["env_steps"] for row in learned] == [
            steps * (i + 1) for i in range(count)
        ]
        assert all("train/loss" in row for row in learned)
        if kind == "tune":
            assert all("tune/no_op_rate" in row for row in played)
            assert [r["episodes"] for r in played if "episodes" in r] == [4, 8]


# --- evaluate -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_agrees_with_the_summary(finished: Any, kind: str) -> None:
    (_, config), folder, _ = finished[kind]
    found, summary = evaluate(folder, config), summary_of(folder)
    common = {
        "train": ("return_mean", "return_std", "return_min", "episodes"),
        "tune": ("episodes", "eval_loss_below_prior", "eval_share_below_prior"),
    }.get(kind, ("valid_nats", "valid_bits"))
    assert {k: found[k] for k in common} == {k: summary[k] for k in common}


@pytest.mark.parametrize("kind", ["train", "tune", "prior"])
def test_evaluate_of_an_unfinished_run(
    finished: Any, tmp_path: Path, kind: str
) -> None:
    start, _, _ = finished[kind]
    with at_row(2, cut), suppress(Cut):
        play(start, tmp_path / "run")
    with pytest.raises(NotARunError, match="go on with --resume"):
        evaluate(tmp_path / "run", start[1])


# --- manners --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_global_state_stays_as_it_was(finished: Any, tmp_path: Path, kind: str) -> None:
    def state() -> Any:
        return (
            torch.random.get_rng_state().numpy().tobytes(),
            repr(np.random.get_state()),
            torch.get_num_threads(),
            os.getcwd(),
        )

    start, folder, _ = finished[kind]
    torch.set_num_threads(2)  # the flows use one
    before = state()
    play(start, tmp_path / "run")
    evaluate(folder, start[1])
    assert state() == before


def test_three_calls_in_a_script(text: Path, tmp_path: Path) -> None:
    """Without the type checks of the tests, which draw from `random`."""
    script = f"""
import random
from rlrnn.config import *
from rlrnn.flows import evaluate, fit, train
before = random.getstate()
agent = AgentConfig(n_steps=16, hidden_size=8, n_epochs=1)
first = train(TrainConfig(steps=64, envs=4, agent=agent, eval_episodes=2,
    env="rlrnn/PendulumHiddenVelocity-v0", run=RunConfig("a", "disabled")))
config = FitConfig(DataConfig(path={str(text)!r}, batch=2), ModelConfig(hidden_size=8),
    TrainingConfig(8_000, decisions=12), "prior", run=RunConfig("b", "disabled"))
second = fit(config)
assert evaluate(second["folder"], config)["valid_nats"] == second["valid_nats"]
assert first["episodes"] == 2
assert random.getstate() == before
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["train", "tune", "prior"])
def test_a_folder_that_holds_something_is_left_alone(
    finished: Any, tmp_path: Path, kind: str
) -> None:
    start, _, _ = finished[kind]
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(RunExistsError, match="already holds something"):
        play(start, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_tune_rejects_tasks_that_could_not_be_trained(tmp_path: Path) -> None:
    few = replace(TUNE.tasks, budget=(100.0, 9_000.0))
    config = replace(TUNE, tasks=few, run=place(tmp_path / "run"))
    with pytest.raises(ValueError, match="^tasks: budget is 100 tokens, expected"):
        tune(config)
    assert not (tmp_path / "run").exists()


def test_controllers_by_name(finished: Any, text: Path, tmp_path: Path) -> None:
    for name in ("constant", "cosine", "plateau"):
        config = replace(fit_config(tmp_path / name, text, name), truncation=8)
        assert fit(config)["controller"] == name
        rows = read_metrics(tmp_path / name)
        assert {row["decision/truncation"] for row in rows[1:]} == {8.0}
    agent_file = str(finished["train"][1] / "agent.zip")
    with pytest.raises(ValueError, match="is no controller"):
        flows.make_controller(agent_file)


# --- demo -----------------------------------------------------------------------------


def test_demo(
    finished: Any,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = {"train": train_config(tmp_path), "fit": fit_config(tmp_path, text)}
    monkeypatch.setattr(demo, "load_config", lambda command, _: tiny[command])
    monkeypatch.setattr(flows, "SHIPPED", finished["tune"][1] / "controller.zip")
    root = tmp_path / "demo"
    summaries = demo.demo(str(root), str(text), "disabled", seed=0)
    names = ["constant", "cosine", "prior", "learned"]
    assert list(summaries) == ["train", *names]
    assert {path.name for path in root.iterdir()} == {
        "train",
        "fits.png",
        *(f"fit-{name}" for name in names),
    }
    assert_is_a_plot(root / "fits.png")
    shown = capsys.readouterr().out
    for name in names:
        assert f"{summaries[name]['valid_bits']:.3f}" in shown
    assert f"return {summaries['train']['return_mean']:.1f}" in shown
    assert str(root / "fits.png") in shown
    assert "wandb" not in shown
    with pytest.raises(RunExistsError):
        demo.demo(str(root), str(text), "disabled")
