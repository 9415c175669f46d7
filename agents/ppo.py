"""Recurrent PPO: a Stable-Baselines3 algorithm with a loop of its own inside.

Schulman et al. 2017, "Proximal policy optimization algorithms", on whole sequences.
Shapes: T steps, B environments; S and H of the recurrent state.
"""

import secrets
import time
import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any, ClassVar, Never

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from jaxtyping import Float
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import (
    FloatSchedule,
    get_system_info,
)
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from rlrnn import checkpoint, losses, returns, seeding
from rlrnn.agents import contrib, files
from rlrnn.agents.masking import masked, possible
from rlrnn.agents.observations import columns, infinite, on_each, outside, parts
from rlrnn.agents.playing import Player
from rlrnn.agents.policies import (
    CnnLstmPolicy,
    MultiInputLstmPolicy,
    RecurrentPolicy,
)
from rlrnn.agents.rollout import Minibatch, Rollout, minibatches, segment_length
from rlrnn.agents.storage import restore_statistics, statistics
from rlrnn.agents.vector import (
    FAULTS,
    STACKING,
    AnyEnv,
    HostArray,
    TensorSource,
    TensorVecEnv,
    brief,
    is_tensor_env,
    source_of,
    stacking,
)
from rlrnn.graphs import graphs_for
from rlrnn.moments import RunningMoments
from rlrnn.optimizers import at_rates, capturable, moments


class RecurrentPPO(OnPolicyAlgorithm):
    """PPO with memory; the arguments and defaults of sb3-contrib's `RecurrentPPO`.

    `env` is an environment id, a gymnasium environment, a Stable-Baselines3 `VecEnv`,
    or a tensor environment of `rlrnn.envs`. For the latter, no step of collection or
    update waits for the device; `device="auto"` is then the environment's.

    An update collects T = `n_steps` steps in B environments, and goes over them
    `n_epochs` times in minibatches of `batch_size` steps: whole columns [T, n], or,
    where a column is larger, segments of the largest length that divides it, each from
    the recurrent state it began in. Everything random comes from `seed`; the global
    generators of random, numpy and torch are not touched.

    What is learned is `reward_scale` times the reward, best such that values are of the
    order of 1; `norm_reward` finds such a scale: rewards in standard deviations of the
    discounted sum of rewards so far (as `VecNormalize` has it, but on the device). The
    episode statistics are of the rewards as they come. The policy's `norm_value` is the
    other way: values of any size, with the value loss (`train/value_loss`) and
    `clip_range_vf` in standard deviations of the returns.

    Segments begin in the states of the policy that played. These become stale as it
    learns (Kapturowski et al. 2019, "Recurrent experience replay in distributed
    reinforcement learning"); with `recompute_states` each epoch after the first plays
    the rollout again, from its beginning, for those of the current policy. Within a
    segment gradients go back to its beginning, or, with `bptt_truncation`, over so many
    steps at most: the state is detached each time as many have passed.

    Learning rate and clip ranges are numbers or functions of the remaining progress,
    which runs from 1 to 0.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": RecurrentPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }
    policy: RecurrentPolicy  # type: ignore[assignment]
    use_masking = True  # for calls of `collect_rollouts` outside of `learn`
    rollout_buffer: Rollout  # type: ignore[assignment]
    _kept: dict[str, Any] | None = None  # what a VecNormalize knew before the rollout

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: AnyEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 128,
        batch_size: int | None = 128,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        reward_scale: float = 1.0,
        norm_reward: bool = False,
        recompute_states: bool = False,
        bptt_truncation: int | None = None,
    ) -> None:
        counts = {"n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs}
        counts["bptt_truncation"] = bptt_truncation
        for name, count in counts.items():
            whole = isinstance(count, (int, np.integer)) and count >= 1
            may_lack = name in ("batch_size", "bptt_truncation")
            if not whole and not (may_lack and count is None):
                raise ValueError(
                    f"{name} is {count!r}: expected a whole number, at least 1"
                )
        for name, share in {"gamma": gamma, "gae_lambda": gae_lambda}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}: expected 0 to 1")
        for name, width in {
            "clip_range": clip_range,
            "clip_range_vf": clip_range_vf,
        }.items():
            if isinstance(width, (int, float)) and not width > 0:
                raise ValueError(
                    f"{name} is {width}: expected a number above 0"
                    + (", or None for no clipping" if name == "clip_range_vf" else "")
                )
        vector = env.env if isinstance(env, TensorVecEnv) else env
        if device == "auto" and is_tensor_env(vector):
            device = vector.device  # type: ignore[union-attr]
        super().__init__(
            policy,  # type: ignore[arg-type]
            env,  # type: ignore[arg-type]  # None is for `load`
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.reward_scale = reward_scale
        self.norm_reward = norm_reward
        self.recompute_states = recompute_states
        self.bptt_truncation = bptt_truncation
        if _init_setup_model:
            self._setup_model()

    # --- set-up -----------------------------------------------------------------------

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, RecurrentPolicy):
            raise ValueError(
                f"policy is {self.policy_class.__module__}."
                f"{self.policy_class.__name__}: expected one of "
                f"{', '.join(map(repr, self.policy_aliases))}, or a RecurrentPolicy"
            )
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        policy = self.policy_class(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            use_sde=self.use_sde,
            **{"seed": self._entropy, **self.policy_kwargs},
        )
        self.policy = policy.to(self.device)
        if self.env is not None:
            self._warn_of_minibatches()
        self._graphs = graphs_for(self.device)
        self._player = Player(self._graphs)
        self._last_state = self.policy.initial_state(self.n_envs)
        self._spread = RunningMoments().to(self.device)  # of discounted returns
        self._returns = torch.zeros(self.n_envs, device=self.device)
        self._played: list[tuple[Any, ...]] = []  # of a rollout that is under way
        self.rollout_buffer = None  # type: ignore[assignment]  # nothing played yet

    @property
    def _minibatch(self) -> int:
        """Steps of a minibatch."""
        return self.batch_size or self.n_steps * self.n_envs

    def _warn_of_minibatches(self) -> None:
        """Of settings that work, but not as whoever chose them may think."""
        total, batch = self.n_steps * self.n_envs, self._minibatch
        length = segment_length(self.n_steps, batch)
        size = max(batch // length, 1) * length
        if 2 * length < min(self.n_steps, batch):
            warnings.warn(
                f"no divisor of n_steps={self.n_steps} is near batch_size={batch}: "
                f"gradients go back {length} steps only; make one a multiple of the "
                "other",
                stacklevel=4,
            )
        elif self.recompute_states and length == self.n_steps:
            warnings.warn(
                f"recompute_states and batch_size={batch}: segments are whole columns "
                "of the rollout, and there is nothing to recompute; it takes a "
                f"batch_size below n_steps={self.n_steps}",
                stacklevel=4,
            )
        elif total % size:
            warnings.warn(
                f"a rollout of {self.n_steps} x {self.n_envs} steps is no multiple of "
                f"batch_size={batch}: the last minibatch of an epoch has "
                f"{total % size} steps",
                stacklevel=4,
            )

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seeds the environments, the action space and the agent's own generators.

        No global random state is touched. Without a seed the system provides one.
        """
        self._entropy = secrets.randbits(63) if seed is None else seed
        self._acting, self._shuffling = (
            seeding.generator(self._entropy, name, device=self.device)
            for name in ("acting", "shuffling")
        )
        if seed is not None:
            self.action_space.seed(seed)
            if self.env is not None:
                self.env.seed(seed)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if is_tensor_env(env):
            env = TensorVecEnv(env)
        if isinstance(env, VectorEnv):
            raise ValueError(
                f"env is {env}, a gymnasium VectorEnv in numpy: expected a tensor "
                "environment or a VecEnv; use stable_baselines3's make_vec_env"
            )
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    # --- learning ---------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "RecurrentPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        use_masking: bool = True,
    ) -> "RecurrentPPO":
        """As in Stable-Baselines3; `self`, after at least `total_timesteps` steps.

        Where the environment has `action_masks()`, only what they allow is played;
        `use_masking=False` ignores them. See `rlrnn.agents.masking`.
        """
        self.use_masking = use_masking
        with self.policy.threads():
            return super().learn(
                total_timesteps,
                callback,
                log_interval,
                tb_log_name,
                reset_num_timesteps,
                progress_bar,
            )

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._keep_statistics()
        expected = f"expected {self.n_envs} of {self.observation_space}"
        try:
            result = super()._setup_learn(*args, **kwargs)
        except STACKING as error:
            if not stacking(error):
                raise
            raise ValueError(
                f"the first observations do not fit ({brief(error)}): {expected}; "
                "repair the environment, or its observation space"
            ) from error
        seen: Any = dict(parts(self._last_obs))
        for key, part in parts(self.observation_space):
            shape = self.n_envs, *(part.shape or ())
            if seen[key].shape != shape:
                given = f"{key} {list(seen[key].shape)}".strip()
                self._last_obs = None
                raise ValueError(
                    f"the first observations are {given}: {expected}; repair the "
                    "environment, or its observation space"
                )
        return result

    def _keep_statistics(self) -> None:
        """Those of a `VecNormalize`, for when a rollout is refused."""
        normalize = self._vec_normalize_env
        self._kept = None if normalize is None else statistics(normalize)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: Any,
        n_rollout_steps: int,
    ) -> bool:
        """Play, remember, and estimate advantages; False if `callback` says stop.

        A new `self.rollout_buffer` takes the place of the old one, which is ignored.
        Callbacks find most locals of Stable-Baselines3's. Those of a tensor
        environment are copied to the host when a callback looks at them.
        """
        try:
            go_on = self._collect(env, callback, n_rollout_steps)
        except (IndexError, RuntimeError) as error:
            if self.device.type != "cpu" or self._last_obs is None:
                raise
            for copy, what in outside(self._last_obs, self.observation_space):
                step = len(self._played)
                self._forget()
                raise ValueError(
                    f"environment {copy} gave an observation {what}, at step {step} "
                    "of the rollout; repair the environment, or its observation space"
                ) from error
            raise
        self._keep_statistics()
        return go_on

    def _collect(
        self, env: VecEnv, callback: BaseCallback, n_rollout_steps: int
    ) -> bool:
        began = time.perf_counter()
        policy = self.policy
        policy.set_training_mode(False)
        source = source_of(env, self.device, self.use_masking, policy.squash_output)
        length = segment_length(n_rollout_steps, self._minibatch)
        callback.on_rollout_start()

        last_obs = self._last_obs
        obs = on_each(lambda x: torch.as_tensor(x, device=self.device), last_obs)
        starts = torch.as_tensor(self._last_episode_starts, device=self.device)  # [B]
        mine, its = policy.split(self._last_state)
        cuts: list[Tensor] = []  # the actor's states where segments begin
        finals: list[tuple[int, Any, Tensor]] = []  # step, observations, state
        allowed: list[Tensor] = []
        self._played = played = []
        self._player.begin(policy, source, self._acting, self.sde_sample_freq)

        for t in range(n_rollout_steps):
            if t % length == 0:
                cuts.append(mine)
            masks = source.masks()
            if masks is not None:
                allowed.append(masks)
            chosen, told = self._player(obs, mine, starts, masks)
            features, params, latent, mine, actions = chosen
            played.append((obs, actions, starts, params, features, latent))
            if told is None:
                step = source.step(actions)
            else:
                assert isinstance(source, TensorSource)
                step = source.book(*told)
            if step.final_obs is not None:
                # `mine` is still that of the episode that was cut
                finals.append((t, step.final_obs, mine))
            obs, starts = step.obs, step.starts
            # at each step, so that a callback may save
            self._last_obs, self._last_episode_starts = obs, starts  # type: ignore[assignment]
            self._mine = mine
            self.num_timesteps += env.num_envs
            callback.update_locals(
                {
                    "self": self,
                    "env": env,
                    "n_steps": t,
                    "n_rollout_steps": n_rollout_steps,
                    "obs_tensor": played[-1][0],
                    "actions": HostArray(actions),
                    "new_obs": on_each(HostArray, obs),
                    "rewards": step.rewards,
                    "dones": step.dones,
                    "infos": step.infos,
                }
            )
            if not callback.on_step():
                self._last_state, self._played = self._state_now(), []
                return False

        seen, *others = zip(*played, strict=True)
        obs_ = on_each(lambda *x: torch.stack(x), *seen)  # [T, B, ...]
        actions_, starts_, params_, features_, latents_ = map(torch.stack, others)
        self._played = []
        # The critic does not act: it goes over what was played in one pass.
        values_, its_ = policy.appraise(features_, latents_, its, starts_)
        self._last_state = torch.cat((mine, its_[-1]))
        with torch.no_grad():
            log_probs_ = policy.distribution.log_prob(params_, actions_)
            last_values = policy.value(obs, self._last_state, starts)
        masks_ = torch.stack(allowed) if allowed else None
        faults = self._faults(obs_, obs, masks_, finals)
        earned = source.earned(faults)  # the one look at the device
        if earned.faults.any():
            self._refuse(earned.faults)
        finals_ = torch.zeros_like(values_)
        if finals:
            when = [t for t, _, _ in finals]
            state = torch.cat((torch.stack([s for _, _, s in finals]), its_[when]), 1)
            last = on_each(lambda *x: torch.cat(x), *(o for _, o, _ in finals))
            going_on = starts.new_zeros(columns(last))  # [n·B]
            worth = policy.value(last, state.transpose(0, 1).flatten(1, 2), going_on)
            finals_[when] = worth.reshape(len(when), -1)
        dones_ = earned.terminated | earned.truncated
        rewards_ = self._scaled(earned.rewards, dones_)
        if policy.popart is not None and not self._n_updates:
            none = torch.zeros_like(values_)  # only what was earned
            first = returns.gae(rewards_, none, none, dones_, self.gamma, 1.0)
            values_, last_values, finals_ = policy.popart.begin(
                first, values_, last_values, finals_
            )
        following = returns.next_values(
            values_, last_values, earned.terminated, earned.truncated, finals_
        )
        advantages = returns.gae(
            rewards_, values_, following, dones_, self.gamma, self.gae_lambda
        )
        critic_cuts = [its, *its_[length - 1 : -1 : length]]
        states = [torch.cat(pair) for pair in zip(cuts, critic_cuts, strict=True)]
        self.rollout_buffer = Rollout(
            obs_,
            actions_,
            starts_,
            values_,
            log_probs_,
            advantages,
            advantages + values_,
            torch.stack(states),
            masks_,
        )
        self._state_norm = latents_.norm(dim=-1).mean()
        assert self.ep_info_buffer is not None and self.ep_success_buffer is not None
        self.ep_info_buffer.extend(earned.episodes)
        self.ep_success_buffer.extend(earned.successes)

        seconds = time.perf_counter() - began
        self.logger.record("time/collect_fps", int(starts_.numel() / seconds))
        callback.update_locals(
            {"rollout_buffer": self.rollout_buffer, "values": last_values}
        )
        callback.on_rollout_end()
        return True

    def _faults(
        self,
        obs: Any,
        last_obs: Any,
        masks: Tensor | None,
        finals: list[tuple[int, Any, Tensor]],
    ) -> Tensor:
        """What is wrong with observations [T, B, ...] and masks: `FAULTS` [T, B].

        Over a whole rollout at once: step by step it would cost more than 1 %.
        """
        faults = infinite(obs, 2).long()
        faults[-1] += 8 * infinite(last_obs, 1)
        for t, final, _ in finals:
            faults[t] |= 8 * infinite(final, 1)
        if masks is not None:
            faults += 2 * ~possible(self.action_space, masks)
        return faults

    def _refuse(self, faults: NDArray[Any]) -> Never:
        """Forget the rollout that nothing can be learned from, and say why.

        The agent is as before it and can be saved, or learn on another environment.
        """
        steps, copies = faults.shape
        t, copy = (int(i) for i in np.argwhere(faults)[0])
        when = self.num_timesteps - (steps - t - 1) * copies
        fault = next(text for key, text in FAULTS.items() if faults[t, copy] & key)
        self._forget()
        raise ValueError(
            f"environment {copy} {fault}, at step {t} of the rollout (timestep "
            f"{when}): nothing was learned from it; repair the environment"
        )

    def _forget(self) -> None:
        """The rollout under way; the next `learn` begins new episodes."""
        self._played, self._last_obs = [], None
        self._last_state = self.policy.initial_state(self.n_envs)
        if self._vec_normalize_env is not None and self._kept is not None:
            restore_statistics(self._vec_normalize_env, self._kept)

    def _scaled(self, rewards: Tensor, dones: Tensor) -> Tensor:
        """Rewards [T, B] as they are learned from."""
        if self.norm_reward:
            totals = returns.running(rewards, dones, self._returns, self.gamma)
            self._returns = totals[-1].masked_fill(dones[-1], 0.0)
            self._spread.update(totals.flatten())
            rewards = rewards * torch.rsqrt(self._spread.var + 1e-8)
            rewards = rewards.clamp(-10.0, 10.0)
        return self.reward_scale * rewards

    def _state_now(self) -> Tensor:
        """The recurrent state [S, B, H], within a rollout too.

        There `_last_state` is that at its beginning; the actor's is `_mine`, and the
        critic has not seen yet what was played.
        """
        if not self._played:
            return self._last_state
        _, its = self.policy.split(self._last_state)
        _, *others = zip(*self._played, strict=True)
        _, starts, _, features, latents = map(torch.stack, others)
        _, states = self.policy.appraise(features, latents, its, starts)
        return torch.cat((self._mine, states[-1]))

    def train(self) -> None:
        """Some epochs of clipped policy gradient over what was played last."""
        began = time.perf_counter()
        self.policy.adapt(self.rollout_buffer.returns)
        self._train()
        self.policy.take_in(self.rollout_buffer.obs)
        seconds = time.perf_counter() - began
        steps = self.rollout_buffer.starts.numel()
        self.logger.record("time/update_fps", int(steps / seconds))

    def _train(self) -> None:
        policy = self.policy
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        clip_range = FloatSchedule(self.clip_range)(self._current_progress_remaining)
        clip_range_vf = None
        if self.clip_range_vf is not None:
            clip_range_vf = FloatSchedule(self.clip_range_vf)(
                self._current_progress_remaining
            )
        segments = self.rollout_buffer.segments()
        update = _Update()
        go_on = True

        for epoch in range(self.n_epochs):
            update.begin_epoch()
            if epoch and self.recompute_states:
                states = self._recomputed()
                segments = segments._replace(state=states.transpose(0, 1).flatten(1, 2))
            for batch in minibatches(segments, self._minibatch, self._shuffling):
                if self.target_kl is None:
                    *row, norm = self._learn_from(batch, clip_range, clip_range_vf)
                    update.add(*row)
                    update.grad_norms.append(norm)
                    continue
                # a limit on the divergence has to look at it
                found = self._losses(batch, clip_range, clip_range_vf)
                update.add(*found)
                kl = losses.approximate_kl(found[-1].detach())
                if float(kl) > 1.5 * self.target_kl:
                    go_on = False
                    if self.verbose >= 1:
                        print(f"Stopping in epoch {epoch}: the KL is {float(kl):.2f}")
                    break
                update.grad_norms.append(self._descend(found[0]))
            self._n_updates += 1
            if not go_on:
                break

        self._log_update(update, clip_range)
        self.logger.record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", clip_range_vf)

    def _learn_from(
        self, batch: Minibatch, clip_range: float, clip_range_vf: float | None
    ) -> tuple[Tensor, ...]:
        """An update by one minibatch: what `_losses` gives, and the gradient's norm. On
        CUDA a captured graph, where the optimiser can be in one, and nothing is
        dropped (whose masks are drawn on the host)."""
        policy, optimizer = self.policy, self.policy.optimizer
        rates = [float(group["lr"]) for group in optimizer.param_groups]

        def learn(
            batch: Minibatch, clip_range: Any, clip_range_vf: Any, rates: list[Any]
        ) -> tuple[Tensor, ...]:
            row = self._losses(batch, clip_range, clip_range_vf)
            with at_rates(optimizer, rates):
                norm = self._descend(row[0])
            # of a tape that is kept backward would go on on the stream that it is of
            return (*(x.detach() for x in row), norm)

        given = batch, clip_range, clip_range_vf, rates
        if self._graphs is None or policy.drops or not capturable(optimizer):
            return learn(*given)
        baked = self.normalize_advantage, self.ent_coef, self.vf_coef
        done: tuple[Tensor, ...] = self._graphs(
            "minibatch",
            learn,
            given,
            constants=(
                policy,
                optimizer,
                *baked,
                self.max_grad_norm,
                self.bptt_truncation,
            ),
            written=lambda: [
                *policy.parameters(),
                *policy.buffers(),
                *moments(optimizer),
            ],
        )
        optimizer.zero_grad()  # nobody is to look at a graph's memory
        return done

    def _losses(
        self,
        batch: Minibatch,
        clip_range: losses.Number,
        clip_range_vf: losses.Number | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The loss; its parts: policy, value and entropy; and the log of the ratio."""
        policy, distribution = self.policy, self.policy.distribution
        params, values, _ = policy.evaluate_sequence(
            batch.obs, batch.state, batch.starts, self.bptt_truncation
        )
        if batch.masks is not None:
            params = masked(distribution, params, batch.masks)
        log_ratio = distribution.log_prob(params, batch.actions)
        log_ratio = log_ratio - batch.log_probs
        advantages = batch.advantages
        if self.normalize_advantage and advantages.numel() > 1:
            deviation, mean = torch.std_mean(advantages)
            advantages = (advantages - mean) / (deviation + 1e-8)
        policy_loss = losses.clipped_surrogate(log_ratio, advantages, clip_range)
        targets, old_values = batch.returns, batch.values
        if policy.popart is not None:
            values, targets, old_values = map(
                policy.popart.scale, (values, targets, old_values)
            )
        value_loss = losses.value_loss(values, targets, old_values, clip_range_vf)
        with torch.set_grad_enabled(self.ent_coef != 0):
            entropy_loss = -distribution.entropy(params).mean()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
        return loss, policy_loss, value_loss, entropy_loss, log_ratio

    def _descend(self, loss: Tensor) -> Tensor:
        """One step of the optimiser; the gradient's norm before it was clipped."""
        optimizer: Any = self.policy.optimizer
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        if all(group.get("fused") for group in optimizer.param_groups):
            # left out where this is 1, without a look at it
            optimizer.found_inf = 1 - norm.isfinite().to(norm.dtype)
            optimizer.step()
            optimizer.found_inf = None
        elif norm.isfinite():
            optimizer.step()
        return norm

    @torch.no_grad()
    def _recomputed(self) -> Float[Tensor, "C S B H"]:
        """The states in which the current policy would begin the segments.

        But for the first: what was played before it is gone.
        """
        rollout, policy = self.rollout_buffer, self.policy
        length = len(rollout.starts) // len(rollout.states)
        states = [rollout.states[0]]
        policy.set_training_mode(False)  # as it played
        for begin in range(0, len(rollout.starts) - length, length):
            now = slice(begin, begin + length)
            obs = on_each(lambda x, now=now: x[now], rollout.obs)
            _, _, state = policy.evaluate_sequence(obs, states[-1], rollout.starts[now])
            states.append(state)
        policy.set_training_mode(True)
        return torch.stack(states)

    def _log_update(self, update: "_Update", clip_range: float) -> None:
        """Names as in Stable-Baselines3; one transfer from the device."""
        rollout, log_std = self.rollout_buffer, self.policy.log_std
        numbers = update.means(clip_range)
        numbers["train/explained_variance"] = losses.explained_variance(
            rollout.values, rollout.returns
        )
        numbers["rollout/state_norm"] = self._state_norm
        if log_std is not None:
            numbers["train/std"] = log_std.detach().exp().mean()
        values = torch.stack(list(numbers.values())).cpu().numpy()
        for name, value in zip(numbers, values, strict=True):
            self.logger.record(name, float(value))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        found = dict(zip(numbers, values, strict=True))
        if not np.isfinite(found.get("train/grad_norm", 0.0)):
            raise ValueError(
                f"the update diverged: the loss is {found['train/loss']:.3g}, the norm "
                "of its gradient not finite; such steps were left out, and the agent "
                "can be saved; lower learning_rate, or scale the rewards"
            )

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
        action_masks: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """See `RecurrentPolicy.predict`. It never changes how training goes on."""
        return self.policy.predict(
            observation, state, episode_start, deterministic, action_masks
        )

    # --- storing ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, for `load_state_dict`.

        With an environment that has a `state_dict` of its own, training goes on as if
        it had never stopped; another one starts new episodes.
        """
        env = self.env.unwrapped if self.env is not None else None
        env_state = None
        if isinstance(env, TensorVecEnv) and hasattr(env.env, "state_dict"):
            env_state = env.env.state_dict()
        keep = ("r", "l", "t")
        episodes = [{k: e[k] for k in keep} for e in self.ep_info_buffer or ()]
        normalize = self._vec_normalize_env
        return {
            "policy": dict(self.policy.state_dict()),
            "optimizer": self.policy.optimizer.state_dict(),
            "generators": {
                "acting": self._acting.get_state(),
                "shuffling": self._shuffling.get_state(),
                "predict": self.policy.generator.get_state(),
                "dropout": self.policy.dropping.get_state(),
                "action_space": self.action_space.np_random.bit_generator.state,
            },
            "num_timesteps": self.num_timesteps,
            "n_updates": self._n_updates,
            "progress_remaining": self._current_progress_remaining,
            "episodes": episodes,
            "successes": [bool(success) for success in self.ep_success_buffer or ()],
            "learning": self.ep_info_buffer is not None,
            "env": env_state,
            "last_obs": self._last_obs,
            "last_starts": self._last_episode_starts,
            "last_state": self._state_now(),
            "last_mask": env.mask if isinstance(env, TensorVecEnv) else None,
            "spread": dict(self._spread.state_dict()),
            "returns": self._returns,
            "normalize": None if normalize is None else statistics(normalize),
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Go on from `state_dict()`, on any device.

        If the environment cannot be put back where it was, or there are more or fewer
        copies of it, it starts new episodes at the next `learn`.
        """
        self.policy.load_state_dict(tree["policy"])
        self.policy.optimizer.load_state_dict(tree["optimizer"])
        generators = tree["generators"]
        for generator, name in (
            (self._acting, "acting"),
            (self._shuffling, "shuffling"),
            (self.policy.generator, "predict"),
            (self.policy.dropping, "dropout"),
        ):
            given = generators.get(name, torch.empty(0)).cpu()
            if given.shape == generator.get_state().shape:  # else of another device
                generator.set_state(given)
        self.action_space.np_random.bit_generator.state = generators["action_space"]
        self.num_timesteps = tree["num_timesteps"]
        self._n_updates = tree["n_updates"]
        if "spread" in tree:
            self._spread.load_state_dict(tree["spread"])
        self._current_progress_remaining = tree["progress_remaining"]
        if tree["learning"]:
            window = self._stats_window_size
            self.ep_info_buffer = deque(tree["episodes"], maxlen=window)
            self.ep_success_buffer = deque(tree["successes"], maxlen=window)
        if self._vec_normalize_env is not None and tree["normalize"] is not None:
            restore_statistics(self._vec_normalize_env, tree["normalize"])

        env = self.env.unwrapped if self.env is not None else None
        same_size = tree["last_state"].shape == self._last_state.shape
        if isinstance(env, TensorVecEnv) and tree["env"] is not None and same_size:
            env.env.load_state_dict(tree["env"])
            env._reset_seeds()
            if (mask := tree.get("last_mask")) is not None:
                env.mask = mask.to(env.env.device)
            self._last_obs = tree["last_obs"]
            self._last_episode_starts = tree["last_starts"]
            self._last_state = tree["last_state"].to(self.device)
            self._returns = tree["returns"].to(self.device)
        else:
            self._last_obs = None  # `learn` will reset
            if self.env is not None and self.seed is not None:
                # not the episodes that training began with
                again = seeding.derive(self.seed, "restart", self.num_timesteps)
                self.env.seed(again >> 32)

    def save(
        self,
        path: contrib.Where,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """One .zip for `load`: settings, spaces and `state_dict()`, without any code.

        A path that does not end in `.zip` gets it. Functions and classes of one's own,
        such as a lambda as learning rate, are left out, and `load` asks for them.
        `exclude` and `include` are for compatibility: nothing is stored by its name.
        """
        files.save(self, path)

    @classmethod
    def load(
        cls,
        path: contrib.Where,
        env: AnyEnv | str | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = False,
        trust: bool = False,
        **overrides: Any,
    ) -> "RecurrentPPO":
        """The agent that `save` stored. Nothing in the file is executed.

        Without `env` it can predict; with one it can also go on learning, from where it
        was if `env` can be put there and `force_reset` is False. `overrides` are
        arguments of the constructor that take the place of the stored ones, as are
        those in `custom_objects`.

        With `trust`, also files of sb3-contrib's `RecurrentPPO`. These hold pickles,
        which can run any code: say so only of files whose origin you know.
        """
        if print_system_info:
            get_system_info()
        given = custom_objects or {}
        known = {key: v for key, v in given.items() if key in files.SETTINGS}
        agent: RecurrentPPO = files.load(
            cls, path, env, device, trust, {**known, **overrides}
        )
        if force_reset:
            agent._last_obs = None
        return agent

    def set_parameters(
        self,
        load_path_or_dict: Any,
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """What `get_parameters` gave, or those in a file of ours or of sb3-contrib.

        Neither runs code. `device` is for compatibility: they go to the agent's.
        """
        given = load_path_or_dict
        if not isinstance(given, dict):
            given = files.existing(given)
            if contrib.recognises(given):
                weights, optimizer = contrib.read_parameters(given)
                contrib.load_parameters(self.policy, weights, optimizer)
                return
            state = checkpoint.load(given)["state"]
            given = {"policy": state["policy"], "policy.optimizer": state["optimizer"]}
        try:
            super().set_parameters(given, exact_match, device)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                "the parameters are of another policy: expected those of one like "
                f"this ({reason})"
            ) from error


class _Update:
    """What the minibatches of one update gave, as tensors on the device."""

    def __init__(self) -> None:
        self.losses: list[tuple[Tensor, ...]] = []
        self.log_ratios: list[Tensor] = []  # [n] each
        self.grad_norms: list[Tensor] = []
        self.epoch = 0  # the first minibatch of the last epoch

    def begin_epoch(self) -> None:
        self.epoch = len(self.losses)

    def add(
        self,
        loss: Tensor,
        policy_loss: Tensor,
        value_loss: Tensor,
        entropy_loss: Tensor,
        log_ratio: Tensor,
    ) -> None:
        row = loss, policy_loss, value_loss, entropy_loss
        self.losses.append(tuple(x.detach() for x in row))
        self.log_ratios.append(log_ratio.detach().flatten())

    def means(self, clip_range: float) -> dict[str, Tensor]:
        """Over the minibatches; the divergence over the last epoch."""
        loss, policy, value, entropy = map(torch.stack, zip(*self.losses, strict=True))
        numbers = {
            "train/entropy_loss": entropy.mean(),
            "train/policy_gradient_loss": policy.mean(),
            "train/value_loss": value.mean(),
            "train/approx_kl": losses.approximate_kl(
                torch.cat(self.log_ratios[self.epoch :])
            ),
            "train/clip_fraction": losses.clip_fraction(
                torch.cat(self.log_ratios), clip_range
            ),
            "train/loss": loss[-1],
        }
        if self.grad_norms:
            numbers["train/grad_norm"] = torch.stack(self.grad_norms).mean()
        return numbers
