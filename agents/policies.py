"""The recurrent actor-critic as a Stable-Baselines3 policy.

Shapes: T time steps, B environments, F features, H units, P parameters of the action
distribution. The recurrent state of actor and critic is one tensor [S, B, H], actor
first; this file alone splits it.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Never

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    FlattenExtractor,
    create_mlp,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from rlrnn import compiled, seeding
from rlrnn.agents import masking
from rlrnn.agents.acting import Step, stepper
from rlrnn.agents.distributions import Gaussian, distribution_for
from rlrnn.recurrent import Cell, Recurrent, together


class RecurrentPolicy(BasePolicy):
    """Features → actor and critic, each a `Recurrent`, a small MLP and a linear head.

    Names and defaults are those of sb3-contrib's `MlpLstmPolicy`; `cell`,
    `initial_logits` and `seed` are ours.

    - `net_arch`: layers after the recurrent ones, `dict(pi=[64, 64], vf=[64, 64])`; a
      list stands for both.
    - `shared_lstm`: the critic reads the actor's output, and sends no gradient into it.
    - `enable_critic_lstm`: the critic has a recurrent network of its own. With neither,
      a linear layer takes its place, and the critic has no memory.
    - `log_std_init`: of the actions of a `Box`; one learned number per coordinate.
    - `optimizer_kwargs`: for `torch.optim.Adam`; eps is 1e-5 unless given.
    - `initial_logits`: what the action head says before any training, whatever it sees:
      its bias is set to them (means, for a `Box`) and its weights to zero.
    - `seed`: of the initial weights, and of the actions that `predict` draws.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Tanh,
        ortho_init: bool = True,
        log_std_init: float = 0.0,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_kwargs: dict[str, Any] | None = None,
        lstm_hidden_size: int = 256,
        n_lstm_layers: int = 1,
        shared_lstm: bool = False,
        enable_critic_lstm: bool = True,
        cell: Cell = "lstm",
        initial_logits: list[float] | None = None,
        seed: int = 0,
    ) -> None:
        if shared_lstm and enable_critic_lstm:
            raise ValueError(
                "shared_lstm and enable_critic_lstm are both True: expected at most "
                "one; pass enable_critic_lstm=False to share"
            )
        if isinstance(observation_space, (spaces.Dict, spaces.Tuple)):
            raise ValueError(
                f"observation space is {observation_space}: expected Box, Discrete, "
                "MultiDiscrete or MultiBinary; wrap the environment"
            )
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
        )
        self.distribution = distribution_for(action_space)
        self.shared_lstm = shared_lstm
        if net_arch is None:
            net_arch = {"pi": [64, 64], "vf": [64, 64]}
        if isinstance(net_arch, list):
            net_arch = {"pi": net_arch, "vf": net_arch}
        if extra := net_arch.keys() - {"pi", "vf"}:
            raise ValueError(f"net_arch has {sorted(extra)}: expected 'pi' and 'vf'")

        gaussian = isinstance(self.distribution, Gaussian)
        outputs = self.distribution.size // (2 if gaussian else 1)
        hidden = lstm_hidden_size
        pi, vf = net_arch.get("pi", []), net_arch.get("vf", [])
        with seeding.initialising(seed, "policy"):
            self.features_extractor = self.make_features_extractor()
            features = int(self.features_extractor.features_dim)
            self.actor = Recurrent(features, hidden, n_lstm_layers, cell)
            self.critic: Recurrent | nn.Linear | None = None
            if enable_critic_lstm:
                self.critic = Recurrent(features, hidden, n_lstm_layers, cell)
            elif not shared_lstm:
                self.critic = nn.Linear(features, hidden)
            self.actor_mlp = nn.Sequential(*create_mlp(hidden, 0, pi, activation_fn))
            self.critic_mlp = nn.Sequential(*create_mlp(hidden, 0, vf, activation_fn))
            self.action_net = nn.Linear(pi[-1] if pi else hidden, outputs)
            self.value_net = nn.Linear(vf[-1] if vf else hidden, 1)
            # all that is behind the recurrent networks; a tuple, so not a module again
            self._heads = (
                nn.Sequential(*self.actor_mlp, self.action_net),
                nn.Sequential(*self.critic_mlp, self.value_net),
            )
            if ortho_init:  # gains as in Stable-Baselines3
                for module, gain in (
                    (self.features_extractor, math.sqrt(2)),
                    (self.actor_mlp, math.sqrt(2)),
                    (self.critic_mlp, math.sqrt(2)),
                    (self.action_net, 0.01),
                    (self.value_net, 1.0),
                ):
                    for child in module.modules():
                        self.init_weights(child, gain)
        self.log_std: nn.Parameter | None = None
        if gaussian:
            self.log_std = nn.Parameter(torch.full((outputs,), float(log_std_init)))
        if initial_logits is not None:
            if len(initial_logits) != outputs or not np.isfinite(initial_logits).all():
                raise ValueError(
                    f"initial_logits are {initial_logits}: expected {outputs} finite "
                    f"numbers, one per output for {action_space}"
                )
            with torch.no_grad():
                self.action_net.weight.zero_()
                self.action_net.bias.copy_(torch.tensor(initial_logits))
        # an observation that is its own features
        self._plain = (
            features_extractor_class is FlattenExtractor
            and isinstance(observation_space, spaces.Box)
            and not is_image_space(observation_space)
        )
        self._actor_rows = len(self.actor.initial_state(1))
        self.generator = seeding.generator(seed, "predict")
        adam = {"eps": 1e-5, "fused": True, **(optimizer_kwargs or {})}
        self.optimizer = torch.optim.Adam(self.parameters(), lr_schedule(1), **adam)

    def initial_state(self, batch: int) -> Float[Tensor, "S B H"]:
        """The state before the first step: zeros."""
        state = self.actor.initial_state(batch)
        if isinstance(self.critic, Recurrent):
            state = torch.cat((state, self.critic.initial_state(batch)))
        return state

    def evaluate_sequence(
        self,
        obs: Shaped[Tensor, "T B *obs"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"],
    ) -> tuple[Float[Tensor, "T B P"], Float[Tensor, "T B"], Float[Tensor, "S B H"]]:
        """Action parameters, values, and the state after the last step.

        `starts[t, b]`: an episode of environment b begins with `obs[t, b]`.
        """
        features = self.features(obs)
        mine, its = self.split(state)
        actor_head, critic_head = self._heads
        cores, heads, states = [self.actor], [actor_head], [mine]
        if isinstance(self.critic, Recurrent):
            cores, heads = [*cores, self.critic], [*heads, critic_head]
            states.append(its)
        results = together(cores, heads, [features] * len(cores), states, starts)
        means, mine, latent = results[0]
        if isinstance(self.critic, Recurrent):
            values, its, _ = results[1]
        else:
            values = critic_head(self._memoryless(features, latent))
        return self._params(means), values.squeeze(-1), torch.cat((mine, its))

    def threads(self) -> AbstractContextManager[None]:
        """Around an update: who has the threads of a CPU."""
        small = not list(self.features_extractor.parameters())
        return compiled.undisturbed() if small else nullcontext()

    def stepper(self) -> Step:
        """The actor alone, a step at a time: features, its state [_, B, H] and starts
        to parameters, latents and state. For as long as the weights stay as they are.
        """
        step = stepper(self.actor, self._heads[0])
        if self.log_std is None:
            return step

        @torch.no_grad()
        def gaussian(
            features: Tensor, state: Tensor, starts: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            means, latent, state = step(features, state, starts)
            return self._params(means), latent, state

        return gaussian

    def appraise(
        self,
        features: Float[Tensor, "T B F"],
        latents: Float[Tensor, "T B _"],
        state: Float[Tensor, "_ B _"],
        starts: Bool[Tensor, "T B"],
    ) -> tuple[Float[Tensor, "T B"], Float[Tensor, "T _ B _"]]:
        """The critic alone, without gradients: values, and its state after each step.

        `latents` are what the actor made of the features: all that a shared one sees.
        """
        with torch.no_grad():
            if isinstance(self.critic, Recurrent):
                states = self.critic.trace(features, state, starts)
                latents = states[:, self.critic.layers - 1]
            else:
                states = state.expand(len(features), *state.shape)
                latents = self._memoryless(features, latents)
            return self._heads[1](latents).squeeze(-1), states

    def value(
        self,
        obs: Shaped[Tensor, "B *obs"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "B"],
    ) -> Float[Tensor, "B"]:
        """The values of `obs` seen next in `state`, which stays as it is."""
        features = self.features(obs[None])
        mine, its = self.split(state)
        latents = features  # what only a shared critic looks at
        if self.shared_lstm:
            latents, _ = self.actor(features, mine, starts[None])
        return self.appraise(features, latents, its, starts[None])[0][0]

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
        action_masks: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Actions for one observation or a batch of n, and the state to pass next time.

        The state is a tuple of arrays [layers, n, H] (of an LSTM: hidden states, cell
        states), None before the first step. `episode_start` [n] says whose episode
        begins, which clears its state. `action_masks` [n, M] say what is allowed, see
        `rlrnn.agents.masking`. Actions of a `Box` are clipped to it. Draws come from
        the policy's `generator`.
        """
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        assert isinstance(obs, Tensor)
        n = len(obs)
        rows = self.actor.initial_state(n)
        if state is not None:
            given = np.concatenate(state)
            if given.shape != rows.shape:
                raise ValueError(
                    f"state has shape {list(given.shape)}: expected "
                    f"{list(rows.shape)} for {n} observations; pass None to begin anew"
                )
            rows = torch.as_tensor(given, dtype=rows.dtype, device=rows.device)
        begins = np.zeros(n, bool) if episode_start is None else episode_start
        begins = np.asarray(begins, bool)
        if begins.size not in (1, n):
            raise ValueError(
                f"episode_start has {begins.size} entries: expected one for each of "
                f"the {n} observations"
            )
        starts = torch.tensor(np.broadcast_to(begins.ravel(), n), device=rows.device)
        with torch.no_grad():
            latent, rows = self.actor(self.features(obs[None]), rows, starts[None])
            params = self.params(latent)[0].cpu()
        if action_masks is not None:
            masks = masking.as_masks(self.action_space, action_masks, n, "action_masks")
            params = masking.masked(self.distribution, params, torch.from_numpy(masks))
        if deterministic:
            actions = self.distribution.mode(params).numpy()
        else:
            actions = self.distribution.sample(params, self.generator).numpy()
        if isinstance(self.action_space, spaces.Box):
            actions = np.clip(actions, self.action_space.low, self.action_space.high)
        actions = actions.astype(self.action_space.dtype)
        states = tuple(x.numpy() for x in rows.cpu().split(self.actor.layers))
        return actions if vectorized else actions.squeeze(0), states

    def save(self, path: str) -> Never:
        raise NotImplementedError("a policy has no file of its own: save the agent")

    @classmethod
    def load(cls, path: str, device: torch.device | str = "auto") -> Never:
        raise NotImplementedError("a policy has no file of its own: load the agent")

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Actions [B] on the first observations of episodes."""
        assert isinstance(observation, Tensor)
        n = len(observation)
        starts = torch.ones(n, dtype=torch.bool, device=self.device)
        params, _, _ = self.evaluate_sequence(
            observation[None], self.initial_state(n), starts[None]
        )
        params = params[0].cpu()
        if deterministic:
            return self.distribution.mode(params)
        return self.distribution.sample(params, self.generator)

    def features(self, obs: Shaped[Tensor, "T B *obs"]) -> Float[Tensor, "T B F"]:
        """Preprocessed as in Stable-Baselines3: integers become one-hot vectors."""
        if self._plain and obs.dtype == torch.float32:
            return obs.flatten(2)
        features = self.extract_features(obs.flatten(0, 1), self.features_extractor)
        return features.reshape(*obs.shape[:2], -1)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the actor, and those of the critic."""
        return state[: self._actor_rows], state[self._actor_rows :]

    def params(self, latent: Float[Tensor, "*T B H"]) -> Float[Tensor, "*T B P"]:
        """Parameters of the action distribution."""
        return self._params(self._heads[0](latent))

    def _params(self, means: Tensor) -> Tensor:
        """What the action head says, with the deviations if there are any."""
        if self.log_std is None:
            return means
        return torch.cat((means, self.log_std.expand_as(means)), -1)

    def _memoryless(self, features: Tensor, latents: Tensor) -> Tensor:
        """What a critic without recurrence of its own looks at."""
        return latents.detach() if self.critic is None else self.critic(features)
