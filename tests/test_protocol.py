"""The runner of the protocol: nothing is played twice, and the table is of what is."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "controller.py"
SPEC = importlib.util.spec_from_file_location("protocol", PATH)
assert SPEC is not None and SPEC.loader is not None
protocol: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(protocol)

SEEDS = [0, 1]
CELLS = ["markov", "copy"]
LOSSES = {"default": 3.0, "oracle": 2.0, "learned": 2.25, "prior": 2.5}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is played: runs that are told what they come to."""
    calls: list[str] = []

    def record(plan: Any, arm: str, task: Any) -> dict[str, Any]:
        calls.append(arm)
        loss = LOSSES.get(arm, 2.75) + 0.01 * (task.seed % 1000)
        return {
            "valid_loss": loss,
            "probe_loss": loss,
            "cost": 1.0,
            "settings": {},
            "cosine": {},
            "runs": [(2 + i / 10, 2 + i / 10) for i in range(plan.random)],
            "curve": [(0.0, 9.0), (0.5, 2.6), (1.0, loss)],
        }

    def entry(plan: Any, arm: str, task: Any, selected: Any) -> Any:
        assert bool(selected) == ("grid" in calls and arm != "grid")
        return None if arm in ("grid", *plan.searches) else (plan, arm, task)

    def steered(entries: Any) -> list[dict[str, Any]]:
        return [record(*entry) for entry in entries]

    for function in (entry, steered):
        monkeypatch.setattr(protocol, function.__name__, function)
    monkeypatch.setattr(protocol, "search", record)
    return calls


def test_what_is_there_is_not_played_again(played: list[str], tmp_path: Path) -> None:
    plan = protocol.SMALL

    def go(arms: list[str], name: str = "runs") -> Any:
        results = protocol.Results(tmp_path, name)
        protocol.run(plan, results, CELLS, SEEDS, arms)
        return results

    go(["default"])
    assert played == ["default"] * 4
    # a line that was torn off is played again, and what is behind it is whole
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text("utf-8")[:-9], "utf-8")
    go(["default"])
    assert played == ["default"] * 5
    assert all(json.loads(line) for line in path.read_text("utf-8").splitlines())
    # another process sees them too; the grid is played once per cell, and first
    played.clear()
    results = go(plan.arms, "second")
    assert played[0] == "grid" and played.count("grid") == 2
    assert "default" not in played
    assert len(results.records) == 4 * (len(plan.arms) - 1) + 2
    played.clear()
    table = protocol.report(plan, go(plan.arms), CELLS, SEEDS)
    assert not played
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    for arm, score in {"default": 0.0, "oracle": 1.0, "prior": 0.5}.items():
        assert f"| {score:.3f} [" in rows[arm]
    assert "0.750 [0.750, 0.750]" in rows["learned"]
    assert "1.00 [1.00, 1.00]" in rows["prior"], "the learned one is better"
    assert "2 cells x 2 seeds" in table


def test_other_sizes_are_not_mixed(played: list[str], tmp_path: Path) -> None:
    results = protocol.Results(tmp_path, "runs")
    with pytest.raises(
        SystemExit, match="^oracle and tuned arms on markov need the arm"
    ):
        protocol.run(protocol.SMALL, results, CELLS, SEEDS, ["oracle"])
    protocol.run(protocol.SMALL, results, CELLS, SEEDS, ["default"])
    cells = {name: protocol.CELLS["text"] for name in CELLS}
    other = protocol.Protocol(cells)
    with pytest.raises(SystemExit, match="of other sizes"):
        protocol.run(other, results, CELLS, SEEDS, ["default"])
    assert "no cell is complete" in protocol.report(other, results, CELLS, SEEDS)


def test_all_arms_and_cells_have_their_names() -> None:
    plan = protocol.Protocol(protocol.CELLS)
    assert len(plan.cells) == 20 and len(set(plan.arms)) == len(plan.arms)
    assert {"asha 4", "asha 16", "asha 64", "pbt", "random", "prior"} < set(plan.arms)
    tasks = list(plan.cells.values())
    assert all(a != b for i, a in enumerate(tasks) for b in tasks[:i])
