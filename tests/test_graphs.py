"""Captured graphs: on a CPU `Recording` takes their place, with the same rules."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from torch.utils._pytree import tree_flatten

from rlrnn import graphs
from rlrnn.agents import RecurrentPPO
from rlrnn.agents.rollout import minibatches
from rlrnn.agents.vector import TensorVecEnv, source_of
from rlrnn.control import Knobs
from rlrnn.envs.recall import RepeatPrevious
from rlrnn.envs.tensor_wrappers import TensorPreviousActionReward
from rlrnn.graphs import Graphs, Recording, graphs_for
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.optimizers import Optimizer
from rlrnn.tasks import DataConfig, Kind, Task, build_trainer
from rlrnn.training import Trainer, _Seen
from shared import Syncs

CPU = torch.device("cpu")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Graphs are recorded from here on; what has been replayed."""
    replayed: list[str] = []
    replay = Recording.replay

    def noted(self: Recording) -> None:
        replayed.append("")
        replay(self)

    monkeypatch.setenv(graphs.SWITCH, "record")
    monkeypatch.setattr(Recording, "replay", noted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no captured graph")
        yield replayed


class Forbidden(Syncs):  # type: ignore[no-untyped-call]
    """Also what brings numbers from the host: it ends a capture."""

    NAMES: Any = (*Syncs.NAMES, "lift_fresh")


def one_hot(x: Tensor, num_classes: int) -> Tensor:
    """As on CUDA, where torch's does not look at its input."""
    return (x.unsqueeze(-1) == torch.arange(num_classes)).long()


@pytest.fixture
def strict(recording: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What recordings did that a capture may not. They run what a device would."""
    found: list[str] = []
    record = Recording.__init__

    def watched(self: Recording, run: Any, *rest: Any) -> None:
        with Forbidden() as mode:
            record(self, run, *rest)
        found.extend(mode.found)

    monkeypatch.setattr(Recording, "__init__", watched)
    monkeypatch.setattr("rlrnn.recurrent.compiles", lambda x: False)
    monkeypatch.setattr("rlrnn.agents.acting.compiles", lambda x: False)
    monkeypatch.setattr("torch.nn.functional.one_hot", one_hot)
    return found


def recorder(limit: int = 32) -> Graphs:
    return Graphs(CPU, Recording, limit)


# --- the helper -----------------------------------------------------------------------


def test_on_a_cpu_there_are_none_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(graphs.SWITCH, raising=False)
    assert graphs_for(CPU) is None
    monkeypatch.setenv(graphs.SWITCH, "record")
    assert graphs_for(CPU) is not None


def test_results_are_the_callers_own_and_those_of_plain_calls() -> None:
    held = recorder()
    weight = torch.ones(2)
    generator, plain = (torch.Generator().manual_seed(1) for _ in range(2))

    def step(
        x: Tensor, rest: dict[str, Any], rate: Any, source: torch.Generator
    ) -> Any:
        noise = torch.empty(2).uniform_(generator=source)
        weight.add_(x * rate)
        return {"y": weight * 2 + noise, "none": None, "same": x}, [rest["s"] + 1]

    ours, theirs = partial(step, source=generator), partial(step, source=plain)

    kept, expected = [], []
    for i in range(8):
        inputs = torch.tensor([i, 1.0]), {"s": torch.tensor(i), "n": None}, 0.1 * i
        before = weight.clone()
        expected.append(theirs(*inputs))
        wanted = weight.clone()
        weight.copy_(before)
        now = held("f", ours, inputs, written=lambda: [weight], generators=(generator,))
        kept.append(now)
        assert torch.equal(weight, wanted)
    for (a, [b]), (c, [d]) in zip(kept, expected, strict=True):
        assert torch.equal(a["y"], c["y"]) and torch.equal(b, d)
        assert torch.equal(a["same"], c["same"]) and a["none"] is None
    (entry,) = held.entries.values()
    assert entry.checked


def test_what_has_moved_is_captured_anew() -> None:
    held, weights = recorder(), [torch.zeros(2)]

    def step(x: Tensor) -> Tensor:
        return weights[0].add_(x).clone()

    total, used = 0.0, []
    for i in range(20):
        if i in (4, 7, 11):  # a roll-back, say
            weights[0] = weights[0].clone()
        total += i
        got = held("f", step, (torch.full((2,), float(i)),), written=lambda: weights)
        assert got.tolist() == [total, total]
        (entry,) = held.entries.values()
        used.append(entry.graph)
    assert not held.eager
    anew = [i for i in range(1, 20) if used[i] is not used[i - 1]]
    assert anew == [1, 4, 7, 11]


def test_the_last_used_are_kept() -> None:
    held = recorder(limit=3)
    for size in (1, 2, 3, 4, 2, 5):
        held("f", torch.neg, (torch.ones(size),))
        assert len(held.entries) <= 3
    assert [entry.graph is not None for entry in held.entries.values()] == [
        False,  # 4
        True,  # 2, twice
        False,
    ]


def test_without_a_capture_it_runs_eagerly_after_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Recording, run: Callable[[], Any], *_: Any) -> None:
        run()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(Recording, "__init__", broken)
    held, weight = recorder(), torch.zeros(1)
    generator = torch.Generator().manual_seed(0)
    plain = torch.Generator().manual_seed(0)

    def step(x: Tensor) -> Tensor:
        weight.add_(x)
        return weight + torch.empty(1).uniform_(generator=generator)

    total = torch.zeros(1)
    with pytest.warns(
        UserWarning, match="no captured graph of a f, .*not perm"
    ) as told:
        for i in range(6):
            given = (torch.full((1,), float(i)),)
            total += i
            got = held(
                "f", step, given, written=lambda: [weight], generators=(generator,)
            )
            assert torch.equal(got, total + torch.empty(1).uniform_(generator=plain))
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert held.eager == {"f"} and not held.entries


@pytest.mark.parametrize("what", ["result", "state", "generator"])
def test_a_replay_that_differs_is_not_used(what: str) -> None:
    """What a graph does not see: something outside of it that changes."""
    held, weight, outside = recorder(), torch.zeros(2), [0.0]
    generator = torch.Generator().manual_seed(0)
    runs = [0]

    def step(x: Tensor) -> Tensor:
        runs[0] += 1
        replayed = runs[0] == 5  # after two eager runs, the capture, another eager one
        outside[0] += 1
        off = 1e-2 * replayed
        weight.add_(1e-5 * x * (1 - (what == "state") * replayed))
        if not (what == "generator" and replayed):
            torch.empty(1).uniform_(generator=generator)
        return x + off * (what == "result")

    with pytest.warns(UserWarning, match="first replay differs") as told:
        for i in range(1, 7):
            got = held(
                "f",
                step,
                (torch.ones(2),),
                written=lambda: [weight],
                generators=(generator,),
            )
            assert torch.equal(got, torch.ones(2))
            assert torch.allclose(weight, torch.full((2,), 1e-5 * i), rtol=1e-6)
    assert len(told) == 1
    plain = torch.Generator().manual_seed(0)
    for _ in range(6):
        torch.empty(1).uniform_(generator=plain)
    assert torch.equal(generator.get_state(), plain.get_state())


# --- the trainer ----------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    (xs, left), (ys, right) = tree_flatten(a), tree_flatten(b)
    assert left == right
    return all(
        np.array_equal(
            np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind == "f"
        )
        for x, y in zip(xs, ys, strict=True)
    )


def trainer(
    kind: Kind = "markov",
    optimizer: Optimizer = "adam",
    model: dict[str, Any] | None = None,
    device: str = "cpu",
    batch: int = 3,
    **training: Any,
) -> Trainer:
    size = 1000 * batch
    task = Task(
        DataConfig(kind, batch=batch, size=size, symbols=4, memory=7),
        ModelConfig("lstm", 5, 1, 4, **(model or {})),
        TrainingConfig(
            2000.0 * batch / 3, optimizer=optimizer, decisions=8, **training
        ),
        0,
    )
    built = build_trainer(task)
    if device != "cpu":
        problem = built.problem.to(torch.device(device))
        built = Trainer(built.model.to(device), problem, built.config)
    built.fast = None  # what a CPU has in place of graphs
    return built


def knobs(lr: float, truncation: int) -> Knobs:
    return Knobs(np.array([lr]), np.array([lr / 2]), np.array([truncation]))


# the rate of decision 3 is survived by a roll-back; K changes and comes back
PLAN = [(0.01, 8), (0.02, 8), (0.01, 16), (math.inf, 8), (0.02, 8), (0.01, 16)]


def played(t: Trainer, plan: list[tuple[float, int]] = PLAN) -> list[Any]:
    """What a controller is told, and all that is left in the end."""
    told = [vars(t.step(knobs(lr, truncation))) for lr, truncation in plan]
    return [told, t.state_dict()]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks and starts": {"kind": "copy"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "layer_decay": 0.5},
    "momentum, frozen": {
        "optimizer": "momentum",
        "average": 0.1,
        "ar": 0.1,
        "tar": 0.1,
        "frozen": "encoder",
    },
    "dropout": {"model": {"dropout": 0.3, "weight_drop": 0.2}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_trainer_with_graphs_is_the_same(
    name: str, recording: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer(**VARIANTS[name])
    monkeypatch.setenv(graphs.SWITCH, "0")
    theirs = trainer(**VARIANTS[name])
    assert ours.graphs is not None and theirs.graphs is None
    for t in (ours, theirs):
        t.start(range_test=name == "plain")
    assert same(played(ours), played(theirs))
    assert ours.lr_scale == 0.5  # the roll-back was one
    entries = ours.graphs.entries.values()
    assert any(entry.checked for entry in entries) and len(recording) > 10


@pytest.mark.parametrize("name", VARIANTS)
def test_a_window_could_be_captured(name: str, strict: list[str]) -> None:
    t = trainer(**VARIANTS[name])
    t.start()
    for _ in range(2):
        t.step(knobs(0.01, 8))
    assert t.graphs is not None and t.graphs.entries
    assert any(entry.checked for entry in t.graphs.entries.values())
    assert strict == []


def test_a_resumed_trainer_captures_again(
    recording: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer("copy")
    t.start()
    first = played(t)
    begun = trainer("copy")
    begun.start()
    begun.step(knobs(0.5, 8))
    begun.step(knobs(0.5, 8))
    again = trainer("copy")
    again.start()
    played(again, PLAN[:2])
    state = copy.deepcopy(again.state_dict())
    for other in (begun, trainer("copy")):  # one that has graphs, and a new one
        other.load_state_dict(copy.deepcopy(state))
        rest = played(other, PLAN[2:])
        assert same(rest, [first[0][2:], first[1]])


def test_a_trainer_without_a_capture_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no")

    theirs = trainer()
    monkeypatch.setenv(graphs.SWITCH, "record")
    monkeypatch.setattr(Recording, "__init__", broken)
    ours = trainer()
    for t in (ours, theirs):
        t.start()
    with pytest.warns(UserWarning, match="no captured graph of a window") as told:
        assert same(played(ours), played(theirs))
    assert len(told) == 1


def test_a_roll_back_is_noticed(recording: list[str]) -> None:
    """It replaces the moments: a graph would go on with those that diverged."""
    t = trainer()
    t.start()
    for _ in range(3):
        t.step(knobs(0.01, 8))
    assert t.graphs is not None
    before = {id(e): e.graph for e in t.graphs.entries.values() if e.checked}
    t.step(knobs(math.inf, 8))
    assert t.lr_scale == 0.5 and before
    t.step(knobs(0.01, 8))
    after = {id(e): e.graph for e in t.graphs.entries.values()}
    assert all(graph is not after[key] for key, graph in before.items())


def test_what_a_trainer_does_not_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(graphs.SWITCH, "record")
    for options in (
        {"accumulate": 2},
        {"unfreeze": 0.5},
        {"decay_probe": True},
        {"optimizer": "schedulefree"},
    ):
        assert trainer(**options).graphs is None
    assert trainer().graphs is not None


# --- the agent ------------------------------------------------------------------------

CARTPOLE = "rlrnn/CartPoleHiddenVelocity-v0"
LAYERS = {"lstm_hidden_size": 8, "net_arch": [8]}


class Logged(BaseCallback):
    """What a callback saw: kept, and looked at only after the run."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        names = "obs_tensor", "actions", "new_obs", "rewards", "dones", "infos"
        self.kept.append({name: self.locals[name] for name in names})
        return True

    def _on_rollout_end(self) -> None:
        row = dict(self.model.logger.name_to_value)
        self.rows.append({k: v for k, v in row.items() if not k.startswith("time/")})

    def seen(self) -> list[Any]:
        def host(x: Any) -> Any:
            if isinstance(x, dict):
                return {key: host(value) for key, value in x.items() if key != "t"}
            return [host(y) for y in x] if isinstance(x, list) else np.asarray(x)

        kept = [{**step, "infos": step["infos"].dicts} for step in self.kept]
        return [host(kept), self.rows]


def agent(
    id: str = CARTPOLE, device: str = "cpu", env: Any = None, **options: Any
) -> RecurrentPPO:
    env = gymnasium.make_vec(id, num_envs=4, device=device) if env is None else env
    given = {"n_steps": 16, "batch_size": 24, "n_epochs": 2, "policy_kwargs": LAYERS}
    given |= {"learning_rate": lambda left: 1e-2 * left, "seed": 0, "device": device}
    policy = options.pop("policy", "MlpLstmPolicy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a last minibatch that is smaller
        return RecurrentPPO(policy, env, **{**given, **options})


def learned(model: RecurrentPPO, steps: int = 128) -> list[Any]:
    """All that is left in the end, and what was seen on the way."""
    log = Logged()
    model.learn(steps, callback=log)
    state = model.state_dict()
    for episode in state["episodes"]:
        del episode["t"]
    return [log.seen(), state]


TENSOR_IDS = [
    id
    for id, spec in gymnasium.registry.items()
    if id.startswith("rlrnn/") and spec.vector_entry_point
    if not id.startswith("rlrnn/Tuning")
]

AGENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {
        "id": "rlrnn/RepeatPreviousEasy-v0",
        "ent_coef": 0.01,
        "clip_range_vf": 0.2,
        "clip_range": lambda left: 0.1 + left / 10,
    },
    "box": {"id": "rlrnn/PositionOnlyPendulumEasy-v0", "norm_reward": True},
    "values": {"policy_kwargs": LAYERS | {"norm_value": True}, "clip_range_vf": 0.2},
    "states": {"recompute_states": True, "batch_size": 8, "bptt_truncation": 4},
}


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_with_graphs_is_the_same(
    name: str, recording: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = agent(**AGENTS[name])
    monkeypatch.setenv(graphs.SWITCH, "0")
    theirs = agent(**AGENTS[name])
    assert ours._graphs is not None and theirs._graphs is None
    assert same(learned(ours), learned(theirs))
    assert ours._graphs.entries and len(recording) > 10


@pytest.mark.parametrize("name", AGENTS)
def test_steps_and_minibatches_could_be_captured(name: str, strict: list[str]) -> None:
    model = agent(**AGENTS[name])
    vector = cast(TensorVecEnv, model.env)
    vector.env._may_read = False  # as on a device
    model.learn(64)
    assert checked(model._graphs) == {"step", "minibatch"} and strict == []


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_steps_of_environments_could_be_captured(id: str) -> None:
    env: Any = gymnasium.make_vec(id, num_envs=3)
    obs, _ = env.reset(seed=0)
    env._may_read = False
    actions = torch.zeros(env._action_shape, dtype=env._action_dtype)
    before = env.state
    with Forbidden() as mode:
        after, told = env.stepped(before, actions)
    assert mode.found == []
    assert env.state is before
    assert same(env.step(actions), told) and same(env.state, after)


def checked(held: Graphs | None) -> set[str]:
    """The names of graphs that are in use."""
    assert held is not None and not held.eager
    return {str(key[0]) for key, entry in held.entries.items() if entry.checked}


class Masked(RepeatPrevious):
    """Forbids one action, another one in each step."""

    def action_masks(self) -> Tensor:
        choices = torch.arange(4, device=self.device)
        return choices != self.state["episode_length"][:, None] % 4


def test_masks_are_inputs_of_a_step(
    recording: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = agent(env=Masked(4))
    monkeypatch.setenv(graphs.SWITCH, "0")
    theirs = agent(env=Masked(4))
    assert same(learned(ours), learned(theirs))
    assert checked(ours._graphs) == {"step", "minibatch"}
    masks = ours.rollout_buffer.masks
    assert masks is not None and (masks.sum(-1) == 3).all()
    assert masks.gather(-1, ours.rollout_buffer.actions[..., None]).all()


def test_a_step_of_its_own_is_not_captured(recording: list[str]) -> None:
    class Other(RepeatPrevious):
        def step(self, actions: Tensor) -> Any:
            obs, rewards, *rest = super().step(actions)
            return obs, rewards + 1, *rest

    model = agent(env=Other(4))
    model.learn(64)
    assert checked(model._graphs) == {"minibatch"}
    assert model.rollout_buffer.returns.mean() > 0


def test_wrapped_steps_are_captured(
    recording: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrapper with `stepped`; not around a step of its own."""

    def env(inner: Any = None) -> Any:
        vector: Any = inner or gymnasium.make_vec(CARTPOLE, num_envs=4)
        wrapped = TensorPreviousActionReward(vector)
        TensorVecEnv(wrapped).set_attr("max_episode_steps", 7)
        assert vector.max_episode_steps == 7
        return wrapped

    ours = agent(env=env())
    monkeypatch.setenv(graphs.SWITCH, "0")
    theirs = agent(env=env())
    assert same(learned(ours), learned(theirs))
    assert checked(ours._graphs) == {"step", "minibatch"}
    assert theirs.rollout_buffer.starts.any()

    class Other(RepeatPrevious):
        def step(self, actions: Tensor) -> Any:
            return super().step(actions)

    monkeypatch.setenv(graphs.SWITCH, "record")
    model = agent(env=env(Other(4)))
    model.learn(64)
    assert checked(model._graphs) == {"minibatch"}
    masked = agent(env=env(Masked(4)))
    masked.learn(64)
    assert masked.rollout_buffer.masks is not None


def test_a_resumed_agent_goes_on_to_the_same_bits(
    recording: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file of the middle of a rollout, with graphs and without."""

    class Save(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 24:
                self.model.save(tmp_path / "agent")
            return True

    agent().learn(128, callback=Save())
    ended = []
    for switch in ("record", "0"):
        monkeypatch.setenv(graphs.SWITCH, switch)
        env = gymnasium.make_vec(CARTPOLE, num_envs=4)
        resumed = RecurrentPPO.load(tmp_path / "agent", env, learning_rate=1e-2)
        assert (resumed._graphs is None) == (switch == "0")
        resumed.learn(128, reset_num_timesteps=False)
        ended.append(resumed.state_dict()["policy"])
    assert same(*ended)


def test_graphs_follow_the_environment_and_its_settings(recording: list[str]) -> None:
    """Another seed, environment or setting, between rollouts: eager and recorded."""
    ended: list[Any] = []
    for switch in ("record", "0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(graphs.SWITCH, switch)
            model = agent("rlrnn/RepeatFirstEasy-v0")
            model.learn(64)
            env = cast(TensorVecEnv, model.env)
            env.set_attr("max_episode_steps", 5)
            model.learn(64, reset_num_timesteps=False)
            model.set_random_seed(3)
            model.learn(64, reset_num_timesteps=False)
            other = TensorVecEnv(
                gymnasium.make_vec("rlrnn/RepeatFirstEasy-v0", num_envs=4)
            )
            other.seed(7)
            model.set_env(other)
            ended.append(learned(model, 64))
    assert same(*ended)


UNFUSED = {"optimizer_class": torch.optim.RMSprop}
DROPOUT = {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}}


@pytest.mark.parametrize(
    ("options", "captured"),
    [
        ({"target_kl": 0.05}, {"step"}),
        (
            {"policy_kwargs": LAYERS | {"optimizer_class": torch.optim.RMSprop}},
            {"step"},
        ),
        (
            {
                "policy_kwargs": LAYERS
                | {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}}
            },
            {"step"},
        ),
        ({"id": "rlrnn/PositionOnlyPendulumEasy-v0", "use_sde": True}, {"minibatch"}),
        ({"env": "CartPole-v1"}, {"minibatch"}),
    ],
)
def test_what_an_agent_does_not_capture(
    options: dict[str, Any], captured: set[str], recording: list[str]
) -> None:
    model = agent(**options)
    model.learn(48)
    assert model._graphs is not None
    assert {key[0] for key in model._graphs.entries} == captured


# --- on a device ----------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(graphs.SWITCH, raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no captured graph")
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def close(a: Any, b: Any) -> None:
    (xs, left), (ys, right) = tree_flatten(a), tree_flatten(b)
    assert left == right
    for x, y in zip(xs, ys, strict=True):
        if isinstance(x, (Tensor, np.ndarray, float)):
            torch.testing.assert_close(
                torch.as_tensor(x),
                torch.as_tensor(y),
                rtol=2e-3,
                atol=1e-4,
                equal_nan=True,
            )


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_captured_windows_on_a_gpu(
    name: str, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer(device="cuda", **VARIANTS[name])
    monkeypatch.setenv(graphs.SWITCH, "0")
    theirs = trainer(device="cuda", **VARIANTS[name])
    plan = [PLAN[0], PLAN[2], PLAN[0], PLAN[3], PLAN[0]]
    for t in (ours, theirs):
        t.start()
    (told, after), (expected, there) = played(ours, plan), played(theirs, plan)
    close(told, expected)
    close(after["model"], there["model"])
    assert ours.graphs is not None and ours.graphs.make is graphs.Captured
    assert checked(ours.graphs) and ours.lr_scale == 0.5
    # the windows of an interval, but for its last two
    seen, chunk = _Seen(), ours.next_chunk(8)
    assert ours.graphs is not None
    for again in range(6):
        torch.cuda.synchronize()
        with no_waiting() if again > 3 else nullcontext():
            ours._train_captured(ours.graphs, chunk, seen, 9)
    assert torch.stack(seen.losses).isfinite().all()


@pytest.mark.gpu
def test_a_large_window_on_a_gpu(on_a_gpu: None) -> None:
    """Above 3,072 symbols an embedding goes back by sorting them, which once looked at
    the device (pytorch #82886)."""
    t, seen = trainer(device="cuda", batch=64), _Seen()
    assert t.graphs is not None
    chunk = t.next_chunk(64)
    for again in range(6):
        torch.cuda.synchronize()
        with no_waiting() if again > 3 else nullcontext():
            t._train_captured(t.graphs, chunk, seen, 9)
    assert checked(t.graphs) == {"window with starts"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", AGENTS)
def test_captured_rollouts_and_updates_on_a_gpu(
    name: str, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rollout and update of each: later ones part ways when an action flips."""
    ours = agent(device="cuda", **AGENTS[name])
    monkeypatch.setenv(graphs.SWITCH, "0")
    theirs = agent(device="cuda", **AGENTS[name])
    for model in (ours, theirs):
        model.learn(64)
    close(dict(ours.policy.state_dict()), dict(theirs.policy.state_dict()))
    close(vars(ours.rollout_buffer), vars(theirs.rollout_buffer))
    assert torch.equal(ours._acting.get_state(), theirs._acting.get_state())
    ours.learn(192, reset_num_timesteps=False)
    assert checked(ours._graphs) == {"step", "minibatch"}
    batch = next(minibatches(ours.rollout_buffer.segments(), 16, ours._shuffling))
    source = source_of(cast(TensorVecEnv, ours.env), ours.device)
    obs: Any = ours._last_obs
    starts = torch.as_tensor(ours._last_episode_starts, device="cuda")
    mine, _ = ours.policy.split(ours._last_state)
    ours._player.begin(ours.policy, source, ours._acting, -1)
    for again in range(6):
        torch.cuda.synchronize()
        with no_waiting() if again > 3 else nullcontext():
            ours._learn_from(batch, 0.2, ours.clip_range_vf and 0.2)
            chosen, told = ours._player(obs, mine, starts, None)
            obs, mine, starts = told[0], chosen.state, told[2] | told[3]


@pytest.mark.gpu
def test_a_failed_capture_on_a_gpu_is_survived(on_a_gpu: None) -> None:
    held = graphs_for(torch.device("cuda"))
    assert held is not None
    generator = torch.Generator("cuda").manual_seed(0)
    plain = torch.Generator("cuda").manual_seed(0)

    def step(x: Tensor) -> Tensor:
        noise = torch.empty_like(x).uniform_(generator=generator)
        return x + noise + float(x.sum())  # which looks at the device

    x = torch.ones(3, device="cuda")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            got = held("f", step, (x,), generators=(generator,))
            noise = torch.empty_like(x).uniform_(generator=plain)
            assert torch.equal(got, x + noise + 3.0)
    assert sum("no captured graph" in str(one.message) for one in told) == 1
    for i in range(5):  # others can still be captured
        assert torch.equal(held("g", torch.neg, (x * i,)), -x * i)
    assert {key[0] for key, e in held.entries.items() if e.checked} == {"g"}
