"""h_t = a_t · h_{t-1} + b_t, elementwise, over a whole sequence at once.

Shapes: T time steps, B columns, H units.

Two such steps after each other are one of the same form, (a, b) then (a', b') being
(a'·a, a'·b + b'). That is associative, so T steps take log2(T) rounds in which each
element looks twice as far back as before (Hillis & Steele 1986, "Data parallel
algorithms"). One core has nothing to gain from that: on a CPU a compiled loop goes over
the steps, and touches each number once.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Float
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

_jit = njit(nogil=True, cache=True)


def scan(
    a: Float[Tensor, "T B H"], b: Float[Tensor, "T B H"], h: Float[Tensor, "B H"]
) -> Float[Tensor, "T B H"]:
    """The h_t of all steps; `h` is that before the first."""
    return _Scan.apply(a, b, h)  # type: ignore[no-any-return, no-untyped-call]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        y = _forward(a, b, h)
        ctx.save_for_backward(a, h, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What reaches step t also comes back from the next one, through its a: the
        same recurrence, from the end to the beginning."""
        a, h, y = ctx.saved_tensors
        later = torch.cat((a[1:], torch.zeros_like(a[:1])))
        d = _forward(later.flip(0), d_y.flip(0), torch.zeros_like(h)).flip(0)
        return d * torch.cat((h[None], y[:-1])), d, d[0] * a[0]


def _forward(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    if a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64):
        arrays = (x.contiguous().numpy() for x in (a, b, h))
        y = torch.empty_like(b, memory_format=torch.contiguous_format)
        _loop(*arrays, y.numpy())
        return y
    return doubling(a, b, h)


def doubling(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    y = torch.cat((torch.addcmul(b[:1], a[:1], h), b[1:]))
    span = 1  # steps that each element stands for
    while span < len(y):
        y = torch.cat((y[:span], torch.addcmul(y[span:], a[span:], y[:-span])))
        a = torch.cat((a[:span], a[span:] * a[:-span]))
        span *= 2
    return y


@_jit
@no_type_check
def _loop(a, b, h, y):
    for t in range(len(a)):
        before = h if t == 0 else y[t - 1]
        for i in range(a.shape[1]):
            for j in range(a.shape[2]):
                y[t, i, j] = a[t, i, j] * before[i, j] + b[t, i, j]
