"""Truncated back-propagation through time, one decision interval at a time.

    signals = trainer.start()
    while not trainer.done:
        knobs, state = controller(signals, state)
        signals = trainer.step(knobs)

The trainer is the physics of the tuning environment: it spends a budget of tokens (one
token is one step of one stream; forward only counts a third), recovers from
divergence whoever holds the knobs, and reads the device once per interval.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlrnn.control import TRUNCATION_BOUNDS, Array, Knobs, Signals
from rlrnn.data.chunks import Chunk, Problem, Streams
from rlrnn.models import SequenceModel

Optimizer = Literal["sgd", "momentum", "adam", "adamw"]

FORWARD_COST = 1 / 3  # of a token that is also trained on
WINDOWS = 4  # the fewest in a decision interval
GIVE_UP = 3  # recoveries in a row


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        budget: tokens to spend, on training, probing, range test and all.
        optimizer: sgd, momentum (0.9), adam or adamw.
        weight_decay: decoupled for adamw, an L2 penalty for the others.
        clip: the gradient norm above which gradients are scaled down.
        decisions: intervals that a controller decides on; a sixth of them lie in the
            first 5 % of the budget.
        probe_share: of the budget, spent on watching the probe loss.
        range_test_share: of the budget, spent on a range test if one is asked for.
    """

    budget: float = 1_000_000.0
    optimizer: Optimizer = "adam"
    weight_decay: float = 0.0
    clip: float = 1.0
    decisions: int = 24
    probe_share: float = 0.02
    range_test_share: float = 0.04

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "momentum", "adam", "adamw"):
            raise ValueError(
                f"optimizer is {self.optimizer!r}, expected sgd, momentum, adam "
                "or adamw"
            )
        if not self.budget >= 1:
            raise ValueError(f"budget is {self.budget}, expected at least 1 token")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}, expected a number above 0")
        if not self.decisions >= 6:
            raise ValueError(f"decisions is {self.decisions}, expected at least 6")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected >= 0")
        for name in ("probe_share", "range_test_share"):
            if not 0 < getattr(self, name) < 0.5:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected between 0 and 0.5"
                )

    def boundary(self, decision: int) -> float:
        """The share of the budget that is spent when this decision's turn comes."""
        early = self.decisions // 6
        if decision <= early:
            return 0.05 * decision / early
        return 0.05 + 0.95 * (decision - early) / (self.decisions - early)

    @property
    def power(self) -> float:
        """p of lr = lambda K^p."""
        return 0.5 if self.optimizer.startswith("adam") else 1.0


def masked_loss(logits: Tensor, chunk: Chunk, density: float) -> Tensor:
    """Cross-entropy in nats: the sum where a loss is due / (steps * streams * density).

    The denominator is a constant of the data, so that a window with few due positions
    does not weigh as much as one with many.
    """
    if chunk.mask is None:
        return F.cross_entropy(logits.flatten(0, 1), chunk.y.flatten())
    losses = F.cross_entropy(logits.flatten(0, 1), chunk.y.flatten(), reduction="none")
    total = (losses * chunk.mask.flatten()).sum()
    return total / (chunk.y.numel() * density)


@torch.no_grad()
def mean_loss(model: SequenceModel, streams: Streams, steps: int) -> Tensor:
    """Mean nats per due position over the first `steps` of all streams, from zero
    states; a scalar on the device."""
    state = model.initial_state(streams.batch)
    weight = next(model.parameters())
    total, due = weight.new_zeros(()), weight.new_zeros(())
    for begin in range(0, steps, 256):
        chunk = streams.window(begin, min(256, steps - begin))
        logits, state = model(chunk.x, state, chunk.starts)
        losses = F.cross_entropy(
            logits.flatten(0, 1), chunk.y.flatten(), reduction="none"
        )
        if chunk.mask is None:
            total, due = total + losses.sum(), due + losses.numel()
        else:
            mask = chunk.mask.flatten()
            total, due = total + (losses * mask).sum(), due + mask.sum()
    return total / due


class Trainer:
    """One supervised run of a `SequenceModel` on a `Problem`.

    The model and the streams are expected on one device. Nothing here is random: the
    same model, data, and knobs give the same bits on a CPU.

    Raises ValueError if the budget is too small for `config.decisions`.
    """

    def __init__(
        self, model: SequenceModel, problem: Problem, config: TrainingConfig
    ) -> None:
        self.model = model
        self.problem = problem
        self.config = config
        self.device = next(model.parameters()).device
        self.batch = problem.train.batch
        self.parameters = list(model.parameters())
        self.optimizer = self._make_optimizer()
        self.hidden = model.initial_state(self.batch)
        self.position = 0  # of the next window, in time steps
        self.spent = 0.0  # tokens
        self.origin = 0.0  # tokens spent before the first decision
        self.decision = 0
        self.lr_scale = 1.0
        self.ceiling = math.inf  # no raises above it for two decisions after a recovery
        self.held = 0
        self.failures = 0  # recoveries in a row
        self.usual_loss = math.nan
        self.usual_noise = math.nan
        self.last_probe = math.nan
        self.range_lr = math.nan
        probes = config.budget * config.probe_share / FORWARD_COST
        per_probe = probes / (config.decisions + 1) / problem.probe.batch
        self.probe_steps = int(min(max(per_probe, 32), problem.probe.length))
        least = 1.1 * WINDOWS * TRUNCATION_BOUNDS[0] * self.batch + self._probe_cost
        if config.budget * config.boundary(1) < least:
            raise ValueError(
                f"budget is {config.budget:.0f} tokens, expected at least "
                f"{math.ceil(least / config.boundary(1))} for {self.batch} streams and "
                f"{config.decisions} decisions; raise the budget, or lower the streams "
                "or the decisions"
            )

    def _make_optimizer(self) -> torch.optim.Optimizer:
        # fused: the step count stays on the device, and nothing is read back
        decay = self.config.weight_decay
        match self.config.optimizer:
            case "adam":
                return torch.optim.Adam(self.parameters, fused=True, weight_decay=decay)
            case "adamw":
                return torch.optim.AdamW(
                    self.parameters, fused=True, weight_decay=decay
                )
            case name:
                momentum = 0.9 if name == "momentum" else 0.0
                return torch.optim.SGD(
                    self.parameters,
                    lr=1e-3,
                    fused=True,
                    momentum=momentum,
                    weight_decay=decay,
                )

    @property
    def done(self) -> bool:
        """Whether the budget is spent, or the run has failed."""
        return self.decision >= self.config.decisions or self.failures >= GIVE_UP

    @property
    def _probe_cost(self) -> float:
        return FORWARD_COST * self.probe_steps * self.problem.probe.batch

    def _room(self) -> float:
        """Time steps that the next interval has room for."""
        share = self.config.boundary(self.decision + 1)
        end = self.origin + share * (self.config.budget - self.origin)
        return max(0.0, end - self.spent - self._probe_cost) / self.batch

    def _longest(self) -> int:
        """The longest K, a power of two, of which the next interval holds 4 windows."""
        shortest, longest = TRUNCATION_BOUNDS
        room = max(float(shortest), self._room() / WINDOWS)
        return int(min(longest, 2 ** math.floor(math.log2(room))))

    def start(self, range_test: bool = False) -> Signals:
        """The signals before the first decision."""
        self.last_probe = float(self._probe())
        self.usual_loss = self.last_probe
        self.usual_noise = 0.05 * self.last_probe
        if range_test:
            self.range_lr = suggest_lambda(*self._range_test(), self.config.power)
        self.origin = self.spent
        return self._signals(truncation=TRUNCATION_BOUNDS[0])

    def step(self, knobs: Knobs) -> Signals:
        """One decision interval under `knobs` (arrays of length 1).

        The truncation is capped so that the interval holds 4 windows. If the interval
        diverges (anything non-finite, or a mean loss 6 standard deviations above the
        usual one) weights, optimiser and hidden state are restored, and all later
        rates are halved; data position and budget go on. Raises RuntimeError if the
        run is done.
        """
        if self.done:
            raise RuntimeError("the run is done: its budget is spent or it has failed")
        truncation = min(int(knobs.truncation[0]), self._longest())
        windows = max(1, round(self._room() / truncation))
        begin, end = (
            min(float(rate[0]) * self.lr_scale, self.ceiling)
            for rate in (knobs.lr, knobs.lr_end)
        )
        snapshot = self._snapshot()
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        due: list[float] = []
        watched: dict[str, Tensor] = {}
        for window in range(windows):
            lr = begin + (end - begin) * (window + 0.5) / windows
            chunk = self._next_chunk(truncation)
            if chunk.due == 0:  # nothing to learn: only the state goes on
                with torch.no_grad():
                    _, self.hidden = self.model(chunk.x, self.hidden, chunk.starts)
                continue
            self._set_lr(lr)
            if window == windows - 1 and losses and truncation > 1:
                before = [p.grad for p in self.parameters if p.grad is not None]
                loss, norm, watched = self._watched_window(chunk)
                now = [p.grad for p in self.parameters if p.grad is not None]
                watched["grad_cosine"] = _cosine(before, now)
            else:
                loss, norm = self._window(chunk)
            losses.append(loss)
            norms.append(norm)
            due.append(chunk.due)
        watched["update_ratio"] = self._update_ratio(snapshot)
        probe = self._probe()
        self.decision += 1
        return self._settle(
            snapshot, losses, norms, due, probe, watched, end, truncation
        )

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _next_chunk(self, steps: int) -> Chunk:
        chunk = self.problem.train.window(self.position, steps)
        self.position = (self.position + steps) % self.problem.train.length
        self.spent += steps * self.batch
        return chunk

    def _window(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """One update: loss and gradient norm (before the clip), on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        logits, state = self.model(chunk.x, self.hidden, chunk.starts)
        loss = masked_loss(logits, chunk, self.problem.train.density)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), self._update(state)

    def _update(self, state: Tensor) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self.hidden = state.detach()
        return norm

    def _watched_window(self, chunk: Chunk) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`_window`, cut in the middle to see how the gradient fades going back."""
        self.optimizer.zero_grad(set_to_none=True)
        steps = len(chunk.x)
        half = steps // 2
        carried = self.hidden.requires_grad_()
        halves: tuple[Any, Any] = (None, None)
        if chunk.starts is not None:
            halves = chunk.starts[:half], chunk.starts[half:]
        first, middle = self.model(chunk.x[:half], carried, halves[0])
        middle.retain_grad()
        second, state = self.model(chunk.x[half:], middle, halves[1])
        loss = masked_loss(
            torch.cat((first, second)), chunk, self.problem.train.density
        )
        loss.backward()  # type: ignore[no-untyped-call]
        assert carried.grad is not None and middle.grad is not None
        tiny = torch.finfo(loss.dtype).tiny
        far, near = carried.grad.norm() + tiny, middle.grad.norm() + tiny
        # Per-step quantities: the loss is a mean over the window's steps.
        carried_grad = far * carried.detach().norm() * steps / loss.detach()
        watched = {
            "carried_grad": carried_grad.clamp(1e-6, 1e6),
            "grad_decay": (near.log() - far.log()) / half,
        }
        return loss.detach(), self._update(state), watched

    def _probe(self) -> Tensor:
        self.spent += self._probe_cost
        return mean_loss(self.model, self.problem.probe, self.probe_steps)

    def _update_ratio(self, snapshot: "_Snapshot") -> Tensor:
        with torch.no_grad():
            change = [
                p - old
                for p, old in zip(self.parameters, snapshot.weights, strict=True)
            ]
            return _norm(change) / _norm(snapshot.weights)

    # --- recovery -------------------------------------------------------------------

    def _snapshot(self) -> "_Snapshot":
        return _Snapshot(
            [p.detach().clone() for p in self.parameters],
            copy.deepcopy(self.optimizer.state_dict()),
            self.hidden.detach().clone(),
        )

    def _restore(self, snapshot: "_Snapshot") -> None:
        with torch.no_grad():
            for parameter, old in zip(self.parameters, snapshot.weights, strict=True):
                parameter.copy_(old)
        self.optimizer.load_state_dict(snapshot.optimizer)
        self.hidden = snapshot.hidden

    def _settle(
        self,
        snapshot: "_Snapshot",
        losses: list[Tensor],
        norms: list[Tensor],
        due: list[float],
        probe: Tensor,
        watched: dict[str, Tensor],
        lr: float,
        truncation: int,
    ) -> Signals:
        """Reads the interval back from the device, and rolls it back if need be."""
        names = list(watched)
        stacked = torch.stack([probe, *watched.values(), *losses, *norms])
        # The one copy to the host of the interval.
        numbers = stacked.double().cpu().numpy()
        probe_loss, rest = float(numbers[0]), numbers[1 + len(names) :]
        measured = dict(
            zip(names, map(float, numbers[1 : 1 + len(names)]), strict=True)
        )
        weight = np.array(due)
        norm = rest[len(losses) :]
        mean, noise = _mean_and_noise(rest[: len(losses)] / weight, weight)
        limit = self.usual_loss + 6 * max(self.usual_noise, 0.02 * self.usual_loss)
        self.held = max(0, self.held - 1)
        if self.held == 0:
            self.ceiling = math.inf
        finite = np.isfinite(numbers).all() and np.isfinite(probe_loss)
        if not finite or mean > limit:
            self._restore(snapshot)
            self.failures += 1
            self.lr_scale /= 2
            self.ceiling, self.held = lr / 2, 2
            return self._signals(truncation=truncation, lr=lr, recovered=1.0)
        self.failures = 0
        if losses:
            self.usual_loss += 0.3 * (mean - self.usual_loss)
            self.usual_noise += 0.3 * (noise - self.usual_noise)
        self.last_probe = probe_loss
        return self._signals(
            truncation=truncation,
            lr=lr,
            train_loss=mean,
            loss_noise=max(noise / mean, 1e-6),
            grad_norm=float(np.exp(_mean(np.log(norm.clip(1e-12))))),
            clip_fraction=_mean(norm > self.config.clip),
            **measured,
        )

    def _signals(
        self,
        truncation: int,
        lr: float = math.nan,
        recovered: float = 0.0,
        **measured: float,
    ) -> Signals:
        decisions, budget = self.config.decisions, self.config.budget
        following = min(self.decision + 1, decisions)
        left = max(0.0, budget - self.spent) / self.batch / truncation
        last = self.decision >= decisions
        values: dict[str, float] = {
            "train_loss": math.nan,
            "loss_noise": math.nan,
            "grad_norm": math.nan,
            "clip_fraction": math.nan,
            "grad_cosine": math.nan,
            "update_ratio": math.nan,
            "carried_grad": math.nan,
            "grad_decay": math.nan,
            "progress": (self.spent - self.origin) / (budget - self.origin),
            "next_progress": self.config.boundary(following),
            "windows_left": left,
            "probe_loss": self.last_probe,
            "lr": lr,
            "truncation": float(truncation),
            "truncation_max": float(truncation if last else self._longest()),
            "range_lr": self.range_lr,
            "adaptive": float(self.config.power < 1),
            "recovered": recovered,
            "lr_scale": self.lr_scale,
            "failed": float(self.failures >= GIVE_UP),
            **measured,
        }
        return Signals(**{name: np.array([value]) for name, value in values.items()})

    # --- range test -----------------------------------------------------------------

    def _range_test(self) -> tuple[Array, Array, int]:
        """Rates, losses and K of a sweep (after Smith 2017, "Cyclical learning rates").

        The rate grows by a constant factor per window. Then weights, optimiser and
        hidden state are restored; the tokens are spent.
        """
        room = self.config.budget * self.config.range_test_share / self.batch
        truncation = 16
        while room / truncation < 40 and truncation > TRUNCATION_BOUNDS[0]:
            truncation //= 2
        windows = int(min(max(room / truncation, 16), 100))
        low, high = (1e-4, 1.0) if self.config.power < 1 else (1e-2, 30.0)
        rates = np.geomspace(low, high, windows)
        snapshot = self._snapshot()
        losses = []
        for lr in rates:
            self._set_lr(float(lr))
            chunk = self._next_chunk(truncation)
            losses.append(self._window(chunk)[0] / (chunk.due or math.nan))
        self._restore(snapshot)
        return rates, torch.stack(losses).double().cpu().numpy(), truncation

    # --- resuming -------------------------------------------------------------------

    _NUMBERS = (
        "position",
        "spent",
        "origin",
        "decision",
        "lr_scale",
        "ceiling",
        "held",
        "failures",
        "usual_loss",
        "usual_noise",
        "last_probe",
        "range_lr",
    )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on to the same bits."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "hidden": self.hidden.detach(),
            "numbers": {name: getattr(self, name) for name in self._NUMBERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hidden = state["hidden"].to(self.device)
        for name in self._NUMBERS:
            setattr(self, name, state["numbers"][name])


RANGE_SHARE = 0.8  # of the sweep's fall; measured: see docs/controller.md


def suggest_lambda(rates: Array, losses: Array, truncation: int, power: float) -> float:
    """Lambda for a run: the first rate of the sweep at which the smoothed loss has
    fallen by most of what it falls before it blows up.

    The lowest loss itself comes late, on a plateau: there the sweep has merely gone on
    for longer. NaN if the loss never fell by 2 %: the sweep was too short to tell.
    Windows in which no loss was due are NaN in `losses`.
    """
    known = ~np.isnan(losses)
    rates, losses = rates[known], losses[known]
    if len(losses) < 5:
        return math.nan
    level = float(losses[:3].mean())
    alive = np.isfinite(losses) & (losses < 2 * level)
    end = len(losses) if alive.all() else max(1, int(np.argmin(alive)))
    kernel = np.array([1.0, 2.0, 3.0, 2.0, 1.0])
    weight = np.convolve(np.ones(end), kernel, mode="same")[:end]
    smooth = np.convolve(losses[:end], kernel, mode="same")[:end] / weight
    if not math.isfinite(level) or smooth.min() > 0.98 * level:
        return math.nan
    target = level - RANGE_SHARE * (level - float(smooth.min()))
    return float(rates[int(np.argmax(smooth <= target))] / truncation**power)


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _mean_and_noise(losses: Array, weights: Array) -> tuple[float, float]:
    """Weighted mean and standard deviation; NaN for no losses at all."""
    if not len(losses):
        return math.nan, math.nan
    mean = float(np.average(losses, weights=weights))
    return mean, math.sqrt(float(np.average((losses - mean) ** 2, weights=weights)))


@dataclass(frozen=True)
class _Snapshot:
    weights: list[Tensor]
    optimizer: dict[str, Any]
    hidden: Tensor


def _norm(tensors: list[Tensor]) -> Tensor:
    norms: tuple[Tensor, ...] = torch._foreach_norm(tensors)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    products = [torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]
    scale = (_norm(a) * _norm(b)).clamp_min(1e-12)
    return torch.stack(products).sum() / scale
