"""Environments in the terminal, by the command line; and the page that shows them."""

import io
import re
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import rlrnn
from rlrnn.cli import main
from rlrnn.envs.text import entered, meanings, picture, task_of
from rlrnn.envs.wrappers import HideCoordinates, PreviousActionReward
from rlrnn.play import families, gallery

ROOT = Path(rlrnn.__path__[0]).parent
IDS = [id for id in gymnasium.registry if id.startswith("rlrnn/")]
PLAYABLE = [id for id in IDS if "Lander" not in id and "Tuning" not in id]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{x}\n" for x in lines)))


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.mark.parametrize("id", PLAYABLE)
def test_every_task_has_pictures(id: str) -> None:
    """Lines that fit a terminal, at every step of an episode, and help that fits."""
    env = gymnasium.make(id)
    env.action_space.seed(1)
    obs, _ = env.reset(seed=1)
    for _ in range(120):
        lines = picture(task_of(env), obs)
        assert lines and all(len(x) <= 80 and x.isprintable() for x in lines)
        obs, _, over, cut, _ = env.step(env.action_space.sample())
        if over or cut:
            break
    told = meanings(task_of(env), env.action_space)
    assert told[0].startswith("action, ") and all(len(x) <= 80 for x in told)
    if isinstance(env.action_space, spaces.Discrete) and len(told) > 1:
        assert len(told) == env.action_space.n + 1


def test_pictures_show_what_is_seen() -> None:
    """Different observations, different pictures: nothing that matters is lost."""
    for id in PLAYABLE:
        env = gymnasium.make(id)
        if isinstance(env.observation_space, spaces.Discrete):
            values = range(env.observation_space.n)
            shown = {tuple(picture(task_of(env), np.int64(x))) for x in values}
            assert len(shown) == len(values), id
    maze: Any = task_of(gymnasium.make("rlrnn/LabyrinthEscapeEasy-v0"))
    lines = picture(maze, np.array([1, 2, 1, 0, 0, 3, 1, 1, 1, 0]))
    assert lines == ["+---+", "|#S#|", "|  G|", "|###|", "+---+", "last move: left"]
    pole: Any = task_of(gymnasium.make("rlrnn/CartPoleHiddenVelocity-v0"))
    left, right = (picture(pole, np.array([x, a])) for x, a in ((-2.4, 0), (2.4, 0)))
    assert left[4].startswith("#") and right[4].endswith("#")
    leaning = picture(pole, np.array([0.0, 0.2]))
    columns = [line.index("|") for line in leaning[:4]]
    assert columns == sorted(columns, reverse=True) and columns[0] > columns[-1]


def test_a_person_plays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "1", "9", "what", "?", "0", "q", "2")
    assert main(["play", "rlrnn/RepeatPreviousEasy-v0", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("  3  spades") == 2  # at first, and when asked for
    assert "'9' is no action. action, 0 to 3" in out and "'what' is no action" in out
    assert [int(n) for n in re.findall(r"^(?:> )*step (\d+)", out, re.M)] == [1, 2]
    # the cards are those of the environment
    env = gymnasium.make("rlrnn/RepeatPreviousEasy-v0")
    seen = [env.reset(seed=3)[0], env.step(1)[0], env.step(0)[0]]
    names = ("clubs", "diamonds", "hearts", "spades")
    assert re.findall(r"card: (\w+)", out) == [names[int(x)] for x in seen]

    type_in(monkeypatch, *["1"] * 13)  # and the input ends
    assert main(["play", "rlrnn/DelayedXorEasy-v0"]) == 0
    out = capsys.readouterr().out
    assert "terminated: return" in out and out.rstrip().endswith(">")


def test_nobody_plays(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["play", "rlrnn/BattleshipEasy-v0", "--steps", "70"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "the input is no terminal, so actions are random" in first
    assert first.count("truncated: return") == 1 and "step 70: " in first
    assert main(arguments) == 0 and capsys.readouterr().out == first
    assert main([*arguments, "--seed=1"]) == 0 and capsys.readouterr().out != first
    assert main(["play", "CartPole-v1", "--steps=3"]) == 0
    assert "angular velocity: " in capsys.readouterr().out
    assert main(["play", "rlrnn/AcrobotHiddenVelocity-v0", "--steps=9"]) == 0
    out = capsys.readouterr().out
    assert "cos 2: " in out and "(torque +1)" in out and "velocity: " not in out


def test_names_of_hidden_coordinates() -> None:
    """Those that the wrappers leave; numbers alone where there is something else."""
    env = gymnasium.make("CartPole-v1")
    two = HideCoordinates(HideCoordinates(env, hide=[1]), keep=[0, 2])
    obs, _ = two.reset(seed=0)
    lines = [line.split(":")[0] for line in picture(task_of(two), obs)]
    assert lines == ["position", "angular velocity"]
    more = PreviousActionReward(two)
    assert picture(task_of(more), more.reset(seed=0)[0])[0] == "observation:"
    plain: Any = gymnasium.make("FrozenLake-v1")
    assert picture(task_of(plain), 3) == ["observation: 3"]


def test_an_agent_plays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = ["--envs=4", "--steps=128", "--eval_episodes=2", "--agent.n_steps=32"]
    for name in ("CartPoleHiddenVelocity", "RepeatPreviousEasy", "AddingEasy"):
        train = ["train", f"--env=rlrnn/{name}-v0", f"--run.folder={name}", *tiny]
        assert main([*train, "--run.track=disabled"]) == 0
        capsys.readouterr()
        assert main(["play", "--agent", name, "--steps=60"]) == 0
        out = capsys.readouterr().out
        assert f"rlrnn/{name}-v0, played by {name}" in out and "step 60: " in out
    assert main(["play", "rlrnn/DelayedXorEasy-v0", "--agent", "AddingEasy"]) == 2
    error = capsys.readouterr().err
    assert "AddingEasy was trained with the observation space Box" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to play: give an environment's id, or --agent RUN"),
        (["rlrnn/RepeatFirstEas-v0"], "did you mean rlrnn/RepeatFirstEasy-v0"),
        (["nowhere:Foo-v0"], "unknown environment 'nowhere:Foo-v0'"),
        (["CartPole-v1", "--steps=0"], "--steps is 0: give at least 1"),
        (["CartPole-v1", "--seed=-1"], "--seed is -1: give at least 0"),
        (["CartPole-v1", "--steps=x"], "--steps is 'x', expected a whole number"),
        (["--agent", "nowhere"], "nowhere is not a run"),
    ],
)
def test_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["play", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_is_typed() -> None:
    box = spaces.Box(-1, 1, (2,), np.float32)
    assert np.array_equal(entered("0.5, -1", box), np.array([0.5, -1], np.float32))
    assert np.array_equal(entered("3 0", spaces.MultiDiscrete([4, 2])), [3, 0])
    assert entered(" 2 ", spaces.Discrete(3)) == 2
    for words, space in [
        ("2", box),
        ("1 3", box),
        ("1.5", spaces.Discrete(3)),
        ("3", spaces.Discrete(3)),
        ("one", spaces.Discrete(3)),
        ("nan", spaces.Discrete(3)),
        ("0 2", spaces.MultiDiscrete([4, 2])),
    ]:
        with pytest.raises(ValueError):
            entered(words, space)


@pytest.mark.parametrize("kind", families())
def test_contracts_are_complete(kind: type) -> None:
    """In each docstring, or by name of another task that has the same."""
    doc = " ".join((kind.__doc__ or "").lower().split())
    for word in "observation", "action", "reward", "start", "end", "truncated":
        assert word in doc or "the rest is as there" in doc or "those of `" in doc, word
    for word in "returns", "memory", "chance", "best":
        assert word in doc, word
    assert re.search(r"\b(19|20)\d\d\b|see `repeatprevious`", doc), "the source"


def test_the_gallery_is_up_to_date() -> None:
    """Else: python -m rlrnn.play > docs/environments.md"""
    page = (ROOT / "docs" / "environments.md").read_text("utf-8")
    assert gallery() == page
    assert all(id in page for id in IDS)
