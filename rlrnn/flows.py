"""The three flows, train, fit and tune, and evaluate: from a config to a run folder.

Each returns what it found as a plain dict, which is also the run's `summary.json`.
"""

import dataclasses
import difflib
import math
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv
from tqdm.auto import tqdm

from rlrnn import plots, seeding
from rlrnn.agents import RecurrentPPO
from rlrnn.agents.controller import (
    SHIPPED,
    controller_card,
    load_controller,
)
from rlrnn.agents.masking import (
    evaluate_policy,
    get_action_masks,
    is_masking_supported,
)
from rlrnn.agents.vector import TensorVecEnv
from rlrnn.baselines import UNLEARNED
from rlrnn.comparison import compare_with_prior
from rlrnn.config import FitConfig, TrainConfig, TuneConfig
from rlrnn.control import FEATURES, Controller, Knobs, Signals, State, prior
from rlrnn.costs import in_tokens, tokens_per_second
from rlrnn.data.chunks import Problem
from rlrnn.device import resolve_device
from rlrnn.envs.tensor_wrappers import TensorPreviousActionReward
from rlrnn.envs.wrappers import PreviousActionReward
from rlrnn.evaluation import inference_speed, score, tally
from rlrnn.explain import left_to_prior
from rlrnn.finished import load_model, same, save_model
from rlrnn.meta import tune as tune
from rlrnn.models import SequenceModel
from rlrnn.objectives import Classes
from rlrnn.population import play_alone
from rlrnn.running import (
    Keeper,
    Stopped,
    Summary,
    config_to_tree,
    create_run,
    learn,
    make_agent,
    resume_run,
    returned,
    run_config,
    stoppable,
    threads,
)
from rlrnn.tasks import Task, build_problem, build_trainer
from rlrnn.tracking import NotARunError, Run, read_metrics
from rlrnn.training import Trainer
from rlrnn.transfer import transfer

Config = TypeVar("Config", TrainConfig, FitConfig, TuneConfig)


# --- train: an agent on an environment ------------------------------------------------


def make_envs(
    env: str,
    copies: int,
    device: str,
    seed: int | None = None,
    previous: bool = False,
) -> VecEnv:
    """`copies` of an environment as SB3 takes them: tensor-native ones on `device`.

    With `previous` observations hold the previous action and reward.
    """
    spec = _spec(env)
    try:
        if spec.vector_entry_point is not None and env.startswith("rlrnn/"):
            vector = gymnasium.make_vec(
                env,
                num_envs=copies,
                vectorization_mode="vector_entry_point",
                device=resolve_device(device),
            )
            return TensorVecEnv(_remembering(vector) if previous else vector)
        wrapper = _remembering if previous else None
        return make_vec_env(env, copies, seed=seed, wrapper_class=wrapper)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make {env!r}: {_told(error)}") from None


def _remembering(env: Any) -> Any:
    """`env`, whose observations hold the previous action and reward."""
    vector = isinstance(env, VectorEnv)
    space = env.single_observation_space if vector else env.observation_space
    if is_image_space(space):
        raise ValueError(
            f"previous is true and the observations are images, {space}: expected "
            "other ones; leave it out"
        )
    return TensorPreviousActionReward(env) if vector else PreviousActionReward(env)


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
        close = difflib.get_close_matches(env, gymnasium.registry, 3, 0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"unknown environment {env!r}: {_told(error)}{hint}") from None


def _told(error: Exception) -> str:
    """One line, without the guess at a name."""
    return " ".join(str(error).split("Did you mean")[0].split()).rstrip(".")


def train(
    config: TrainConfig, resume: str | Path | None = None, progress: bool = True
) -> Summary:
    """Flow 1: an agent learns an environment. Writes `agent.zip` and `returns.png`.

    With `resume`, a run folder, `config` must be that run's own. Raises ValueError for
    bad input, `Stopped` after SIGINT or SIGTERM.
    """
    with threads(config.threads), stoppable() as stopped:
        if config.eval_videos:
            _stage(config).close()  # an error now, not after the training
        env = make_envs(
            config.env, config.envs, config.device, config.seed, config.previous
        )
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
        run, saved = create_run(config, "train"), None
    else:
        run, saved = resume_run(resume, config)
    with run:
        keeper = Keeper(run, config.checkpoint_every, agent.state_dict, stopped)
        if saved is not None:
            agent.load_state_dict(saved["flow"])
            keeper.restore(saved, agent.num_timesteps)
        began, first = time.monotonic(), agent.num_timesteps
        learn(run, agent, config.steps, keeper, [], progress)
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
        return returned(summary, run)


def _evaluate_agent(agent: RecurrentPPO, config: TrainConfig) -> Summary:
    """Returns of the likeliest actions, over episodes that training never saw."""
    episodes = config.eval_episodes
    seed = seeding.derive(config.seed, "evaluation") >> 32
    copies = min(episodes, 20)
    env = make_envs(config.env, copies, config.device, seed, config.previous)
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


def _stage(config: TrainConfig) -> VecEnv:
    """One copy of the environment, in which a picture can be taken."""
    wrapper = _remembering if config.previous else None
    pictures = {"render_mode": "rgb_array"}
    try:
        stage = make_vec_env(config.env, 1, env_kwargs=pictures, wrapper_class=wrapper)
        stage.reset()
        picture, reason = stage.render(), "it gave no picture"
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        picture, reason = None, _told(error)
    if picture is None:
        raise ValueError(
            f"{config.env!r} cannot be filmed ({reason}): expected render_mode "
            "rgb_array; leave eval_videos at 0"
        )
    return stage


def _film(agent: RecurrentPPO, config: TrainConfig, run: Run) -> None:
    """Pictures of the likeliest actions, an episode each."""
    if not config.eval_videos:
        return
    (run.folder / "videos").mkdir(exist_ok=True)
    stage = _stage(config)
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
    with threads(config.threads), stoppable() as stopped:
        controller = make_controller(config.controller, config.lr, config.truncation)
        taken: dict[str, str] = {}

        def prepare(model: SequenceModel, problem: Problem) -> None:
            if config.init_from is not None and resume is None:
                source = load_model(config.init_from)
                taken.update(transfer(model, problem.format, source))

        problem = build_problem(fit_task(config), resolve_device(config.device))
        config, speed = _in_tokens(config, problem, resume)
        trainer = build_trainer(fit_task(config), config.device, prepare, problem)
        return _fit(
            config, controller, trainer, taken, speed, resume, progress, stopped
        )


def _in_tokens(
    config: FitConfig, problem: Problem, resume: str | Path | None
) -> tuple[FitConfig, Summary]:
    """A budget in minutes as one in tokens, and what it was computed from. That of a
    run which is resumed is in its config."""
    training = config.training
    if training.minutes is None:
        return config, {}
    if resume is not None:
        budget = run_config(resume)[1]["training"]["budget"]
        training = dataclasses.replace(training, minutes=None, budget=budget)
        return dataclasses.replace(config, training=training), {}
    speed = tokens_per_second(fit_task(config), config.device, problem)
    resolved = in_tokens(training, speed)
    tqdm.write(
        f"{training.minutes:g} minutes at {speed:,.0f} tokens per second (K = 16): "
        f"{resolved.budget:,.0f} tokens",
        file=sys.stderr,
    )
    found = {"minutes": training.minutes, "tokens_per_second": speed}
    return dataclasses.replace(config, training=resolved), found


def _fit(
    config: FitConfig,
    controller: Controller,
    trainer: Trainer,
    taken: dict[str, str],
    speed: Summary,
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
        (create_run(config, "fit"), None)
        if resume is None
        else resume_run(resume, config)
    )
    with run:
        if saved is None:
            if taken:
                told = ", ".join(f"{part}: {what}" for part, what in taken.items())
                tqdm.write(f"begins with {config.init_from} ({told})", file=sys.stderr)
            state = controller.init(1)
            signals = trainer.start(controller.range_test)
            run.log({**_fit_row(trainer, signals, {}), **speed})
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
        figures: Summary = {}
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
                seen, before = signals, state
                knobs, state = controller(seen, before)
                signals = trainer.step(knobs)
                if trainer.done:
                    figures = _held_out(trainer, "valid")
                row = _fit_row(trainer, signals, figures)
                reward = math.log(seen.probe_loss[0] / signals.probe_loss[0])
                moves = _moves(seen, knobs, before, state)
                run.log({**row, **moves, "decision/reward": reward})
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
            **(figures or _held_out(trainer, "valid")),
            "tokens": trainer.spent,
            "failed": bool(signals.failed[0]),
            "recoveries": round(-math.log2(trainer.lr_scale)),
            "time/seconds": seconds,
            "time/tokens_per_second": (trainer.spent - first) / seconds,
        }
        save_model(run.folder / "model.zip", trainer, config_to_tree(config))
        run.artifact(run.folder / "model.zip", f"model-{run.folder.name}", "model")
        rows = read_metrics(run.folder)
        if left := left_to_prior(rows):
            tqdm.write(left, file=sys.stderr)
        plot = plots.plot_fits(
            {config.controller: rows},
            run.folder / "fit.png",
            "fit",
        )
        run.image("fit", plot)
        run.summary(summary)
        return returned(summary, run)


def _fingerprint(trainer: Trainer) -> int:
    """Tells another text from the one that a run began with."""
    return trainer.problem.train.fingerprint()


def _fit_row(
    trainer: Trainer, signals: Signals, figures: Summary
) -> dict[str, float | int]:
    """The signals after an interval. The validation loss is among them where it is
    measured at each decision, and, of `figures`, in the end."""
    values = signals.to_row()
    losses = ("train_loss", "probe_loss", "grad_norm")
    row: dict[str, float | int] = {
        "decision": trainer.decision,
        "tokens": trainer.spent,
        **{f"fit/{name}": values[name] for name in losses},
    }
    valid = next(iter(figures.values()), trainer.valid_loss)  # the loss comes first
    if not math.isnan(valid):
        row["fit/valid_loss"] = trainer.positive(valid)
    names = values.keys() - set(losses)
    return row | {f"decision/{name}": values[name] for name in sorted(names)}


def _moves(signals: Signals, knobs: Knobs, before: State, after: State) -> Summary:
    """What a controller set at these signals, and the rate that the prior would have
    ended the interval with; of a player, its moves on the prior, and whether and why
    it left that alone (`control.Familiar`)."""
    alone = prior()
    by_prior, _ = alone(signals, alone.init(1))
    row = {f"decision/set_{name}": v.item() for name, v in vars(knobs).items()}
    row["decision/prior_lr"] = by_prior.lr_end.item()
    if "codec" in after:
        then, now = before["codec"], after["codec"]
        rate = np.exp(now["log_lambda"] - then["log_lambda"])
        truncation = 2 ** (now["log2_k"] - then["log2_k"])
        row["decision/rate_factor"] = rate.item()
        row["decision/truncation_factor"] = truncation.item()
        if "outside" in after["player"]:
            (outside,) = after["player"]["outside"]
            names = [FEATURES[i] for i in np.flatnonzero(outside)]
            row["decision/fallback"] = float(bool(names))
            if names:
                row["decision/outside"] = "; ".join(names)
    return row


def _held_out(trainer: Trainer, split: str) -> Summary:
    """The metrics of a split; not charged to the budget."""
    figures = trainer.score(split)
    return {f"{split}_{name}": value for name, value in figures.items()}


def run_task(task: Task, controller: Controller, device: str = "cpu") -> Trainer:
    """A task trained to the end under a controller, without a run folder."""
    trainer = build_trainer(task, device)
    play_alone(trainer, controller)
    return trainer


# --- evaluate -------------------------------------------------------------------------


def evaluate(folder: str | Path, config: Config) -> Summary:
    """A finished run's figures, measured anew: the return of an agent over fresh
    episodes, the held-out losses of a model, a controller against its prior."""
    with threads(config.threads):
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
        load_controller(path),
        config.tasks,
        config.eval_tasks,
        config.seed,
        config.device,
        progress=True,
    )
    figures = {**controller_card(path), **scores}
    return {k: v for k, v in figures.items() if not isinstance(v, (dict, list))}


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
