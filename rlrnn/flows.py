"""The three flows, train, fit and tune, and evaluate: from a config to a run folder.

Each returns what it found as a plain dict, which is also the run's `summary.json`.
"""

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch
import yaml
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from tqdm.auto import tqdm

from rlrnn import __version__, checkpoint, plots, seeding
from rlrnn.agents import RecurrentPPO
from rlrnn.agents.controller import (
    SHIPPED,
    controller_card,
    initial_logits,
    learned,
    load_controller,
    save_controller,
)
from rlrnn.agents.vector import TensorVecEnv
from rlrnn.config import AgentConfig, FitConfig, RunConfig, TrainConfig, TuneConfig
from rlrnn.control import UNLEARNED, Controller, Signals, prior
from rlrnn.device import resolve_device
from rlrnn.envs.tuning import GroupBaseline, TuningEnv, log_loss
from rlrnn.tasks import Task, Tasks, build_trainer
from rlrnn.tracking import LoggerMirror, NotARunError, Run, read_metrics
from rlrnn.training import Trainer, mean_loss

Config = TypeVar("Config", TrainConfig, FitConfig, TuneConfig)
Summary = dict[str, Any]


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; it has been saved."""

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(f"stopped and saved; go on with --resume {folder}")
        self.exit_code = 128 + number


@contextmanager
def _stoppable() -> Iterator[Callable[[], int]]:
    """Inside, SIGINT and SIGTERM are noted: the yielded function gives the first one's
    number, or 0. A second one ends the process as it would have."""
    noted = [0]
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, _frame: object) -> None:
        noted[0] = number
        for other in numbers:
            signal.signal(other, before[other])

    try:
        before = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not in the main thread: signals are somebody else's
        yield lambda: 0
        return
    try:
        yield lambda: noted[0]
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def config_to_tree(config: Any) -> dict[str, Any]:
    """A config as plain values, for YAML. The folder is left out, so that a run can be
    made again from its own file."""
    tree = dataclasses.asdict(config)
    tree["run"]["folder"] = None
    if "tasks" in tree:
        tree["tasks"]["budget"] = list(tree["tasks"]["budget"])
    return tree


def _create(config: Any, job: str) -> Run:
    run: RunConfig = config.run
    if run.folder is not None:
        folder = Path(run.folder)
    else:
        stem = f"{job}-{datetime.now():%Y%m%d-%H%M%S}"
        names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
        folder = next(
            path for name in names if not (path := Path("runs", name)).exists()
        )
    return Run.create(
        folder,
        config_to_tree(config),
        job,
        mode=run.track,
        project=run.project,
        group=run.group,
        keep=run.keep,
    )


def run_config(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """A run's job (train, fit or tune) and its config as plain values."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise NotARunError(
            f"{folder} is not a run: expected a folder with config.yaml and "
            "checkpoints/; check the path"
        )
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise NotARunError(
            f"{path} is no YAML: {' '.join(str(error).split())}"
        ) from None
    jobs = {"env": "train", "data": "fit", "tasks": "tune"}
    for key, job in jobs.items():
        if isinstance(tree, dict) and key in tree:
            return job, tree
    raise NotARunError(
        f"{path} is not the config of a run: it has no env, data or tasks"
    )


# --- train: an agent on an environment ------------------------------------------------


def make_envs(env: str, copies: int, device: str, seed: int | None = None) -> VecEnv:
    """`copies` of an environment as SB3 takes them: tensor-native ones on `device`."""
    try:
        spec = gymnasium.spec(env)
    except gymnasium.error.Error as error:
        raise ValueError(f"unknown environment {env!r}: {_one_line(error)}") from None
    try:
        if spec.vector_entry_point is not None and env.startswith("rlrnn/"):
            vector = gymnasium.make_vec(
                env,
                num_envs=copies,
                vectorization_mode="vector_entry_point",
                device=resolve_device(device),
            )
            return TensorVecEnv(vector)
        return make_vec_env(env, copies, seed=seed)
    except gymnasium.error.Error as error:
        raise ValueError(f"cannot make {env!r}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _agent(
    config: AgentConfig, env: VecEnv, seed: int, device: str, **kwargs: Any
) -> Any:
    rate = config.learning_rate
    return RecurrentPPO(
        "MlpLstmPolicy",
        env,
        learning_rate=LinearSchedule(rate, 0.0, 1.0) if config.anneal else rate,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm,
        reward_scale=config.reward_scale,
        policy_kwargs={
            "cell": config.cell,
            "lstm_hidden_size": config.hidden_size,
            "n_lstm_layers": config.layers,
            "shared_lstm": config.shared,
            "enable_critic_lstm": not config.shared,
            "net_arch": config.net_arch,
            **kwargs,
        },
        seed=seed,
        device=resolve_device(device),
    )


class _Keeper(BaseCallback):
    """Between two updates: writes the pending figures, saves now and then, and stops
    when a signal asked for it."""

    def __init__(
        self,
        run: Run,
        every: int,
        tree: Callable[[], dict[str, Any]],
        stopped: Callable[[], int],
    ) -> None:
        super().__init__()
        self.run, self.every, self.tree, self.stopped = run, every, tree, stopped
        self.updates = 0

    def _on_rollout_start(self) -> None:
        # Here the last update is complete, and the next rollout has not begun.
        if self.num_timesteps:
            self.updates += 1
            self.logger.dump(self.num_timesteps)
        if self.stopped() or self.updates % self.every == 0:
            self.save()

    def save(self) -> None:
        tree = {"flow": self.tree(), "updates": self.updates}
        self.run.checkpoint(self.num_timesteps, tree)

    def _on_step(self) -> bool:
        return not self.stopped()


def _learn(
    run: Run,
    agent: RecurrentPPO,
    steps: int,
    keeper: _Keeper,
    callbacks: list[BaseCallback],
    progress: bool,
) -> None:
    agent.set_logger(Logger(None, [LoggerMirror(run)]))
    agent.learn(
        steps - agent.num_timesteps,
        callback=CallbackList([keeper, *callbacks]),
        reset_num_timesteps=False,
        progress_bar=progress and sys.stdout.isatty(),
    )
    if number := keeper.stopped():
        raise Stopped(number, run.folder)
    keeper._on_rollout_start()
    keeper.save()


def train(
    config: TrainConfig, resume: str | Path | None = None, progress: bool = True
) -> Summary:
    """Flow 1: an agent learns an environment. Writes `agent.zip` and `returns.png`.

    With `resume`, a run folder, `config` must be that run's own. Raises ValueError for
    bad input, `Stopped` after SIGINT or SIGTERM.
    """
    resolve_device(config.device)
    torch.set_num_threads(config.threads)
    env = make_envs(config.env, config.envs, config.device, config.seed)
    agent = _agent(config.agent, env, config.seed, config.device)
    with _stoppable() as stopped:
        if resume is None:
            run, saved = _create(config, "train"), None
        else:
            run, _, saved = Run.resume(resume, mode=config.run.track)
        with run:
            keeper = _Keeper(run, config.checkpoint_every, agent.state_dict, stopped)
            if saved is not None:
                agent.load_state_dict(saved["flow"])
                keeper.updates = saved["updates"]
            began, first = time.monotonic(), agent.num_timesteps
            _learn(run, agent, config.steps, keeper, [], progress)
            seconds = time.monotonic() - began
            agent.save(run.folder / "agent.zip")
            run.artifact(run.folder / "agent.zip", f"agent-{run.folder.name}", "model")
            score = _evaluate_agent(agent, config)
            plot = plots.plot_returns(
                read_metrics(run.folder), run.folder / "returns.png", config.env, None
            )
            run.image("returns", plot)
            summary = {
                **score,
                "env_steps": agent.num_timesteps,
                "time/seconds": seconds,
                "time/steps_per_second": (agent.num_timesteps - first) / seconds,
            }
            run.summary(summary)
    env.close()
    return {**summary, "folder": str(run.folder)}


def _evaluate_agent(agent: RecurrentPPO, config: TrainConfig) -> Summary:
    """Returns of the likeliest actions, over episodes that training never saw."""
    episodes = config.eval_episodes
    seed = seeding.derive(config.seed, "evaluation") >> 32
    env = make_envs(config.env, min(episodes, 20), config.device, seed)
    env.seed(seed)
    returns, lengths = evaluate_policy(
        agent,
        env,
        episodes,
        deterministic=True,
        return_episode_rewards=True,
        warn=False,
    )
    env.close()
    assert isinstance(returns, list) and isinstance(lengths, list)
    return {
        "return_mean": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "return_min": float(np.min(returns)),
        "length_mean": float(np.mean(lengths)),
        "episodes": len(returns),
    }


# --- fit: supervised training under a controller --------------------------------------


def make_controller(name: str, lr: float = 1e-3, truncation: int = 32) -> Controller:
    """`learned` (the shipped one), `prior`, `constant`, `cosine`, `plateau`, or a file
    that `rlrnn tune` wrote."""
    if name in UNLEARNED:
        return UNLEARNED[name](lr=lr, truncation=truncation)
    if name == "prior":
        return prior()
    if name == "learned":
        return load_controller(SHIPPED)
    if name.endswith(".zip") or Path(name).is_file():
        return load_controller(name)
    raise ValueError(
        f"controller is {name!r}, expected learned, prior, {', '.join(UNLEARNED)}, "
        "or a .zip that `rlrnn tune` wrote"
    )


def fit_task(config: FitConfig) -> Task:
    """The task that a config describes, without its controller."""
    return Task(config.data, config.model, config.training, config.seed)


def fit(
    config: FitConfig, resume: str | Path | None = None, progress: bool = True
) -> Summary:
    """Flow 2: a model learns sequences. Writes `model.zip` and `fit.png`.

        signals = trainer.start()
        while not trainer.done:
            knobs, state = controller(signals, state)
            signals = trainer.step(knobs)

    `resume` and errors as in `train`.
    """
    torch.set_num_threads(config.threads)
    controller = make_controller(config.controller, config.lr, config.truncation)
    trainer = build_trainer(fit_task(config), config.device)
    with _stoppable() as stopped:
        if resume is None:
            run = _create(config, "fit")
            state = controller.init(1)
            signals = trainer.start(controller.range_test)
            reward_sum = 0.0
        else:
            run, _, saved = Run.resume(resume, mode=config.run.track)
            trainer.load_state_dict(saved["trainer"])
            state, signals = saved["controller"], Signals(**saved["signals"])
            reward_sum = saved["reward_sum"]
        with run:
            began, first = time.monotonic(), trainer.spent
            if resume is None:
                run.log(_fit_row(trainer, signals))
            bar = tqdm(
                total=round(config.training.budget),
                initial=round(trainer.spent),
                unit="token",
                unit_scale=True,
                desc=f"fit {config.controller}",
                disable=None if progress else True,  # None: not on a terminal
            )
            with bar:
                while not trainer.done and not stopped():
                    knobs, state = controller(signals, state)
                    before = log_loss(signals)
                    signals = trainer.step(knobs)
                    reward = before - log_loss(signals)
                    reward_sum += reward
                    run.log({**_fit_row(trainer, signals), "decision/reward": reward})
                    tree = {
                        "trainer": trainer.state_dict(),
                        "controller": state,
                        "signals": vars(signals),
                        "reward_sum": reward_sum,
                    }
                    # a run that has failed has nothing to be best at
                    score = -trainer.last_probe if not signals.failed[0] else None
                    run.checkpoint(trainer.decision, tree, score)
                    bar.update(round(trainer.spent) - bar.n)
                    bar.set_postfix_str(
                        f"loss {trainer.last_probe:.3f} lr {signals.lr[0]:.2g} "
                        f"K {signals.truncation[0]:.0f}"
                    )
            if number := stopped():
                raise Stopped(number, run.folder)
            seconds = time.monotonic() - began
            summary = {
                "controller": config.controller,
                "probe_loss": trainer.last_probe,
                **_held_out(trainer, "valid"),
                "tokens": trainer.spent,
                "failed": bool(signals.failed[0]),
                "recoveries": round(-math.log2(trainer.lr_scale)),
                "time/seconds": seconds,
                "time/tokens_per_second": (trainer.spent - first) / seconds,
            }
            save_model(run.folder / "model.zip", trainer, config)
            run.artifact(run.folder / "model.zip", f"model-{run.folder.name}", "model")
            plot = plots.plot_fits(
                {config.controller: read_metrics(run.folder)},
                run.folder / "fit.png",
                "fit",
            )
            run.image("fit", plot)
            run.summary(summary)
    return {**summary, "folder": str(run.folder)}


def _fit_row(trainer: Trainer, signals: Signals) -> dict[str, float | int]:
    values = signals.to_row()
    losses = ("train_loss", "probe_loss", "grad_norm")
    row: dict[str, float | int] = {
        "decision": trainer.decision,
        "tokens": trainer.spent,
        **{f"fit/{name}": values[name] for name in losses},
    }
    names = values.keys() - set(losses)
    return row | {f"decision/{name}": values[name] for name in sorted(names)}


def _held_out(trainer: Trainer, split: str) -> Summary:
    """The loss of a split in nats and bits per symbol; not charged to the budget."""
    streams = getattr(trainer.problem, split)
    nats = float(mean_loss(trainer.model, streams, streams.length))
    return {f"{split}_nats": nats, f"{split}_bits": nats / math.log(2)}


def save_model(path: Path, trainer: Trainer, config: FitConfig) -> None:
    """Weights, vocabulary and config of a trained model, in one safe file."""
    tree = {
        "model": dict(trainer.model.state_dict()),
        "vocabulary": trainer.problem.vocabulary,
        "config": config_to_tree(config),
    }
    checkpoint.save(path, tree, {"kind": "model"})


# --- tune: the agent on the tuning environment ----------------------------------------


def _tuning_envs(config: TuneConfig, processes: bool) -> VecEnv:
    def make(rank: int) -> Callable[[], gymnasium.Env[Any, Any]]:
        def env() -> gymnasium.Env[Any, Any]:
            torch.set_num_threads(config.threads)
            group = seeding.derive(config.seed, "tasks", rank // config.group)
            return TuningEnv(config.tasks, group, config.device)

        return env

    makers = [make(rank) for rank in range(config.envs)]
    return SubprocVecEnv(makers) if processes else DummyVecEnv(makers)


class _TuningLog(BaseCallback):
    """Counts finished training runs, and logs what their losses did."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.episodes = 0
        self.falls: list[float] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.episodes += 1
                self.falls.append(info["episode"]["r"])
                failed = info["signals"]["failed"]
                self.logger.record_mean("tune/failed", failed)
            signals = info["signals"]
            self.logger.record_mean("tune/truncation", signals["truncation"])
            self.logger.record_mean("tune/recovered", signals["recovered"])
        return True

    def _on_rollout_end(self) -> None:
        if self.falls:
            self.logger.record("tune/log_loss_fall", float(np.mean(self.falls)))
            self.logger.record("episodes", self.episodes)
            self.falls = []
        assert isinstance(self.model, RecurrentPPO)
        rollout = self.model.rollout_buffer
        actions = np.asarray(rollout.actions.cpu())
        no_op = (actions == np.array([3, 1])).mean((0, 1))
        self.logger.record("tune/no_op_rate", float(no_op[0]))
        self.logger.record("tune/no_op_truncation", float(no_op[1]))


def tune(
    config: TuneConfig,
    resume: str | Path | None = None,
    progress: bool = True,
    processes: bool = True,
) -> Summary:
    """Flow 3: flow 1 on the tuning environment. Writes `controller.zip`, for
    `fit --controller`, and `tuning.png`.

    `processes=False` plays all runs in this process. `resume`, errors: as in `train`.
    """
    resolve_device(config.device)
    torch.set_num_threads(config.threads)
    envs = _tuning_envs(config, processes)
    agent = _agent(
        config.agent,
        GroupBaseline(envs, config.group),
        config.seed,
        config.device,
        initial_logits=initial_logits(),
    )
    steps = config.episodes * config.tasks.decisions
    try:
        with _stoppable() as stopped:
            if resume is None:
                run, saved = _create(config, "tune"), None
            else:
                run, _, saved = Run.resume(resume, mode=config.run.track)
            with run:
                log = _TuningLog(run)

                def tree() -> dict[str, Any]:
                    return {
                        "agent": agent.state_dict(),
                        "envs": envs.env_method("state_dict"),
                        "episodes": log.episodes,
                        "falls": log.falls,
                    }

                keeper = _Keeper(run, config.checkpoint_every, tree, stopped)
                if saved is not None:
                    flow = saved["flow"]
                    keeper.updates = saved["updates"]
                    log.episodes, log.falls = flow["episodes"], flow["falls"]
                    agent.load_state_dict(flow["agent"])
                    agent._last_obs = flow["agent"]["last_obs"]
                    agent._last_episode_starts = flow["agent"]["last_starts"]
                    agent._last_state = flow["agent"]["last_state"].to(agent.device)
                    for rank, state in enumerate(flow["envs"]):
                        envs.env_method("load_state_dict", state, indices=rank)
                began = time.monotonic()
                _learn(run, agent, steps, keeper, [log], progress)
                seconds = time.monotonic() - began
                controller = learned(agent.policy)
                scores = compare_with_prior(
                    controller, config.tasks, config.eval_tasks, config.seed, progress
                )
                card = {
                    "episodes": log.episodes,
                    "seed": config.seed,
                    "hours": round(seconds / 3600, 3),
                    "rlrnn": __version__,
                    "torch": torch.__version__,
                    **scores,
                }
                path = run.folder / "controller.zip"
                kwargs = {**agent.policy_kwargs, "seed": config.seed}
                save_controller(path, agent.policy, kwargs, card)
                run.artifact(path, f"controller-{run.folder.name}", "model")
                plot = plots.plot_tuning(
                    read_metrics(run.folder), run.folder / "tuning.png"
                )
                run.image("tuning", plot)
                summary = {**card, "time/seconds": seconds}
                run.summary(summary)
    finally:
        envs.close()
    return {**summary, "folder": str(run.folder)}


def run_task(task: Task, controller: Controller, device: str = "cpu") -> Trainer:
    """A task trained to the end under a controller, without a run folder."""
    trainer = build_trainer(task, device)
    state = controller.init(1)
    signals = trainer.start(controller.range_test)
    while not trainer.done:
        knobs, state = controller(signals, state)
        signals = trainer.step(knobs)
    return trainer


def compare_with_prior(
    controller: Controller, tasks: Tasks, count: int, seed: int, progress: bool = False
) -> dict[str, float | int]:
    """Validation losses under `controller` and under the prior, on `count` tasks that
    were drawn for this alone: how much lower on average, and how often lower."""
    rng = np.random.default_rng(seeding.derive(seed, "evaluation tasks"))
    falls = []
    for _ in tqdm(range(count), desc="compare with the prior", disable=not progress):
        task = tasks.draw(rng)
        nats = [
            _held_out(run_task(task, player), "valid")["valid_nats"]
            for player in (controller, prior())
        ]
        falls.append(math.log(nats[1] / nats[0]))
    if not falls:
        return {}
    return {
        "eval_tasks": count,
        "eval_loss_below_prior": float(1 - math.exp(-np.mean(falls))),
        "eval_share_below_prior": float(np.mean(np.array(falls) > 0)),
    }


# --- evaluate -------------------------------------------------------------------------


def evaluate(folder: str | Path, config: Config) -> Summary:
    """A finished run's figures, measured anew: the return of an agent over fresh
    episodes, the held-out losses of a model, a controller against its prior."""
    folder = Path(folder)
    torch.set_num_threads(config.threads)

    def finished(name: str) -> Path:
        if not (folder / name).is_file():
            raise NotARunError(
                f"{folder} has no {name}: the run is not finished; go on with "
                f"--resume {folder}"
            )
        return folder / name

    if isinstance(config, TrainConfig):
        device = resolve_device(config.device)
        agent = RecurrentPPO.load(finished("agent.zip"), device=device)
        return _evaluate_agent(agent, config)
    if isinstance(config, FitConfig):
        trainer = build_trainer(fit_task(config), config.device)
        tree = checkpoint.load(finished("model.zip"))
        if tree["vocabulary"] != trainer.problem.vocabulary:
            source = config.data.path or "the standard library of this Python"
            raise ValueError(
                f"{folder} was trained on another text than {source} has now; "
                "restore the text"
            )
        trainer.model.load_state_dict(tree["model"])
        return {**_held_out(trainer, "valid"), **_held_out(trainer, "test")}
    path = finished("controller.zip")
    scores = compare_with_prior(
        load_controller(path), config.tasks, config.eval_tasks, config.seed, True
    )
    return {**controller_card(path), **scores}
