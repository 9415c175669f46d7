"""The model card of a controller: how it was made, what it is good for and what not."""

from collections.abc import Mapping
from typing import Any

from rlrnn.control import Codec

Card = Mapping[str, Any]


def card_text(card: Card) -> str:
    """Markdown, from the card that a controller's file carries."""
    parts = (
        "# Model card: a learned controller\n",
        "It watches one training run of a recurrent network and sets the learning rate "
        f"and the truncation length K at {card['tasks']['decisions']} decision points. "
        f"{_base(card)}\n",
        "## How it was made\n",
        _made(card),
        "## What it was trained on\n",
        "Drawn at random for each training run:\n",
        _table(["", "of"], [[k, _words(v)] for k, v in card["tasks"].items()]),
        "## How good it is\n",
        _scores(card),
        "## When not to use it\n",
        _limits(card),
    )
    return "\n".join(parts)


def _base(card: Card) -> str:
    codec = Codec(ablation=card["ablation"])
    if not codec.range_test:
        return f"Its moves are on a constant default rate and K = {codec.truncation}."
    return (
        "Its moves are on top of the prior: a range test, then a warm-up and a cosine "
        f"at K = {codec.truncation}."
    )


def _made(card: Card) -> str:
    rows = [
        ["command", f"`{card['command']}`"],
        ["algorithm", str(card["algorithm"])],
        ["seed", str(card["seed"])],
        [
            "training runs",
            f"{card['episodes']}; the best policy on validation tasks was that after "
            f"{card['episodes_of_best']}",
        ],
        [
            "hours",
            f"{card['time/hours']} of training, {card['time/validation_hours']} of "
            "validation",
        ],
        ["without", str(card["ablation"])],
        ["versions", f"rlrnn {card['rlrnn']}, torch {card['torch']}"],
    ]
    return _table(["", ""], [row for row in rows if row != ["without", "none"]])


def _scores(card: Card) -> str:
    if "families" not in card:
        return "It has not been compared with the prior.\n"
    whole = {
        name.removeprefix("eval_"): value
        for name, value in card.items()
        if name.startswith("eval_")
    }
    rows = [
        [name, str(scores["tasks"]), *_gain(scores)]
        for name, scores in [*card["families"].items(), ("all", whole)]
    ]
    heading = ["family", "tasks", "loss below the prior's", "95 % interval", "lower in"]
    return (
        "Validation losses at the end of fresh tasks of the same distribution, which "
        "neither learning nor the choice of the policy has seen; geometric means. The "
        "interval is a bootstrap over tasks, for one seed of the meta-training.\n\n"
        + _table(heading, rows)
    )


def _gain(scores: Card) -> list[str]:
    interval = "too few tasks"
    if "loss_below_prior_low" in scores:
        ends = (scores[f"loss_below_prior_{end}"] for end in ("low", "high"))
        interval = " to ".join(f"{100 * end:.1f}" for end in ends) + " %"
    share = f"{100 * scores['share_below_prior']:.0f} %"
    return [f"{100 * scores['loss_below_prior']:.1f} %", interval, share]


def _limits(card: Card) -> str:
    worse = [
        name
        for name, scores in card.get("families", {}).items()
        if scores["loss_below_prior"] <= 0
    ]
    lines = [
        "- Outside the ranges above: other kinds of data, cells, sizes, optimisers, "
        "numbers of streams or layers, budgets, numbers of decisions. What it does "
        "there has not been measured here.",
        "- Where seconds count and not tokens: it was rewarded per token, and short "
        "truncations cost more seconds per token.",
    ]
    if worse:
        lines.append(f"- Where it was no better than the prior: {', '.join(worse)}.")
    lines.append("- `--controller prior` is the safe choice: the same without moves.")
    return "\n".join(lines) + "\n"


def _words(value: Any) -> str:
    """Values once each, and ends as ends."""
    if isinstance(value, tuple):
        return " to ".join(f"{end:,.10g}" for end in value)
    if isinstance(value, list):
        return ", ".join(dict.fromkeys(map(str, value)))
    return str(value)


def _table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
