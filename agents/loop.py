"""The controller beside a training loop of one's own.

    controller = LearnedController.shipped(optimizer, budget_tokens=2_000_000)
    ...
    knobs = controller.step(loss, tokens)  # after each update

The books are those of `fit` (`rlrnn.ledger`), of a run that nobody sees but through its
losses: signals that would take more than that are missing.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from rlrnn.agents.controller import load_controller
from rlrnn.control import Array, Controller, Signals
from rlrnn.data.chunks import Chunk, Problem, Symbols
from rlrnn.ledger import Interval, Ledger, Measured, TrainingConfig
from rlrnn.objectives import Classes
from rlrnn.optimizers import Optimizer

FIRST = 16  # K of the first window; what the range test begins with
SAMPLED = 8  # windows, of which the gradient of one is looked at
# A gradient that a loop has clipped to 1, as `fit` does, has a norm just below.
CLIP = 0.999


@dataclass(frozen=True)
class LoopKnobs:
    """What holds for the next window.

    Args:
        lr: the highest of the optimiser's rates, which have been set.
        truncation: K, the time steps to go forward and back.
        restored: weights and optimiser have just been put back to where they were, as
            the range test is over or the loss has diverged; a hidden state that is
            carried on should begin at zero.
        fallback: the controller leaves this decision to its prior, for it sees what it
            was not trained on (`rlrnn.control.Familiar`).
    """

    lr: float
    truncation: int = FIRST
    restored: bool = False
    fallback: bool = False


class LearnedController:
    """Sets the rate of an optimiser and says K, for a loop that reads streams in
    windows of K steps and carries the hidden state.

    The first 4 % of the budget are the range test of `fit`: the rate grows from window
    to window until the loss blows up, then weights and optimiser are restored. From
    then on it decides 24 times; the rate moves linearly in between. If a loss is not
    finite, or far above the usual one, weights and optimiser go back to the last
    decision, and all later rates are halved; after three times in a row it gives up. It
    keeps a copy of both for that, and reads the device once per decision.

    Rates of parameter groups keep their ratios; what they are is of no importance. The
    optimiser is SGD's or Adam's kind; no other scheduler should set its rates.

    Args:
        controller: which sets the knobs.
        optimizer: whose rates are set, and whose parameters are the weights.
        budget_tokens: of the whole run; a token is one step of one stream.
        probe: gives the loss on a part of the data that is not trained on; it is called
            at each decision. Without it the mean training loss stands in.

    Raises ValueError for another kind of optimiser, and, at the first step, for a
    budget that is too small for 24 decisions.
    """

    def __init__(
        self,
        controller: Controller,
        optimizer: torch.optim.Optimizer,
        budget_tokens: float | int,
        probe: Callable[[], float | Tensor] | None = None,
    ) -> None:
        self.controller, self.optimizer, self.probe = controller, optimizer, probe
        kind = _kind(optimizer)
        self.config = TrainingConfig(float(budget_tokens), kind, clip=CLIP)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.scales = [rate / max(rates) if max(rates) else 1.0 for rate in rates]
        self.parameters = [p for g in optimizer.param_groups for p in g["params"]]
        self.ledger: Ledger | None = None  # until the number of streams is known
        self.signals: Signals | None = None  # until the range test is over
        self.interval: Interval | None = None
        self.began = 0.0  # tokens that were spent then
        self.state = controller.init(1)
        self.losses: list[Tensor] = []  # of the windows since then
        self.norms: list[Tensor] = []
        self._remember()
        rates_tested, _ = _books(self.config, 1).range_plan()
        self._set(LoopKnobs(float(rates_tested[0])))

    @classmethod
    def shipped(
        cls,
        optimizer: torch.optim.Optimizer,
        budget_tokens: float | int,
        probe: Callable[[], float | Tensor] | None = None,
    ) -> "LearnedController":
        """With the controller that comes with the package."""
        return cls(load_controller(), optimizer, budget_tokens, probe)

    @property
    def done(self) -> bool:
        """Whether the budget is spent, or it has given up."""
        return self.ledger is not None and self.ledger.done

    @np.errstate(all="ignore")  # whatever numbers a loop comes with
    def step(self, loss: float | int | Tensor, tokens: float | int) -> LoopKnobs:
        """Books a window that has been trained on, sets the rates for the next one.

        `loss` is the mean over its `tokens`. Gradients are looked at where they are
        still there. Nothing happens once it is done.
        """
        if self.done:
            return self._set(replace(self.knobs, restored=False))
        if self.ledger is None:
            streams = max(1, round(tokens / self.knobs.truncation))
            self.ledger = _books(self.config, streams)
        self.ledger.spent += tokens
        self.losses.append(torch.as_tensor(loss).detach().float())
        if len(self.losses) % SAMPLED == 1:
            grads = [p.grad for p in self.parameters if p.grad is not None]
            if dense := [grad for grad in grads if not grad.is_sparse]:
                self.norms.append(get_total_norm(dense))
        if self.signals is None:
            return self._test(self.ledger)
        return self._go_on(self.ledger, tokens)

    def _test(self, ledger: Ledger) -> LoopKnobs:
        """The range test: the next rate, or, at its end, the first decision."""
        rates, truncation = ledger.range_plan()
        losses = _read(self.losses)
        level = losses[:3].mean()
        # What comes after a loss that has blown up says nothing.
        alive = np.isfinite(losses[-1]) and losses[-1] < level + abs(level)
        tested = self.controller.range_test
        if tested and alive and len(losses) < len(rates):
            return self._set(LoopKnobs(float(rates[len(losses)]), truncation))
        if tested:
            self._restore()
        sweep = (rates[: len(losses)], losses, truncation) if tested else None
        self.signals = ledger.begin(self._probed(level), sweep)
        return self._decide(ledger, restored=tested)

    def _go_on(self, ledger: Ledger, tokens: float | int) -> LoopKnobs:
        """The next rate of the interval, or, at its end, the next decision."""
        assert self.interval is not None
        rates, last = self.interval.rates, self.losses[-1]
        length = self.interval.spans[0] * ledger.batch
        gone = ledger.spent - self.began
        broken = last.device.type == "cpu" and not math.isfinite(last.item())
        if not broken and length - gone >= tokens / 2:
            at = min(round(gone / length * len(rates)), len(rates) - 1)
            return self._set(replace(self.knobs, lr=float(rates[at]), restored=False))
        losses, norms = _read(self.losses), _read(self.norms)
        change = [
            p.detach() - old
            for p, old in zip(self.parameters, self.weights, strict=True)
        ]
        ratio = get_total_norm(change) / get_total_norm(self.weights)
        measured = Measured(
            self._probed(losses.mean()),
            losses,
            np.ones(len(losses)),
            norms[np.isfinite(norms)],  # a loop may have skipped such an update
            {"update_ratio": float(ratio)},
        )
        self.signals = ledger.settle(self.interval, measured)
        recovered = bool(self.signals.recovered[0])
        if recovered:
            self._restore()
        if ledger.done:
            rate = self.interval.end / (2 if recovered else 1)
            return self._set(replace(self.knobs, lr=rate, restored=recovered))
        return self._decide(ledger, recovered)

    def _decide(self, ledger: Ledger, restored: bool) -> LoopKnobs:
        assert self.signals is not None
        knobs, self.state = self.controller(self.signals, self.state)
        planned = ledger.plan(knobs)
        # its length is all that counts: windows are the loop's to cut
        self.interval = replace(planned, spans=[sum(planned.spans)])
        self.began = ledger.spent
        self.losses, self.norms = [], []
        self._remember()
        outside = self.state.get("player", {}).get("outside")
        fallback = outside is not None and bool(outside.any())
        first, k = float(self.interval.rates[0]), self.interval.truncation
        return self._set(LoopKnobs(first, k, restored, fallback))

    def _probed(self, mean: float) -> float:
        """The probe loss; `mean`, that of training, without a probe, or a number."""
        if self.probe is None or not np.isfinite(mean):
            return float(mean)
        return float(self.probe())

    def _set(self, knobs: LoopKnobs) -> LoopKnobs:
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = knobs.lr * scale
        self.knobs = knobs
        return knobs

    def _remember(self) -> None:
        self.weights = [p.detach().clone() for p in self.parameters]
        self.optimizer_state = copy.deepcopy(self.optimizer.state_dict())

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, self.weights, strict=True):
                parameter.copy_(weight)
        # a copy, for an optimiser goes on with the tensors that it is given
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer_state))

    # --- resuming -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything with which a resumed loop gets the same knobs; tensors and plain
        values, as `torch.save` and `rlrnn.checkpoint` take them."""
        ledger, signals, interval = self.ledger, self.signals, self.interval
        return {
            "budget": self.config.budget,
            "streams": None if ledger is None else ledger.batch,
            "numbers": {}
            if ledger is None
            else {name: float(getattr(ledger, name)) for name in ledger.NUMBERS},
            "signals": None if signals is None else _tensors(vars(signals)),
            "interval": None if interval is None else _tensors(asdict(interval)),
            "began": self.began,
            "controller": _tensors(self.state),
            "losses": [loss.cpu() for loss in self.losses],
            "norms": [norm.cpu() for norm in self.norms],
            "weights": [weight.clone() for weight in self.weights],
            "optimizer": copy.deepcopy(self.optimizer_state),
            "knobs": asdict(self.knobs),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`, with model and optimiser as they were then.
        Raises ValueError for a run of another budget."""
        if state["budget"] != self.config.budget:
            raise ValueError(
                f"budget_tokens is {self.config.budget:.0f}, expected that of the run "
                f"which is resumed, {state['budget']:.0f}"
            )
        if state["streams"] is not None:
            self.ledger = _books(self.config, state["streams"])
            for name, value in state["numbers"].items():
                kind = type(getattr(self.ledger, name))
                setattr(self.ledger, name, kind(value))
        if state["signals"] is not None:
            self.signals = Signals(**_arrays(state["signals"]))
            self.interval = Interval(**_arrays(state["interval"]))
        self.began, self.state = state["began"], _arrays(state["controller"])
        self.losses, self.norms = list(state["losses"]), list(state["norms"])
        devices = [parameter.device for parameter in self.parameters]
        self.weights = [
            weight.to(device)
            for weight, device in zip(state["weights"], devices, strict=True)
        ]
        self.optimizer_state = state["optimizer"]
        self._set(LoopKnobs(**state["knobs"]))


class _Streams:
    """A source of `rlrnn.data.chunks` that gives nothing: the loop has its own."""

    whole = False

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length

    def span(self, t: int, truncation: int) -> int:
        return truncation

    def typical(self, truncation: int) -> float:
        return float(truncation)

    def window(self, t: int, steps: int) -> Chunk:
        raise AssertionError("the loop reads its own data")

    def to(self, device: torch.device) -> "_Streams":
        return self

    def fingerprint(self) -> int:
        return 0


def _books(config: TrainingConfig, streams: int) -> Ledger:
    """Of a run on so many streams, whose probe costs it nothing."""
    train, none = _Streams(streams, 2**62), _Streams(1, 0)
    return Ledger(Problem(Symbols(1), Classes(1), train, none, none, none), config)


def _kind(optimizer: torch.optim.Optimizer) -> Optimizer:
    """The nearest one that a range test and a rate of K are known for."""
    if isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD)):
        groups = optimizer.param_groups
        return "momentum" if any(g.get("momentum") for g in groups) else "sgd"
    if "betas" in optimizer.defaults or isinstance(optimizer, torch.optim.RMSprop):
        return "adam"
    raise ValueError(
        f"optimizer is {type(optimizer).__name__}, expected SGD, or one of Adam's kind "
        "(with betas)"
    )


def _read(numbers: list[Tensor]) -> Array:
    """The one copy to the host; numbers may come from there."""
    if not numbers:
        return np.zeros(0)
    device = numbers[-1].device
    return torch.stack([n.to(device) for n in numbers]).double().cpu().numpy()


def _tensors(tree: Any) -> Any:
    """Arrays as tensors, for `torch.save`."""
    if isinstance(tree, dict):
        return {key: _tensors(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_tensors(value) for value in tree)
    return torch.from_numpy(tree.copy()) if isinstance(tree, np.ndarray) else tree


def _arrays(tree: Any) -> Any:
    """Tensors as arrays."""
    if isinstance(tree, dict):
        return {key: _arrays(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_arrays(value) for value in tree)
    return tree.numpy().copy() if isinstance(tree, Tensor) else tree
