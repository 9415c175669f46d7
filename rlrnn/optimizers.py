"""Optimisers by name, and what sets the unusual ones apart.

Schedule-Free AdamW (Defazio et al. 2024, "The road less scheduled") learns at weights
y and is evaluated at their average x. Prodigy (Mishchenko & Defazio 2023) finds its
own step size, of which the learning rate is a factor, usually 1. Both come from their
authors' packages: `pip install 'rlrnn[rivals]'`.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from io import StringIO
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Optimizer = Literal["sgd", "momentum", "adam", "adamw", "schedulefree", "prodigy"]


def rate_power(name: Optimizer) -> float:
    """p of lr = lambda K^p, the rate that suits windows of K steps."""
    return 1.0 if name in ("sgd", "momentum") else 0.5


def light(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """A class of torch's optimisers without torch's compiler: a subclass with the same
    steps. Others as they are.

    Its making and its first step import the compiler, to keep out of what that
    compiles: two seconds and 150 MiB. Nothing here compiles an optimiser.
    """
    if not kind.__module__.startswith("torch.optim."):
        return kind
    step = inspect.unwrap(kind.step)

    @wraps(step)
    def light_step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            return step(self, *args, **kwargs)

    doors = "zero_grad", "add_param_group", "state_dict", "load_state_dict"
    own: dict[str, Any] = {door: inspect.unwrap(getattr(kind, door)) for door in doors}
    return type(kind.__name__, (kind,), own | {"step": light_step})


def make_optimizer(
    name: Optimizer, groups: list[dict[str, Any]], weight_decay: float | int
) -> torch.optim.Optimizer:
    """An optimiser of parameter groups; their rates are set before each step. Weight
    decay is an L2 penalty for sgd, momentum and adam, decoupled for the others.

    Raises ValueError without the package that it comes from.
    """
    # fused: the step count stays on the device, and nothing is read back
    match name:
        case "adam":
            kind = light(torch.optim.Adam)
            return kind(groups, fused=True, weight_decay=weight_decay)
        case "adamw":
            kind = light(torch.optim.AdamW)
            return kind(groups, fused=True, weight_decay=weight_decay)
        case "schedulefree":
            try:
                from schedulefree import AdamWScheduleFree
            except ImportError:
                raise _missing(name, name) from None
            free = AdamWScheduleFree(groups, weight_decay=weight_decay)
            free.train()  # and stays so: `evaluation_weights` are computed on the side
            return free  # type: ignore[no-any-return]
        case "prodigy":
            try:
                from prodigyopt import Prodigy
            except ImportError:
                raise _missing(name, "prodigyopt") from None
            with redirect_stdout(StringIO()):  # it tells of its weight decay
                prodigy = Prodigy(
                    groups, weight_decay=weight_decay, use_bias_correction=True
                )
            return prodigy  # type: ignore[no-any-return]
        case _:
            assert name in get_args(Optimizer), name
            momentum = 0.9 if name == "momentum" else 0.0
            return light(torch.optim.SGD)(
                groups,
                lr=1e-3,
                fused=True,
                momentum=momentum,
                weight_decay=weight_decay,
            )


def evaluation_weights(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The weights to evaluate with, where they are not those that learn: x of
    Schedule-Free, from y = (1 - beta_1) z + beta_1 x. Otherwise nothing.

    The package's own `eval()` and `train()` move the weights there and back, which
    would change their last bits.
    """
    if not hasattr(optimizer, "eval"):
        return []
    beta = {
        id(parameter): group["betas"][0]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    moved = []
    for parameter in parameters:
        y, z = parameter.detach(), optimizer.state.get(parameter, {}).get("z")
        back = 1 - 1 / beta[id(parameter)]
        moved.append(y.clone() if z is None else torch.lerp(y, z, back))
    return moved


# --- steps in a captured graph --------------------------------------------------------


def capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is all on the device, and takes its rates from there: torch's
    fused ones. Others count their steps, or look at the device, in Python."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    adam, sgd = torch.optim.Adam, torch.optim.SGD  # AdamW is an Adam
    return fused and isinstance(optimizer, (adam, sgd))


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What it keeps of each parameter: other tensors after `load_state_dict`."""
    states = optimizer.state.values()
    return [x for kept in states for x in kept.values() if isinstance(x, Tensor)]


@contextmanager
def at_rates(
    optimizer: torch.optim.Optimizer, rates: Sequence[float | Tensor]
) -> Iterator[None]:
    """Inside, the groups have these rates; those of a captured step are tensors, and
    torch wants the groups to say `capturable`. Neither gets into a state dict."""
    before = [dict(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor) and rate.is_cuda:
            rate = rate.float()  # the fused kernels read nothing else
            if "capturable" in group:
                group["capturable"] = True
        group["lr"] = rate
    try:
        yield
    finally:
        for group, was in zip(optimizer.param_groups, before, strict=True):
            group.update(was)


def _missing(name: str, package: str) -> ValueError:
    return ValueError(
        f"optimizer is {name!r}, expected its package {package}: "
        "pip install 'rlrnn[rivals]'"
    )
