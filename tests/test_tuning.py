"""The tuning environment and the agent that plays it, as a controller."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray
from stable_baselines3.common import env_checker
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from rlrnn import checkpoint
from rlrnn.agents.controller import (
    OBSERVATIONS,
    SHIPPED,
    controller_card,
    initial_logits,
    learned,
    load_controller,
    load_policy,
    save_controller,
)
from rlrnn.agents.policies import RecurrentPolicy
from rlrnn.checkpoint import CheckpointError
from rlrnn.control import (
    ACTIONS,
    NO_OP,
    SOLVED,
    Controller,
    Knobs,
    Signals,
    State,
    prior,
)
from rlrnn.envs.tuning import FIRST_SCALE, GroupBaseline, TuningEnv, log_loss
from rlrnn.flows import run_task
from rlrnn.ledger import Interval, TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.tasks import DataConfig, Task, Tasks
from rlrnn.training import Trainer

DECISIONS = 8
TASK = Task(
    DataConfig("markov", batch=3, size=4000, symbols=6, memory=4),
    ModelConfig("lstm", 6),
    TrainingConfig(6000.0, "adam", decisions=DECISIONS),
    seed=5,
)
SGD_TASK = Task(
    DataConfig("copy", batch=2, size=4000, symbols=4, memory=5),
    ModelConfig("gru", 5),
    TrainingConfig(4000.0, "momentum", decisions=6),
    seed=6,
)
TASKS = Tasks(
    kinds=["markov"],
    hidden_sizes=[4, 5],
    batches=[2, 3],
    budget=(2500.0, 4000.0),
    decisions=6,
)
SMALL: dict[str, Any] = {"lstm_hidden_size": 8, "net_arch": [8], "seed": 3}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def policy(restless: bool = True, **kwargs: Any) -> RecurrentPolicy:
    """A policy of random weights; `restless`: one whose likeliest action changes."""
    actions = spaces.MultiDiscrete(list(ACTIONS))
    made = RecurrentPolicy(OBSERVATIONS, actions, lambda _: 0.0, **SMALL, **kwargs)
    if restless:
        with torch.no_grad():
            made.action_net.weight.mul_(300)
    return made


def weights(trainer: Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()


def rows(*parts: Signals | Knobs) -> list[dict[str, float | None]]:
    """As plain numbers; NaN as None, so that it equals itself."""
    return [
        {k: None if v[0] != v[0] else v[0].item() for k, v in vars(p).items()}
        for p in parts
    ]


class Recorder:
    """A controller that remembers what it was told and what it said."""

    def __init__(self, inner: Controller) -> None:
        self.inner, self.range_test = inner, inner.range_test
        self.told: list[Signals] = []
        self.said: list[Knobs] = []

    def init(self, n: int) -> State:
        return self.inner.init(n)

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]:
        knobs, state = self.inner(signals, state)
        self.told.append(signals)
        self.said.append(knobs)
        return knobs, state


Moves = Callable[[NDArray[np.float32]], NDArray[np.int64]]


def fixed(*moves: int) -> Moves:
    return lambda observation: np.array(moves)


def episode(env: TuningEnv, moves: Moves, seed: int | None = 0) -> list[Any]:
    """(observation, reward, terminated, info) of each step; the reset's first."""
    observation, info = env.reset(seed=seed)
    steps: list[Any] = [(observation, 0.0, False, info)]
    while not steps[-1][2]:
        observation, reward, terminated, truncated, info = env.step(moves(observation))
        assert not truncated
        steps.append((observation, reward, terminated, info))
    return steps


# --- an environment like others -----------------------------------------------------


@pytest.mark.parametrize("tasks", [TASK, SGD_TASK, TASKS])
def test_gymnasium_and_stable_baselines_accept_it(tasks: Task | Tasks) -> None:
    check_env(TuningEnv(tasks), skip_render_check=True)
    env_checker.check_env(TuningEnv(tasks), skip_render_check=True)


def test_wrong_actions() -> None:
    env = TuningEnv(TASK)
    env.reset(seed=0)
    for action in ([7, 0], [-1, 0], [3]):
        with pytest.raises(ValueError, match="action is .*, expected a member of"):
            env.step(np.array(action))


@pytest.mark.parametrize("task", [TASK, SGD_TASK])
@pytest.mark.parametrize("moves", [NO_OP, (4, 2), (6, 0)])
def test_rewards_add_up_to_the_fall_of_the_log_loss(
    task: Task, moves: tuple[int, int]
) -> None:
    env = TuningEnv(task)
    steps = episode(env, fixed(*moves))
    first, last = (steps[i][3]["signals"]["probe_loss"] for i in (0, -1))
    total = sum(reward for _, reward, _, _ in steps)
    expected = math.log(first * (1 + SOLVED) / (last + SOLVED * first))
    assert total == pytest.approx(expected, abs=1e-9)
    end = steps[-1][3]
    assert end["episode"]["r"] == pytest.approx(total)
    assert end["episode"]["l"] == len(steps) - 1
    assert end["signals"]["failed"] or end["decision"] == task.training.decisions
    assert [info["decision"] for *_, info in steps] == list(range(len(steps)))
    assert all("episode" not in info for *_, info in steps[:-1])
    for observation, *_ in steps:
        assert env.observation_space.contains(observation)


def test_a_loss_that_is_nearly_zero_has_a_floor() -> None:
    for loss, expected in ((0.0, 0.06), (1e-9, 0.06), (0.5, 0.56)):
        told = Signals(**{k: np.array([loss]) for k in Signals.__dataclass_fields__})
        assert log_loss(told, first=3.0) == pytest.approx(math.log(expected))


def test_same_seed_same_episode_and_another_seed_another() -> None:
    def play(seed: int) -> list[float]:
        steps = episode(TuningEnv(TASKS), fixed(4, 1), seed)
        return [number for o, r, *_ in steps for number in (*o.tolist(), r)]

    assert play(0) == play(0) != play(1)


def test_steps_out_of_place_are_errors() -> None:
    env = TuningEnv(SGD_TASK)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.array(NO_OP))
    episode(env, fixed(*NO_OP))
    with pytest.raises(RuntimeError, match="the run is done"):
        env.step(np.array(NO_OP))


def test_failed_training_terminates(monkeypatch: pytest.MonkeyPatch) -> None:
    env = TuningEnv(TASK)
    env.reset(seed=0)
    before = weights(env.trainer)

    plan = env.trainer.plan

    def broken(knobs: Knobs) -> Interval:
        interval = plan(knobs)
        return replace(interval, rates=interval.rates * math.nan)

    monkeypatch.setattr(env.trainer, "plan", broken)
    for i in range(3):
        observation, reward, terminated, truncated, info = env.step(np.array(NO_OP))
        assert np.isfinite(observation).all() and reward == 0 and not truncated
        assert terminated == (i == 2) == bool(info["signals"]["failed"])
    assert info["episode"] == {"r": 0.0, "l": 3, "t": 0.0}
    assert torch.equal(weights(env.trainer), before)


# --- the keystone -------------------------------------------------------------------


@pytest.mark.parametrize("task", [TASK, SGD_TASK])
def test_an_episode_and_a_fit_are_one_thing(task: Task) -> None:
    """The same agent in the environment and as a controller: knobs, signals and
    weights agree bit for bit."""
    agent = policy()
    env = TuningEnv(task)
    observation, info = env.reset(seed=11)
    told, said, actions = [env.signals], [], []
    state, terminated = None, False
    while not terminated:
        action, state = agent.predict(observation, state, deterministic=True)
        observation, _, terminated, _, info = env.step(action)
        actions.append(tuple(action.tolist()))
        told.append(env.signals)
        said.append(info["knobs"])
    assert len(set(actions)) > 2, "a policy that moves"

    controller = Recorder(learned(agent))
    trainer = run_task(task, controller)
    assert rows(*controller.told) == rows(*told[:-1])
    assert rows(*controller.said) == said
    assert trainer.last_probe == told[-1].probe_loss[0]
    assert torch.equal(weights(trainer), weights(env.trainer))
    assert trainer.spent == env.trainer.spent


@pytest.mark.parametrize("task", [TASK, SGD_TASK])
def test_the_untrained_controller_is_the_prior(task: Task) -> None:
    untrained = policy(False, initial_logits=initial_logits())
    a, b = Recorder(learned(untrained)), Recorder(prior())
    assert torch.equal(weights(run_task(task, a)), weights(run_task(task, b)))
    assert rows(*a.said) == rows(*b.said)
    probabilities = np.exp(initial_logits())
    rate = len(probabilities) - ACTIONS[1]
    assert probabilities[:rate].sum() == pytest.approx(1)
    assert probabilities[rate:].sum() == pytest.approx(1)


def test_no_op_in_the_environment_is_the_prior() -> None:
    env = TuningEnv(TASK)
    steps = episode(env, fixed(*NO_OP))
    controller = Recorder(prior())
    trainer = run_task(TASK, controller)
    assert rows(*controller.said) == [info["knobs"] for *_, info in steps[1:]]
    assert torch.equal(weights(trainer), weights(env.trainer))


def test_a_controller_steers_many_runs_as_it_steers_one() -> None:
    controller = learned(policy())
    runs = [Recorder(controller) for _ in range(2)]
    for recorder, task in zip(runs, (TASK, SGD_TASK), strict=True):
        run_task(task, recorder)
    state = controller.init(2)
    for i in range(6):
        pairs = [vars(r.told[i]) for r in runs]
        both = Signals(**{k: np.concatenate([p[k] for p in pairs]) for k in pairs[0]})
        knobs, state = controller(both, state)
        for j, recorder in enumerate(runs):
            for name, value in vars(recorder.said[i]).items():
                assert getattr(knobs, name)[j] == pytest.approx(value[0])


# --- groups -------------------------------------------------------------------------


def drawn(env: TuningEnv, seed: int, count: int = 3) -> list[Task]:
    tasks = []
    for i in range(count):
        env.reset(seed=seed if i == 0 else None)
        assert env.task is not None and env.episode_index == i
        tasks.append(env.task)
    return tasks


def test_a_group_plays_the_same_tasks_whatever_its_members_are_seeded_with() -> None:
    first = drawn(TuningEnv(TASKS, task_seed=1), seed=10)
    assert len({task.seed for task in first}) == len(first)
    assert drawn(TuningEnv(TASKS, task_seed=1), seed=11) == first
    assert drawn(TuningEnv(TASKS, task_seed=2), seed=10) != first
    # without one, they come from the seed
    own = drawn(TuningEnv(TASKS), seed=10)
    assert own == drawn(TuningEnv(TASKS), seed=10) != drawn(TuningEnv(TASKS), seed=11)


def vector(group: int | None) -> Any:
    def make(rank: int) -> Callable[[], gymnasium.Env[Any, Any]]:
        task = (TASK, SGD_TASK)[rank // 2]
        return lambda: TuningEnv(task)

    env = DummyVecEnv([make(rank) for rank in range(4)])
    return env if group is None else GroupBaseline(env, group)


def test_the_group_baseline_takes_the_groups_mean() -> None:
    plain, centred = vector(None), vector(2)
    assert np.array_equal(plain.reset(), centred.reset())
    rng = np.random.default_rng(0)
    for _ in range(7):  # over the end of the shorter task
        actions = rng.integers(0, ACTIONS, size=(4, 2))
        a, raw, dones, _ = plain.step(actions)
        before = dict(centred.squares)
        b, rewards, its_dones, infos = centred.step(actions)
        squares = [before.get(i["family"], FIRST_SCALE**2) for i in infos]
        rewards = rewards * np.sqrt(squares, dtype=np.float32)
        assert np.array_equal(a, b) and np.array_equal(dones, its_dones)
        groups = raw.reshape(2, 2).astype(np.float64)
        expected = (groups - groups.mean(1, keepdims=True)).ravel()
        assert rewards == pytest.approx(expected, abs=1e-7)
        assert rewards.reshape(2, 2).sum(1) == pytest.approx(0, abs=1e-6)
        assert rewards.dtype == np.float32
    assert np.abs(rewards).max() > 0


def test_members_that_do_the_same_earn_nothing() -> None:
    env = vector(2)
    env.reset()
    for _ in range(3):
        _, rewards, _, _ = env.step(np.array([[5, 1], [5, 1], [1, 2], [1, 2]]))
        assert (rewards == 0).all()


class Ends(gymnasium.Env[NDArray[np.float32], Any]):
    """Pays `index` squared per step; its first episode ends after `length` steps."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, index: int, length: int) -> None:
        self.index, self.length, self.episode = index, length, -1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        self.episode, self.decision = self.episode + 1, 0
        return np.zeros(1, np.float32), {}

    def step(
        self, action: int
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.decision += 1
        info = {
            "episode_index": self.episode,
            "decision": self.decision,
            "family": "",
        }
        over = self.decision >= (self.length if self.episode == 0 else 4)
        return np.zeros(1, np.float32), float(self.index**2), over, False, info


def test_who_is_an_episode_ahead_is_compared_with_nobody() -> None:
    makers: Any = [lambda i=i, n=n: Ends(i, n) for i, n in enumerate((4, 2, 4))]
    env = GroupBaseline(DummyVecEnv(makers), 3)
    env.reset()
    seen = [unscaled(env) for _ in range(4)]
    before, after = [-5 / 3, -2 / 3, 7 / 3], [-2.0, 0.0, 2.0]
    assert np.allclose(seen, [before, before, after, after])
    env = GroupBaseline(DummyVecEnv([makers[0], makers[1]]), 2)
    env.reset()
    seen = [unscaled(env) for _ in range(4)]
    assert np.allclose(seen, [[-0.5, 0.5]] * 2 + [[0, 0]] * 2)


def unscaled(env: GroupBaseline) -> list[float]:
    """The rewards of a step, times the scale that they were divided by."""
    scale = math.sqrt(env.squares.get("", FIRST_SCALE**2))
    rewards = env.step(np.zeros(env.num_envs, int))[1]
    return [float(reward) * scale for reward in rewards]


def test_the_scale_of_a_family_is_that_of_its_returns() -> None:
    env = GroupBaseline(DummyVecEnv([lambda i=i: Ends(i, 4) for i in (1, 3)]), 2)  # type: ignore[misc]
    env.reset()
    for _ in range(4 * 300):
        env.step(np.zeros(2, int))
    # 4 steps of -4 and of 4, from a first guess that is forgotten by and by
    assert math.sqrt(env.squares[""]) == pytest.approx(16, rel=0.02)
    other = GroupBaseline(DummyVecEnv([lambda i=i: Ends(i, 4) for i in (1, 3)]), 2)  # type: ignore[misc]
    other.load_state_dict(env.state_dict())
    assert other.state_dict()["squares"] == env.state_dict()["squares"]


def test_a_group_that_does_not_divide_is_one_line() -> None:
    for size in (1, 3):
        with pytest.raises(ValueError, match=f"^group is {size}, expected .* 4 env.*$"):
            vector(size)


# --- resuming -----------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [TASK, SGD_TASK, TASKS])
@pytest.mark.parametrize("at", [0, 3])
def test_an_episode_goes_on_to_the_same_bits(
    tasks: Task | Tasks, at: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    moves = rng.integers(0, ACTIONS, size=(DECISIONS + 1, 2))
    env = TuningEnv(tasks)
    env.reset(seed=4)
    for i in range(at):
        env.step(moves[i])
    checkpoint.save(tmp_path / "env", env.state_dict())
    other = TuningEnv(tasks)
    other.load_state_dict(checkpoint.load(tmp_path / "env"))
    terminated = False
    for move in moves[at:]:
        a, b = env.step(move), other.step(move)
        assert a[0].tobytes() == b[0].tobytes()
        assert a[1:] == b[1:]
        assert torch.equal(weights(env.trainer), weights(other.trainer))
        if terminated := a[2]:
            break
    assert terminated
    # the next episode too
    (first, info), (again, its) = env.reset(), other.reset()
    assert first.tobytes() == again.tobytes() and info == its
    assert env.task == other.task


def test_an_environment_that_has_not_begun_can_be_saved(tmp_path: Path) -> None:
    env, other = TuningEnv(TASKS), TuningEnv(TASKS)
    checkpoint.save(tmp_path / "env", env.state_dict())
    other.load_state_dict(checkpoint.load(tmp_path / "env"))
    assert env.reset()[1] == other.reset()[1] and env.task == other.task


# --- controller files ---------------------------------------------------------------


def test_a_controller_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.zip"
    agent = policy()
    save_controller(path, agent, SMALL, {"episodes": 7, "note": "ü"})
    assert controller_card(path) == {"kind": "controller", "episodes": 7, "note": "ü"}
    before = torch.get_rng_state()
    a, b = Recorder(learned(agent)), Recorder(load_controller(path))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(run_task(TASK, a)), weights(run_task(TASK, b)))
    assert rows(*a.said) == rows(*b.said)


def test_a_controllers_state_can_be_saved(tmp_path: Path) -> None:
    controller = learned(policy())
    recorder = Recorder(controller)
    run_task(TASK, recorder)
    state = controller.init(1)
    for i, told in enumerate(recorder.told):
        checkpoint.save(tmp_path / "state", state)
        state = checkpoint.load(tmp_path / "state")
        knobs, state = controller(told, state)
        assert rows(knobs) == rows(recorder.said[i])


def test_a_file_that_is_no_controller_is_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.zip"
    save_controller(good, policy(), SMALL, {})

    def error(path: Path, kind: type[ValueError] = ValueError) -> str:
        with pytest.raises(kind) as caught:
            load_controller(path)
        words = str(caught.value)
        assert "\n" not in words and str(path) in words
        return words

    assert "no checkpoint" in error(tmp_path / "none.zip", CheckpointError)
    foreign = tmp_path / "model.zip"
    foreigners: list[Any] = [{"model": {}, "vocabulary": None}, [1, 2], None]
    for it in foreigners:
        checkpoint.save(foreign, it)
        assert "is no controller" in error(foreign)
    other = tmp_path / "other.zip"
    tree = checkpoint.load(good)
    checkpoint.save(other, {**tree, "features": tree["features"][:-1]})
    assert "made for other signals (27, here 28)" in error(other)
    data = bytearray(good.read_bytes())
    for at in (len(data) // 3, len(data) // 2):
        bad = tmp_path / f"bad{at}.zip"
        bad.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        error(bad, CheckpointError)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(data[: len(data) // 2])
    error(cut, CheckpointError)


def test_the_shipped_controller_says_how_it_was_made() -> None:
    """A small file, made by a command that anyone can repeat."""
    assert SHIPPED.stat().st_size <= 1_000_000
    card = controller_card(SHIPPED)
    assert card["command"].startswith("rlrnn tune --config controller")
    assert isinstance(card["seed"], int) and card["time/hours"] > 0
    assert load_controller().codec.ablation == "none"
    head = load_policy(SHIPPED).action_net.weight
    assert float(head.detach().abs().max()) > 0.01  # it was zero before training
