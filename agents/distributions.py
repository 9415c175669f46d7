"""Distributions over actions: pure functions of parameters [..., P].

Any leading shape serves, so acting on [B] and learning on [T, B] share the code. Each
class draws from the generator it is given (`torch.distributions` draws from the global
one), and no method waits for the device, so parameters are not validated.
"""

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from jaxtyping import Float, Int, Shaped
from torch import Tensor


@runtime_checkable
class ActionDistribution(Protocol):
    """`size` is P. `log_prob` and `entropy` sum over the axes of an action: [...]."""

    @property
    def size(self) -> int: ...

    def sample(
        self, params: Float[Tensor, "*N P"], generator: torch.Generator
    ) -> Shaped[Tensor, "*N_and_action"]: ...

    def mode(
        self, params: Float[Tensor, "*N P"]
    ) -> Shaped[Tensor, "*N_and_action"]: ...

    def log_prob(
        self, params: Float[Tensor, "*N P"], actions: Shaped[Tensor, "*N_and_action"]
    ) -> Float[Tensor, "*N"]: ...

    def entropy(self, params: Float[Tensor, "*N P"]) -> Float[Tensor, "*N"]: ...


class Categorical:
    """One of P choices by logits, for `Discrete`. Actions [...], int64, in nats."""

    def __init__(self, choices: int) -> None:
        self.size = choices

    def sample(
        self, params: Float[Tensor, "*N P"], generator: torch.Generator
    ) -> Int[Tensor, "*N"]:
        return _perturb(params, generator).argmax(-1)

    def mode(self, params: Float[Tensor, "*N P"]) -> Int[Tensor, "*N"]:
        return params.argmax(-1)

    def log_prob(
        self, params: Float[Tensor, "*N P"], actions: Int[Tensor, "*N"]
    ) -> Float[Tensor, "*N"]:
        chosen = params.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
        return chosen - params.logsumexp(-1)

    def entropy(self, params: Float[Tensor, "*N P"]) -> Float[Tensor, "*N"]:
        logs = F.log_softmax(params, -1)
        return -(logs.exp() * logs).sum(-1)


class MultiCategorical:
    """n independent choices, for `MultiDiscrete`; their logits lie end to end.

    Actions [..., n], int64.
    """

    def __init__(self, choices: list[int]) -> None:
        self.choices = choices
        self.size = sum(choices)
        self._parts = [Categorical(n) for n in choices]

    def sample(
        self, params: Float[Tensor, "*N P"], generator: torch.Generator
    ) -> Int[Tensor, "*N n"]:
        return self.mode(_perturb(params, generator))

    def mode(self, params: Float[Tensor, "*N P"]) -> Int[Tensor, "*N n"]:
        return torch.stack([p.argmax(-1) for p in self._split(params)], -1)

    def log_prob(
        self, params: Float[Tensor, "*N P"], actions: Int[Tensor, "*N n"]
    ) -> Float[Tensor, "*N"]:
        split = zip(self._parts, self._split(params), actions.unbind(-1), strict=True)
        return torch.stack([part.log_prob(p, a) for part, p, a in split]).sum(0)

    def entropy(self, params: Float[Tensor, "*N P"]) -> Float[Tensor, "*N"]:
        split = zip(self._parts, self._split(params), strict=True)
        return torch.stack([part.entropy(p) for part, p in split]).sum(0)

    def _split(self, params: Tensor) -> tuple[Tensor, ...]:
        return torch.split(params, self.choices, -1)


class Bernoulli:
    """Independent bits by logits, for `MultiBinary`. Actions [..., *shape], int8."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.size = math.prod(shape)

    def sample(
        self, params: Float[Tensor, "*N P"], generator: torch.Generator
    ) -> Int[Tensor, "*N_and_shape"]:
        u = torch.empty_like(params).uniform_(generator=generator)
        return _shaped((u < params.sigmoid()).to(torch.int8), self.shape)

    def mode(self, params: Float[Tensor, "*N P"]) -> Int[Tensor, "*N_and_shape"]:
        return _shaped((params > 0).to(torch.int8), self.shape)

    def log_prob(
        self, params: Float[Tensor, "*N P"], actions: Int[Tensor, "*N_and_shape"]
    ) -> Float[Tensor, "*N"]:
        bits = actions.reshape(params.shape).to(params.dtype)
        return (bits * params - F.softplus(params)).sum(-1)

    def entropy(self, params: Float[Tensor, "*N P"]) -> Float[Tensor, "*N"]:
        return (F.softplus(params) - params * params.sigmoid()).sum(-1)


class Gaussian:
    """Independent normals, for `Box`: d means, then d logarithms of deviations, P = 2d.

    Actions [..., *shape] are not bounded: who plays them clips them to the space.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.size = 2 * math.prod(shape)

    def sample(
        self, params: Float[Tensor, "*N P"], generator: torch.Generator
    ) -> Float[Tensor, "*N_and_shape"]:
        mean, log_std = params.chunk(2, -1)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return _shaped((mean + log_std.exp() * noise), self.shape)

    def mode(self, params: Float[Tensor, "*N P"]) -> Float[Tensor, "*N_and_shape"]:
        return _shaped(params.chunk(2, -1)[0], self.shape)

    def log_prob(
        self, params: Float[Tensor, "*N P"], actions: Float[Tensor, "*N_and_shape"]
    ) -> Float[Tensor, "*N"]:
        mean, log_std = params.chunk(2, -1)
        z = (actions.reshape(mean.shape) - mean) * (-log_std).exp()
        return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, params: Float[Tensor, "*N P"]) -> Float[Tensor, "*N"]:
        log_std = params.chunk(2, -1)[1]
        return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class StateDependent:
    """Normals whose noise is a function of the state, for `Box`: gSDE (Raffin et al.
    2021, "Smooth exploration for robotic reinforcement learning").

    With L features h of the state an action is mean + h E. The matrix E [L, d], of
    independent normals with `deviations`, stays for many steps: `explore`. Over all
    E that is a normal with variance h² std²: `sample`, `log_prob` and `entropy`.
    Parameters are d means, d logarithms of deviations, and h: P = 2d + L; see `params`.

    With `squash` it is the tanh of all that, in [-1, 1].
    """

    def __init__(
        self, shape: tuple[int, ...], features: int, squash: bool = False
    ) -> None:
        self.shape = shape
        self.squash = squash
        self.outputs = math.prod(shape)
        self.size = 2 * self.outputs + features
        self._normal = Gaussian((self.outputs,))

    def params(
        self,
        mean: Float[Tensor, "*N D"],
        features: Float[Tensor, "*N L"],
        std: Float[Tensor, "L D"],
    ) -> Float[Tensor, "*N P"]:
        """No gradient goes into the features."""
        features = features.detach()
        variance = features.square() @ std.square() + 1e-6
        return torch.cat((mean, 0.5 * variance.log(), features), -1)

    def explore(
        self, params: Float[Tensor, "B P"], noise: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B *shape"]:
        """The actions under given matrices E."""
        features = params[:, None, 2 * self.outputs :]
        return self._action(params[:, : self.outputs] + (features @ noise)[:, 0])

    def sample(
        self, params: Float[Tensor, "*N P"], generator: torch.Generator
    ) -> Float[Tensor, "*N_and_shape"]:
        return self._action(self._normal.sample(self._law(params), generator))

    def mode(self, params: Float[Tensor, "*N P"]) -> Float[Tensor, "*N_and_shape"]:
        return self._action(params[..., : self.outputs])

    def log_prob(
        self, params: Float[Tensor, "*N P"], actions: Float[Tensor, "*N_and_shape"]
    ) -> Float[Tensor, "*N"]:
        flat = actions.reshape(*params.shape[:-1], -1)
        if not self.squash:
            return self._normal.log_prob(self._law(params), flat)
        nearly = 1 - torch.finfo(flat.dtype).eps
        x = flat.clamp(-nearly, nearly).atanh()
        return self._normal.log_prob(self._law(params), x) - _log_slope(x).sum(-1)

    def entropy(self, params: Float[Tensor, "*N P"]) -> Float[Tensor, "*N"]:
        law = self._law(params)
        entropy = self._normal.entropy(law)
        if not self.squash:
            return entropy
        # H[tanh x] = H[x] + E[log tanh' x], the latter by Gauss-Hermite quadrature
        mean, log_std = law.unsqueeze(-1).chunk(2, -2)
        x = mean + log_std.exp() * law.new_tensor(_NODES)
        slopes = _log_slope(x) @ law.new_tensor(_WEIGHTS)
        return entropy + slopes.sum(-1)

    def _law(self, params: Tensor) -> Tensor:
        return params[..., : 2 * self.outputs]

    def _action(self, flat: Tensor) -> Tensor:
        return _shaped(flat.tanh() if self.squash else flat, self.shape)


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
_WEIGHTS = _WEIGHTS / math.sqrt(2 * math.pi)


def deviations(
    log_std: Float[Tensor, "L _"], outputs: int, slow_above_one: bool = False
) -> Float[Tensor, "L D"]:
    """exp(log_std), one column for each output, or the same one for all of them.

    `slow_above_one` ("expln"): for log_std > 0 it is 1 + log(1 + log_std) instead.
    """
    std = log_std.exp()
    if slow_above_one:
        std = torch.where(log_std > 0, log_std.clamp(min=0).log1p() + 1, std)
    return std.expand(-1, outputs)


def _log_slope(x: Tensor) -> Tensor:
    """log tanh'(x) = log(1 - tanh² x), exact far out too."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


def distribution_for(space: spaces.Space[Any]) -> ActionDistribution:
    """The distribution over the actions of `space`; ValueError for other spaces."""
    match space:
        case spaces.Discrete() if space.start == 0:
            return Categorical(int(space.n))
        case spaces.MultiDiscrete() if space.nvec.ndim == 1 and not space.start.any():
            return MultiCategorical([int(n) for n in space.nvec])
        case spaces.MultiBinary():
            return Bernoulli(space.shape)
        case spaces.Box() if space.shape:
            return Gaussian(space.shape)
    raise ValueError(
        f"action space is {space}: expected Discrete or flat MultiDiscrete starting at "
        "0, MultiBinary, or Box with an axis; wrap the environment"
    )


def _shaped(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat.reshape(*flat.shape[:-1], *shape)


def _perturb(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Logits plus Gumbel noise: the largest one is a sample (Gumbel 1954)."""
    return logits - torch.empty_like(logits).exponential_(generator=generator).log_()
