"""Evolution strategies: the weights of an actor follow what perturbed copies earn.

Salimans et al. 2017, "Evolution strategies as a scalable alternative to reinforcement
learning" (arXiv 1703.03864). Shapes: N members, n of them in one of G groups; M = N/2
pairs; P weights.
"""

import copy
from typing import Any, Never

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from rlrnn import seeding
from rlrnn.agents.policies import RecurrentPolicy

Fitness = NDArray[np.float64]


def centred_ranks(fitness: Float[np.ndarray, "G n"]) -> Float[np.ndarray, "G n"]:
    """The rank of each in its row, from -1/2 (the worst) to 1/2; equals share theirs.

    Whatever a task's returns are like, each row weighs the same (section 2.1).
    """
    mine, others = fitness[:, :, None], fitness[:, None]
    below = (mine > others).sum(2) + 0.5 * ((mine == others).sum(2) - 1)
    ranks: Fitness = below / (fitness.shape[1] - 1) - 0.5
    return ranks


def antithetic_gradient(
    fitness: Float[np.ndarray, "N"], noise: Float[Tensor, "M P"], sigma: float
) -> Float[Tensor, "P"]:
    """The gradient of the mean fitness of weights w + sigma e, e ~ N(0, 1), at w.

    Members 2i and 2i+1 are the pair w + sigma e_i and w - sigma e_i, of noise e:
    sum_i (f_2i - f_2i+1) e_i / (N sigma). What both have in common cancels.
    """
    differences = torch.as_tensor(fitness[0::2] - fitness[1::2]).to(noise)
    return differences @ noise / (len(fitness) * sigma)


class EvolutionStrategies(BaseAlgorithm):
    """A recurrent actor that learns from whole episodes alone, without a critic.

    A generation is an episode of each of N environments. Neighbours play in pairs,
    with weights w + sigma e and w - sigma e, and `group` of them in one task: their
    returns are ranked among themselves, and w follows the `antithetic_gradient` of the
    ranks, by Adam with decoupled weight decay.

    Members play their likeliest actions: it is weights that are explored, each for a
    whole episode, and what is learned is a policy that draws nothing. One whose first
    choice leads by much more than sigma hardly ever changes it under a perturbation,
    and learns nothing: `initial_logits` should be of the order of sigma.

    All noise comes from `seed` and the number of the generation.
    """

    policy: RecurrentPolicy

    def __init__(
        self,
        env: VecEnv,
        group: int,
        learning_rate: float | Schedule = 0.01,
        sigma: float = 0.05,
        weight_decay: float = 0.005,
        policy_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        device: torch.device | str = "auto",
    ) -> None:
        if group % 2 or env.num_envs % group:
            raise ValueError(
                f"group is {group}, expected an even divisor of the {env.num_envs} "
                "environments"
            )
        super().__init__(
            RecurrentPolicy,
            env,
            learning_rate,
            policy_kwargs,
            device=device,
            support_multi_env=True,
            seed=seed,
        )
        self.group, self.sigma, self.weight_decay = group, sigma, weight_decay
        self._setup_model()

    def _setup_model(self) -> None:
        assert self.env is not None and self.seed is not None
        self._setup_lr_schedule()
        self.env.seed(self.seed)
        policy = RecurrentPolicy(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            optimizer_class=torch.optim.AdamW,
            optimizer_kwargs={"weight_decay": self.weight_decay},
            **{"seed": self.seed, **self.policy_kwargs},
        )
        self.policy = policy.to(self.device)
        self.members = [copy.deepcopy(self.policy) for _ in range(self.n_envs)]

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "EvolutionStrategies",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> "EvolutionStrategies":
        """As in Stable-Baselines3; `self`, after at least `total_timesteps` steps.

        Between the end of an update and the next rollout a callback may save.
        """
        total, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total:
            callback.on_rollout_start()
            noise = self._perturb()
            fitness = self._play(callback)
            if fitness is None:
                break
            self._update_current_progress_remaining(self.num_timesteps, total)
            self._update(fitness, noise)
        callback.on_training_end()
        return self

    def _perturb(self) -> Float[Tensor, "M P"]:
        """Gives this generation its weights; the noise of each pair."""
        assert self.seed is not None
        weights = nn.utils.parameters_to_vector(_acting(self.policy)).detach()
        generator = seeding.generator(self.seed, "generation", self._n_updates)
        shape = self.n_envs // 2, len(weights)
        noise = torch.randn(shape, generator=generator).to(self.device)
        state = self.policy.state_dict()
        for number, member in enumerate(self.members):
            member.load_state_dict(state)
            sign = 1 - 2 * (number % 2)
            moved = weights + sign * self.sigma * noise[number // 2]
            nn.utils.vector_to_parameters(moved, _acting(member))
        return noise

    def _play(self, callback: BaseCallback) -> Fitness | None:
        """An episode of each member: their returns [N]. None if `callback` says stop.

        A member whose episode ends early plays another, which does not count, until
        all have ended theirs.
        """
        assert self.env is not None
        obs: Any = self._last_obs
        fitness, ended = np.zeros(self.n_envs), np.zeros(self.n_envs, int)
        starts = np.ones(self.n_envs, bool)
        states: list[Any] = [None] * self.n_envs
        seen = []
        while not ended.all():
            seen.append(obs)
            played = [
                member.predict(obs[i : i + 1], states[i], starts[i : i + 1], True)
                for i, member in enumerate(self.members)
            ]
            actions = np.concatenate([action for action, _ in played])
            states = [state for _, state in played]
            obs, rewards, starts, infos = self.env.step(actions)
            fitness += np.where(ended == 0, rewards, 0.0)
            ended += starts
            self.num_timesteps += self.n_envs
            callback.update_locals({"actions": actions, "infos": infos})
            if not callback.on_step():
                return None
        if (ended > 1).any() or not starts.all():  # all begin the next one together
            obs = self.env.reset()
        self._last_obs = obs
        self.policy.take_in(torch.as_tensor(np.stack(seen), device=self.device))
        callback.on_rollout_end()
        return fitness

    def _update(self, fitness: Fitness, noise: Tensor) -> None:
        ranks = centred_ranks(fitness.reshape(-1, self.group)).reshape(-1)
        gradient = antithetic_gradient(ranks, noise, self.sigma)
        weights = _acting(self.policy)
        parts = torch.split(gradient, [weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = -part.view_as(weight)  # Adam descends
        self._update_learning_rate(self.policy.optimizer)
        self.policy.optimizer.step()
        self._n_updates += 1
        self.logger.record("rollout/ep_rew_mean", float(fitness.mean()))
        spread = fitness.reshape(-1, self.group).std(1).mean()
        self.logger.record("train/fitness_std", float(spread))  # in a group
        self.logger.record("train/grad_norm", float(gradient.norm()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    # --- storing ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, between two generations."""
        return {
            "policy": dict(self.policy.state_dict()),
            "optimizer": self.policy.optimizer.state_dict(),
            "num_timesteps": self.num_timesteps,
            "n_updates": self._n_updates,
            "last_obs": self._last_obs,
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Go on from `state_dict()`, with environments that are where they were."""
        self.policy.load_state_dict(tree["policy"])
        self.policy.optimizer.load_state_dict(tree["optimizer"])
        self.num_timesteps = tree["num_timesteps"]
        self._n_updates = tree["n_updates"]
        self._last_obs = tree["last_obs"]

    def save(self, *args: Any, **kwargs: Any) -> Never:
        raise NotImplementedError("keep `state_dict()` with rlrnn.checkpoint")

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> Never:
        raise NotImplementedError("use `load_state_dict` on a new one")


def _acting(policy: RecurrentPolicy) -> list[nn.Parameter]:
    """The weights that actions depend on."""
    critic = ("critic", "value_net")
    return [p for name, p in policy.named_parameters() if not name.startswith(critic)]
