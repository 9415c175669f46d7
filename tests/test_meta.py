"""The flow tune: its ways to learn, what it tracks, and what it says of itself."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlrnn import checkpoint
from rlrnn.agents.controller import controller_card, load_controller
from rlrnn.card import card_text
from rlrnn.checkpoint import Checkpoints
from rlrnn.cli import load_config
from rlrnn.comparison import Played, falls_below, gain
from rlrnn.comparison import play as compared
from rlrnn.config import AgentConfig, EvolutionConfig, RunConfig, TuneConfig
from rlrnn.control import prior
from rlrnn.data.synthetic import markov_problem
from rlrnn.flows import run_task, tune
from rlrnn.meta import _command
from rlrnn.population import Population
from rlrnn.running import Stopped
from rlrnn.tasks import Tasks
from rlrnn.tracking import read_metrics
from shared import Cut, at_row, cut, timeless

# 3 generations of 4 members, or 3 rollouts of 6 decisions in 4 environments
TUNE = TuneConfig(
    tasks=Tasks(
        kinds=["markov"],
        cells=["gru"],
        hidden_sizes=[8],
        optimizers=["adam"],
        batches=[16],
        budget=(8_000.0, 9_000.0),
        decisions=6,
    ),
    episodes=12,
    envs=4,
    group=2,
    validate_every=2,
    validation_tasks=2,
    eval_tasks=2,
    algorithm="es",
    agent=AgentConfig(
        hidden_size=8, net_arch=[8], n_steps=6, batch_size=12, n_epochs=2, gamma=1.0
    ),
    es=EvolutionConfig(learning_rate=0.1, sigma=0.5),
    checkpoint_every=2,
)


@pytest.fixture(autouse=True, scope="module")
def short_chains() -> Iterator[None]:
    """A shorter chain takes less time to draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rlrnn.tasks.markov_problem",
            lambda rng, _, *rest: markov_problem(rng, 20_000, *rest),
        )
        yield


def play(
    folder: Path, config: TuneConfig = TUNE, resume: Path | None = None
) -> dict[str, Any]:
    run = RunConfig(folder=str(folder), track="disabled")
    return tune(replace(config, run=run), resume, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("meta") / "run"
    return folder, play(folder)


def assert_same_run(a: Path, b: Path) -> None:
    rows, others = read_metrics(a), read_metrics(b)
    assert list(map(timeless, rows)) == list(map(timeless, others))
    mine, its = weights(a), weights(b)
    assert all(torch.equal(mine[name], its[name]) for name in its)


def weights(folder: Path) -> dict[str, Any]:
    policy: dict[str, Any] = checkpoint.load(folder / "controller.zip")["policy"]
    return policy


# --- evolution strategies -------------------------------------------------------------


def test_evolution_leaves_what_ppo_leaves(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    assert summary["episodes"] == 12
    rows = [row for row in read_metrics(folder) if "tune/log_loss_fall" in row]
    assert [row["episodes"] for row in rows] == [4, 8, 12]
    for row in rows:
        assert {"tune/group_spread", "tune/no_op_rate", "tune/truncation"} <= set(row)
        family = row["tune/log_loss_fall/markov-gru-adam"]
        assert family == row["tune/log_loss_fall"]  # there is no other
    controller = load_controller(folder / "controller.zip")
    assert controller.range_test


def test_evolution_interrupted_and_resumed_is_the_same_run(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """After the third row: two updates, and a validation."""
    with at_row(3, cut), pytest.raises(Cut):
        play(tmp_path / "run")
    play(tmp_path / "run", resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole[0])


def test_evolution_plays_in_pairs() -> None:
    with pytest.raises(ValueError, match="group is 3, expected an even number"):
        replace(TUNE, envs=3, group=3)


# --- validation -----------------------------------------------------------------------


def test_each_validation_is_a_row_and_the_best_policy_is_kept(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    folder, summary = whole
    rows = [r for r in read_metrics(folder) if "tune/loss_below_prior" in r]
    assert [row["episodes"] for row in rows] == [8, 12]
    shares = [float(str(row["tune/loss_below_prior"])) for row in rows]
    best = rows[int(np.argmax(shares))]
    assert summary["episodes_of_best"] == best["episodes"]
    saved = Checkpoints(folder / "checkpoints").best()[1]["tree"]["flow"]
    assert saved["episodes"] == best["episodes"]
    kept = weights(folder)
    assert all(torch.equal(kept[k], v) for k, v in saved["agent"]["policy"].items())


def test_a_policy_that_has_learned_nothing_is_the_prior(tmp_path: Path) -> None:
    """Its likeliest actions never move: its losses are the prior's, to the bit."""
    config = replace(TUNE, episodes=4, es=EvolutionConfig(learning_rate=1e-12))
    play(tmp_path / "run", config)
    (row,) = [r for r in read_metrics(tmp_path / "run") if "tune/loss_below_prior" in r]
    assert row["tune/loss_below_prior"] == row["tune/share_below_prior"] == 0


def test_a_signal_within_a_validation_is_heeded_and_loses_nothing(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = Population.step, 0

    def counting(self: Population, knobs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2 * 6 + 3:  # the third decision of the prior
            signal.raise_signal(signal.SIGTERM)
        return step(self, knobs)

    monkeypatch.setattr(Population, "step", counting)
    with pytest.raises(Stopped):
        play(tmp_path / "run")
    assert count == 2 * 6 + 3 + 1  # one of the rollout that is cut off
    assert len(read_metrics(tmp_path / "run")) == 2
    play(tmp_path / "run", resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole[0])


def test_without_validation_the_last_policy_is_kept(tmp_path: Path) -> None:
    summary = play(tmp_path / "run", replace(TUNE, episodes=4, validation_tasks=0))
    assert summary["episodes_of_best"] == 4
    assert not (tmp_path / "run/traces.png").exists()


# --- the comparison -------------------------------------------------------------------


def test_the_gain_of_what_is_known() -> None:
    same = gain(np.full(8, np.log(2.0)))
    assert same["loss_below_prior"] == pytest.approx(0.5)
    assert same["loss_below_prior_error"] == pytest.approx(0.0)
    assert same["loss_below_prior_low"] == pytest.approx(0.5)
    even = gain(np.array([0.1, -0.1] * 4))  # the geometric mean
    assert even["loss_below_prior"] == pytest.approx(0.0)
    assert even["share_below_prior"] == 0.5
    assert even["loss_below_prior_low"] < 0 < even["loss_below_prior_high"]
    assert "loss_below_prior_error" not in gain(np.ones(1))


def test_a_solved_task_is_no_gain() -> None:
    """Of first losses of 1, what is below 0.02 is solved."""
    traces = np.ones((3, 3))

    def played(*losses: float) -> Played:
        return Played(np.array(losses), traces, traces, traces)

    falls = falls_below(played(0.5, 1e-6, 0.01), played(1.0, 0.01, 0.04))
    np.testing.assert_allclose(falls, np.log([2.0, 1.0, 2.0]))


def test_tasks_side_by_side_are_those_alone() -> None:
    rng = np.random.default_rng(0)
    tasks = [TUNE.tasks.draw(rng) for _ in range(2)]
    played = compared(tasks, prior())
    assert played.lr.shape == played.truncation.shape == (7, 2)
    for loss, task in zip(played.losses, tasks, strict=True):
        alone = run_task(task, prior())
        assert loss == pytest.approx(alone.score("valid")["nats"], rel=1e-3)


# --- what is left ---------------------------------------------------------------------


def test_the_pictures(whole: tuple[Path, dict[str, Any]]) -> None:
    for name in ("tuning.png", "traces.png"):
        with Image.open(whole[0] / name) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert (np.ptp(pixels, axis=-1) > 60).sum() > 100, "no line was drawn"


def test_the_card_says_what_the_file_says(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    text = (folder / "card.md").read_text("utf-8")
    assert text == card_text(controller_card(folder / "controller.zip"))
    assert "| budget | 8,000 to 9,000 |" in text
    assert "| kinds | markov |" in text
    best = summary["episodes_of_best"]
    assert f"12; the best policy on validation tasks was that after {best} |" in text
    share = f"{100 * summary['eval_loss_below_prior']:.1f} %"
    assert f"| markov-gru-adam | 2 | {share} | too few tasks |" in text


def test_the_command_is_the_shortest_that_makes_it_again() -> None:
    named: TuneConfig = load_config("tune", "controller_long")
    assert _command(named) == "rlrnn tune --config controller_long"
    begun = replace(named, init_from="x.zip", run=RunConfig("elsewhere"))
    assert _command(begun) == "rlrnn tune --config controller_long --init_from FILE"
    assert _command(replace(named, seed=9)) == "rlrnn tune --config RUN/config.yaml"


def test_the_card_names_where_it_is_worse() -> None:
    scores = {"tasks": 6, **gain(np.full(6, -0.1))}
    whole = {f"eval_{name}": value for name, value in gain(np.full(6, -0.1)).items()}
    card = {
        "command": "rlrnn tune --config mine",
        "algorithm": "ppo",
        "ablation": "rate_only",
        "seed": 0,
        "rlrnn": "0",
        "torch": "2",
        "episodes": 6,
        "episodes_of_best": 6,
        "time/hours": 1.0,
        "time/validation_hours": 0.1,
        "tasks": {"kinds": ["text", "text"], "budget": (1e5, 2e6), "decisions": 24},
        **whole,
        "eval_tasks": 6,
        "families": {"text-lstm-sgd": scores},
    }
    text = card_text(card)
    assert "no better than the prior: text-lstm-sgd" in text
    assert "| text-lstm-sgd | 6 | -10.5 % | -10.5 to -10.5 % | 0 % |" in text
    assert "| without | rate_only |" in text
    assert "| budget | 100,000 to 2,000,000 |" in text
    assert "| kinds | text |" in text
