"""The command line: what it takes, what it says, and what it leaves alone."""

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces

from rlrnn import checkpoint, cli
from rlrnn.cli import UsageError, config_names, config_path, main, parse
from rlrnn.config import FitConfig, RunConfig, TrainConfig, TuneConfig
from rlrnn.data.synthetic import markov_problem
from rlrnn.tracking import Run, read_metrics

OFF = "--run.track=disabled"
TINY_AGENT = {"hidden_size": 8, "net_arch": [8], "n_steps": 32, "n_epochs": 1}
TINY: dict[str, dict[str, Any]] = {
    "train": {
        "env": "rlrnn/RepeatPreviousEasy-v0",
        "envs": 4,
        "steps": 256,
        "eval_episodes": 4,
        "agent": TINY_AGENT,
    },
    "fit": {
        "data": {"kind": "text", "batch": 2},
        "model": {"hidden_size": 8},
        "training": {"budget": 8000, "decisions": 12},
        "controller": "prior",
    },
    "tune": {
        "tasks": {
            "kinds": ["markov"],
            "cells": ["gru"],
            "hidden_sizes": [8],
            "batches": [4],
            "budget": [8000, 9000],
            "decisions": 6,
        },
        "episodes": 4,
        "envs": 2,
        "group": 2,
        "eval_tasks": 1,
        "agent": {**TINY_AGENT, "n_steps": 6, "gamma": 1.0},
    },
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, without settings of the user's W&B."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/.netrc"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Config files, in the working folder, of runs that take a second."""
    Path("text.txt").write_text("one two three, four five six. " * 200, "utf-8")
    TINY["fit"]["data"]["path"] = "text.txt"
    for name, tree in TINY.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    monkeypatch.setattr(  # a shorter chain takes less time to draw
        "rlrnn.tasks.markov_problem",
        lambda rng, _, *rest: markov_problem(rng, 20_000, *rest),
    )
    return {name: f"{name}.yaml" for name in TINY}


def run(command: str, folder: str, *options: str) -> int:
    """One run from its tiny config."""
    where = f"--run.folder={folder}"
    return main([command, "--config", f"{command}.yaml", OFF, where, *options])


def config_of(command: str, *arguments: str) -> Any:
    return parse(command, arguments)[0]


# --- bad input ------------------------------------------------------------------------


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail: one line, exit code 2, no new file."""

    def check(*arguments: str) -> str:
        before = sorted(Path.cwd().rglob("*"))
        capsys.readouterr()
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("rlrnn: ") and err.count("\n") == 1, err
        assert sorted(Path.cwd().rglob("*")) == before
        for word in ("<class", "Literal", "typing.", "Traceback", "Parser key"):
            assert word not in err
        return err.removeprefix("rlrnn: ").rstrip()

    return check


Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--agnt.n_steps=3", "unknown option --agnt.n_steps; did you mean --agent."),
        ("--agent.n_step=3", "unknown option --agent.n_step; did you mean --agent."),
        ("--stps 3", "unknown option --stps; did you mean --steps?"),
        ("stps=3", "unknown option stps; did you mean --steps?"),
        ("--bogus=3", "unknown option --bogus; see rlrnn train --help"),
        ("-x", "unknown option -x; see rlrnn train --help"),
        ("bogus", "'bogus' is no option: expected --KEY=VALUE"),
        ("--steps", "--steps needs a value: --steps=VALUE"),
        ("--steps --envs=3", "--steps needs a value: --steps=VALUE"),
        ("--config", "--config needs a value: --config=VALUE"),
        ("--resume", "--resume needs a value: --resume=VALUE"),
        ("--steps=", "steps is '', expected a whole number"),
        ("--steps=many", "steps is 'many', expected a whole number"),
        ("--steps=1.5", "steps is '1.5', expected a whole number"),
        ("--steps=0", "steps is 0, expected at least 1"),
        ("--seed=-1", "seed is -1, expected at least 0"),
        ("--agent.gamma=high", "agent.gamma is 'high', expected a number"),
        ("--agent.gamma=2", "agent.gamma is 2.0, expected 0 to 1"),
        ("--agent.gamma=.nan", "agent.gamma is nan, expected 0 to 1"),
        ("--agent.learning_rate=.inf", "agent.learning_rate is inf, expected a finite"),
        ("--agent.anneal=maybe", "agent.anneal is 'maybe', expected true or false"),
        ("--agent.cell=cnn", "agent.cell is 'cnn', expected one of lstm, gru, rnn, m"),
        ("--agent.net_arch=3", "agent.net_arch is '3', expected a list [..., ...]"),
        ("--agent.net_arch=[a]", "agent.net_arch is 'a', expected a list [..., ...]"),
        ("--agent.net_arch=[0]", "agent.net_arch is 0, expected at least 1"),
        ("--agent=3", "agent is '3', expected keys and values"),
        ("--run.track=on", "run.track is 'on', expected one of auto, online, offline"),
        ("--device=gpu", "device is 'gpu', expected auto, cpu or cuda"),
        ("--config=nope", f"no config 'nope': expected a file, or one of {', '.join(config_names())}"),  # noqa: E501
        ("--config=text_lst", "did you mean text_lstm?"),
        ("--resume=nope", "nope is not a run: expected a folder with config.yaml"),
        ("--resume=nope --envs=3", "but --envs=3 was given; leave it out"),
        ("--env=CartPol-v1", "unknown environment 'CartPol-v1': "),
        ("--env=rlrnn/CartPoleHiddenVelocty-v0", "did you mean rlrnn/CartPoleHiddenVelocity-v0 or "),  # noqa: E501
        ("--env=rlrnn/TMaze-v0", "did you mean rlrnn/TMazeHard-v0 or rlrnn/TMaze"),
        ("--env=nowhere:Foo-v0", "unknown environment 'nowhere:Foo-v0'"),
        ("--run.folder=/dev/null/x", "could not write /dev/null/x: not a directory"),
    ],
)  # fmt: skip
def test_train_refuses(refused: Refused, arguments: str, said: str) -> None:
    assert said in refused("train", OFF, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--training.budget=0", "training.budget is 0.0, expected at least 1 token"),
        ("--training.budget=1000", "training.budget is 1000 tokens, expected at least"),
        ("--training.budget=lots", "training.budget is 'lots', expected a number"),
        ("--model.embedding_size=x", "is 'x', expected a whole number or null"),
        ("--data.kind=image", "data.kind is 'image', expected one of text, series, "),
        ("--data.kind=markov --data.size=99", "data.size is 99, expected at least"),
        ("--data.batch=0", "data.batch is 0, expected at least 1"),
        ("--data.path=missing.txt", "no such file: missing.txt"),
        ("--data.path=folder", "no .txt files in the folder folder"),
        ("--data.path=empty.txt", "empty.txt is empty, expected UTF-8 text"),
        ("--data.path=binary.txt", "binary.txt is binary (a zero byte at offset 1)"),
        ("--data.path=latin.txt", "latin.txt is not UTF-8 (line 1: byte 0xe9 at off"),
        ("--data.path=short.txt", "short.txt (training part) has 2 characters, expect"),
        ("--lr=0", "lr is 0.0, expected above 0 and at most 10"),
        ("--truncation=0", "truncation is 0, expected 1 to 1024"),
        ("--controller=pror", "did you mean prior?"),
        ("--controller=short.txt", "controller is 'short.txt', expected learned"),
        ("--controller=other.zip", "other.zip is no controller: expected a file that"),
    ],
)  # fmt: skip
def test_fit_refuses(
    tiny: dict[str, str], refused: Refused, arguments: str, said: str
) -> None:
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"a\0")
    Path("latin.txt").write_bytes("café ".encode("latin1") * 1000)
    Path("short.txt").write_text("abc")
    Path("folder").mkdir()
    checkpoint.save("other.zip", {"policy": 1})
    assert said in refused("fit", "--config=fit.yaml", *arguments.split(), OFF)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--group=3", "group is 3, expected at least 2 and a divisor of the 2 envs"),
        ("--tasks.decisions=5", "tasks.decisions is 5, expected at least 6"),
        ("--tasks.kinds=[image]", "expected a list [..., ...], each one of text, s"),
        ("--tasks.kinds=[]", "tasks.kinds is empty, expected at least one"),
        ("--tasks.hidden_sizes=[0]", "tasks.hidden_sizes is 0, expected at least 1"),
        ("--tasks.budget=[5]", "tasks.budget is '[5]', expected a list of 2, each a"),
        ("--tasks.budget=[9,5]", "tasks.budget is [9.0, 5.0], expected [least,"),
        ("--tasks.budget=[5,9]", "tasks: budget is 5 tokens, expected at least"),
    ],
)  # fmt: skip
def test_tune_refuses(
    tiny: dict[str, str], refused: Refused, arguments: str, said: str
) -> None:
    assert said in refused("tune", "--config=tune.yaml", *arguments.split(), OFF)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("tran", "unknown command 'tran': expected train, fit, tune, evaluate, expl"),
        ("evaluate", "the following arguments are required: RUN"),
        ("evaluate nope", "nope is not a run: expected a folder with config.yaml"),
        ("evaluate a b", "unrecognized arguments: b"),
        ("demo --seed=x", "--seed is 'x', expected a whole number"),
        ("demo --run.track=x", "--run.track is x, expected one of auto, online"),
        ("demo --data.path=missing.txt", "no such file: missing.txt"),
    ],
)
def test_other_commands_refuse(refused: Refused, arguments: str, said: str) -> None:
    assert said in refused(*arguments.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("agent: {n_step: 3}", "bad.yaml: unknown key agent.n_step; did you mean"),
        ("env: {id: 3}", "bad.yaml: unknown key env.id"),
        ("resume: somewhere", "bad.yaml: unknown key resume"),
        ("steps: many", "steps is 'many', expected a whole number"),
        ("agent: 3", "bad.yaml: agent is 3, expected keys and values"),
        ("steps: [", "bad.yaml line 1, column 9 is no YAML: "),
        ("steps: !!python/name:os.system x", "is no YAML: "),
        ("- 3", "bad.yaml is no config: expected keys and values"),
        ("", "bad.yaml is no config: expected keys and values"),
        ("\x00", "bad.yaml is no YAML: "),
    ],
)  # fmt: skip
def test_bad_yaml(refused: Refused, text: str, said: str) -> None:
    Path("bad.yaml").write_text(text)
    assert said in refused("train", "--config", "bad.yaml")


class Odd(gymnasium.Env[Any, Any]):
    """Spaces that no agent here plays."""

    def __init__(self, which: str) -> None:
        plain, two = spaces.Discrete(2), spaces.Box(-1, 1, (2,))
        odd = {
            "dict": spaces.Dict(a=plain, b=two),
            "tuple": spaces.Tuple((plain, two)),
        }
        self.action_space = odd.get(which, plain)
        self.observation_space = odd["tuple"] if which == "observation" else two

    def reset(self, **kwargs: Any) -> Any:
        return self.observation_space.sample(), {}


@pytest.mark.parametrize("which", ["dict", "tuple", "observation"])
def test_spaces_that_are_not_supported(refused: Refused, which: str) -> None:
    def make(**kwargs: Any) -> gymnasium.Env[Any, Any]:
        return Odd(which)

    gymnasium.register(f"Odd-{which}-v0", make)
    try:
        said = refused("train", f"--env=Odd-{which}-v0", "--envs=1", OFF)
    finally:
        gymnasium.registry.pop(f"Odd-{which}-v0")
    assert " space is " in said and "expected" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["train", "fit", "tune"])
def test_no_gpu(tiny: dict[str, str], refused: Refused, command: str) -> None:
    said = refused(command, "--config", tiny[command], "--device=cuda", OFF)
    assert "device is 'cuda', but torch" in said and "use device: auto or cpu" in said


def test_a_run_that_cannot_be_resumed_or_judged(
    tiny: dict[str, str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, rows = Run.log, []

    def failing(run: Run, row: Any) -> None:
        log(run, row)
        rows.append(row)
        if len(rows) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", failing)
    assert run("fit", "run") == 130
    monkeypatch.setattr(Run, "log", log)
    assert "go on with --resume run" in refused("evaluate", "run")
    assert "already holds something" in refused(
        "fit", "--config=fit.yaml", OFF, "--run.folder=run"
    )
    said = refused("train", "--resume=run")
    assert "made by `rlrnn fit`" in said and "rlrnn fit --resume run" in said
    said = refused("fit", "--resume=run", "--lr=1")
    assert "--lr=1 was given; leave it out" in said
    newest = sorted(Path("run/checkpoints").glob("step_*"))[-1]
    weights = newest / "tensors.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    said = refused("fit", "--resume=run", OFF)
    assert f"damaged checkpoint {newest}: tensors.safetensors has SHA-256" in said
    assert main(["fit", "--resume", "run"]) == 2
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert main(["fit", "--resume", "run"]) == 0
    assert main(["evaluate", "run"]) == 0


@pytest.mark.parametrize(
    ("number", "code", "commands"),
    [(signal.SIGINT, 130, ["fit"]), (signal.SIGTERM, 143, list(TINY))],
)
def test_a_signal_saves_and_says_how_to_go_on(
    tiny: dict[str, str],
    number: signal.Signals,
    code: int,
    commands: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log, rows = Run.log, []

    def signalling(run: Run, row: Any) -> None:
        log(run, row)
        rows.append(row)
        if len(rows) == 1:  # a second signal would end the process
            signal.raise_signal(number)

    for command in commands:
        rows.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Run, "log", signalling)
            assert run(command, f"my-{command}") == code
        said = f"rlrnn: stopped and saved; go on with --resume my-{command}"
        assert capsys.readouterr().err.strip() == said
        assert main([command, "--resume", f"my-{command}"]) == 0


# --- configuration --------------------------------------------------------------------


def test_options_override_the_file_which_overrides_the_defaults() -> None:
    Path("my.yaml").write_text("envs: 5\nsteps: 7\nagent: {n_steps: 9}\n")
    for arguments in (
        ["--config", "my.yaml", "--steps", "3", "--agent.n_epochs=2"],
        ["--steps=3", "--agent.n_epochs=2", "--config=my.yaml"],
    ):
        config = config_of("train", *arguments)
        assert (config.envs, config.steps, config.seed) == (5, 3, TrainConfig().seed)
        assert (config.agent.n_steps, config.agent.n_epochs) == (9, 2)


def test_arguments_as_a_sweep_sends_them() -> None:
    config = config_of(
        "train",
        "--agent.n_steps=64",
        "agent.cell=gru",
        "--run.group=None",
        "agent.shared=True",
        "--agent.anneal=False",
        "--agent.net_arch=[32, 16]",
        "--run.folder",
        "a=b",
    )
    agent = config.agent
    assert (agent.n_steps, agent.cell, agent.net_arch) == (64, "gru", [32, 16])
    assert (agent.shared, agent.anneal) == (True, False)
    assert (config.run.group, config.run.folder) == (None, "a=b")
    config = config_of(
        "fit", "data.path=None", "--model.embedding_size", "None", "training.budget=1e6"
    )
    assert config.data.path is None and config.model.embedding_size is None


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs(name: str) -> None:
    tree = yaml.safe_load(config_path(name).read_text("utf-8"))
    job = "train" if "env" in tree else "fit" if "controller" in tree else "tune"
    config = config_of(job, "--config", name)

    def check(node: dict[str, Any], part: Any) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                check(value, getattr(part, key))
            else:
                found = getattr(part, key)
                assert (list(found) if isinstance(found, tuple) else found) == value

    check(tree, config)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["--config=repeat_previous_easy", "--seed=3", "--run.folder=x"]),
        ("fit", ["--config=text_lstm", "--data.path=None", "--lr=1e-2"]),
        ("tune", ["--config=controller_small", "--tasks.budget=[7e4,8e4]"]),
    ],
)
def test_print_config_can_be_read_back(
    command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *arguments, "--print_config"]) == 0
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    assert config_of(command, "--config=printed.yaml") == config_of(command, *arguments)


@pytest.mark.parametrize("command", ["train", "fit", "tune"])
def test_a_run_can_be_made_again_from_its_folder(
    tiny: dict[str, str], command: str
) -> None:
    assert run(command, "first", "--seed=1") == 0
    again = ["--config", "first/config.yaml", "--run.folder=second"]
    assert main([command, *again]) == 0
    first, second = (
        [
            {k: repr(v) for k, v in row.items() if not k.startswith("time/")}
            for row in read_metrics(folder)
        ]
        for folder in ("first", "second")
    )
    assert first == second
    assert (
        Path("first/config.yaml").read_text() == Path("second/config.yaml").read_text()
    )
    assert cli.stored_config("first") == replace(
        config_of(command, "--config", tiny[command], "--seed=1"),
        run=RunConfig(track="disabled"),
    )


def options_of(made: Any, prefix: str = "") -> dict[str, Any]:
    """Each option and its default."""
    found: dict[str, Any] = {}
    for name, value in vars(made).items():
        if is_dataclass(value):
            found |= options_of(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


@pytest.mark.parametrize("config", [TrainConfig, FitConfig, TuneConfig])
def test_help_has_each_option_its_sentence_and_its_default(
    config: type[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    command = config.__name__.removesuffix("Config").lower()
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    entries = shown.split("\n  --")[1:]
    for option, default in options_of(config()).items():
        entry = next(e for e in entries if e.split()[0].rstrip(",") == option)
        words = " ".join(entry.split("\n\n")[0].split())
        spelled = "null" if default is None else str(default)
        assert words.endswith(f"default: {spelled})"), words
        sentence = words.split("(type:")[0].split(maxsplit=1)[1]
        assert len(sentence.split()) >= 3, f"{option} has no help"
    assert "--config" in shown and "--resume" in shown


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in (*cli.FLOWS, *config_names(), "demo"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rlrnn 0.")
    for command in ("evaluate", "demo"):
        assert main([command, "--help"]) == 0
        assert f"usage: rlrnn {command}" in capsys.readouterr().out


def test_resume_keeps_the_tracking_of_the_run(tiny: dict[str, str]) -> None:
    assert run("fit", "run") == 0
    config, resume = parse("fit", ["--resume", "run"])
    assert (resume, config.run) == ("run", RunConfig("run", "disabled"))
    config, _ = parse("fit", ["--resume=run", "--run.track", "offline"])
    assert config.run.track == "offline"
    with pytest.raises(UsageError):
        parse("fit", ["--resume=run", "--config=text_lstm"])


# --- what is said in the end ----------------------------------------------------------


def test_an_offline_run_says_how_to_look_at_it(
    tiny: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    where = "--run.folder=runs/one"
    assert main(["fit", "--config=fit.yaml", "--run.track=offline", where]) == 0
    shown = capsys.readouterr().out
    assert "run folder: runs/one\n" in shown
    assert "look at it: wandb leet runs/one/wandb\n" in shown
    assert "upload it:  wandb sync runs/one/wandb/offline-run-*\n" in shown
    (mirror,) = Path("runs/one/wandb").glob("offline-run-*")
    assert len(list(mirror.glob("run-*.wandb"))) == 1
    # `leet` takes the folder of the runs; only its other face works without a terminal
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
    told = subprocess.run(
        [*command, "runs/one/wandb"], capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    assert "fit/probe_loss" in json.dumps(json.loads(told.stdout))
    sys.modules["wandb"].teardown()


@pytest.mark.parametrize("command", ["train", "fit", "tune"])
def test_a_run_without_wandb_and_its_evaluation(
    tiny: dict[str, str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "run") == 0
    shown = capsys.readouterr().out
    assert shown.endswith("\nrun folder: run\n")
    assert main(["evaluate", "run"]) == 0
    again = capsys.readouterr().out
    key = {"train": "return_mean", "fit": "valid_nats"}.get(command, "eval_loss_below")
    lines = [
        [line.split() for line in text.splitlines() if key in line]
        for text in (shown, again)
    ]
    assert lines[0] == lines[1] != []


def test_folders_without_a_name_do_not_collide(tiny: dict[str, str]) -> None:
    for _ in range(2):
        assert main(["fit", "--config=fit.yaml", OFF]) == 0
    first, second = sorted(Path("runs").iterdir())
    assert first != second and first.name.startswith("fit-2")


def test_warnings_are_one_line_without_a_place_in_the_source() -> None:
    main(["predict", "nowhere", "x"])
    said = warnings.formatwarning("two\nlines", UserWarning, "here.py", 3)
    assert said == "rlrnn: two lines\n"
    said = warnings.formatwarning("old", DeprecationWarning, "here.py", 3)
    assert said == "here.py:3: DeprecationWarning: old\n"


def test_a_file_that_cannot_be_written_is_one_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a.onnx")

    monkeypatch.setattr("rlrnn.export.export_run", full)
    assert "No space left on device: a.onnx" in refused("export", "run")


def test_module_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlrnn", "fit", "--lr=x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "rlrnn: lr is 'x', expected a number\n"


def test_numbers_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    cli._report({"a": 1.23456, "b": 3, "folder": "x", "c": np.nan})
    assert capsys.readouterr().out.split() == ["a", "1.235", "b", "3", "c", "nan"]
