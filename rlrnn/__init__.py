"""rlrnn: recurrent agents, and sequence training steered by one of them.

Importing it registers the environments, `rlrnn/...`, with gymnasium.
"""

from typing import Any

from gymnasium.envs.registration import WrapperSpec, register

__version__ = "0.1.0"


def _register() -> None:
    """Names the environments; their modules, and torch, are imported when one is made.

    A tensor task has two faces: `gymnasium.make` gives numpy, `gymnasium.make_vec` the
    tensors. It truncates by itself, so that both agree: no `max_episode_steps` here.
    """

    def tensor(id: str, single: str, vector: str, **kwargs: Any) -> None:
        register(
            f"rlrnn/{id}-v0",
            entry_point=f"rlrnn.envs.{single}",
            vector_entry_point=f"rlrnn.envs.{vector}",
            kwargs=kwargs,
        )

    def hidden(id: str, entry_point: str, hide: list[int], steps: int) -> None:
        wrapper = "rlrnn.envs.wrappers:HideCoordinates"
        register(
            f"rlrnn/{id}-v0",
            entry_point=entry_point,
            additional_wrappers=(
                WrapperSpec("HideCoordinates", wrapper, {"hide": hide}),
            ),
            max_episode_steps=steps,
        )

    recall = "recall:repeat_previous", "recall:RepeatPrevious"
    tensor("RepeatPreviousEasy", *recall, k=4, decks=1)
    tensor("RepeatPreviousMedium", *recall, k=32, decks=2)
    tensor("RepeatPreviousHard", *recall, k=64, decks=3)
    tensor("CartPoleHiddenVelocity", "cartpole:cartpole", "cartpole:CartPole")

    classic = "gymnasium.envs.classic_control"  # hidden: the velocities
    hidden("PendulumHiddenVelocity", f"{classic}:PendulumEnv", [2], 200)
    hidden(
        "MountainCarContinuousHiddenVelocity",
        f"{classic}:Continuous_MountainCarEnv",
        [1],
        999,
    )
    hidden("AcrobotHiddenVelocity", f"{classic}:AcrobotEnv", [4, 5], 500)

    register("rlrnn/Tuning-v0", entry_point="rlrnn.envs.tuning:TuningEnv")


_register()
