"""The recurrent actor-critic as a Stable-Baselines3 policy.

Shapes: T time steps, B environments, F features, H units, P parameters of the action
distribution. The recurrent state of actor and critic is one tensor [S, B, H], actor
first; this file alone splits it.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Never

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from rlrnn import compiled, seeding
from rlrnn.agents import masking
from rlrnn.agents.acting import Step, stepper
from rlrnn.agents.cores import Dropping, Memoryless
from rlrnn.agents.distributions import (
    ActionDistribution,
    Gaussian,
    StateDependent,
    deviations,
    distribution_for,
)
from rlrnn.agents.observations import Batch, Sequences, columns, infinite, on_each
from rlrnn.moments import PopArt, RunningMoments
from rlrnn.optimizers import light
from rlrnn.recurrent import Cell, Recurrent, together

SYMBOLS = 1024  # of an observation that is one number, up to which there is a table


class RecurrentPolicy(BasePolicy):
    """Features → actor and critic, each a `Recurrent`, a small MLP and a linear head.

    Names and defaults are those of sb3-contrib's `MlpLstmPolicy`; `cell`,
    `critic_keys`, `initial_logits` and `seed` are ours.

    - `net_arch`: layers after the recurrent ones, `dict(pi=[64, 64], vf=[64, 64])`; a
      list stands for both. Behind a `NatureCNN` there are none unless given.
    - `use_sde`: the noise of `Box` actions depends on the state, see `StateDependent`;
      `full_std=False`: it is as large for each action, `use_expln`: it grows slowly
      above 1, `squash_output`: actions end in a tanh, scaled to the space.
    - `log_std_init`: of the actions of a `Box`; one learned number per coordinate.
    - `share_features_extractor=False`: the critic has a features extractor of its own.
    - `optimizer_kwargs`: without them Adam has eps=1e-5, with them torch's default, as
      in Stable-Baselines3.
    - `shared_lstm`: the critic reads the actor's output, and sends no gradient into it.
    - `enable_critic_lstm`: the critic has a recurrent network of its own. With neither,
      a linear layer takes its place, and the critic has no memory.
    - `lstm_kwargs`: `dropout` between recurrent layers, in updates.
    - `cell`: "lstm", "gru", "rnn", "mingru" (see `Recurrent`), or "none": a dense layer
      in its place, the control without memory.
    - `critic_keys`: of a `Dict` observation, what only the critic may see. Actions do
      not depend on these keys, and `predict` does not need them.
    - `norm_obs`: the networks see observations minus their mean, in standard
      deviations, of all that was learned from so far. Both are part of the policy,
      which takes observations as they come.
    - `norm_value`: the critic's head says how many standard deviations from the mean of
      the returns a value is, both part of the policy (see `PopArt`). Values are in the
      units of the rewards everywhere else.
    - `initial_logits`: what the action head says before any training, whatever it sees:
      its bias is set to them (means, for a `Box`) and its weights to zero.
    - `seed`: of the initial weights, and of the actions that `predict` draws.
    """

    default_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: Sequence[Any] | dict[str, Sequence[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Tanh,
        ortho_init: bool = True,
        use_sde: bool = False,
        log_std_init: float | int = 0.0,
        full_std: bool = True,
        use_expln: bool = False,
        squash_output: bool = False,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        lstm_hidden_size: int = 256,
        n_lstm_layers: int = 1,
        shared_lstm: bool = False,
        enable_critic_lstm: bool = True,
        lstm_kwargs: dict[str, Any] | None = None,
        cell: Cell | Literal["none"] = "lstm",
        critic_keys: Sequence[str] = (),
        norm_obs: bool = False,
        norm_value: bool = False,
        initial_logits: list[float] | None = None,
        seed: int = 0,
    ) -> None:
        if shared_lstm and enable_critic_lstm:
            raise ValueError(
                "shared_lstm and enable_critic_lstm are both True: expected at most "
                "one; pass enable_critic_lstm=False to share"
            )
        if shared_lstm and (critic_keys or not share_features_extractor):
            name = "critic_keys" if critic_keys else "share_features_extractor=False"
            raise ValueError(
                f"shared_lstm with {name}: a critic that reads the actor's output has "
                "no features of its own; expected shared_lstm=False"
            )
        if squash_output and not use_sde:
            raise ValueError("squash_output without use_sde: expected use_sde=True")
        if use_sde and not isinstance(action_space, spaces.Box):
            raise ValueError(
                f"use_sde with the action space {action_space}: expected a Box; leave "
                "use_sde out"
            )
        extractor = features_extractor_class or self.default_extractor
        super().__init__(
            observation_space,
            action_space,
            extractor,
            {**(features_extractor_kwargs or {})},  # which Stable-Baselines3 adds to
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=squash_output,
        )
        self.critic_keys = tuple(critic_keys)
        self._check_observations()
        dropout = _dropout(lstm_kwargs, n_lstm_layers)
        pi, vf = _layers(net_arch, extractor)
        hidden = lstm_hidden_size
        self.use_sde, self.use_expln = use_sde, use_expln
        self.shared_lstm = shared_lstm
        self.share_features_extractor = share_features_extractor
        self.distribution: ActionDistribution = distribution_for(action_space)
        gaussian = isinstance(self.distribution, Gaussian)
        outputs = self.distribution.size // (2 if gaussian else 1)
        if use_sde:
            noisy = pi[-1] if pi else hidden
            assert isinstance(action_space, spaces.Box)
            self.distribution = StateDependent(action_space.shape, noisy, squash_output)

        def core(inputs: int) -> Recurrent | Memoryless:
            if cell == "none":
                return Memoryless(inputs, hidden)
            return Recurrent(inputs, hidden, n_lstm_layers, cell)

        with seeding.initialising(seed, "policy"):
            self.features_extractor, self.critic_extractor = self._extractors()
            self._seen = int(self.features_extractor.features_dim)
            features = self._seen  # of the critic
            if self.critic_extractor is not None:
                features = int(self.critic_extractor.features_dim)
                features += self._seen if share_features_extractor else 0
            self.actor = core(self._seen)
            self.critic: nn.Module | None = None
            if enable_critic_lstm:
                critic = core(features)
                self.critic = critic if isinstance(critic, Recurrent) else critic.dense
            elif not shared_lstm:
                self.critic = nn.Linear(features, hidden)
            self.actor_mlp = nn.Sequential(*create_mlp(hidden, 0, pi, activation_fn))
            self.critic_mlp = nn.Sequential(*create_mlp(hidden, 0, vf, activation_fn))
            self.action_net = nn.Linear(pi[-1] if pi else hidden, outputs)
            self.value_net = nn.Linear(vf[-1] if vf else hidden, 1)
            # all that is behind the recurrent networks; a tuple, so not a module again.
            # State-dependent noise needs what the action head sees.
            last = () if use_sde else (self.action_net,)
            self._heads = (
                nn.Sequential(*self.actor_mlp, *last),
                nn.Sequential(*self.critic_mlp, self.value_net),
            )
            if ortho_init:  # gains as in Stable-Baselines3
                for module, gain in (
                    (self.features_extractor, math.sqrt(2)),
                    (self.critic_extractor, math.sqrt(2)),
                    (self.actor_mlp, math.sqrt(2)),
                    (self.critic_mlp, math.sqrt(2)),
                    (self.action_net, 0.01),
                    (self.value_net, 1.0),
                ):
                    for child in module.modules() if module is not None else ():
                        self.init_weights(child, gain)
            cores = [c for c in (self.actor, self.critic) if isinstance(c, Recurrent)]
            self.dropping = seeding.generator(seed, "dropout")
            self._dropping = tuple(
                Dropping(c, dropout, self.dropping) for c in cores if dropout
            )
        self.log_std: nn.Parameter | None = None
        if gaussian:
            shape = (noisy, outputs if full_std else 1) if use_sde else (outputs,)
            self.log_std = nn.Parameter(torch.full(shape, float(log_std_init)))
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
            extractor is FlattenExtractor
            and isinstance(observation_space, spaces.Box)
            and not is_image_space(observation_space)
        )
        # of one number, the one-hot vectors: looked up sooner than made
        self._symbols: Tensor | None
        discrete = isinstance(observation_space, spaces.Discrete)
        few = discrete and self._seen <= SYMBOLS and extractor is FlattenExtractor
        table = torch.eye(self._seen) if few else None
        self.register_buffer("_symbols", table, persistent=False)
        self.seen: RunningMoments | None = None
        if norm_obs:
            if not self._plain:
                raise ValueError(
                    f"norm_obs is True and the observations are {observation_space}: "
                    "expected a Box of numbers; leave norm_obs out"
                )
            self.seen = RunningMoments(int(self.features_extractor.features_dim))
        self.popart = PopArt() if norm_value else None
        self._actor_rows = len(self.actor.initial_state(1))
        self.generator = seeding.generator(seed, "predict")
        self._noise: Tensor | None = None  # [n, L, D] that `predict` explores with
        kwargs = dict(optimizer_kwargs or {})
        if optimizer_class is torch.optim.Adam:
            if optimizer_kwargs is None:
                kwargs["eps"] = 1e-5
            if not {"foreach", "differentiable"} & kwargs.keys():
                kwargs.setdefault("fused", True)
        make = light(optimizer_class)
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **kwargs)

    def _check_observations(self) -> None:
        """Spaces that the features extractor cannot take, before it says so at length.

        ValueError: what was given, what was expected.
        """
        space, extractor = self.observation_space, self.features_extractor_class
        parts = [*space.spaces.values()] if isinstance(space, spaces.Dict) else [space]
        if any(isinstance(part, (spaces.Dict, spaces.Tuple)) for part in parts):
            raise ValueError(
                f"observation space is {space}: expected Box, Discrete, MultiDiscrete, "
                "MultiBinary or a Dict of them; wrap the environment"
            )
        for part in parts:
            start = getattr(part, "start", 0)  # of the discrete ones
            if np.any(start != 0):
                raise ValueError(
                    f"observation space is {space}: expected numbers that start at 0; "
                    "wrap the environment"
                )
        is_dict = isinstance(space, spaces.Dict)
        if is_dict and extractor in (FlattenExtractor, NatureCNN):
            raise ValueError(
                f"observation space is {space}: expected no Dict; use "
                "'MultiInputLstmPolicy', which takes one"
            )
        if extractor is CombinedExtractor and not is_dict:
            raise ValueError(
                f"observation space is {space}: expected a Dict; use 'MlpLstmPolicy' "
                "or, for images, 'CnnLstmPolicy'"
            )
        normalized = bool(self.features_extractor_kwargs.get("normalized_image"))
        if extractor is NatureCNN and not is_image_space(
            space, normalized_image=normalized
        ):
            raise ValueError(
                f"observation space is {space}: expected an image, uint8 in [0, 255] "
                "with three axes; use 'MlpLstmPolicy', or normalize_images=False for "
                "images of another type"
            )
        if self.critic_keys:
            keys = set(space.spaces) if isinstance(space, spaces.Dict) else set()
            if not set(self.critic_keys) < keys:
                raise ValueError(
                    f"critic_keys are {list(self.critic_keys)}: expected some keys of "
                    f"a Dict observation, not all; it has {sorted(keys)}"
                )

    def _extractors(self) -> tuple[BaseFeaturesExtractor, BaseFeaturesExtractor | None]:
        """The actor's, and what the critic has of its own: features of all keys, or,
        if it shares the actor's, of the `critic_keys`.
        """
        make, kwargs = self.features_extractor_class, self.features_extractor_kwargs
        space, shared = self.observation_space, self.share_features_extractor
        if self.critic_keys:
            assert isinstance(space, spaces.Dict)
            hidden = {key: space[key] for key in self.critic_keys}
            seen = {k: v for k, v in space.spaces.items() if k not in hidden}
            extractor = make(spaces.Dict(seen), **kwargs)
            return extractor, make(spaces.Dict(hidden) if shared else space, **kwargs)
        extractor = make(space, **kwargs)
        # one that learns nothing is the same for both
        if shared or make is FlattenExtractor:
            return extractor, None
        return extractor, make(space, **kwargs)

    def initial_state(self, batch: int) -> Float[Tensor, "S B H"]:
        """The state before the first step: zeros."""
        state = self.actor.initial_state(batch)
        if isinstance(self.critic, Recurrent):
            state = torch.cat((state, self.critic.initial_state(batch)))
        return state

    def evaluate_sequence(
        self,
        obs: Sequences,
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"],
        truncation: int | None = None,
    ) -> tuple[Float[Tensor, "T B P"], Float[Tensor, "T B"], Float[Tensor, "S B H"]]:
        """Action parameters, values, and the state after the last step.

        `starts[t, b]`: an episode of environment b begins with `obs[t, b]`. With a
        `truncation` of K no gradient goes from step K, 2K, ... to those before it.
        """
        features = self.features(obs)
        if truncation is None or truncation >= len(starts):
            return self._evaluate(features, state, starts)
        parts: list[tuple[Tensor, Tensor]] = []
        for begin in range(0, len(starts), truncation):
            now = slice(begin, begin + truncation)
            if begin:
                state = state.detach()
            params, values, state = self._evaluate(features[now], state, starts[now])
            parts.append((params, values))
        params, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return params, values, state

    def _evaluate(
        self, features: Tensor, state: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`evaluate_sequence` of features, without truncation."""
        seen, known = self._views(features)
        mine, its = self.split(state)
        actor_head, critic_head = self._heads
        if isinstance(self.critic, Recurrent):
            (outputs, mine, _), (values, its, _) = self._through(
                [self.actor, self.critic],
                [actor_head, critic_head],
                [seen, known],
                [mine, its],
                starts,
            )
        else:
            ((outputs, mine, latent),) = self._through(
                [self.actor], [actor_head], [seen], [mine], starts
            )
            values = critic_head(self._memoryless(known, latent))
        return self._params(outputs), self._valued(values), torch.cat((mine, its))

    def _valued(self, outputs: Float[Tensor, "*T B 1"]) -> Float[Tensor, "*T B"]:
        """What the critic's head says, as values in the units of the rewards."""
        values = outputs.squeeze(-1)
        return values if self.popart is None else self.popart.unscale(values)

    def _through(
        self,
        cores: Sequence[Recurrent | Memoryless],
        heads: Sequence[nn.Sequential],
        xs: Sequence[Tensor],
        states: Sequence[Tensor],
        starts: Tensor,
    ) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
        """`recurrent.together`, for what it does not know too."""
        dropping = self._dropping if self.training else ()
        recurrent = [core for core in cores if isinstance(core, Recurrent)]
        if not dropping and len(recurrent) == len(cores):
            return together(recurrent, heads, xs, states, starts)
        results = []
        for core, head, x, state in zip(
            dropping or cores, heads, xs, states, strict=True
        ):
            y, after = core(x, state, starts)
            results.append((head(y), after, y))
        return results

    @property
    def drops(self) -> bool:
        """Whether something is dropped in updates."""
        return bool(self._dropping)

    def take_in(self, obs: Sequences) -> None:
        """Count them for `norm_obs`. It changes what the networks see from now on."""
        if self.seen is not None:
            assert isinstance(obs, Tensor)
            self.seen.update(obs.flatten(2).flatten(0, 1))

    def adapt(self, returns: Float[Tensor, "T B"]) -> None:
        """Count them for `norm_value`; values stay what they are."""
        if self.popart is not None:
            self.popart.move(returns, self.value_net)

    def threads(self) -> AbstractContextManager[None]:
        """Around an update: who has the threads of a CPU."""
        small = not list(self.features_extractor.parameters())
        if self.critic_extractor is not None:
            small = small and not list(self.critic_extractor.parameters())
        return compiled.undisturbed() if small else nullcontext()

    def stepper(self) -> Step:
        """The actor alone, a step at a time: features, its state [_, B, H] and starts
        to parameters, latents and state. For as long as the weights stay as they are.
        """
        step = stepper(self.actor, self._heads[0])
        if self.log_std is None and self.critic_extractor is None:
            return step

        @torch.no_grad()
        def act(
            features: Tensor, state: Tensor, starts: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            seen, _ = self._views(features)
            outputs, latent, state = step(seen, state, starts)
            return self._params(outputs), latent, state

        return act

    def sampler(
        self, generator: torch.Generator, every: int = -1
    ) -> Callable[[Tensor], Tensor]:
        """Draws actions from parameters [B, P], step by step, as the weights are now.

        State-dependent noise stays for `every` steps, or for good if that is negative.
        """
        distribution = self.distribution
        if not isinstance(distribution, StateDependent):
            return lambda params: distribution.sample(params, generator)
        steps = 0
        noise: Tensor | None = None

        @torch.no_grad()
        def explore(params: Tensor) -> Tensor:
            nonlocal steps, noise
            if noise is None or (every > 0 and steps % every == 0):
                noise = self._std() * self._unit_noise(len(params), generator)
            steps += 1
            return distribution.explore(params, noise)

        return explore

    def reset_noise(self, n_envs: int = 1) -> None:
        """With `use_sde`: new noise for the actions that `predict` draws.

        That of training is the agent's: see `sampler`.
        """
        if not self.use_sde:
            raise ValueError("reset_noise without use_sde: expected use_sde=True")
        self._noise = self._unit_noise(n_envs, self.generator)

    def _unit_noise(self, n: int, generator: torch.Generator) -> Tensor:
        shape = n, *self._std().shape
        return torch.empty(shape, device=generator.device).normal_(generator=generator)

    def _std(self) -> Float[Tensor, "L D"]:
        """Deviations of the entries of the noise matrix."""
        assert self.log_std is not None
        return deviations(self.log_std, self.action_net.out_features, self.use_expln)

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
            _, known = self._views(features)
            if isinstance(self.critic, Recurrent):
                states = self.critic.trace(known, state, starts)
                latents = states[:, self.critic.layers - 1]
            else:
                states = state.expand(len(features), *state.shape)
                latents = self._memoryless(known, latents)
            return self._valued(self._heads[1](latents)), states

    def value(
        self,
        obs: Batch,
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "B"],
    ) -> Float[Tensor, "B"]:
        """The values of `obs` seen next in `state`, which stays as it is."""
        features = self.features(on_each(lambda x: x[None], obs))
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
        if isinstance(observation, dict):
            hidden = self.critic_keys
            observation = {k: v for k, v in observation.items() if k not in hidden}
        obs, vectorized = self.obs_to_tensor(observation)
        n = columns(obs)
        if (bad := infinite(obs, 1)).any():
            raise ValueError(
                f"observation {int(bad.nonzero()[0])} of {n} is not finite: expected "
                "numbers; repair the environment"
            )
        rows = self.actor.initial_state(n)
        if state is not None:
            given, layers = [list(np.shape(part)) for part in state], self.actor.layers
            expected = [list(part.shape) for part in torch.split(rows, layers)]
            if given != expected:
                raise ValueError(
                    f"state has shapes {given}: expected {expected} for {n} "
                    "observations; pass None to begin anew"
                )
            whole = np.concatenate(state)
            rows = torch.as_tensor(whole, dtype=rows.dtype, device=rows.device)
        begins = np.zeros(n, bool) if episode_start is None else episode_start
        begins = np.asarray(begins, bool)
        if begins.size not in (1, n):
            raise ValueError(
                f"episode_start has {begins.size} entries: expected one for each of "
                f"the {n} observations"
            )
        starts = torch.tensor(np.broadcast_to(begins.ravel(), n), device=rows.device)
        with torch.no_grad():
            seen = self.actor_features(on_each(lambda x: x[None], obs))
            latent, rows = self.actor(seen, rows, starts[None])
            params = self.params(latent)[0].cpu()
        if action_masks is not None:
            masks = masking.as_masks(self.action_space, action_masks, n, "action_masks")
            params = masking.masked(self.distribution, params, torch.from_numpy(masks))
        if deterministic:
            actions = self.distribution.mode(params).numpy()
        else:
            actions = self._draw(params).numpy()
        if self.squash_output:
            actions = self.unscale_action(actions)
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
        n = columns(observation)
        starts = torch.ones(1, n, dtype=torch.bool, device=self.device)
        seen = self.actor_features(on_each(lambda x: x[None], observation))
        latent, _ = self.actor(seen, self.actor.initial_state(n), starts)
        params = self.params(latent)[0].cpu()
        return self.distribution.mode(params) if deterministic else self._draw(params)

    def _draw(self, params: Float[Tensor, "n P"]) -> Tensor:
        """Actions for `predict`, on the CPU."""
        if not isinstance(self.distribution, StateDependent):
            return self.distribution.sample(params, self.generator)
        noise = self._noise
        if noise is None or len(noise) != len(params):
            noise = self._noise = self._unit_noise(len(params), self.generator)
        with torch.no_grad():
            return self.distribution.explore(params, self._std().cpu() * noise)

    def features(self, obs: Sequences) -> Float[Tensor, "T B F"]:
        """What the networks see of `obs`: features of the actor, which the critic may
        share, then those that the critic alone has.
        """
        features = self.actor_features(obs)
        if self.critic_extractor is None:
            return features
        if self.share_features_extractor:
            assert isinstance(obs, dict)
            obs = {key: obs[key] for key in self.critic_keys}
        return torch.cat((features, self._extract(obs, self.critic_extractor)), -1)

    def actor_features(self, obs: Sequences) -> Float[Tensor, "T B F"]:
        """What the actor sees of `obs`; `critic_keys` may be missing."""
        if self._plain and isinstance(obs, Tensor) and obs.dtype == torch.float32:
            flat = obs.flatten(2)
            return flat if self.seen is None else self.seen.normalize(flat)
        if self._symbols is not None and isinstance(obs, Tensor) and obs.ndim == 2:
            return F.embedding(obs.long(), self._symbols)
        if isinstance(obs, dict):
            obs = {k: v for k, v in obs.items() if k not in self.critic_keys}
        return self._extract(obs, self.features_extractor)

    def _extract(self, obs: Sequences, extractor: BaseFeaturesExtractor) -> Tensor:
        """Preprocessed as in Stable-Baselines3: integers become one-hot vectors."""
        one = next(iter(obs.values())) if isinstance(obs, dict) else obs
        flat = on_each(lambda x: x.flatten(0, 1), obs)
        return self.extract_features(flat, extractor).reshape(*one.shape[:2], -1)

    def _views(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the actor sees, and what the critic does."""
        if self.critic_extractor is None:
            return features, features
        seen, own = features[..., : self._seen], features[..., self._seen :]
        return seen, features if self.share_features_extractor else own

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the actor, and those of the critic."""
        return state[: self._actor_rows], state[self._actor_rows :]

    def params(self, latent: Float[Tensor, "*T B H"]) -> Float[Tensor, "*T B P"]:
        """Parameters of the action distribution."""
        return self._params(self._heads[0](latent))

    def _params(self, outputs: Tensor) -> Tensor:
        """What the head says, with the deviations if there are any."""
        if self.log_std is None:
            return outputs
        if isinstance(self.distribution, StateDependent):
            mean = self.action_net(outputs)
            return self.distribution.params(mean, outputs, self._std())
        return torch.cat((outputs, self.log_std.expand_as(outputs)), -1)

    def _memoryless(self, features: Tensor, latents: Tensor) -> Tensor:
        """What a critic without recurrence of its own looks at."""
        return latents.detach() if self.critic is None else self.critic(features)


MlpLstmPolicy = RecurrentPolicy


class CnnLstmPolicy(RecurrentPolicy):
    """A `RecurrentPolicy` for images: its features are those of `NatureCNN`."""

    default_extractor = NatureCNN


class MultiInputLstmPolicy(RecurrentPolicy):
    """A `RecurrentPolicy` for `Dict` observations: images go through `NatureCNN`, the
    rest is flattened, and all lie end to end.
    """

    default_extractor = CombinedExtractor


def _layers(
    net_arch: Any, extractor: type[BaseFeaturesExtractor]
) -> tuple[list[int], list[int]]:
    """Widths of the layers behind the recurrent ones, in actor and critic."""
    if net_arch is None:
        net_arch = [] if extractor is NatureCNN else [64, 64]
    given = net_arch
    if isinstance(net_arch, (list, tuple)) and net_arch:
        if isinstance(net_arch[0], dict):
            net_arch = net_arch[0]  # as before Stable-Baselines3 1.8
    if isinstance(net_arch, (list, tuple)):
        net_arch = {"pi": net_arch, "vf": net_arch}
    widths: list[Any] = [net_arch]
    if isinstance(net_arch, dict):
        if extra := net_arch.keys() - {"pi", "vf"}:
            raise ValueError(f"net_arch has {sorted(extra)}: expected 'pi' and 'vf'")
        widths = [net_arch.get("pi", []), net_arch.get("vf", [])]
    for layers in widths:
        right = isinstance(layers, (list, tuple)) and all(
            isinstance(n, (int, np.integer)) and n > 0 for n in layers
        )
        if not right:
            raise ValueError(
                f"net_arch is {given!r}: expected a list of widths, or such a list for "
                "each of 'pi' and 'vf'"
            )
    pi, vf = ([int(n) for n in layers] for layers in widths)
    return pi, vf


def _dropout(lstm_kwargs: dict[str, Any] | None, layers: int) -> float:
    """The one option of `nn.LSTM` that is not another architecture."""
    given = dict(lstm_kwargs or {})
    rate = float(given.pop("dropout", 0.0))
    defaults: dict[str, Any] = {"bias": True, "proj_size": 0}
    defaults |= {"batch_first": False, "bidirectional": False}
    for name, value in given.items():
        if name not in defaults or value != defaults[name]:
            raise ValueError(
                f"lstm_kwargs has {name}={value!r}: expected only 'dropout'; leave it "
                "out"
            )
    if not 0 <= rate < 1:
        raise ValueError(f"lstm_kwargs has dropout={rate}: expected 0 <= dropout < 1")
    if rate and layers == 1:
        warnings.warn(
            f"lstm_kwargs has dropout={rate} and n_lstm_layers is 1: dropout is "
            "between layers, so nothing is dropped",
            stacklevel=2,
        )
    return rate
