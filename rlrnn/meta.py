"""Flow 3, tune: the agent on the tuning environment, from a config to a controller."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_wrapper

from rlrnn import __version__, plots, seeding
from rlrnn.agents import RecurrentPPO
from rlrnn.agents.controller import (
    initial_logits,
    learned,
    load_policy,
    save_controller,
)
from rlrnn.agents.evolution import EvolutionStrategies
from rlrnn.agents.policies import RecurrentPolicy
from rlrnn.card import card_text
from rlrnn.comparison import (
    Played,
    by_family,
    compare_with_prior,
    falls_below,
    gain,
    play,
)
from rlrnn.config import TuneConfig
from rlrnn.control import NO_OP, Controller, prior
from rlrnn.device import resolve_device
from rlrnn.envs.together import TuningVecEnv
from rlrnn.envs.tuning import GroupBaseline, Ranges, TuningEnv
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
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

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group
        self.episodes = 0
        self.falls: list[tuple[str, float]] = []  # of the log loss, and in which family

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        for info in infos:
            if "episode" in info:
                self.episodes += 1
                self.falls.append((info["family"], info["episode"]["r"]))
                failed = info["signals"]["failed"]
                self.logger.record_mean("tune/failed", failed)
            signals = info["signals"]
            self.logger.record_mean("tune/truncation", signals["truncation"])
            self.logger.record_mean("tune/recovered", signals["recovered"])
        if all("episode" in info for info in infos):
            falls = np.array([info["episode"]["r"] for info in infos])
            spread = falls.reshape(-1, self.group).std(1).mean()
            self.logger.record_mean("tune/group_spread", float(spread))
        no_op = (np.asarray(self.locals["actions"]) == np.array(NO_OP)).mean(0)
        self.logger.record_mean("tune/no_op_rate", float(no_op[0]))
        self.logger.record_mean("tune/no_op_truncation", float(no_op[1]))
        return True

    def _on_rollout_end(self) -> None:
        for family, fall in self.falls:
            self.logger.record_mean("tune/log_loss_fall", fall)
            self.logger.record_mean(f"tune/log_loss_fall/{family}", fall)
        if self.falls:
            self.logger.record("episodes", self.episodes)
        self.falls = []


class _Validation:
    """The likeliest actions of the policy on its way against the prior, now and then,
    on tasks that it never learns on, the same each time."""

    def __init__(
        self, config: TuneConfig, run: Run, stopped: Callable[[], int]
    ) -> None:
        self.config, self.run, self.stopped = config, run, stopped
        rng = np.random.default_rng(seeding.derive(config.seed, "validation tasks"))
        self.tasks = [config.tasks.draw(rng) for _ in range(config.validation_tasks)]
        self.prior: Played | None = None
        self.updates = 0  # when it was last done
        self.best = -math.inf
        self.seconds = 0.0

    def __call__(
        self, policy: RecurrentPolicy, updates: int, place: dict[str, int], last: bool
    ) -> float | None:
        """The mean fall of the log loss below the prior's, if it is time for it; logged
        with `place`. Nothing is remembered of one that was stopped."""
        due = last or (updates > 0 and updates % self.config.validate_every == 0)
        if not (due and self.tasks) or updates == self.updates:
            return None
        began = time.monotonic()
        its = self._play(prior()) if self.prior is None else self.prior
        mine = self._play(learned(policy, self.config.ablation))
        if self.stopped():
            return None
        self.prior, self.updates = its, updates
        falls = falls_below(mine, its)
        row = {f"tune/{name}": value for name, value in gain(falls).items()}
        for family, part in by_family(self.tasks, falls).items():
            row[f"tune/loss_below_prior/{family}"] = gain(part)["loss_below_prior"]
        self.run.log({**place, **row})
        self.run.flush()
        score = float(falls.mean())
        if score > self.best:
            self.best = score
            names = [task.family for task in self.tasks]
            path = plots.plot_traces(names, mine, its, self.run.folder / "traces.png")
            self.run.image("traces", path)
        self.seconds += time.monotonic() - began
        return score

    def _play(self, controller: Controller) -> Played:
        return play(self.tasks, controller, self.config.device, self.stopped)

    def state_dict(self) -> dict[str, Any]:
        return {
            "prior": None if self.prior is None else vars(self.prior),
            "updates": self.updates,
            "best": self.best,
            "time/seconds": self.seconds,
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self.prior = None if tree["prior"] is None else Played(**tree["prior"])
        self.updates, self.best = tree["updates"], tree["best"]
        self.seconds = tree["time/seconds"]


def tune(
    config: TuneConfig,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Summary:
    """Flow 3: flow 1 on the tuning environment. Writes `controller.zip`, for
    `fit --controller`, its model card `card.md`, the curve `tuning.png`, and
    `traces.png`, what the controller did on validation tasks.

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
    if config.algorithm == "es":
        logits = initial_logits(config.es.sigma)  # a perturbation may turn their order
        return EvolutionStrategies(
            envs,
            config.group,
            rate_schedule(config.es.learning_rate, config.agent),
            config.es.sigma,
            config.es.weight_decay,
            {**policy_kwargs(config.agent), "initial_logits": logits},
            config.seed,
            resolve_device(config.device),
        )
    return make_agent(
        config.agent,
        GroupBaseline(envs, config.group),
        config.seed,
        config.device,
        initial_logits=initial_logits(),
    )


def _begin_with(policy: RecurrentPolicy, path: str) -> None:
    """Raises ValueError if the policy in the file is of other sizes."""
    try:
        policy.load_state_dict(load_policy(path).state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"init_from is {path}, whose policy is not that of agent ({reason}); "
            "expected one of the same cell and sizes"
        ) from None


def _tune(
    config: TuneConfig,
    run: Run,
    saved: Any,
    envs: VecEnv,
    progress: bool,
    stopped: Callable[[], int],
) -> Summary:
    watched = Ranges(envs)
    agent = _player(config, watched)
    if config.init_from is not None and saved is None:
        _begin_with(agent.policy, config.init_from)
    assert agent.env is not None
    grouped = unwrap_vec_wrapper(agent.env, GroupBaseline)
    log, validation = _TuningLog(config.group), _Validation(config, run, stopped)
    steps = config.episodes * config.tasks.decisions

    def tree() -> dict[str, Any]:
        return {
            "agent": agent.state_dict(),
            "envs": envs.env_method("state_dict"),
            "group": None if grouped is None else grouped.state_dict(),
            "episodes": log.episodes,
            "ranges": [watched.low, watched.high],
            "validation": validation.state_dict(),
            "time/seconds": earlier + time.monotonic() - began,
        }

    def judge(updates: int) -> float | None:
        played = agent.num_timesteps
        place = {"env_steps": played, "episodes": log.episodes}
        return validation(agent.policy, updates, place, played >= steps)

    began, earlier = time.monotonic(), 0.0
    keeper = Keeper(run, config.checkpoint_every, tree, stopped, judge)
    if saved is not None:
        flow = saved["flow"]
        earlier = flow["time/seconds"]
        log.episodes = flow["episodes"]
        watched.low, watched.high = flow["ranges"]
        validation.load_state_dict(flow["validation"])
        agent.load_state_dict(flow["agent"])
        if isinstance(agent, RecurrentPPO):  # which would begin new episodes
            agent._last_obs = flow["agent"]["last_obs"]
            agent._last_episode_starts = flow["agent"]["last_starts"]
            agent._last_state = flow["agent"]["last_state"].to(agent.device)
        if grouped is not None:
            grouped.load_state_dict(flow["group"])
        for rank, state in enumerate(flow["envs"]):
            envs.env_method("load_state_dict", state, indices=rank)
        keeper.restore(saved, agent.num_timesteps)
    learn(run, agent, steps, keeper, [log], progress)
    seconds = earlier + time.monotonic() - began
    episodes, ranges = log.episodes, (watched.low, watched.high)
    if run.checkpoints.best_step() is not None:
        best = run.checkpoints.best()[1]["tree"]["flow"]
        agent.policy.load_state_dict(best["agent"]["policy"])
        episodes = best["episodes"]
        ranges = best["ranges"][0], best["ranges"][1]
    scores = compare_with_prior(
        learned(agent.policy, config.ablation, ranges),
        config.tasks,
        config.eval_tasks,
        config.seed,
        config.device,
        progress,
        stopped,
    )
    if number := stopped():
        raise Stopped(number, run.folder)
    card = {
        "command": _command(config),
        "algorithm": config.algorithm,
        "ablation": config.ablation,
        "tasks": dataclasses.asdict(config.tasks),
        "episodes": log.episodes,
        "episodes_of_best": episodes,
        "seed": config.seed,
        "rlrnn": __version__,
        "torch": torch.__version__,
        **scores,
        "time/hours": round((seconds - validation.seconds) / 3600, 3),
        "time/validation_hours": round(validation.seconds / 3600, 3),
    }
    path = run.folder / "controller.zip"
    kwargs = {**agent.policy_kwargs, "seed": config.seed}
    save_controller(path, agent.policy, kwargs, card, config.ablation, ranges)
    (run.folder / "card.md").write_text(card_text(card), encoding="utf-8")
    run.artifact(path, f"controller-{run.folder.name}", "model")
    plot = plots.plot_tuning(read_metrics(run.folder), run.folder / "tuning.png")
    run.image("tuning", plot)
    summary = {k: v for k, v in card.items() if not isinstance(v, dict)}
    run.summary({**summary, "time/seconds": seconds})
    return returned({**summary, "time/seconds": seconds}, run)


def _command(config: TuneConfig) -> str:
    """What makes a controller like this one again."""
    from rlrnn.cli import config_names, config_path, load_config

    for name in config_names():
        if "tasks" in yaml.safe_load(config_path(name).read_text("utf-8")):
            shipped = load_config("tune", name)
            own = {"run": shipped.run, "init_from": None}
            if dataclasses.replace(config, **own) == shipped:
                begun = " --init_from FILE" if config.init_from else ""
                return f"rlrnn tune --config {name}{begun}"
    return "rlrnn tune --config RUN/config.yaml"
