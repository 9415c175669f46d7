"""Trains a shipped config under several seeds, and says how good it is on data that was
not trained on.

    RLRNN_DATA=… python benchmarks/results.py tinyshakespeare --seeds 1 --threads 2

Runs lie in runs/results/NAME-SEED, with a number of the further options behind. One
that is finished is not made again, one that was stopped goes on; so the command may be
repeated. Each run is evaluated once. The last line is a row for benchmarks/results.md.
Further options are those of `rlrnn fit`.
"""

import argparse
import json
import statistics
import zlib
from pathlib import Path
from typing import Any

from rlrnn.cli import parse
from rlrnn.flows import evaluate, fit

EVALUATION = "evaluation.json"


def result(name: str, seed: int, more: list[str]) -> dict[str, Any]:
    """The figures of one run, and its minutes."""
    other = f"-{zlib.crc32(repr(more).encode()):08x}" if more else ""
    folder = Path("runs", "results", f"{Path(name).stem}-{seed}{other}")
    figures = folder / EVALUATION
    if figures.is_file():
        found: dict[str, Any] = json.loads(figures.read_text("utf-8"))
        return found
    given = ["--config", name, f"--seed={seed}", *more]
    where = [f"--run.folder={folder}", "--run.track=disabled"]
    config, _ = parse("fit", [*given, *where])
    if not (folder / "model.zip").is_file():
        begun = any(folder.glob("checkpoints/*"))
        fit(config, resume=folder if begun else None)
    trained = json.loads((folder / "summary.json").read_text("utf-8"))
    found = evaluate(folder, config)
    # the rate is that of the last part of a run that was stopped and went on
    found["minutes"] = trained["tokens"] / trained["time/tokens_per_second"] / 60
    figures.write_text(json.dumps(found, indent=1), "utf-8")
    return found


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of a config")
    parser.add_argument("--seeds", type=int, default=1)
    options, more = parser.parse_known_args()
    results = []
    for seed in range(options.seeds):
        results.append(result(options.name, seed, more))
        print(f"seed {seed}: {json.dumps(results[-1])}", flush=True)
    numbers = [key for key in results[0] if not key.startswith("time/")]
    parts = [f"{key} {spread([r[key] for r in results])}" for key in numbers]
    command = f"python benchmarks/results.py {options.name} --seeds {options.seeds}"
    print(f"| {options.name} | {', '.join(parts)} | `{' '.join([command, *more])}` |")


if __name__ == "__main__":
    main()
