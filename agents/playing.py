"""A step of a rollout: the policy's, and, in a captured graph, the environment's too.

Shapes: B environments; S and H of the recurrent state.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from gymnasium.vector import VectorWrapper
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from rlrnn.agents.distributions import StateDependent
from rlrnn.agents.masking import masked
from rlrnn.agents.observations import Batch, on_each
from rlrnn.agents.policies import RecurrentPolicy
from rlrnn.agents.vector import Source, TensorSource, TensorVecEnv
from rlrnn.graphs import Graphs


class Chosen(NamedTuple):
    """What the actor made of an observation; `state` is its own after it."""

    features: Float[Tensor, "B F"]
    params: Float[Tensor, "B P"]
    latent: Float[Tensor, "B _"]
    state: Float[Tensor, "S B H"]
    actions: Shaped[Tensor, "B *action"]


class Player:
    """Plays the rollouts of an agent, step by step.

    With graphs, and an environment that has `stepped` (see `rlrnn.envs.tensor`), both
    steps are one graph. Noise that depends on the state has its own clock on the host,
    and is played without.
    """

    def __init__(self, graphs: Graphs | None) -> None:
        self.graphs = graphs
        self.face: TensorVecEnv | None = None  # of an environment inside the graph

    def begin(
        self,
        policy: RecurrentPolicy,
        source: Source,
        generator: torch.Generator,
        every: int,
    ) -> None:
        """Before each rollout: the weights stay as they are from here on."""
        self.policy, self.generator = policy, generator
        self.act = policy.stepper()
        self.draw = policy.sampler(generator, every)
        self.face = None
        if self.graphs is None or not isinstance(source, TensorSource):
            return
        env = source.face.env
        if isinstance(policy.distribution, StateDependent) or not _is_function(env):
            return
        self.face, self.squashed = source.face, source.squashed
        settings, tensors = env.surroundings()
        self.baked: tuple[Hashable, ...] = (policy, env, source.squashed, settings)
        self.tensors = [*tensors, *self.face.bounds]

    def __call__(
        self,
        obs: Batch,
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "B"],
        masks: Bool[Tensor, "B M"] | None,
    ) -> tuple[Chosen, Any]:
        """What is done next, and what the environment told, if it has been done."""
        if self.face is None:
            return self._choose(obs, state, starts, masks), None
        assert self.graphs is not None
        env, policy = self.face.env, self.policy
        chosen, env.state, told = self.graphs(
            "step",
            self._step,
            (obs, state, starts, masks, env.state),
            constants=self.baked,
            read=lambda: [*policy.parameters(), *policy.buffers(), *self.tensors],
            generators=(self.generator,),
        )
        return chosen, told

    def _step(
        self, obs: Any, state: Tensor, starts: Tensor, masks: Any, before: Any
    ) -> tuple[Chosen, Any, Any]:
        assert self.face is not None
        chosen = self._choose(obs, state, starts, masks)
        actions = self.face.taken(chosen.actions, self.squashed)
        after, told = self.face.env.stepped(before, actions)
        return chosen, after, told

    @torch.no_grad()
    def _choose(self, obs: Any, state: Tensor, starts: Tensor, masks: Any) -> Chosen:
        features = self.policy.features(on_each(lambda x: x[None], obs))[0]
        params, latent, state = self.act(features, state, starts)
        if masks is not None:
            params = masked(self.policy.distribution, params, masks)
        return Chosen(features, params, latent, state, self.draw(params))


def _is_function(env: object) -> bool:
    """Whether `stepped` is what `step` does: not of a class, or a wrapper, that has
    another `step`, nor of what is inside such a wrapper."""
    first = next(c for c in type(env).__mro__ if "step" in vars(c))
    if isinstance(env, VectorWrapper) and not _is_function(env.env):
        return False
    return "stepped" in vars(first)
