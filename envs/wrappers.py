"""Wrappers for the environments of others."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.utils import RecordConstructorArgs


class HideCoordinates(
    gymnasium.ObservationWrapper[Any, Any, Any], RecordConstructorArgs
):
    """Show some coordinates of the observation only, in their order.

    `env` has a `Box` observation with one axis. Name the indices to `keep` or those to
    `hide`: hiding velocities turns a control task into a memory task.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        *,
        keep: Sequence[int] | None = None,
        hide: Sequence[int] | None = None,
    ) -> None:
        RecordConstructorArgs.__init__(self, keep=keep, hide=hide)
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ValueError(
                f"the observation is {space}, expected a Box with one axis: "
                "flatten it first (gymnasium.wrappers.FlattenObservation)"
            )
        size = space.shape[0]
        named = keep if keep is not None else hide
        if named is None or (keep is not None and hide is not None):
            raise ValueError(f"keep={keep}, hide={hide}: give one of the two")
        wrong = [index for index in named if not 0 <= index < size]
        if wrong:
            raise ValueError(
                f"no coordinates {wrong}: the observation has 0 to {size - 1}"
            )
        shown = [i for i in range(size) if (i in named) == (keep is not None)]
        if not shown:
            raise ValueError(f"keep={keep}, hide={hide} leaves nothing to observe")
        self._shown = np.array(shown)
        self.observation_space = Box(
            space.low[shown], space.high[shown], dtype=space.dtype.type
        )

    def observation(self, observation: Any) -> Any:
        return observation[self._shown]
