"""What all tests share.

One thread of torch in each process: they run side by side, and threads that wait for
each other on a busy machine take many times as long.

Shapes in signatures are checked in the first 1,000 calls of a test, and in every 50th
after that: a training makes tens of thousands, and would take three times as long.
"""

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)


class Sometimes(type(jaxtyping.config)):  # type: ignore[misc]
    calls = 0

    @property
    def jaxtyping_disable(self) -> bool:
        """Asked before each call."""
        Sometimes.calls += 1
        return Sometimes.calls > 1000 and Sometimes.calls % 50 > 0


jaxtyping.config.__class__ = Sometimes


@pytest.fixture(autouse=True)
def _shapes_are_checked_again() -> None:
    Sometimes.calls = 0
