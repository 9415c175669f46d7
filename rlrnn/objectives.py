"""What a sequence model is trained for and judged by: losses and metrics.

An objective is a small value: the width of the head, a loss, and the field's metrics.

    total(out, y, mask)   sum of the losses that are due, a scalar on the device
    tally(out, y, mask)   sums from which the metrics are made, on the device
    report(sums, due)     the metrics, from the sums over a split and its due losses

Shapes: out [T, B, outputs], y [T, B, ...], mask [T, B] (None: due everywhere). `unit`
names the loss. `logarithmic`: it is a density's logarithm, which may be negative, and
only its differences mean something.
"""

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Classes:
    """One of `count` classes: cross-entropy in nats. y [T, B] int.

    `names`: of the classes, where they have any; then the report has macro F1 too.
    """

    count: int
    names: tuple[str, ...] = ()
    unit = "nats"
    logarithmic = False

    @property
    def outputs(self) -> int:
        return self.count

    def total(self, out: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum")
        losses = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none")
        return (losses * mask.flatten()).sum()

    def tally(self, out: Tensor, y: Tensor, mask: Tensor | None) -> Sums:
        due = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
        guess = out.argmax(-1)
        sums = {"loss": self.total(out, y, mask), "right": ((guess == y) & due).sum()}
        if self.names:
            cell = (y * self.count + guess).flatten()
            weight = due.flatten().to(out.dtype)
            flat = out.new_zeros(self.count**2).index_add(0, cell, weight)
            sums["confusion"] = flat.view(self.count, self.count)
        return sums

    def report(self, sums: Sums, due: float) -> dict[str, float]:
        nats = float(sums["loss"]) / due
        figures = {
            "nats": nats,
            "bits": nats / math.log(2),
            "perplexity": math.exp(min(nats, 700.0)),
            "accuracy": float(sums["right"]) / due,
        }
        if self.names:
            figures["f1"] = macro_f1(sums["confusion"])
        return figures


def macro_f1(confusion: Tensor) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN); rows are the truth. A class
    that neither occurs nor is guessed is left out."""
    hits = confusion.diag()
    total = confusion.sum(0) + confusion.sum(1)
    seen = total > 0
    return float((2 * hits[seen] / total[seen]).mean())


@dataclass(frozen=True)
class Labels:
    """Any of `count` labels at once: the sum of their Bernoulli losses in nats, as for
    piano rolls (Boulanger-Lewandowski et al. 2012). y [T, B, count] 0 or 1."""

    count: int
    unit = "nats"
    logarithmic = False

    @property
    def outputs(self) -> int:
        return self.count

    @staticmethod
    def bias(y: Tensor) -> Tensor:
        """The outputs [count] of the least loss that does not look at inputs: the log
        odds of each label in y [N, count], as if it had been there, and not, once
        more."""
        there = y.sum(0) + 1
        return torch.log(there / (len(y) + 2 - there))

    def total(self, out: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(out, y, reduction="none").sum(-1)
        return (losses if mask is None else losses * mask).sum()

    def tally(self, out: Tensor, y: Tensor, mask: Tensor | None) -> Sums:
        due = 1.0 if mask is None else mask.unsqueeze(-1).to(y.dtype)
        guess = (out > 0).to(y.dtype)
        return {
            "loss": self.total(out, y, mask),
            "hits": (guess * y * due).sum(),
            "guessed": (guess * due).sum(),
            "true": (y * due).sum(),
        }

    def report(self, sums: Sums, due: float) -> dict[str, float]:
        both = float(sums["guessed"] + sums["true"])
        return {
            "nats": float(sums["loss"]) / due,
            "f1": 2 * float(sums["hits"]) / both if both else math.nan,
        }


ForecastLoss = Literal["mse", "mae", "quantile", "normal", "student"]


@dataclass(frozen=True)
class Numbers:
    """`count` numbers, of which some may be missing (NaN in y): a mean over those that
    are there. y [T, B, count].

    | loss     | outputs for each number                                    |
    |----------|------------------------------------------------------------|
    | mse, mae | itself                                                     |
    | quantile | its `quantiles` (pinball loss, Koenker & Bassett 1978)     |
    | normal   | mean, log scale: negative log-likelihood in nats           |
    | student  | the same of Student's t with 4 degrees of freedom          |

    Outputs are [..., count, parameters], flattened.
    """

    count: int
    loss: ForecastLoss = "mse"
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)

    @property
    def unit(self) -> str:
        return {"normal": "nats", "student": "nats", "quantile": "pinball"}.get(
            self.loss, self.loss
        )

    @property
    def logarithmic(self) -> bool:
        return self.loss in ("normal", "student")

    @property
    def parameters(self) -> int:
        """Outputs for each number."""
        if self.loss == "quantile":
            return len(self.quantiles)
        return 2 if self.loss in ("normal", "student") else 1

    @property
    def outputs(self) -> int:
        return self.count * self.parameters

    def _losses(self, out: Tensor, y: Tensor) -> Tensor:
        """[..., count]."""
        out = out.view(*out.shape[:-1], self.count, self.parameters)
        if self.loss == "mse":
            return (out[..., 0] - y).square()
        if self.loss == "mae":
            return (out[..., 0] - y).abs()
        if self.loss == "quantile":
            return pinball(out, y, self.quantiles).mean(-1)
        mean, log_scale = out.unbind(-1)
        log_scale = log_scale.clamp(-7, 7)
        error = (y - mean) * (-log_scale).exp()
        if self.loss == "normal":
            return 0.5 * error.square() + log_scale + 0.5 * math.log(2 * math.pi)
        # the density of t with 4 degrees of freedom: 3/8 (1 + e^2 / 4)^(-5/2)
        return 2.5 * torch.log1p(error.square() / 4) + log_scale - math.log(3 / 8)

    def total(self, out: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        there = ~y.isnan()
        # Missing targets are replaced before the loss: a NaN that is masked afterwards
        # would still poison the gradient.
        losses = self._losses(out, y.nan_to_num()) * there
        losses = losses.sum(-1) / there.sum(-1).clamp_min(1)
        return (losses if mask is None else losses * mask).sum()

    def point(self, out: Tensor) -> Tensor:
        """The forecast itself, [..., count]: the mean, or the median quantile."""
        out = out.view(*out.shape[:-1], self.count, self.parameters)
        if self.loss != "quantile":
            return out[..., 0]
        middle = min(range(self.parameters), key=lambda i: abs(self.quantiles[i] - 0.5))
        return out[..., middle]

    def intervals(self, out: Tensor, levels: tuple[float, ...]) -> Tensor:
        """Quantiles at `levels`, [..., count, levels]. Raises ValueError for a point
        forecast, and for levels that a quantile loss was not trained for."""
        out = out.view(*out.shape[:-1], self.count, self.parameters)
        if self.loss == "quantile":
            missing = [level for level in levels if level not in self.quantiles]
            if missing:
                raise ValueError(
                    f"quantile {missing[0]} was not trained for, expected one of "
                    f"{', '.join(map(str, self.quantiles))}"
                )
            return out[..., [self.quantiles.index(level) for level in levels]]
        if self.loss not in ("normal", "student"):
            raise ValueError(
                f"loss {self.loss} gives no intervals; train with quantile, normal or "
                "student"
            )
        at = out.new_tensor([_quantile(self.loss, level) for level in levels])
        scale = out[..., 1:].clamp(-7, 7).exp()
        return out[..., :1] + scale * at

    def tally(self, out: Tensor, y: Tensor, mask: Tensor | None) -> Sums:
        there = ~y.isnan()
        if mask is not None:
            there = there & mask.unsqueeze(-1)
        true = y.nan_to_num()
        error = (self.point(out) - true) * there
        sums = {
            "loss": self.total(out, y, mask),
            "square": error.square().sum(),
            "absolute": error.abs().sum(),
            "numbers": there.sum(),
        }
        if self.loss in ("quantile", "normal", "student"):
            ends = min(self.quantiles), max(self.quantiles)
            low, high = self.intervals(out, ends).unbind(-1)
            sums["inside"] = ((low <= true) & (true <= high) & there).sum()
        return sums

    def report(self, sums: Sums, due: float) -> dict[str, float]:
        numbers = max(1.0, float(sums["numbers"]))
        mse = float(sums["square"]) / numbers
        figures = {
            self.unit: float(sums["loss"]) / due,
            "mse": mse,  # per number, where the loss is per step
            "rmse": math.sqrt(mse),
            "mae": float(sums["absolute"]) / numbers,
        }
        if "inside" in sums:
            figures["coverage"] = float(sums["inside"]) / numbers
        return figures


def pinball(out: Tensor, y: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """max(q e, (q - 1) e), e = y - out, for out [..., Q] and y [...]; twice that, so
    that at q = 1/2 it is the absolute error."""
    q = _row(quantiles, out.dtype, out.device)
    error = y.unsqueeze(-1) - out
    return 2 * torch.maximum(q * error, (q - 1) * error)


@cache
def _row(
    numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Made once: a copy from the host would wait for the device, each time."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def _quantile(loss: str, level: float) -> float:
    """Of the standard normal, or of Student's t with 4 degrees of freedom (whose
    quantile has a closed form: Shaw 2006, "Sampling Student's t distribution")."""
    if loss == "normal":
        return NormalDist().inv_cdf(level)
    spread = math.sqrt(4 * level * (1 - level))
    size = 2 * math.sqrt(math.cos(math.acos(spread) / 3) / spread - 1)
    return math.copysign(size, level - 0.5)


@dataclass(frozen=True)
class Ctc:
    """A shorter string of `count` labels, in order but not aligned: connectionist
    temporal classification (Graves et al. 2006), in nats per label.

    y [S, B]: labels, -1 after the last. `mask` says which frames are there. Output 0 is
    the blank, output i + 1 label i.
    """

    count: int
    names: tuple[str, ...] = ()
    unit = "nats"
    logarithmic = False

    @property
    def outputs(self) -> int:
        return self.count + 1

    def total(self, out: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        frames = _lengths(out, mask)
        return F.ctc_loss(
            out.log_softmax(-1),
            (y + 1).clamp_min(0).t(),
            frames,
            (y >= 0).sum(0),
            reduction="sum",
            zero_infinity=True,  # a string longer than its frames has no path
        )

    def tally(self, out: Tensor, y: Tensor, mask: Tensor | None) -> Sums:
        wrong = sum(
            edit_distance(guess, [label for label in true if label >= 0])
            for guess, true in zip(self.decode(out, mask), y.t().tolist(), strict=True)
        )
        return {"loss": self.total(out, y, mask), "edits": torch.tensor(float(wrong))}

    def report(self, sums: Sums, due: float) -> dict[str, float]:
        return {
            "nats": float(sums["loss"]) / due,
            "label_error_rate": float(sums["edits"]) / due,
        }

    def decode(self, out: Tensor, mask: Tensor | None) -> list[list[int]]:
        """The likeliest label of each frame; repeats and blanks go."""
        best = out.argmax(-1).t().tolist()
        strings = []
        for frames, length in zip(best, _lengths(out, mask).tolist(), strict=True):
            kept = frames[:length]
            pairs = zip(kept, [0, *kept], strict=False)
            strings.append([a - 1 for a, before in pairs if a and a != before])
        return strings


def _lengths(out: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((out.shape[1],), out.shape[0], device=out.device)
    return mask.sum(0)


def edit_distance(a: list[int], b: list[int]) -> int:
    """Insertions, deletions and substitutions from `a` to `b` (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            step = min(row[j] + 1, row[j - 1] + 1, before + (left != right))
            before, row[j] = row[j], step
    return row[-1]


Objective = Classes | Labels | Numbers | Ctc
