"""What a controller did with a run, and what it saw: a table and a picture, from the
rows of `metrics.jsonl`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlrnn import plots
from rlrnn.running import run_config
from rlrnn.tracking import NotARunError, read_metrics

Row = Mapping[str, Any]


def explain(folder: str | Path) -> Path:
    """Prints each decision of a run of `rlrnn fit`, finished or not, and writes
    `explain.png` into its folder. Raises NotARunError for another folder."""
    folder = Path(folder)
    job, config = run_config(folder)
    if job != "fit":
        raise NotARunError(
            f"{folder} was made by `rlrnn {job}`, which has no controller's decisions; "
            "expected a run of `rlrnn fit`"
        )
    rows = [row for row in read_metrics(folder) if "decision" in row]
    if not rows:
        raise NotARunError(
            f"{folder} has no decisions yet: expected a run that has begun; go on with "
            f"--resume {folder}"
        )
    table = _table(rows)
    # A cut cell says nothing: where there is less room, the terminal breaks the lines.
    needed = Console(width=1000).measure(table).maximum
    console = Console(width=max(Console().width, needed))
    console.print(table)
    print(f"{config['controller']}: {_in_short(rows)}")
    return plots.plot_decisions(rows, folder / "explain.png", config["controller"])


def _table(rows: Sequence[Row]) -> Table:
    """A line per decision: what was done, and what came of it."""
    table = Table(box=None, pad_edge=False)
    heads = "decision", "spent", "loss", "probe", "rate", "K"
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("action", no_wrap=True)
    for head in ("carried", "decay", "reward"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        table.add_row(
            str(row["decision"]),
            f"{100 * row['decision/progress']:.0f} %",
            _number(row, "fit/train_loss", ".4f"),
            _number(row, "fit/probe_loss", ".4f"),
            _number(row, "decision/lr", ".2g"),
            "" if before is None else _number(row, "decision/truncation", ".0f"),
            "start" if before is None else action_in_words(row, before),
            _number(row, "decision/carried_grad", ".2g"),
            _number(row, "decision/grad_decay", ".3f"),
            _number(row, "decision/reward", "+.4f"),
            "rolled back" if row["decision/recovered"] else "",
        )
    return table


def _number(row: Row, key: str, form: str) -> str:
    """Nothing for what was not measured."""
    value = float(row.get(key, math.nan))
    return "" if math.isnan(value) else format(value, form)


def action_in_words(row: Row, before: Row) -> str:
    """What a decision did: a player's moves on its prior, or, of other controllers, how
    the knobs differ from those before."""
    if row.get("decision/fallback"):
        return "left to the prior"
    if "decision/rate_factor" in row:
        moves = [
            f"{name} {_times(row[key])}"
            for name, key in (
                ("rate", "decision/rate_factor"),
                ("K", "decision/truncation_factor"),
            )
            if abs(row[key] - 1) > 1e-6
        ]
        return ", ".join(moves) or "as the prior"
    rate, previous = row["decision/lr"], before["decision/lr"]
    move = "rate stays"
    if before["decision"] == 0:
        move = f"rate {rate:.2g}"
    elif abs(rate - previous) > 1e-6 * previous:
        move = "rate rises" if rate > previous else "rate falls"
    k, was = row["decision/truncation"], before["decision/truncation"]
    return move if k == was or before["decision"] == 0 else f"{move}, K from {was:.0f}"


def _times(factor: float) -> str:
    return f"×{factor:.3g}" if factor > 1 else f"÷{1 / factor:.3g}"


def _in_short(rows: Sequence[Row]) -> str:
    """The run in one line."""
    first, last = rows[0], rows[-1]
    told = [f"{last['decision']} decisions, {last['tokens']:,.0f} tokens"]
    if last["decision"]:
        ends = f"{first['fit/probe_loss']:.4g} to {last['fit/probe_loss']:.4g}"
        told.append(f"probe loss {ends}")
    back = sum(row["decision/recovered"] > 0 for row in rows)
    if back:
        told.append(f"{back} rolled back")
    left = left_to_prior(rows)
    return ", ".join(told) + (f"\n{left}" if left else "")


def left_to_prior(rows: Sequence[Row]) -> str:
    """How often a controller left a decision to the prior, and why; nothing if it never
    did."""
    left = [row["decision/outside"] for row in rows if row.get("decision/fallback")]
    if not left:
        return ""
    names = dict.fromkeys(name for names in left for name in names.split("; "))
    return (
        f"the controller left {len(left)} of {rows[-1]['decision']} decisions to the "
        f"prior: {'; '.join(names)} outside what it was trained on"
    )
