"""One seed, many local generators: no global random state is read or written."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """A seed for the stream called `names`, independent of all other names.

    `derive(0, "data")` and `derive(0, "policy")` are unrelated, and neither changes
    when a third stream is added. The result is in [0, 2^63).
    """
    words = [zlib.crc32(str(name).encode()) for name in names]
    sequence = np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, *words])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def generator(
    seed: int, *names: str | int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator on `device` for the stream called `names`."""
    result = torch.Generator(device=device)
    result.manual_seed(derive(seed, *names))
    return result


@contextmanager
def initialising(seed: int, *names: str | int) -> Iterator[None]:
    """Inside, torch's default CPU generator is seeded; on leaving it is as before.

    For the initialisers of `torch.nn`, which draw from the default generator. Build
    on the CPU and move, so that every device starts from the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, *names))
        yield
