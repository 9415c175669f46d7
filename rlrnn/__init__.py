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
        wrappers = "rlrnn.envs.wrappers"
        register(
            f"rlrnn/{id}-v0",
            entry_point=entry_point,
            additional_wrappers=(
                WrapperSpec(
                    "HideCoordinates", f"{wrappers}:HideCoordinates", {"hide": hide}
                ),
                WrapperSpec("Checked", f"{wrappers}:Checked", {}),
            ),
            max_episode_steps=steps,
        )

    recall = "recall:repeat_previous", "recall:RepeatPrevious"
    tensor("RepeatPreviousEasy", *recall, k=4, decks=1)
    tensor("RepeatPreviousMedium", *recall, k=32, decks=2)
    tensor("RepeatPreviousHard", *recall, k=64, decks=3)

    # POPGym's levels of the other games of memory
    for level, decks in (("Easy", 1), ("Medium", 8), ("Hard", 16)):
        single, vector = "recall:repeat_first", "recall:RepeatFirst"
        tensor(f"RepeatFirst{level}", single, vector, decks=decks)
    for level, decks in (("Easy", 1), ("Medium", 2), ("Hard", 3)):
        single, vector = "recall:autoencode", "recall:Autoencode"
        tensor(f"Autoencode{level}", single, vector, decks=decks)
        single, vector = "cards:higher_lower", "cards:HigherLower"
        tensor(f"HigherLower{level}", single, vector, decks=decks)
    count = "recall:count_recall", "recall:CountRecall"
    tensor("CountRecallEasy", *count, kind="colors", decks=1)
    tensor("CountRecallMedium", *count, kind="suits", decks=2)
    tensor("CountRecallHard", *count, kind="ranks", decks=4)
    pairs = "cards:concentration", "cards:Concentration"
    tensor("ConcentrationEasy", *pairs, kind="colors", decks=1)
    tensor("ConcentrationMedium", *pairs, kind="colors", decks=2)
    tensor("ConcentrationHard", *pairs, kind="ranks", decks=1)
    bandit = "bandit:multiarmed_bandit", "bandit:MultiarmedBandit"
    tensor("MultiarmedBanditEasy", *bandit, arms=10, max_episode_steps=200)
    tensor("MultiarmedBanditMedium", *bandit, arms=20, max_episode_steps=400)
    tensor("MultiarmedBanditHard", *bandit, arms=30, max_episode_steps=600)

    tensor("CartPoleHiddenVelocity", "cartpole:cartpole", "cartpole:CartPole")

    def levels(task: str, single: str, *kwargs: dict[str, Any]) -> None:
        """Easy, medium and hard, POPGym's for its tasks; `single`: module, function."""
        for level, chosen in zip(("Easy", "Medium", "Hard"), kwargs, strict=True):
            vector = f"{single.split(':')[0]}:{task}"
            tensor(f"{task}{level}", single, vector, **chosen)

    fleets = {"size": 8}, {"size": 10}, {"size": 12}
    levels("Battleship", "grids:battleship", *fleets)
    fields = {"size": 4, "mines": 2}, {"size": 6, "mines": 6}, {"size": 8, "mines": 10}
    levels("Minesweeper", "grids:minesweeper", *fields)
    mazes = {"size": 10}, {"size": 14}, {"size": 18}
    levels("LabyrinthEscape", "labyrinth:labyrinth_escape", *mazes)
    levels("LabyrinthExplore", "labyrinth:labyrinth_explore", *mazes)
    lengths = tuple({"max_episode_steps": steps} for steps in (200, 400, 600))
    levels("PositionOnlyCartPole", "cartpole:position_only_cartpole", *lengths)
    levels("VelocityOnlyCartPole", "cartpole:velocity_only_cartpole", *lengths)
    noise = {"sigma": 0.1}, {"sigma": 0.2}, {"sigma": 0.3}
    noisy = "cartpole:noisy_position_only_cartpole"
    levels("NoisyPositionOnlyCartPole", noisy, *noise)
    lengths = tuple({"max_episode_steps": steps} for steps in (200, 150, 100))
    levels("PositionOnlyPendulum", "pendulum:position_only_pendulum", *lengths)
    noisy = "pendulum:noisy_position_only_pendulum"
    levels("NoisyPositionOnlyPendulum", noisy, *noise)

    # Diagnostics: each is one thing to remember, for so long
    corridors = {"length": 10}, {"length": 30}, {"length": 70}
    levels("TMaze", "diagnostics:t_maze", *corridors)
    chains = {"length": 10}, {"length": 30}, {"length": 100}
    levels("MemoryChain", "diagnostics:memory_chain", *chains)
    strings = (5, 10), (10, 50), (10, 200)
    dials = [{"length": length, "delay": delay} for length, delay in strings]
    levels("Copy", "diagnostics:copy", *dials)
    sums = {"length": 10}, {"length": 50}, {"length": 100}
    levels("Adding", "diagnostics:adding", *sums)
    delays = {"delay": 5}, {"delay": 20}, {"delay": 50}
    levels("DelayedXor", "diagnostics:delayed_xor", *delays)

    classic = "gymnasium.envs.classic_control"  # hidden: the velocities
    hidden("PendulumHiddenVelocity", f"{classic}:PendulumEnv", [2], 200)
    hidden(
        "MountainCarContinuousHiddenVelocity",
        f"{classic}:Continuous_MountainCarEnv",
        [1],
        999,
    )
    hidden("AcrobotHiddenVelocity", f"{classic}:AcrobotEnv", [4, 5], 500)
    lander = "gymnasium.envs.box2d.lunar_lander:LunarLander"  # needs gymnasium[box2d]
    hidden("LunarLanderHiddenVelocity", lander, [2, 3, 5], 1000)

    register("rlrnn/Tuning-v0", entry_point="rlrnn.envs.tuning:TuningEnv")


_register()
