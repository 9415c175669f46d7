"""Gate 0: what is there to win? Static settings and schedules, known in hindsight.

    python benchmarks/headroom.py                      # about 20 minutes of a core
    python benchmarks/headroom.py --tasks text copy --schedules 64

For each small task: a grid of 182 static settings (rate x K x constant or cosine), and
random schedules in four segments, in whose course rate and K move; half of them move
one knob only. Of each kind the best by probe loss are run again from fresh weights,
data order and all, and only these runs are told of: selection would flatter the winner.
What is selected and told is paired over seeds. Writes OUT/table.md and
OUT/headroom.png; finished tasks in OUT are not played again.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rlrnn import seeding
from rlrnn.baselines import Constant
from rlrnn.control import Controller, Knobs, Signals, State, make_knobs, rate_power
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.population import play_all
from rlrnn.search import grid, held_out
from rlrnn.statistics import bootstrap_interval
from rlrnn.tasks import DataConfig, Task, build_problem, build_trainer

Moves = Literal["both", "rate", "truncation"]
SEGMENTS = 4
FRESH = 5  # seeds that winners are run again under
WINNERS = 4  # of each kind
TRUNCATIONS = (4, 8, 16, 32, 64, 128)


def small(
    data: dict[str, Any], budget: float = 100_000.0, optimizer: Any = "adam"
) -> Task:
    return Task(
        DataConfig(**{"batch": 16, "size": 400_000, **data}),
        ModelConfig("lstm", 32),
        TrainingConfig(budget, optimizer),
    )


TASKS = {
    "text": small({}),
    "text, 400k tokens": small({"size": 1_000_000}, 400_000.0),
    "text, momentum": small({}, optimizer="momentum"),
    "markov, memory 24": small({"kind": "markov", "symbols": 12, "memory": 24}),
    "copy, memory 8": small({"kind": "copy", "symbols": 8, "memory": 8}, 200_000.0),
}


@dataclass(frozen=True)
class Schedule:
    """A `Controller`: log lambda is linear between knots at the ends of equal segments,
    K constant in each; lr = lambda K^p."""

    knots: tuple[float, ...]  # lambda, [SEGMENTS + 1]
    truncations: tuple[int, ...]  # [SEGMENTS]
    range_test = False

    def init(self, n: int) -> State:
        return {}

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]:
        place = (signals.progress * SEGMENTS).astype(int).clip(0, SEGMENTS - 1)
        k = np.minimum(np.array(self.truncations)[place], signals.truncation_max)
        at = np.linspace(0, 1, SEGMENTS + 1)
        begin, end = (
            np.exp(np.interp(p, at, np.log(self.knots))) * k ** rate_power(signals)
            for p in (signals.progress, signals.next_progress)
        )
        return make_knobs(begin, end, k), state


def draw(task: Task, moves: Moves, rng: np.random.Generator) -> Schedule:
    """Lambda within four decades at first, then mostly falling; K a random walk."""
    low, high = (1e-4, 0.1) if task.training.power < 1 else (1e-3, 1.0)
    first = np.exp(rng.uniform(np.log(low), np.log(high)))
    steps = rng.normal(-0.5, 1.0, SEGMENTS) if moves != "truncation" else [0] * SEGMENTS
    knots = first * np.exp(np.cumsum([0.0, *steps]))
    walk = rng.integers(-1, 2, SEGMENTS - 1) if moves != "rate" else [0] * 3
    places = np.cumsum([rng.integers(len(TRUNCATIONS)), *walk])
    k = [TRUNCATIONS[i] for i in places.clip(0, len(TRUNCATIONS) - 1)]
    return Schedule(tuple(knots.tolist()), tuple(k))


def losses(task: Task, controllers: Sequence[Controller]) -> list[tuple[float, float]]:
    """Probe and validation loss of a run under each, all from the same weights."""
    problem = build_problem(task)
    trainers = [build_trainer(task, problem=problem) for _ in controllers]
    play_all(trainers, controllers)
    return [(trainer.last_probe, held_out(trainer)) for trainer in trainers]


def study(task: Task, schedules: int) -> dict[str, Any]:
    """The winners of each kind, and their losses under fresh seeds."""
    rng = np.random.default_rng(seeding.derive(0, "headroom"))
    tried: list[Controller] = [settings.controller() for settings in grid(task)]
    kinds = {
        "static": list(range(len(tried))),
        "static, constant": [
            i for i, s in enumerate(grid(task)) if s.schedule == "constant"
        ],
    }
    shares: dict[Moves, int] = {"both": 2, "rate": 1, "truncation": 1}
    for moves, share in shares.items():
        drawn = [draw(task, moves, rng) for _ in range(schedules * share // 4)]
        kinds[moves] = list(range(len(tried), len(tried) + len(drawn)))
        tried += drawn
    probes = np.array([probe for probe, _ in losses(task, tried)])
    record: dict[str, Any] = {"kinds": {}}
    winners: list[Controller] = [Constant()]
    names = ["default"]
    for kind, places in kinds.items():
        best = np.argsort(np.nan_to_num(probes[places], nan=np.inf))[:WINNERS]
        winners += [tried[places[i]] for i in best]
        names += [kind] * len(best)
    fresh = np.array(
        [losses(replace(task, seed=1 + seed), winners) for seed in range(2 * FRESH)]
    )  # [seeds, winners, (probe, validation)]
    for kind in dict.fromkeys(names):
        own_ = [i for i, name in enumerate(names) if name == kind]
        # which of the few is taken is decided under half of the seeds, told of the rest
        chosen = own_[int(fresh[:FRESH, own_, 0].mean(0).argmin())]
        record["kinds"][kind] = {
            "valid": fresh[FRESH:, chosen, 1].tolist(),
            "what": _told(winners[chosen]),
        }
    return record


def _told(controller: Controller) -> dict[str, Any]:
    return {"type": type(controller).__name__, **asdict(controller)}  # type: ignore[call-overload]


def report(records: dict[str, Any]) -> str:
    lines = [
        f"Validation losses, mean of {FRESH} fresh seeds; gains are the geometric mean "
        "of paired ratios against the best static setting, with a 95 % bootstrap "
        "interval; where only K moves, against the best at a constant rate.",
        "",
        "| task | default | static | static, constant rate | rate and K move "
        "| only the rate | only K |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        kinds = {kind: np.array(v["valid"]) for kind, v in record["kinds"].items()}
        shown = ("default", "static", "static, constant")
        cells = [f"{kinds[kind].mean():.3f}" for kind in shown]
        for kind in ("both", "rate", "truncation"):
            rival = "static, constant" if kind == "truncation" else "static"
            falls = np.log(kinds[rival] / kinds[kind])
            low, high = bootstrap_interval(falls[:, None], lambda x: float(x.mean()))
            cells.append(
                f"{kinds[kind].mean():.3f} ({_percent(falls.mean())} "
                f"[{_percent(low)}, {_percent(high)}])"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(fall: float) -> str:
    return f"{100 * (1 - np.exp(-fall)):+.1f} %"


def plot(records: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(records), 3), layout="constrained")
    axes = figure.subplots(1, len(records), squeeze=False).ravel()
    shown = ("default", "static, constant", "static", "rate", "truncation", "both")
    for axis, (name, record) in zip(axes, records.items(), strict=True):
        values = [record["kinds"][kind]["valid"] for kind in shown]
        axis.boxplot(values, orientation="horizontal")
        axis.set_yticks(range(1, len(shown) + 1), shown, fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("validation loss (nats)", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/headroom"))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--schedules", type=int, default=512, help="per task")
    options = parser.parse_args()
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown:
        raise SystemExit(f"--tasks: no {unknown[0]!r}; expected {', '.join(TASKS)}")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "records.json"
    records = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name in options.tasks:
        mark = f"{TASKS[name]!r} {options.schedules}"
        if records.get(name, {}).get("task") != mark:
            records[name] = {"task": mark, **study(TASKS[name], options.schedules)}
            path.write_text(json.dumps(records, indent=1), "utf-8")
            print(name, flush=True)
    table = report(records)
    (options.out / "table.md").write_text(table + "\n", "utf-8")
    plot(records, options.out / "headroom.png")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
