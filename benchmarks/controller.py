"""The protocol: held-out tasks x seeds x arms, all charged the same.

    python benchmarks/controller.py --small                       # minutes
    python benchmarks/controller.py --out runs/protocol           # many hours of a core
    python benchmarks/controller.py --out runs/protocol --cells rnn sgd --name second
    python benchmarks/controller.py --out runs/protocol --report  # table and plots

Each finished run is a JSON line in OUT/NAME.jsonl and is not repeated: several of these
can share OUT, each with a NAME. Cells differ from what meta-training saw in data,
size, cell, optimiser or budget; but the shipped controller has met copying, with
shorter memories (docs/controller.md). All arms of a cell and seed begin with the same
weights and read the data in the same order.

`plain loop` is the shipped controller beside a loop of plain torch
(`rlrnn.agents.LearnedController`), which shows it the training loss and no probe;
`default` is lr 1e-3, K = 32, constant; `oracle` the settings with the lowest probe loss
of a grid of 182, found under another seed, and run under each seed; `tuned cosine` and
`tuned adaptive` the best rate and K of its cosines. `asha N` costs N budgets, `pbt` as
many as its population; `random` is a pool of runs, of which random searches of any size
are drawn. What counts is the validation loss of the run that is taken.
"""

import argparse
import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlrnn import seeding
from rlrnn.agents import LearnedController
from rlrnn.baselines import (
    Adaptive,
    Constant,
    LengthWarmup,
    Linear,
    Plateau,
    WarmupCosine,
)
from rlrnn.control import Controller
from rlrnn.data.chunks import Problem
from rlrnn.flows import make_controller
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.population import play_all
from rlrnn.search import (
    Found,
    Settings,
    asha,
    grid,
    held_out,
    pbt,
    random_search,
    search_all,
)
from rlrnn.statistics import (
    bootstrap_interval,
    equivalent_trials,
    expected_best,
    improvement_interval,
    interquartile_mean,
    normalised,
    probability_of_improvement,
    regret,
)
from rlrnn.tasks import DataConfig, Task, build_problem, build_trainer

LOOP = "plain loop"
Array = NDArray[np.float64]
Record = dict[str, Any]
SELECTION_SEED = 1_000_000  # the grid's, which no arm is scored under
BASE = Task(
    DataConfig(batch=16, size=600_000),  # the half of the library not trained on
    ModelConfig("lstm", 64),
    TrainingConfig(200_000.0),
)


def variant(
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> Task:
    return Task(
        replace(BASE.data, **data or {}),
        replace(BASE.model, **model or {}),
        replace(BASE.training, **training or {}),
    )


COPY = {"kind": "copy", "size": 300_000, "symbols": 8, "memory": 10}
MARKOV = {"kind": "markov", "size": 300_000, "symbols": 12, "memory": 30}
SHAKESPEARE = {"path": "$RLRNN_DATA/tinyshakespeare/input.txt", "size": None}
CELLS = {
    # one thing that meta-training has not seen
    "text": BASE,
    "shakespeare": variant(SHAKESPEARE),
    "copy": variant(COPY),
    "long markov": variant(MARKOV),
    "64 streams": variant({"batch": 64}, None, {"budget": 400_000.0}),
    "8 streams": variant({"batch": 8}),
    "lstm 16": variant(None, {"hidden_size": 16}),
    "lstm 256": variant(None, {"hidden_size": 256}),
    "2 layers": variant(None, {"layers": 2}),
    "rnn": variant(None, {"cell": "rnn"}),
    "mingru": variant(None, {"cell": "mingru"}),
    "sgd": variant(None, None, {"optimizer": "sgd"}),
    "adamw": variant(None, None, {"optimizer": "adamw", "weight_decay": 0.1}),
    "2M tokens": variant({"size": None}, None, {"budget": 2_000_000.0}),
    "30k tokens": variant(None, None, {"budget": 30_000.0}),
    # several at once
    "copy, rnn": variant(COPY, {"cell": "rnn"}),
    "markov, 2 layers, sgd": variant(MARKOV, {"layers": 2}, {"optimizer": "sgd"}),
    "shakespeare, lstm 256": variant(SHAKESPEARE, {"hidden_size": 256}),
    "shakespeare, gru 256, adamw": variant(
        SHAKESPEARE, {"cell": "gru", "hidden_size": 256}, {"optimizer": "adamw"}
    ),
    "shakespeare, 2M tokens": variant(SHAKESPEARE, None, {"budget": 2_000_000.0}),
}
TINY = {"size": 6000, "symbols": 6, "memory": 4, "batch": 4}
SMALL_CELLS = {
    name: variant({**TINY, "kind": kind}, {"hidden_size": 8, "cell": cell}, SHORT)
    for SHORT in [{"budget": 20_000.0, "decisions": 12}]
    for name, kind, cell in [("markov", "markov", "gru"), ("copy", "copy", "lstm")]
}


@dataclass(frozen=True)
class Protocol:
    """What is played, and how large."""

    cells: dict[str, Task]
    random: int = 64
    asha: tuple[int, ...] = (4, 16, 64)
    population: int = 8
    every: int = 1  # of the grid's settings
    learned: dict[str, str] = field(default_factory=lambda: {"learned": "learned"})

    @property
    def arms(self) -> list[str]:
        """Those that depend on the grid come behind it."""
        return [
            "default",
            "grid",
            "oracle",
            *self.learned,
            LOOP,
            *FREE,
            *TUNED,
            *self.searches,
        ]

    @property
    def searches(self) -> list[str]:
        return [*(f"asha {cost}" for cost in self.asha), "pbt", "random"]


SMALL = Protocol(SMALL_CELLS, random=8, asha=(4,), population=4, every=9)

# Rivals that nobody has to tune: the task as they take it, and their controller.
Rival = Callable[[Task], tuple[Task, Controller]]


def trained_by(task: Task, **training: Any) -> Task:
    return replace(task, training=replace(task.training, **training))


FREE: dict[str, Rival] = {
    "prior": lambda task: (task, make_controller("prior")),
    "range test + linear": lambda task: (task, Linear()),
    "cosine": lambda task: (task, WarmupCosine()),
    "plateau": lambda task: (task, Plateau()),
    "length warm-up": lambda task: (task, LengthWarmup()),
    "schedule-free": lambda task: (
        trained_by(task, optimizer="schedulefree"),
        Constant(2.5e-3, warmup=0.05),  # the rate of its authors' package
    ),
    "prodigy": lambda task: (
        trained_by(task, optimizer="prodigy", layer_decay=1.0),
        WarmupCosine(1.0, warmup=0.0),
    ),
}
TUNED: dict[str, Callable[[Task, Settings], tuple[Task, Controller]]] = {
    "tuned cosine": lambda task, best: (task, best.controller()),
    "tuned adaptive": lambda task, best: (
        trained_by(task, decay_probe=True),
        Adaptive(best.lr, best.truncation),
    ),
}


# --- playing --------------------------------------------------------------------------


def steered(entries: Sequence[tuple[Task, Controller]]) -> list[Record]:
    """Runs of these tasks, side by side, and their probe losses on the way."""
    problems: dict[str, Problem] = {}
    trainers = []
    for task, _ in entries:
        key = repr((task.data, task.seed))
        if key not in problems:
            problems[key] = build_problem(task)
        trainers.append(build_trainer(task, problem=problems[key]))
    told = play_all(trainers, [controller for _, controller in entries])
    records = []
    for trainer, signals in zip(trainers, told, strict=True):
        start = trainer.origin / trainer.budget
        curve = [
            (start + (1 - start) * float(s.progress[0]), float(s.probe_loss[0]))
            for s in signals
        ]
        records.append(
            {
                "valid_loss": held_out(trainer),
                "probe_loss": trainer.last_probe,
                "cost": trainer.spent / trainer.budget,
                "failed": bool(signals[-1].failed[0]),
                "recoveries": round(-float(np.log2(trainer.lr_scale))),
                "curve": curve,
                "truncations": [int(s.truncation[0]) for s in signals[1:]],
            }
        )
    return records


def looped(task: Task) -> Record:
    """A run in a loop of one's own, as docs/controller.md has it."""
    trainer = build_trainer(task)
    model, objective, source = trainer.model, trainer.problem.objective, trainer.source
    optimizer, weights = trainer.optimizer, list(trainer.model.parameters())
    controller = LearnedController.shipped(optimizer, task.training.budget)
    knobs, t = controller.knobs, 0
    state = model.initial_state(source.batch)
    while not controller.done:
        chunk = source.window(t, knobs.truncation)
        t += knobs.truncation
        out, state = model(chunk.x, state.detach(), chunk.starts)
        loss = objective.total(out, chunk.y, chunk.mask) / chunk.scale
        if chunk.due:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, task.training.clip)
            optimizer.step()
        told = loss / (chunk.due or 1.0)
        knobs = controller.step(told, knobs.truncation * source.batch)
        if knobs.restored:
            state = model.initial_state(source.batch)
    return {"valid_loss": held_out(trainer), "cost": 1.0}


def searched(found: Found, runs: bool = False) -> Record:
    record = {
        "valid_loss": found.best.valid_loss,
        "probe_loss": found.best.probe_loss,
        "cost": found.cost,
        "settings": dataclasses.asdict(found.best.settings),
    }
    if runs:
        losses = [(run.probe_loss, run.valid_loss) for run in found.runs]
        record["runs"] = losses
    return record


def gridded(task: Task, every: int) -> Record:
    found = search_all(task, grid(task)[::every])
    cosines = [run for run in found.runs if run.settings.schedule == "cosine"]
    best = min(cosines, key=lambda run: run.probe_loss)
    return searched(found) | {"cosine": dataclasses.asdict(best.settings)}


def entry(
    protocol: Protocol, arm: str, task: Task, selected: Record
) -> tuple[Task, Controller] | None:
    """The run of an arm that is one of a trainer; `selected`: what the grid found."""
    if arm == "default":
        return task, Constant()
    if arm == "oracle":
        return task, Settings(**selected["settings"]).controller()
    if arm in protocol.learned:
        return task, make_controller(protocol.learned[arm])
    if arm in FREE:
        return FREE[arm](task)
    if arm in TUNED:
        return TUNED[arm](task, Settings(**selected["cosine"]))
    return None


def search(protocol: Protocol, arm: str, task: Task) -> Record:
    """An arm that is a search, or a loop of its own."""
    if arm == LOOP:
        return looped(task)
    rng = np.random.default_rng(seeding.derive(task.seed, "search", arm))
    if arm == "grid":
        return gridded(task, protocol.every)
    if arm == "pbt":
        return searched(pbt(task, rng, protocol.population))
    if arm == "random":
        return searched(random_search(task, protocol.random, rng), runs=True)
    return searched(asha(task, float(arm.removeprefix("asha ")), rng))


def digest(protocol: Protocol, arm: str, task: Task) -> int:
    """Changes with what is played."""
    size = {"grid": protocol.every, "random": protocol.random}.get(arm)
    size = protocol.population if arm == "pbt" else size
    return zlib.crc32(repr((task, arm, size, protocol.learned.get(arm))).encode())


class Results:
    """Finished runs by cell, seed and arm, in the JSON lines of a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / f"{name}.jsonl"
        self.records: dict[tuple[str, int, str], Record] = {}
        for path in sorted(folder.glob("*.jsonl")):
            lines = path.read_text("utf-8").split("\n")
            for line in lines[:-1]:  # behind the last newline: nothing, or a torn line
                record = json.loads(line)
                key = record["cell"], record["seed"], record["arm"]
                self.records[key] = record
            if path == self.path and lines[-1]:
                path.write_text("".join(f"{line}\n" for line in lines[:-1]), "utf-8")

    def add(self, record: Record) -> None:
        self.records[record["cell"], record["seed"], record["arm"]] = record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def get(self, cell: str, seed: int, arm: str) -> Record | None:
        return self.records.get((cell, seed, arm))


def run(
    protocol: Protocol,
    results: Results,
    cells: Iterable[str],
    seeds: Iterable[int],
    arms: Iterable[str],
) -> None:
    """Plays what is not there yet."""
    seeds, arms = list(seeds), list(arms)
    last = protocol.searches
    single = [arm for arm in protocol.arms if arm not in ("grid", *last)]
    for cell in cells:
        for group in (["grid"], single, last):  # a group's single runs side by side
            these = [arm for arm in group if arm in arms]
            missing = _missing(protocol, results, cell, seeds, these)
            selected = results.get(cell, SELECTION_SEED, "grid")
            if selected is None and any(a in ("oracle", *TUNED) for a, _, _ in missing):
                raise SystemExit(
                    f"oracle and tuned arms on {cell} need the arm grid: add it to "
                    "--arms"
                )
            entries = [
                entry(protocol, arm, task, selected or {}) for arm, task, _ in missing
            ]
            runs = [each for each in entries if each is not None]
            records = iter(steered(runs) if runs else [])
            for each, (arm, task, mark) in zip(entries, missing, strict=True):
                record = search(protocol, arm, task) if each is None else next(records)
                key = {"cell": cell, "seed": task.seed, "arm": arm, "digest": mark}
                results.add(key | record)
                loss = record["valid_loss"]
                print(f"{cell}, seed {task.seed}, {arm}: {loss:.4f}", flush=True)


def _missing(
    protocol: Protocol,
    results: Results,
    cell: str,
    seeds: Iterable[int],
    arms: Iterable[str],
) -> list[tuple[str, Task, int]]:
    """What has not been played: the arm, its task, and the digest of both."""
    missing = []
    for arm in arms:
        for seed in [SELECTION_SEED] if arm == "grid" else seeds:
            task = replace(protocol.cells[cell], seed=seed)
            mark = digest(protocol, arm, task)
            old = results.get(cell, seed, arm)
            if old is None:
                missing.append((arm, task, mark))
            elif old["digest"] != mark:
                raise SystemExit(
                    f"{results.folder} has {arm} on {cell} of other sizes, "
                    "expected this protocol's: choose another --out"
                )
    return missing


# --- judging --------------------------------------------------------------------------


def losses_of(
    results: Results, arm: str, cells: list[str], seeds: list[int]
) -> Array | None:
    """Validation losses [seeds, cells]; None if one is missing."""
    found = [[results.get(cell, seed, arm) for cell in cells] for seed in seeds]
    if any(record is None for row in found for record in row):
        return None
    return np.array([[r["valid_loss"] for r in row if r] for row in found])


def report(
    protocol: Protocol, results: Results, cells: list[str], seeds: list[int]
) -> str:
    """The table, over the cells that are complete for `default` and `oracle` and in
    which there is something to win."""
    kept = [cell for cell in cells if _room(results, cell, seeds) > 0]
    if not kept:
        return "no cell is complete for default and oracle yet"
    left = [cell for cell in cells if cell not in kept]
    default, best = (_losses(results, arm, kept, seeds) for arm in ANCHORS)
    main = next(iter(protocol.learned))
    scores = {
        arm: normalised(losses, default, best)
        for arm in protocol.arms
        if (losses := losses_of(results, arm, kept, seeds)) is not None
    }
    lines = [
        f"{len(kept)} cells x {len(seeds)} seeds"
        + (f"; left out: {', '.join(left)}" if left else ""),
        "",
        f"| arm | cost | score, IQM [95 %] | P({main} better) [95 %] | median above "
        "the oracle | worth of random trials | cost to tuned cosine | failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, these in scores.items():
        records = [_record(results, c, s, arm) for s in seeds for c in kept]
        low, high = bootstrap_interval(these)
        above = np.median(regret(_losses(results, arm, kept, seeds), best))
        failed = sum(record.get("failed", False) for record in records)
        better = "-"
        if main in scores and arm != main:
            chance = probability_of_improvement(scores[main], these)
            least, most = improvement_interval(scores[main], these)
            better = f"{chance:.2f} [{least:.2f}, {most:.2f}]"
        row = [
            arm,
            f"{np.median([record['cost'] for record in records]):.3g}",
            f"{interquartile_mean(these):.3f} [{low:.3f}, {high:.3f}]",
            better,
            f"{100 * above:.2f} %",
            _worth(results, arm, kept, seeds),
            _cost_to_target(results, arm, kept, seeds),
            f"{failed} of {len(records)}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, *_random_lines(protocol, results, kept, seeds)])


ANCHORS = ("default", "oracle")


def _room(results: Results, cell: str, seeds: list[int]) -> float:
    """How far the default lies above the oracle; 0 if one is not there."""
    default, best = (losses_of(results, arm, [cell], seeds) for arm in ANCHORS)
    return 0.0 if default is None or best is None else float((default - best).mean())


def _losses(results: Results, arm: str, cells: list[str], seeds: list[int]) -> Array:
    losses = losses_of(results, arm, cells, seeds)
    assert losses is not None
    return losses


def _record(results: Results, cell: str, seed: int, arm: str) -> Record:
    record = results.get(cell, seed, arm)
    assert record is not None
    return record


def _pools(
    results: Results, cells: list[str], seeds: list[int]
) -> list[tuple[str, int, Array, Array]]:
    """Probe and validation losses of the random runs, where they have been made."""
    found = []
    for cell in cells:
        for seed in seeds:
            record = results.get(cell, seed, "random")
            if record is not None:
                probe, valid = np.array(record["runs"]).T
                found.append((cell, seed, probe, valid))
    return found


def _worth(results: Results, arm: str, cells: list[str], seeds: list[int]) -> str:
    """Random-search trials that one run of the arm is worth: the median."""
    worth = [
        equivalent_trials(_record(results, c, s, arm)["valid_loss"], probe, valid)
        for c, s, probe, valid in _pools(results, cells, seeds)
    ]
    return f"{np.median(worth):.1f}" if worth and arm != "random" else "-"


def _cost_to_target(
    results: Results, arm: str, cells: list[str], seeds: list[int]
) -> str:
    """Budgets until the probe loss is that with which tuned cosine ends: the median,
    infinite where it never is."""
    costs = []
    for cell in cells:
        for seed in seeds:
            target = results.get(cell, seed, "tuned cosine")
            curve = _record(results, cell, seed, arm).get("curve")
            if target is None or curve is None:
                return "-"
            there = [cost for cost, loss in curve if loss <= target["probe_loss"]]
            costs.append(there[0] if there else np.inf)
    return f"{np.median(costs):.2f}"


def _random_lines(
    protocol: Protocol, results: Results, cells: list[str], seeds: list[int]
) -> list[str]:
    """Random search of several sizes: expected losses above the oracle's."""
    pools = _pools(results, cells, seeds)
    if not pools:
        return []
    lines = ["", "| random search of | median above the oracle |", "|---|---|"]
    for n in (1, 4, 16, 64):
        if n <= protocol.random:
            above = []
            for cell, seed, probe, valid in pools:
                best = _record(results, cell, seed, "oracle")["valid_loss"]
                above.append(float(expected_best(probe, valid)[n - 1]) / best - 1)
            lines.append(f"| {n} | {100 * np.median(above):.2f} % |")
    return lines


def plot(
    protocol: Protocol, results: Results, cells: list[str], seeds: list[int]
) -> Path:
    """Probe losses over the budget, a panel per cell: the median over seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    shown = ["default", "oracle", *protocol.learned, *FREE, *TUNED]
    for axis, cell in zip(axes, cells, strict=False):
        for color, arm in enumerate(shown):
            found = [results.get(cell, seed, arm) for seed in seeds]
            curves = [np.array(record["curve"]) for record in found if record]
            if curves and len({len(curve) for curve in curves}) == 1:
                cost, loss = np.median(curves, 0).T
                mine = arm in protocol.learned
                look = ("black", 2) if mine else (colormaps["tab20"](color), 1)
                axis.plot(cost, loss, label=arm, color=look[0], lw=look[1])
        axis.set_title(cell, fontsize=9)
        axis.set(xlabel="share of the budget", ylabel="probe loss")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in axes[len(cells) :]:
        axis.axis("off")
    axes[0].legend(fontsize=6)
    path = results.folder / "losses.png"
    figure.savefig(path, dpi=90)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: runs/protocol[-small]")
    parser.add_argument("--name", default="runs", help="of this process's lines")
    parser.add_argument("--small", action="store_true", help="two small cells")
    parser.add_argument("--report", action="store_true", help="play nothing")
    parser.add_argument("--cells", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--arms", nargs="*")
    parser.add_argument(
        "--learned",
        nargs="*",
        metavar="NAME=FILE",
        help="controllers; the first is compared with the others; default: the shipped",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    protocol = SMALL if options.small else Protocol(CELLS)
    if options.learned:
        files = dict(entry.split("=", 1) for entry in options.learned)
        protocol = replace(protocol, learned=files)
    seeds = options.seeds or list(range(2 if options.small else 5))
    cells = _chosen("cells", options.cells, list(protocol.cells))
    arms = _chosen("arms", options.arms, protocol.arms)
    folder = options.out or Path(f"runs/protocol{'-small' * options.small}")
    results = Results(folder, options.name)
    if not options.report:
        run(protocol, results, cells, seeds, arms)
    table = report(protocol, results, cells, seeds)
    (folder / "table.md").write_text(table + "\n", "utf-8")
    print(f"\n{table}\n\ncurves: {plot(protocol, results, cells, seeds)}")


def _chosen(option: str, given: list[str] | None, known: list[str]) -> list[str]:
    unknown = [name for name in given or [] if name not in known]
    if unknown:
        raise SystemExit(f"--{option}: no {unknown[0]!r}; expected {', '.join(known)}")
    return given or known


if __name__ == "__main__":
    main()
