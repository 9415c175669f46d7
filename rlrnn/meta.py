"""Flow 3, tune: the agent on the tuning environment, from a config to a controller."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from tqdm.auto import tqdm

from rlrnn import __version__, plots, seeding
from rlrnn.agents import RecurrentPPO
from rlrnn.agents.controller import initial_logits, learned, save_controller
from rlrnn.agents.evolution import EvolutionStrategies
from rlrnn.config import TuneConfig
from rlrnn.control import NO_OP, Controller, prior
from rlrnn.device import resolve_device
from rlrnn.envs.together import TuningVecEnv
from rlrnn.envs.tuning import GroupBaseline, TuningEnv
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.population import Population
from rlrnn.running import (
    Keeper,
    Stopped,
    Summary,
    create_run,
    learn,
    make_agent,
    policy_kwargs,
    rate_schedule,
    resume_run,
    returned,
    stoppable,
    threads,
)
from rlrnn.tasks import DataConfig, Task, Tasks, build_trainer
from rlrnn.tracking import Run, read_metrics
from rlrnn.training import Trainer


def _tuning_envs(config: TuneConfig) -> TuningVecEnv:
    groups = (rank // config.group for rank in range(config.envs))
    seeds = (seeding.derive(config.seed, "tasks", group) for group in groups)
    return TuningVecEnv(
        [
            TuningEnv(config.tasks, seed, config.device, config.ablation)
            for seed in seeds
        ]
    )


class _TuningLog(BaseCallback):
    """Counts finished training runs, and logs what their losses did."""

    def __init__(self) -> None:
        super().__init__()
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
        no_op = (np.asarray(self.locals["actions"]) == np.array(NO_OP)).mean(0)
        self.logger.record_mean("tune/no_op_rate", float(no_op[0]))
        self.logger.record_mean("tune/no_op_truncation", float(no_op[1]))
        return True

    def _on_rollout_end(self) -> None:
        if self.falls:
            self.logger.record("tune/log_loss_fall", float(np.mean(self.falls)))
            self.logger.record("episodes", self.episodes)
            self.falls = []


def tune(
    config: TuneConfig,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Summary:
    """Flow 3: flow 1 on the tuning environment. Writes `controller.zip`, for
    `fit --controller`, and `tuning.png`.

    `resume` and errors as in `train`.
    """
    resolve_device(config.device)
    _check_tasks(config.tasks)
    with threads(config.threads), stoppable() as stopped:
        run, saved = (
            (create_run(config, "tune"), None)
            if resume is None
            else resume_run(resume, config)
        )
        with run:
            envs = _tuning_envs(config)
            return _tune(config, run, saved, envs, progress, stopped)


def _check_tasks(tasks: Tasks) -> None:
    """Raises ValueError if a task could be drawn that cannot be trained on."""
    for kind in sorted(set(tasks.kinds)):
        data = DataConfig(kind, batch=max(tasks.batches), half=1, size=200_000)
        model = ModelConfig(hidden_size=min(tasks.hidden_sizes))
        try:
            training = TrainingConfig(tasks.budget[0], decisions=tasks.decisions)
            build_trainer(Task(data, model, training))
        except ValueError as error:
            raise ValueError(f"tasks: {error}") from None


def _player(config: TuneConfig, envs: VecEnv) -> RecurrentPPO | EvolutionStrategies:
    """The agent that learns to tune."""
    logits = {"initial_logits": initial_logits()}
    if config.algorithm == "es":
        return EvolutionStrategies(
            envs,
            config.group,
            rate_schedule(config.es.learning_rate, config.agent),
            config.es.sigma,
            config.es.weight_decay,
            {**policy_kwargs(config.agent), **logits},
            config.seed,
            resolve_device(config.device),
        )
    baseline = GroupBaseline(envs, config.group)
    return make_agent(config.agent, baseline, config.seed, config.device, **logits)


def _tune(
    config: TuneConfig,
    run: Run,
    saved: Any,
    envs: VecEnv,
    progress: bool,
    stopped: Callable[[], int],
) -> Summary:
    agent = _player(config, envs)
    log = _TuningLog()

    def tree() -> dict[str, Any]:
        return {
            "agent": agent.state_dict(),
            "envs": envs.env_method("state_dict"),
            "episodes": log.episodes,
            "falls": log.falls,
            "time/seconds": earlier + time.monotonic() - began,
        }

    began, earlier = time.monotonic(), 0.0
    keeper = Keeper(run, config.checkpoint_every, tree, stopped)
    if saved is not None:
        flow = saved["flow"]
        earlier = flow["time/seconds"]
        log.episodes, log.falls = flow["episodes"], flow["falls"]
        agent.load_state_dict(flow["agent"])
        if isinstance(agent, RecurrentPPO):  # which would begin new episodes
            agent._last_obs = flow["agent"]["last_obs"]
            agent._last_episode_starts = flow["agent"]["last_starts"]
            agent._last_state = flow["agent"]["last_state"].to(agent.device)
        for rank, state in enumerate(flow["envs"]):
            envs.env_method("load_state_dict", state, indices=rank)
        keeper.restore(saved, agent.num_timesteps)
    steps = config.episodes * config.tasks.decisions
    learn(run, agent, steps, keeper, [log], progress)
    seconds = earlier + time.monotonic() - began
    scores = compare_with_prior(
        learned(agent.policy, config.ablation),
        config.tasks,
        config.eval_tasks,
        config.seed,
        progress,
        stopped,
    )
    if number := stopped():
        raise Stopped(number, run.folder)
    card = {
        "command": _command(config),
        "episodes": log.episodes,
        "seed": config.seed,
        "rlrnn": __version__,
        "torch": torch.__version__,
        **scores,
        "time/hours": round(seconds / 3600, 3),
    }
    path = run.folder / "controller.zip"
    kwargs = {**agent.policy_kwargs, "seed": config.seed}
    save_controller(path, agent.policy, kwargs, card, config.ablation)
    run.artifact(path, f"controller-{run.folder.name}", "model")
    plot = plots.plot_tuning(read_metrics(run.folder), run.folder / "tuning.png")
    run.image("tuning", plot)
    summary = {**card, "time/seconds": seconds}
    run.summary(summary)
    return returned(summary, run)


def _command(config: TuneConfig) -> str:
    """What makes a controller like this one again."""
    from rlrnn.cli import config_names, config_path, load_config

    for name in config_names():
        if "tasks" in yaml.safe_load(config_path(name).read_text("utf-8")):
            shipped = load_config("tune", name)
            if dataclasses.replace(config, run=shipped.run) == shipped:
                return f"rlrnn tune --config {name}"
    return "rlrnn tune --config RUN/config.yaml"


def run_tasks(
    tasks: Sequence[Task], controller: Controller, device: str = "cpu"
) -> list[Trainer]:
    """Tasks trained to the end under a controller, side by side."""
    trainers = [build_trainer(task, device) for task in tasks]
    population, state = Population(trainers), controller.init(len(trainers))
    signals = population.start(controller.range_test)
    while not population.done.all():
        knobs, state = controller(signals, state)
        signals = population.step(knobs)
    population.sync()
    return trainers


def compare_with_prior(
    controller: Controller,
    tasks: Tasks,
    count: int,
    seed: int,
    progress: bool = False,
    stopped: Callable[[], int] = lambda: 0,
) -> dict[str, float | int]:
    """Validation losses under `controller` and under the prior, on `count` tasks that
    were drawn for this alone: how much lower on average, and how often lower. Nothing
    once `stopped` says so."""
    rng = np.random.default_rng(seeding.derive(seed, "evaluation tasks"))
    falls: list[float] = []
    hide = None if progress else True  # None: not on a terminal
    with tqdm(total=count, desc="compare with the prior", disable=hide) as bar:
        while len(falls) < count and not stopped():
            drawn = [tasks.draw(rng) for _ in range(min(16, count - len(falls)))]
            nats = [
                [trainer.score("valid")["nats"] for trainer in run_tasks(drawn, player)]
                for player in (controller, prior())
            ]
            falls += np.log(np.array(nats[1]) / np.array(nats[0])).tolist()
            bar.update(len(drawn))
    if not falls or stopped():
        return {}
    return {
        "eval_tasks": count,
        "eval_loss_below_prior": float(1 - math.exp(-np.mean(falls))),
        "eval_share_below_prior": float(np.mean(np.array(falls) > 0)),
    }
