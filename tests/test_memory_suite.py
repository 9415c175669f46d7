"""The runner of the memory suite: nothing runs twice, and the table is of what is."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "memory_suite.py"
SPEC = importlib.util.spec_from_file_location("memory_suite", PATH)
assert SPEC is not None and SPEC.loader is not None
memory_suite: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(memory_suite)

ID = "rlrnn/CopyEasy-v0"


class Pool:
    """In the place of a pool of processes: what would be run."""

    due: list[Any] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Pool.due = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, run: Any, job: Any, folder: Path, device: str) -> None:
        Pool.due.append(job)
        result = {"mmer": 0.125 * job.seed, "last": 0.0, "seconds": 1.0, "curve": []}
        memory_suite.write(folder / job.file, result)


def test_the_suite_is_resumed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory_suite, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(memory_suite, "as_completed", lambda futures: [])

    def go(*arguments: str) -> str:
        argv = ["memory_suite.py", "--ids", "CopyEasy", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*argv, "--steps", "1000", *arguments])
        memory_suite.main()
        return capsys.readouterr().out

    out = go("--cells", "gru", "none", "--seeds", "1", "2")
    assert "4 runs, 0 of them done before" in out and len(Pool.due) == 4
    assert "0.188 ± 0.062 (2) | 0.188 ± 0.062 (2) | 1 |" in out
    (tmp_path / memory_suite.Job(ID, "gru", 2, 1000).file).unlink()
    out = go("--cells", "gru", "none", "--seeds", "1", "2")
    assert "4 runs, 3 of them done before" in out
    assert Pool.due == [memory_suite.Job(ID, "gru", 2, 1000)]
    # of another length, and of another cell: not the same runs
    one = "--seeds", "1"
    assert "1 runs, 0 of them" in go("--cells", "gru", *one, "--steps", "500")
    assert "1 runs, 0 of them" in go("--cells", "lstm", *one)
    assert (tmp_path / "memory_suite.png").exists()
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(SystemExit):
        go("--ids", "Nothing")


def test_a_run_and_its_bests(tmp_path: Path) -> None:
    bests = memory_suite.suite(["Easy"])
    assert len(bests) == 21 and bests["rlrnn/TMazeEasy-v0"] == 4
    assert bests["rlrnn/BattleshipEasy-v0"] == 1  # not known
    job = memory_suite.Job(ID, "none", 0, 2048)
    told, result = memory_suite.run(job, tmp_path, "cpu")
    assert told == job and json.loads((tmp_path / job.file).read_text()) == {
        **result,
        "curve": [list(row) for row in result["curve"]],
    }
    assert result["mmer"] == max(mean for _, mean in result["curve"])
    assert -1 <= result["mmer"] <= 1
    assert memory_suite.by_chance(ID, tmp_path) == pytest.approx(-0.75, abs=0.05)
