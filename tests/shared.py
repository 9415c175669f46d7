"""What several test files need."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlrnn.agents import RecurrentPPO
from rlrnn.tracking import Run

Policy = Callable[[Tensor], Tensor]


@contextmanager
def at_row(number: int, do: Callable[[], object]) -> Iterator[None]:
    """Inside, `do` happens when the row with this number has been logged."""
    log, count = Run.log, 0

    def counting(run: Run, row: Any) -> None:
        nonlocal count
        log(run, row)
        count += 1
        if count == number:
            do()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", counting)
        yield


class Cut(Exception):
    """The power went."""


def cut() -> None:
    raise Cut


def timeless(row: dict[str, Any]) -> dict[str, str]:
    return {key: repr(row[key]) for key in row if not key.startswith("time/")}


class Syncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that would make an accelerator wait."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            for arg in args
            if isinstance(arg, (list, tuple))
            for i in arg
        )
        if name in self.NAMES or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Inspect(BaseCallback):
    """Calls `look(model)` after each rollout, before the update."""

    def __init__(self, look: Callable[[RecurrentPPO], None]) -> None:
        super().__init__()
        self.look = look

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.look(cast(RecurrentPPO, self.model))


def first_returns(env: Any, policy: Policy) -> Tensor:
    """The return of the first episode of each copy."""
    obs, _ = env.reset(seed=0)
    alive = torch.ones(env.num_envs, dtype=torch.bool)
    returns = torch.zeros(env.num_envs)
    for _ in range(env.max_episode_steps):
        obs, rewards, terminated, truncated, _ = env.step(policy(obs))
        returns += rewards * alive
        alive &= ~(terminated | truncated)
        if not alive.any():
            break
    assert not alive.any()
    return returns
