"""What the flows share: signals, threads, the run folder, and the agent's loop."""

import copy
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from rlrnn.agents import RecurrentPPO
from rlrnn.agents.evolution import EvolutionStrategies
from rlrnn.checkpoint import CheckpointError
from rlrnn.config import AgentConfig, RunConfig
from rlrnn.device import resolve_device
from rlrnn.tracking import LoggerMirror, NotARunError, Run

Summary = dict[str, Any]


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; it has been saved."""

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(f"stopped and saved; go on with --resume {folder}")
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[Callable[[], int]]:
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
def threads(count: int) -> Iterator[None]:
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


def create_run(config: Any, job: str) -> Run:
    """A new run in the config's folder, or in one with the date in its name."""
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


def resume_run(folder: str | Path, config: Any) -> tuple[Run, Any]:
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


def returned(summary: Summary, run: Run) -> Summary:
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


def policy_kwargs(config: AgentConfig) -> dict[str, Any]:
    """What a config says of the networks."""
    return {
        "cell": config.cell,
        "lstm_hidden_size": config.hidden_size,
        "n_lstm_layers": config.layers,
        "shared_lstm": config.shared,
        "enable_critic_lstm": not config.shared,
        "net_arch": config.net_arch,
        "norm_obs": config.normalize,
        "norm_value": config.norm_value,
    }


def rate_schedule(rate: float, config: AgentConfig) -> float | LinearSchedule:
    """The learning rate, or how it falls."""
    return LinearSchedule(rate, 0.0, 1.0) if config.anneal else rate


def policy_for(space: spaces.Space[Any]) -> str:
    """The policy that reads such observations."""
    if isinstance(space, spaces.Dict):
        return "MultiInputLstmPolicy"
    return "CnnLstmPolicy" if is_image_space(space) else "MlpLstmPolicy"


def make_agent(
    config: AgentConfig, env: VecEnv, seed: int, device: str, **kwargs: Any
) -> RecurrentPPO:
    """The agent that a config describes; `kwargs` go to its policy."""
    return RecurrentPPO(
        policy_for(env.observation_space),
        env,
        learning_rate=rate_schedule(config.learning_rate, config),
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm,
        target_kl=config.target_kl,
        reward_scale=config.reward_scale,
        norm_reward=config.normalize,
        use_sde=config.use_sde,
        sde_sample_freq=config.sde_sample_freq,
        recompute_states=config.recompute_states,
        bptt_truncation=config.bptt_truncation,
        policy_kwargs={**policy_kwargs(config), **kwargs},
        seed=seed,
        device=resolve_device(device),
    )


class Keeper(BaseCallback):
    """Between two updates: writes the pending figures and saves now and then.

    When a signal asked for a stop, what is saved is the moment before the rollout that
    was cut off, which the resumed run then plays again. `judge` is called with the
    number of updates; if it gives a score, that moment is saved under it.
    """

    def __init__(
        self,
        run: Run,
        every: int,
        tree: Callable[[], dict[str, Any]],
        stopped: Callable[[], int],
        judge: Callable[[int], float | None] = lambda updates: None,
    ) -> None:
        super().__init__()
        self.run, self.every, self.tree, self.stopped = run, every, tree, stopped
        self.judge = judge
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
        score = self.judge(self.updates)
        self.moment = copy.deepcopy({"flow": self.tree(), "updates": self.updates})
        if score is not None or self.stopped() or self.updates % self.every == 0:
            self.save(score)

    def save(self, score: float | None = None) -> None:
        if self.saved_steps != self.steps or score is not None:
            self.run.checkpoint(self.steps, self.moment, score)
            self.saved_steps = self.steps

    def _on_step(self) -> bool:
        self.cut = bool(self.stopped())
        return not self.cut


def learn(
    run: Run,
    agent: RecurrentPPO | EvolutionStrategies,
    steps: int,
    keeper: Keeper,
    callbacks: list[BaseCallback],
    progress: bool,
) -> None:
    """Learns up to `steps` in all, saved at the end. Raises `Stopped` if it was."""
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
