"""The three flows, train, fit and tune, and evaluate: from a config to a run folder.

Each returns what it found as a plain dict, which is also the run's `summary.json`.
"""

import copy
import dataclasses
import difflib
import math
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch
import yaml
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv
from tqdm.auto import tqdm

from rlrnn import __version__, plots, seeding
from rlrnn.agents import RecurrentPPO
from rlrnn.agents.controller import (
    SHIPPED,
    controller_card,
    initial_logits,
    learned,
    load_controller,
    save_controller,
)
from rlrnn.agents.masking import (
    evaluate_policy,
    get_action_masks,
    is_masking_supported,
)
from rlrnn.agents.vector import TensorVecEnv
from rlrnn.baselines import UNLEARNED
from rlrnn.checkpoint import CheckpointError
from rlrnn.config import AgentConfig, FitConfig, RunConfig, TrainConfig, TuneConfig
from rlrnn.control import NO_OP, Controller, Signals, prior
from rlrnn.data.chunks import Problem
from rlrnn.device import resolve_device
from rlrnn.envs.together import TuningVecEnv
from rlrnn.envs.tuning import GroupBaseline, TuningEnv, log_loss
from rlrnn.evaluation import inference_speed, score, tally
from rlrnn.finished import load_model, same, save_model
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Classes
from rlrnn.population import Population
from rlrnn.tasks import DataConfig, Task, Tasks, build_problem, build_trainer
from rlrnn.tracking import LoggerMirror, NotARunError, Run, read_metrics
from rlrnn.training import Trainer
from rlrnn.transfer import transfer

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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, torch computes with `count` threads; on leaving as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _resume(folder: str | Path, config: Any) -> tuple[Run, Any]:
    """The run that is in `folder`, open again, and what it saved last."""
    _, stored = run_config(folder)
    given = config_to_tree(config)
    for key, was in _leaves(stored):
        now = dict(_leaves(given)).get(key, was)
        if now != was and key.split(".")[0] not in ("run", "device", "threads"):
            raise ValueError(
                f"{key} is {now!r}, but {folder} was made with {was!r}: expected the "
                "run's own config"
            )
    try:
        run, _, saved = Run.resume(folder, mode=config.run.track)
    except CheckpointError as error:
        held = sorted(Path(folder, "checkpoints").glob("step_*"))
        if len(held) > 1 and "damaged" in str(error):
            raise CheckpointError(f"{error}: delete {held[-1]}") from error
        raise
    return run, saved


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _returned(summary: Summary, run: Run) -> Summary:
    """What a flow gives back: also where the run is."""
    place = {"folder": str(run.folder)}
    return (
        {**summary, **place}
        if run.url is None
        else {**summary, **place, "url": run.url}
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
    spec = _spec(env)
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
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make {env!r}: {_told(error)}") from None


def make_env(env: str) -> gymnasium.Env[Any, Any]:
    """One copy, as gymnasium has it."""
    _spec(env)
    try:
        return gymnasium.make(env)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make {env!r}: {_told(error)}") from None


def _spec(env: str) -> EnvSpec:
    try:
        return gymnasium.spec(env)
    except (gymnasium.error.Error, ImportError) as error:
        close = difflib.get_close_matches(env, gymnasium.registry, 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown environment {env!r}: {_told(error)}{hint}") from None


def _told(error: Exception) -> str:
    """One line, without the guess at a name."""
    return " ".join(str(error).split("Did you mean")[0].split()).rstrip(".")


def make_agent(
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
        norm_reward=config.normalize,
        use_sde=config.use_sde,
        sde_sample_freq=config.sde_sample_freq,
        recompute_states=config.recompute_states,
        bptt_truncation=config.bptt_truncation,
        policy_kwargs={
            "cell": config.cell,
            "lstm_hidden_size": config.hidden_size,
            "n_lstm_layers": config.layers,
            "shared_lstm": config.shared,
            "enable_critic_lstm": not config.shared,
            "net_arch": config.net_arch,
            "norm_obs": config.normalize,
            **kwargs,
        },
        seed=seed,
        device=resolve_device(device),
    )


class _Keeper(BaseCallback):
    """Between two updates: writes the pending figures and saves now and then.

    When a signal asked for a stop, what is saved is the moment before the rollout that
    was cut off, which the resumed run then plays again.
    """

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
        self.steps = 0  # played when the last update was complete
        self.moment: dict[str, Any] = {}  # all that there was then
        self.saved_steps = -1
        self.cut = False  # the last rollout was

    def restore(self, saved: dict[str, Any], steps: int) -> None:
        self.updates, self.steps, self.saved_steps = saved["updates"], steps, steps

    def _on_rollout_start(self) -> None:
        # Here the last update is complete, and the next rollout has not begun.
        steps = self.model.num_timesteps
        if steps > self.steps:
            self.updates += 1
            self.logger.dump(steps)
        self.steps = steps
        self.moment = copy.deepcopy({"flow": self.tree(), "updates": self.updates})
        if self.stopped() or self.updates % self.every == 0:
            self.save()

    def save(self) -> None:
        if self.saved_steps != self.steps:
            self.run.checkpoint(self.steps, self.moment)
            self.saved_steps = self.steps

    def _on_step(self) -> bool:
        self.cut = bool(self.stopped())
        return not self.cut


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
    if not keeper.cut:
        keeper._on_rollout_start()
    keeper.save()
    if keeper.cut:
        raise Stopped(keeper.stopped(), run.folder)


def train(
    config: TrainConfig, resume: str | Path | None = None, progress: bool = True
) -> Summary:
    """Flow 1: an agent learns an environment. Writes `agent.zip` and `returns.png`.

    With `resume`, a run folder, `config` must be that run's own. Raises ValueError for
    bad input, `Stopped` after SIGINT or SIGTERM.
    """
    with _threads(config.threads), _stoppable() as stopped:
        if config.eval_videos:
            _stage(config.env).close()  # an error now, not after the training
        env = make_envs(config.env, config.envs, config.device, config.seed)
        try:
            agent = make_agent(config.agent, env, config.seed, config.device)
            return _train(config, agent, resume, progress, stopped)
        finally:
            env.close()


def _train(
    config: TrainConfig,
    agent: RecurrentPPO,
    resume: str | Path | None,
    progress: bool,
    stopped: Callable[[], int],
) -> Summary:
    if resume is None:
        run, saved = _create(config, "train"), None
    else:
        run, saved = _resume(resume, config)
    with run:
        keeper = _Keeper(run, config.checkpoint_every, agent.state_dict, stopped)
        if saved is not None:
            agent.load_state_dict(saved["flow"])
            keeper.restore(saved, agent.num_timesteps)
        began, first = time.monotonic(), agent.num_timesteps
        _learn(run, agent, config.steps, keeper, [], progress)
        seconds = time.monotonic() - began
        agent.save(run.folder / "agent.zip")
        run.artifact(run.folder / "agent.zip", f"agent-{run.folder.name}", "model")
        score = _evaluate_agent(agent, config)
        _film(agent, config, run)
        plot = plots.plot_returns(
            read_metrics(run.folder), run.folder / "returns.png", config.env
        )
        run.image("returns", plot)
        summary = {
            **score,
            "env_steps": agent.num_timesteps,
            "time/seconds": seconds,
            "time/steps_per_second": (agent.num_timesteps - first) / seconds,
        }
        run.summary(summary)
        return _returned(summary, run)


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


def _stage(env: str) -> VecEnv:
    """One copy of an environment, in which a picture can be taken."""
    try:
        stage = make_vec_env(env, 1, env_kwargs={"render_mode": "rgb_array"})
        stage.reset()
        picture, reason = stage.render(), "it gave no picture"
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        picture, reason = None, _told(error)
    if picture is None:
        raise ValueError(
            f"{env!r} cannot be filmed ({reason}): expected render_mode rgb_array; "
            "leave eval_videos at 0"
        )
    return stage


def _film(agent: RecurrentPPO, config: TrainConfig, run: Run) -> None:
    """Pictures of the likeliest actions, an episode each."""
    if not config.eval_videos:
        return
    (run.folder / "videos").mkdir(exist_ok=True)
    stage = _stage(config.env)
    stage.seed(seeding.derive(config.seed, "videos") >> 32)
    masked = is_masking_supported(stage)
    obs: Any = stage.reset()
    for number in range(config.eval_videos):
        film, state, done = plots.Animation(), None, False
        while not done:
            film.add(stage.render())
            masks = get_action_masks(stage) if masked else None
            actions, state = agent.predict(obs, state, None, True, masks)
            obs, _, dones, _ = stage.step(actions)
            done = bool(dones[0])
        path = film.save(run.folder / "videos" / f"episode_{number}.gif")
        run.video("eval/video", path)
    stage.close()


# --- fit: supervised training under a controller --------------------------------------


def make_controller(name: str, lr: float = 1e-3, truncation: int = 32) -> Controller:
    """`learned` (the shipped one), `prior`, one of `UNLEARNED`, or a file that
    `rlrnn tune` wrote."""
    if name in UNLEARNED:
        return UNLEARNED[name](lr=lr, truncation=truncation)
    if name == "prior":
        return prior()
    if name == "learned":
        return load_controller(SHIPPED)
    if zipfile.is_zipfile(name):
        return load_controller(name)
    names = ("learned", "prior", *UNLEARNED)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    raise ValueError(
        f"controller is {name!r}, expected {', '.join(names)}, or a .zip that "
        "`rlrnn tune` wrote" + (f"; did you mean {close[0]}?" if close else "")
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
    resolve_device(config.device)
    with _threads(config.threads), _stoppable() as stopped:
        controller = make_controller(config.controller, config.lr, config.truncation)
        taken: dict[str, str] = {}

        def prepare(model: SequenceModel, problem: Problem) -> None:
            if config.init_from is not None and resume is None:
                source = load_model(config.init_from)
                taken.update(transfer(model, problem.format, source))

        trainer = build_trainer(fit_task(config), config.device, prepare)
        return _fit(config, controller, trainer, taken, resume, progress, stopped)


def _fit(
    config: FitConfig,
    controller: Controller,
    trainer: Trainer,
    taken: dict[str, str],
    resume: str | Path | None,
    progress: bool,
    stopped: Callable[[], int],
) -> Summary:
    def save(score: float | None) -> None:
        tree = {
            "trainer": trainer.state_dict(),
            "controller": state,
            "signals": vars(signals),
            "data": _fingerprint(trainer),
        }
        run.checkpoint(trainer.decision, tree, score)

    run, saved = (
        (_create(config, "fit"), None) if resume is None else _resume(resume, config)
    )
    with run:
        if saved is None:
            if taken:
                told = ", ".join(f"{part}: {what}" for part, what in taken.items())
                tqdm.write(f"begins with {config.init_from} ({told})", file=sys.stderr)
            state = controller.init(1)
            signals = trainer.start(controller.range_test)
            run.log(_fit_row(trainer, signals))
            save(None)
        elif saved["data"] != _fingerprint(trainer):
            raise ValueError(
                f"{config.data.path or 'the standard library'} is not the text that "
                f"{run.folder} began with; restore it, or start a new run"
            )
        else:
            trainer.load_state_dict(saved["trainer"])
            state, signals = saved["controller"], Signals(**saved["signals"])
        began, first = time.monotonic(), trainer.spent
        bar = tqdm(
            total=round(trainer.budget),
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
                run.log({**_fit_row(trainer, signals), "decision/reward": reward})
                # a run that has failed has nothing to be best at
                save(-trainer.last_probe if not signals.failed[0] else None)
                bar.update(round(trainer.spent) - bar.n)
                bar.set_postfix_str(
                    f"loss {trainer.last_probe:.3f} lr {signals.lr[0]:.2g} "
                    f"K {signals.truncation[0]:.0f}"
                )
        if not trainer.done:
            raise Stopped(stopped(), run.folder)
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
        save_model(run.folder / "model.zip", trainer, config_to_tree(config))
        run.artifact(run.folder / "model.zip", f"model-{run.folder.name}", "model")
        plot = plots.plot_fits(
            {config.controller: read_metrics(run.folder)},
            run.folder / "fit.png",
            "fit",
        )
        run.image("fit", plot)
        run.summary(summary)
        return _returned(summary, run)


def _fingerprint(trainer: Trainer) -> int:
    """Tells another text from the one that a run began with."""
    return trainer.problem.train.fingerprint()


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
    """The metrics of a split; not charged to the budget."""
    figures = trainer.score(split)
    return {f"{split}_{name}": value for name, value in figures.items()}


# --- tune: the agent on the tuning environment ----------------------------------------


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
        return True

    def _on_rollout_end(self) -> None:
        if self.falls:
            self.logger.record("tune/log_loss_fall", float(np.mean(self.falls)))
            self.logger.record("episodes", self.episodes)
            self.falls = []
        assert isinstance(self.model, RecurrentPPO)
        rollout = self.model.rollout_buffer
        actions = np.asarray(rollout.actions.cpu())
        no_op = (actions == np.array(NO_OP)).mean((0, 1))
        self.logger.record("tune/no_op_rate", float(no_op[0]))
        self.logger.record("tune/no_op_truncation", float(no_op[1]))


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
    with _threads(config.threads), _stoppable() as stopped:
        run, saved = (
            (_create(config, "tune"), None)
            if resume is None
            else _resume(resume, config)
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


def _tune(
    config: TuneConfig,
    run: Run,
    saved: Any,
    envs: VecEnv,
    progress: bool,
    stopped: Callable[[], int],
) -> Summary:
    agent = make_agent(
        config.agent,
        GroupBaseline(envs, config.group),
        config.seed,
        config.device,
        initial_logits=initial_logits(),
    )
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
    keeper = _Keeper(run, config.checkpoint_every, tree, stopped)
    if saved is not None:
        flow = saved["flow"]
        earlier = flow["time/seconds"]
        log.episodes, log.falls = flow["episodes"], flow["falls"]
        agent.load_state_dict(flow["agent"])
        agent._last_obs = flow["agent"]["last_obs"]
        agent._last_episode_starts = flow["agent"]["last_starts"]
        agent._last_state = flow["agent"]["last_state"].to(agent.device)
        for rank, state in enumerate(flow["envs"]):
            envs.env_method("load_state_dict", state, indices=rank)
        keeper.restore(saved, agent.num_timesteps)
    steps = config.episodes * config.tasks.decisions
    _learn(run, agent, steps, keeper, [log], progress)
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
    return _returned(summary, run)


def _command(config: TuneConfig) -> str:
    """What makes a controller like this one again."""
    from rlrnn.cli import config_names, config_path, load_config

    for name in config_names():
        if "tasks" in yaml.safe_load(config_path(name).read_text("utf-8")):
            shipped = load_config("tune", name)
            if dataclasses.replace(config, run=shipped.run) == shipped:
                return f"rlrnn tune --config {name}"
    return "rlrnn tune --config RUN/config.yaml"


def run_task(task: Task, controller: Controller, device: str = "cpu") -> Trainer:
    """A task trained to the end under a controller, without a run folder."""
    trainer = build_trainer(task, device)
    state = controller.init(1)
    signals = trainer.start(controller.range_test)
    while not trainer.done:
        knobs, state = controller(signals, state)
        signals = trainer.step(knobs)
    return trainer


def run_tasks(
    tasks: Sequence[Task], controller: Controller, device: str = "cpu"
) -> list[Trainer]:
    """The same for many tasks, side by side."""
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


# --- evaluate -------------------------------------------------------------------------


def evaluate(folder: str | Path, config: Config) -> Summary:
    """A finished run's figures, measured anew: the return of an agent over fresh
    episodes, the held-out losses of a model, a controller against its prior."""
    with _threads(config.threads):
        return _evaluate(Path(folder), config)


def _evaluate(folder: Path, config: Config) -> Summary:
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
        return _evaluate_model(folder, config)
    path = finished("controller.zip")
    scores = compare_with_prior(
        load_controller(path), config.tasks, config.eval_tasks, config.seed, True
    )
    return {**controller_card(path), **scores}


def _evaluate_model(folder: Path, config: FitConfig) -> Summary:
    """The metrics of the untouched parts, and how fast the model is. Writes
    `confusion.png` where there are classes with names."""
    device = resolve_device(config.device)
    finished = load_model(folder, device)
    problem = build_problem(fit_task(config)).to(device)
    if not same(finished.format, problem.format):
        source = config.data.path or "the standard library of this Python"
        raise ValueError(
            f"{folder} was trained on other data than {source} has now; restore them"
        )
    figures: Summary = {}
    for split in ("valid", "test"):
        for name, value in score(finished.model, problem, split).items():
            figures[f"{split}_{name}"] = value
    sums, _ = tally(finished.model, problem.objective, problem.test)
    if isinstance(problem.objective, Classes) and "confusion" in sums:
        plots.plot_confusion(
            sums["confusion"].numpy(),
            problem.objective.names,
            folder / "confusion.png",
        )
    return figures | inference_speed(finished.model, problem.test)
