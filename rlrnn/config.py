"""The three flows' options: typed, with their sentence of help, and their ranges."""

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from rlrnn.checks import at_least, one_of
from rlrnn.control import Ablation
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.recurrent import Cell
from rlrnn.tasks import DataConfig, Tasks
from rlrnn.tracking import Mode

AgentCell = Literal[Cell, "none"]
Algorithm = Literal["ppo", "es"]


def _check_common(config: Any) -> None:
    """What holds for each flow's config: seed, device, threads, and finite numbers."""
    at_least("seed", config.seed, 0)
    at_least("threads", config.threads, 1)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise ValueError(f"device is {config.device!r}, expected auto, cpu or cuda")
    _check_finite(config, "")


def _check_finite(config: Any, prefix: str) -> None:
    for entry in fields(config):
        name, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if is_dataclass(value):
            _check_finite(value, f"{name}.")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name} is {number}, expected a finite number")


@dataclass(frozen=True)
class RunConfig:
    """Where a run is written, and who is told.

    Args:
        folder: new or empty; without one, runs/ and a name with the date.
        track: Weights & Biases: online if there is a key and offline if not (auto),
            online, offline, or disabled.
        project: in Weights & Biases.
        group: of runs that belong to one experiment.
        keep: the number of latest checkpoints, beside the best.
    """

    folder: str | None = None
    track: Mode = "auto"
    project: str = "rlrnn"
    group: str | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        one_of("run.track", self.track, Mode)
        at_least("run.keep", self.keep, 1)


@dataclass(frozen=True)
class AgentConfig:
    """The recurrent agent and its PPO (Schulman et al. 2017).

    Args:
        cell: lstm, gru, rnn or mingru; none is the control without memory.
        hidden_size: units of a recurrent layer.
        layers: recurrent layers.
        shared: the critic reads the actor's recurrent output.
        net_arch: widths of the layers after the recurrent ones, in actor and critic.
        learning_rate: of Adam.
        anneal: the learning rate falls linearly to zero.
        n_steps: of a rollout, in each environment.
        batch_size: steps of a minibatch: whole columns of the rollout.
        n_epochs: passes over a rollout.
        gamma: discount of later rewards.
        gae_lambda: of generalised advantage estimation.
        clip_range: of PPO's ratio.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss.
        max_grad_norm: above which gradients are scaled down.
        target_kl: an update ends when the policy has moved by more; null, never.
        reward_scale: what the agent's rewards are multiplied by; returns are reported
            without it.
        normalize: observations and rewards, by what has been seen so far.
        norm_value: the critic learns returns in standard deviations from their running
            mean (PopArt), for rewards of any size.
        use_sde: exploration that depends on the state, for continuous actions.
        sde_sample_freq: steps after which its noise is drawn anew; -1 once per rollout.
        recompute_states: in which segments of a rollout begin, anew in each epoch; for
            a batch_size below n_steps, else there is one segment.
        bptt_truncation: steps over which gradients go back; null, whole segments.
    """

    cell: AgentCell = "lstm"
    hidden_size: int = 64
    layers: int = 1
    shared: bool = False
    net_arch: list[int] = field(default_factory=lambda: [64])
    learning_rate: float = 1e-3
    anneal: bool = True
    n_steps: int = 128
    batch_size: int = 512
    n_epochs: int = 4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    reward_scale: float = 1.0
    normalize: bool = False
    norm_value: bool = False
    use_sde: bool = False
    sde_sample_freq: int = -1
    recompute_states: bool = False
    bptt_truncation: int | None = None

    def __post_init__(self) -> None:
        one_of("agent.cell", self.cell, AgentCell)
        for name in ("hidden_size", "layers", "n_steps", "batch_size", "n_epochs"):
            at_least(f"agent.{name}", getattr(self, name), 1)
        for width in self.net_arch:
            at_least("agent.net_arch", width, 1)
        if self.bptt_truncation is not None:
            at_least("agent.bptt_truncation", self.bptt_truncation, 1)
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"agent.{name} is {getattr(self, name)}, expected 0 to 1"
                )
        for name in ("learning_rate", "clip_range", "max_grad_norm", "reward_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"agent.{name} is {getattr(self, name)}, expected a number above 0"
                )
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(
                f"agent.target_kl is {self.target_kl}, expected a number above 0, or "
                "null for none"
            )
        for name in ("ent_coef", "vf_coef"):
            at_least(f"agent.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class TrainConfig:
    """Train a recurrent agent on an environment.

    Args:
        env: a gymnasium id; `rlrnn/...` ones are tensor-native.
        envs: copies that are played side by side.
        steps: to play in all, over all copies.
        eval_episodes: to judge the trained agent on.
        eval_videos: of these, in `videos/` and W&B; the environment must render.
        agent: the agent.
        seed: of everything random.
        device: auto (the GPU if there is one), cpu or cuda.
        threads: of torch on the CPU; small networks are fastest with one.
        checkpoint_every: updates between two checkpoints.
        previous: observations hold the previous action and reward, too.
        run: the run folder and its tracking.
    """

    env: str = "rlrnn/CartPoleHiddenVelocity-v0"
    envs: int = 16
    steps: int = 200_000
    eval_episodes: int = 20
    eval_videos: int = 0
    agent: AgentConfig = field(default_factory=AgentConfig)
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    checkpoint_every: int = 10
    previous: bool = False
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name in ("envs", "steps", "eval_episodes", "checkpoint_every"):
            at_least(name, getattr(self, name), 1)
        at_least("eval_videos", self.eval_videos, 0)
        _check_common(self)


@dataclass(frozen=True)
class FitConfig:
    """Train a recurrent model on sequences, under a controller.

    Args:
        data: what is learned.
        model: what learns it.
        training: how, and the budget.
        controller: learned, prior, constant, cosine, plateau, linear, length_warmup,
            adaptive (see docs/controller.md), or a controller file.
        lr: the rate of constant; the first of plateau; the peak of cosine, and of
            length_warmup and adaptive at K = truncation.
        truncation: K of constant, cosine, plateau and linear, the last of
            length_warmup, the first of adaptive.
        init_from: a run whose encoder, layers and, where it speaks of the same, head
            this one begins with; see also training.frozen, unfreeze and layer_decay.
        seed: of the initial weights and of synthetic data.
        device: auto (the GPU if there is one), cpu or cuda.
        threads: of torch on the CPU; small networks are fastest with one.
        run: the run folder and its tracking.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    controller: str = "learned"
    lr: float = 1e-3
    truncation: int = 32
    init_from: str | None = None
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_common(self)
        # texts are measured when they are read
        if self.data.kind != "text" and self.data.size is not None:
            at_least("data.size", self.data.size, 20 * 64 * self.data.batch)
        if not 0 < self.lr <= 10:
            raise ValueError(f"lr is {self.lr}, expected above 0 and at most 10")
        if not 1 <= self.truncation <= 1024:
            raise ValueError(f"truncation is {self.truncation}, expected 1 to 1024")
        if self.controller == "adaptive" and not self.training.decay_probe:
            raise ValueError(
                "training.decay_probe is false, expected true: controller adaptive "
                "chooses K by it"
            )


@dataclass(frozen=True)
class EvolutionConfig:
    """Evolution strategies (Salimans et al. 2017).

    Args:
        learning_rate: of Adam on the mean of the weights.
        sigma: standard deviation of the weights of a generation around their mean.
        weight_decay: of the mean, decoupled from Adam's scale.
    """

    learning_rate: float = 0.05
    sigma: float = 0.1
    weight_decay: float = 0.005

    def __post_init__(self) -> None:
        for name in ("learning_rate", "sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"es.{name} is {getattr(self, name)}, expected a number above 0"
                )
        at_least("es.weight_decay", self.weight_decay, 0)


@dataclass(frozen=True)
class TuneConfig:
    """Train a controller: the recurrent agent on the tuning environment.

    Args:
        tasks: the distribution of training runs.
        episodes: training runs to play in all.
        envs: runs that are played side by side.
        group: neighbours that play the same task, and are compared with each other.
        algorithm: ppo, or es, evolution strategies: a rollout is then an episode of
            each of the envs, and of the agent's options cell, hidden_size, layers,
            net_arch, anneal and normalize apply.
        init_from: a controller file whose policy learning begins with.
        validate_every: updates after which the likeliest actions are compared with the
            prior; the best policy so far is the one that is kept.
        validation_tasks: on which this is done, the same each time; none, and the last
            policy is kept.
        eval_tasks: fresh tasks on which controller and prior are compared at the end.
        ablation: none, or what the agent does without, to see what that is worth:
            open_loop (all but the share of the budget that is spent), rate_only and
            truncation_only (the other knob's moves), no_bias_features (signals of the
            gradient that truncation cuts off), no_prior (range test and schedule).
        agent: the agent; a rollout is agent.n_steps decisions.
        es: what algorithm es goes by.
        seed: of everything random.
        device: of the agent and the training runs: auto, cpu or cuda.
        threads: on the CPU.
        checkpoint_every: updates between two checkpoints.
        run: the run folder and its tracking.
    """

    tasks: Tasks = field(default_factory=Tasks)
    episodes: int = 960
    envs: int = 16
    group: int = 8
    algorithm: Algorithm = "ppo"
    init_from: str | None = None
    validate_every: int = 12
    validation_tasks: int = 16
    eval_tasks: int = 24
    ablation: Ablation = "none"
    agent: AgentConfig = field(
        default_factory=lambda: AgentConfig(
            hidden_size=32,
            net_arch=[32],
            learning_rate=3e-3,
            n_steps=24,
            batch_size=96,
            n_epochs=8,
            gamma=1.0,
            gae_lambda=0.98,
        )
    )
    es: EvolutionConfig = field(default_factory=EvolutionConfig)
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    checkpoint_every: int = 5
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name in ("episodes", "envs", "validate_every", "checkpoint_every"):
            at_least(name, getattr(self, name), 1)
        for name in ("hidden_sizes", "batches"):
            at_least(f"tasks.{name}", min(getattr(self.tasks, name)), 1)
        at_least("tasks.decisions", self.tasks.decisions, 6)
        _check_common(self)
        at_least("validation_tasks", self.validation_tasks, 0)
        at_least("eval_tasks", self.eval_tasks, 0)
        one_of("ablation", self.ablation, Ablation)
        one_of("algorithm", self.algorithm, Algorithm)
        if self.group < 2 or self.envs % self.group:
            raise ValueError(
                f"group is {self.group}, expected at least 2 and a divisor of the "
                f"{self.envs} envs"
            )
        if self.algorithm == "es" and self.group % 2:
            raise ValueError(
                f"group is {self.group}, expected an even number: evolution strategies "
                "play in pairs"
            )
