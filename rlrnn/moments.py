"""Running mean and variance, on the device of the data."""

import torch
from jaxtyping import Bool, Float
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
    def update(self, x: Float[Tensor, "N *shape"], least: float = 0.0) -> None:
        """Count N more; nothing here waits for the device.

        They have a share of `least` or more, so that what was before is forgotten.
        """
        var, mean = torch.var_mean(x, 0, correction=0)
        total = self.count + len(x)
        share = len(x) / total.to(x.dtype)  # 1 at the first update
        if least:
            share = share.clamp(min=least)
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


class PopArt(RunningMoments):
    """Moments of the returns, for a critic whose `head` says how many deviations from
    their mean a value is: values may then be of any size, at one learning rate.

    van Hasselt et al. 2016, "Learning values across many orders of magnitude". The
    head is rescaled as the moments move, so that values stay what they are. Nothing
    here waits for the device; moments that would not be finite are not taken.
    """

    SHARE = 0.1  # of the last returns, at least: those of earlier policies are others
    LEAST = 1e-4  # of the deviation, as in Hessel et al. 2019, "Multi-task PopArt"

    @property
    def std(self) -> Float[Tensor, ""]:
        return self.var.sqrt().clamp(min=self.LEAST)

    def scale(self, values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Values in deviations from the mean."""
        return (values - self.mean) / self.std

    def unscale(self, outputs: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """What the head says as values, in the units of the rewards."""
        return outputs * self.std + self.mean

    @torch.no_grad()
    def begin(self, returns: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Without moments, take those of `returns`; `values` in the units of now.

        A head that has learned nothing has no units yet. Without this step its values
        would be preserved, however far from the first returns.
        """
        fresh = self.count == 0
        self._take(returns, fresh)
        return tuple(torch.where(fresh, self.unscale(x), x) for x in values)

    @torch.no_grad()
    def move(self, returns: Tensor, head: nn.Linear) -> None:
        """Count them; `head` is changed so that `unscale` of it is as before."""
        mean, std = self.mean.clone(), self.std
        self._take(returns, torch.ones_like(self.count, dtype=torch.bool))
        head.weight.mul_(std / self.std)
        head.bias.mul_(std / self.std).add_((mean - self.mean) / self.std)

    def _take(self, returns: Tensor, where: Bool[Tensor, ""]) -> None:
        moments = self.mean, self.var, self.count
        before = [x.clone() for x in moments]
        self.update(returns.flatten(), self.SHARE)
        where = where & self.mean.isfinite() & self.var.isfinite()
        for now, then in zip(moments, before, strict=True):
            now.copy_(torch.where(where, now, then))
