"""Videos of evaluation episodes: files in the run folder, and a mirror in W&B."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rlrnn.config import AgentConfig, RunConfig, TrainConfig
from rlrnn.flows import train


class Filmed(gymnasium.Env[Any, Any]):
    """Five steps; the picture grows lighter. The last action is never allowed."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        assert action != 2
        self.t += 1
        return np.zeros(2, np.float32), 1.0, self.t == 5, False, {}

    def action_masks(self) -> Any:
        return [True, True, False]

    def render(self) -> Any:
        return np.full((40, 640, 3), 50 * self.t, np.uint8)


def config(env: str, folder: Path) -> TrainConfig:
    return TrainConfig(
        env=env,
        envs=2,
        steps=32,
        eval_episodes=2,
        eval_videos=2,
        agent=AgentConfig(hidden_size=4, net_arch=[], n_steps=8, batch_size=16),
        device="cpu",
        run=RunConfig(folder=str(folder), track="offline"),
    )


@pytest.mark.parametrize("previous", [False, True])
def test_videos_of_evaluation_episodes(previous: bool, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    gymnasium.register("Filmed-v0", lambda **kwargs: Filmed(**kwargs))
    try:
        given = replace(config("Filmed-v0", tmp_path / "run"), previous=previous)
        summary = train(given, progress=False)
    finally:
        del gymnasium.registry["Filmed-v0"]
    assert summary["return_mean"] == 5  # masks are kept in the evaluation, too
    films = sorted((tmp_path / "run" / "videos").iterdir())
    assert [film.name for film in films] == ["episode_0.gif", "episode_1.gif"]
    with image.open(films[0]) as film:
        assert film.n_frames == 5 and film.size == (320, 20)
    mirrored = list((tmp_path / "run" / "wandb").rglob("*.gif"))
    assert len(mirrored) == 2


def test_what_does_not_render_is_said_before_training(tmp_path: Path) -> None:
    name = "rlrnn/CartPoleHiddenVelocity-v0"
    with pytest.raises(ValueError, match=r"cannot be filmed.*eval_videos") as error:
        train(config(name, tmp_path / "run"), progress=False)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
