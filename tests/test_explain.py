"""`rlrnn explain`: what it tells of a run is what the run did."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from rlrnn.cli import main
from rlrnn.config import FitConfig, RunConfig
from rlrnn.control import Signals, prior
from rlrnn.explain import action_in_words, explain
from rlrnn.flows import fit
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.tasks import DataConfig
from rlrnn.tracking import read_metrics
from rlrnn.training import Trainer

NAMES = [
    "learned",
    "prior",
    "constant",
    "plateau",
    "length_warmup",
    "adaptive",
]
DECISIONS = 6


def run(folder: Path, controller: str, lr: float = 1e-3) -> Path:
    training = TrainingConfig(
        budget=16_000.0, decisions=DECISIONS, decay_probe=controller == "adaptive"
    )
    config = FitConfig(
        data=DataConfig("markov", batch=4, size=20_000),
        model=ModelConfig("gru", hidden_size=8),
        training=training,
        controller=controller,
        lr=lr,
        run=RunConfig(folder=str(folder), track="disabled"),
    )
    fit(config, progress=False)
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "learned", "learned")


def table(text: str) -> list[str]:
    """The lines of the decisions."""
    return [line for line in text.splitlines() if line.lstrip()[:1].isdigit()]


@pytest.mark.parametrize("name", NAMES)
def test_any_controller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = run(tmp_path / "run", name)
    capsys.readouterr()
    assert main(["explain", str(folder)]) == 0
    said = capsys.readouterr().out
    rows = read_metrics(folder)
    lines = table(said)
    assert len(lines) == len(rows) == DECISIONS + 1
    for line, row in zip(lines[1:], rows[1:], strict=True):
        assert f"{row['fit/probe_loss']:.4f}" in line
        assert f"{row['decision/reward']:+.4f}" in line
    assert f"{name}: {DECISIONS} decisions, " in said
    with Image.open(folder / "explain.png") as image:
        assert image.format == "PNG" and min(image.size) > 800


def test_each_decision_is_logged_with_what_it_saw(learned: Path) -> None:
    """The signals of a row and the prior give the rate that the next row says."""
    rows: list[dict[str, Any]] = read_metrics(learned)
    alone = prior()
    rate = k = 1.0
    for before, row in zip(rows, rows[1:], strict=False):
        seen = {
            name.split("/")[1]: np.array([float(value)])
            for name, value in before.items()
            if name.startswith(("fit/", "decision/"))
        }
        signals = Signals(**{name: seen[name] for name in Signals.__annotations__})
        knobs, _ = alone(signals, alone.init(1))
        assert row["decision/prior_lr"] == knobs.lr_end.item()
        rate *= row["decision/rate_factor"]
        k *= row["decision/truncation_factor"]
        # lr = lambda K^p, up to the bounds of rate and K
        if 1e-6 < row["decision/set_lr_end"] and not row["decision/recovered"]:
            base = knobs.lr_end.item() / knobs.truncation.item() ** 0.5
            wanted = base * rate * row["decision/set_truncation"] ** 0.5
            assert row["decision/set_lr_end"] == pytest.approx(wanted)
        assert row["decision/lr"] == row["decision/set_lr_end"]
        assert row["decision/truncation"] == row["decision/set_truncation"]
    assert rows[-1]["fit/valid_loss"] == pytest.approx(
        json.loads((learned / "summary.json").read_text("utf-8"))["valid_nats"]
    )


def moved(rate: float, k: float) -> dict[str, Any]:
    return {"decision/rate_factor": rate, "decision/truncation_factor": k}


def stood(decision: int, rate: float, k: float) -> dict[str, Any]:
    return {"decision": decision, "decision/lr": rate, "decision/truncation": k}


@pytest.mark.parametrize(
    ("row", "before", "words"),
    [
        (moved(1.0, 1.0), {}, "as the prior"),
        (moved(1.3, 0.5), {}, "rate ×1.3, K ÷2"),
        (moved(0.25, 1.0), {}, "rate ÷4"),
        (moved(1.0, 2.0) | {"decision/fallback": 1.0}, {}, "left to the prior"),
        (stood(1, 0.001, 32.0), stood(0, math.nan, 4.0), "rate 0.001"),
        (stood(2, 0.001, 32.0), stood(1, 0.001, 32.0), "rate stays"),
        (stood(2, 0.001, 8.0), stood(1, 0.002, 4.0), "rate falls, K from 4"),
    ],
)
def test_actions_in_words(
    row: dict[str, Any], before: dict[str, Any], words: str
) -> None:
    assert action_in_words(row, before) == words


def test_roll_backs_are_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Trainer.step

    def broken(self: Trainer, knobs: Any) -> Signals:
        if self.decision == 2:
            with_nan = self.parameters[0].detach()
            with_nan[:] = math.nan
        return step(self, knobs)

    monkeypatch.setattr(Trainer, "step", broken)
    explain(run(tmp_path / "run", "cosine"))
    said = capsys.readouterr().out
    # the weights that are restored are those before the interval, which are broken
    assert "rolled back" in table(said)[3] and "3 rolled back" in said


def test_a_run_that_has_only_begun(
    tmp_path: Path, learned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        first = (learned / name).read_text("utf-8")
        if name == "metrics.jsonl":
            first = first.splitlines()[0] + "\n"
        (tmp_path / name).write_text(first, "utf-8")
    explain(tmp_path)
    assert len(table(capsys.readouterr().out)) == 1


def damaged(folder: Path, config: object = None, metrics: str | None = None) -> None:
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    if metrics is not None:
        (folder / "metrics.jsonl").write_text(metrics, "utf-8")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, "is not a run: expected a folder with config.yaml"),
        (lambda folder: damaged(folder, {"env": "x"}), "made by `rlrnn train`"),
        (lambda folder: damaged(folder, {"tasks": {}}), "made by `rlrnn tune`"),
        (lambda folder: damaged(folder, {"data": {}}), "is not a run: expected"),
        (lambda folder: damaged(folder, {"data": {}}, ""), "has no decisions yet"),
    ],
)
def test_other_folders(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], None],
    words: str,
) -> None:
    prepare(tmp_path)
    assert main(["explain", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "explain.png").exists()
