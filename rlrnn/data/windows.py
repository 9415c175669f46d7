"""Windows of time series, gathered on the device when they are read.

A window is `lookback` times of a series and the `horizon` times after them; its input
is a sequence of L = lookback / patch steps, each a segment of `patch` times (SegRNN:
Lin et al. 2023). The sequences lie end to end in B streams, all in phase.

Shapes: N times of all series after each other, V variables of a series, W windows,
G static rows, K steps, B streams.
"""

import zlib
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from rlrnn import seeding
from rlrnn.data.chunks import Chunk


@dataclass(frozen=True)
class Panel:
    """All series as numbers, scaled. Gaps in `values` have the value before them,
    those in `targets` are NaN. With separate channels the variables lie after each
    other, [V N, 1], and the covariates of row r are those of row r % N."""

    values: Float[Tensor, "R V"]
    targets: Float[Tensor, "R V"]
    missing: Float[Tensor, "R M"]  # 1 where there is a gap; M is V, or 0 for no gaps
    past: Float[Tensor, "N P"]
    future: Float[Tensor, "N F"]  # known in advance
    static: Float[Tensor, "G C"]

    def to(self, device: torch.device) -> "Panel":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return Panel(**moved)


@dataclass(frozen=True)
class Shape:
    """Times that a window reads, forecasts, and has in a segment; what its values are
    relative to; whether a forecast is due after each segment."""

    lookback: int
    horizon: int
    patch: int
    subtract: str = "none"  # none, last, mean
    every: bool = False

    @property
    def steps(self) -> int:
        return self.lookback // self.patch

    def width(self, panel: Panel) -> int:
        """Of a step's features."""
        variables, gaps = panel.values.shape[1], panel.missing.shape[1]
        past, future = panel.past.shape[1], panel.future.shape[1]
        segment = self.patch * (variables + gaps + past + future)
        return segment + self.horizon * future + panel.static.shape[1]


class Windows:
    """The windows that begin at rows `begins` of `panel`: a `Source`.

    x [K, B, D] is the segment's values, gaps and covariates, the horizon's known
    covariates and the static ones, in this order, times before variables. y [K, B,
    horizon V] is due at the last step of a window, or, with `shape.every`, at all.

    Args:
        rows: of `static`, for each window.
        seed: windows come in another order in each pass, a function of this and the
            pass, and those that do not fill the streams wait for another one. None: all
            in the order given.
    """

    whole = False

    def __init__(
        self,
        panel: Panel,
        begins: Int[Tensor, "W"],
        rows: Int[Tensor, "W"],
        shape: Shape,
        batch: int,
        seed: int | None = None,
    ) -> None:
        count = len(begins)
        assert count, "there is a window"
        self.panel, self.begins, self.rows = panel, begins, rows
        self.shape, self.seed = shape, seed
        self.batch = min(batch, count)
        self.places = count // self.batch if seed is not None else -(-count // batch)
        self.length = self.places * shape.steps
        self._there = self._with_targets()
        self.density = 1.0 if shape.every else 1 / shape.steps
        if self._there is not None:
            self.density *= float(self._there.mean())
        device = begins.device
        self._segment = torch.arange(shape.patch, device=device)
        self._horizon = torch.arange(shape.horizon, device=device)
        self.anchors = self._anchors()  # [W, V]
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self.begins)

    def to(self, device: torch.device) -> "Windows":
        panel, begins = self.panel.to(device), self.begins.to(device)
        rows = self.rows.to(device)
        return Windows(panel, begins, rows, self.shape, self.batch, self.seed)

    def fingerprint(self) -> int:
        crc = zlib.crc32(self.panel.values.cpu().numpy().tobytes())
        return zlib.crc32(self.begins.cpu().numpy().tobytes(), crc)

    def span(self, t: int, truncation: int) -> int:
        """Windows in order are read whole, so that a loss is due in each span."""
        if self.seed is not None:
            return truncation
        return -(-truncation // self.shape.steps) * self.shape.steps

    def typical(self, truncation: int) -> float:
        return float(truncation)

    def _anchors(self) -> Float[Tensor, "W V"]:
        """What the values of each window are relative to: known at its last step."""
        values, lookback = self.panel.values, self.shape.lookback
        if self.shape.subtract == "last":
            return values[self.begins + lookback - 1]
        if self.shape.subtract == "mean":
            sums = values.double().cumsum(0)
            sums = torch.cat((torch.zeros_like(sums[:1]), sums))
            total = sums[self.begins + lookback] - sums[self.begins]
            return (total / lookback).to(values.dtype)
        return values.new_zeros(len(self.begins), values.shape[1])

    def _with_targets(self) -> NDArray[np.bool_] | None:
        """Whether any target follows the steps of each window at which a forecast is
        due, [W, L] or [W, 1]; None: everywhere, or, where all is to come, nowhere."""
        shape = self.shape
        known = (~self.panel.targets.isnan()).any(1).cpu().numpy()
        counts = np.concatenate(([0], np.cumsum(known)))
        steps = np.arange(1 if shape.every else shape.steps, shape.steps + 1)
        at = self.begins.cpu().numpy()[:, None] + steps * shape.patch
        there: NDArray[np.bool_] = counts[at + shape.horizon] > counts[at]
        return there if there.any() and not there.all() else None

    def _order(self, lap: int) -> NDArray[np.int64]:
        """[places, B], on the host: the window at each place of the streams; past the
        last one, that one."""
        key = 0 if self.seed is None else lap
        if key not in self._orders:
            room = self.places * self.batch
            if self.seed is None:
                order = np.arange(room).clip(max=len(self) - 1)
            else:
                rng = np.random.default_rng(seeding.derive(self.seed, "pass", lap))
                order = rng.permutation(len(self))[:room]
            self._orders = {key: order.reshape(self.places, self.batch)}
        return self._orders[key]

    def window(self, t: int, steps: int) -> Chunk:
        length = self.shape.steps
        at = np.arange(t, t + steps)
        first, last = t // length, (t + steps - 1) // length
        laps = [divmod(number, self.places) for number in range(first, last + 1)]
        rows = np.stack([self._order(lap)[place] for lap, place in laps])
        chosen, phase = rows[at // length - first], at % length  # [K, B], [K]
        device = self.begins.device
        window = torch.from_numpy(chosen).to(device)
        x = self._inputs(window, torch.from_numpy(phase).to(device))
        ends = (
            np.arange(steps)
            if self.shape.every
            else np.flatnonzero(phase == length - 1)
        )
        y = self._due(window, phase, ends)
        due, mask = self._mask(ends, at // length, chosen, phase)
        starts = None
        if (phase == 0).any():
            begin = torch.from_numpy(phase == 0).to(device)
            starts = begin[:, None].expand(-1, self.batch).contiguous()
        scale = steps * self.batch * self.density
        return Chunk(x, y, starts, mask, scale, due / scale)

    def _inputs(
        self, window: Int[Tensor, "K B"], phase: Int[Tensor, "K"]
    ) -> Float[Tensor, "K B D"]:
        panel, patch = self.panel, self.shape.patch
        begin = self.begins[window] + (phase * patch)[:, None]
        at = begin[..., None] + self._segment  # [K, B, patch]
        values = panel.values[at] - self.anchors[window][:, :, None]
        parts = [values.flatten(2)]
        if panel.missing.shape[1]:
            parts.append(panel.missing[at].flatten(2))
        times = len(panel.past)
        for covariates in (panel.past, panel.future):
            if covariates.shape[1]:
                parts.append(covariates[at % times].flatten(2))
        if panel.future.shape[1]:
            ahead = begin[..., None] + patch + self._horizon
            parts.append(panel.future[ahead % times].flatten(2))
        if panel.static.shape[1]:
            parts.append(panel.static[self.rows[window]])
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _due(
        self,
        window: Int[Tensor, "K B"],
        phase: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> Float[Tensor, "K B Y"]:
        """The targets after the steps `ends`; zero elsewhere."""
        device = window.device
        y = self.panel.values.new_zeros(
            *window.shape, self.shape.horizon * self.panel.values.shape[1]
        )
        if len(ends):
            rows = torch.from_numpy(ends).to(device)
            after = torch.from_numpy((phase[ends] + 1) * self.shape.patch).to(device)
            chosen = window[rows]
            at = self.begins[chosen] + after[:, None]
            targets = self.panel.targets[at[..., None] + self._horizon]
            targets = targets - self.anchors[chosen][:, :, None]
            y[rows] = targets.flatten(2)
        return y

    def _mask(
        self,
        ends: NDArray[np.int64],
        numbers: NDArray[np.int64],
        chosen: NDArray[np.int64],
        phase: NDArray[np.int64],
    ) -> tuple[float, Tensor | None]:
        """How many losses are due, and where; None: everywhere."""
        room = self.places * self.batch - len(self)  # places past the last window
        if room <= 0 and self.shape.every and self._there is None:
            return float(chosen.size), None
        mask = np.zeros(chosen.shape, bool)
        mask[ends] = True
        if self._there is not None:
            column = phase[ends, None] % self._there.shape[1]
            mask[ends] = self._there[chosen[ends], column]
        if room > 0:
            final = numbers % self.places == self.places - 1
            mask[final, self.batch - room :] = False
        return float(mask.sum()), torch.from_numpy(mask).to(self.begins.device)
