"""Running mean and variance, on the device of the data."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance of all that `update` has seen, part of the state dict.

    Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances". Before the first update: mean 0 and variance 1.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, x: Float[Tensor, "N *shape"]) -> None:
        """Count N more; nothing here waits for the device."""
        var, mean = torch.var_mean(x, 0, correction=0)
        total = self.count + len(x)
        share = len(x) / total.to(x.dtype)  # 1 at the first update
        delta = mean - self.mean
        self.var.copy_(
            (1 - share) * self.var + share * var + share * (1 - share) * delta**2
        )
        self.mean.add_(share * delta)
        self.count.copy_(total)

    def normalize(
        self, x: Float[Tensor, "*N_and_shape"], clip: float = 10.0
    ) -> Float[Tensor, "*N_and_shape"]:
        """Deviations from the mean, in standard deviations, at most `clip` of them."""
        scaled = (x - self.mean) * torch.rsqrt(self.var + 1e-8)
        return scaled.clamp_(-clip, clip)
