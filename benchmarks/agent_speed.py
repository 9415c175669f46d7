"""Environment steps per second of the full loop, beside sb3-contrib's RecurrentPPO.

    python benchmarks/agent_speed.py --rounds 5

The same recipe for both: network, environments (SB3's DummyVecEnv over the same
gymnasium environments), rollout, epochs, minibatch, one thread. Rounds alternate; the
ratio is taken in each round. `tensor` is ours on our tensor-native environment, apart.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import torch
from stable_baselines3.common.env_util import make_vec_env

import rlrnn  # noqa: F401  registers the ids
from rlrnn.agents import RecurrentPPO

ENV = "rlrnn/CartPoleHiddenVelocity-v0"


def hidden_cartpole() -> gymnasium.Env[Any, Any]:
    """gymnasium's own cart-pole, without velocities: the same for both agents."""
    from rlrnn.envs.wrappers import HideCoordinates

    return HideCoordinates(gymnasium.make("CartPole-v1"), hide=[1, 3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=128, help="of a rollout")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--shared", action="store_true", help="one LSTM for both")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from sb3_contrib import RecurrentPPO as Peer

    recipe: dict[str, Any] = {
        "n_steps": options.steps,
        "batch_size": options.batch,
        "n_epochs": 4,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": {
            "lstm_hidden_size": options.hidden,
            "shared_lstm": options.shared,
            "enable_critic_lstm": not options.shared,
        },
    }
    numpy_envs: Callable[[], Any] = lambda: make_vec_env(hidden_cartpole, options.envs)  # noqa: E731
    tensor_envs: Callable[[], Any] = lambda: gymnasium.make_vec(  # noqa: E731
        ENV, num_envs=options.envs
    )
    agents = {
        "sb3-contrib": Peer("MlpLstmPolicy", numpy_envs(), **recipe),
        "rlrnn": RecurrentPPO("MlpLstmPolicy", numpy_envs(), **recipe),
        "rlrnn, tensor": RecurrentPPO("MlpLstmPolicy", tensor_envs(), **recipe),
    }
    one = options.envs * options.steps
    for agent in agents.values():
        agent.learn(one)  # warm-up
    speeds: dict[str, list[float]] = {name: [] for name in agents}
    for _ in range(options.rounds):
        for name, agent in agents.items():
            begin = time.perf_counter()
            agent.learn(options.updates * one, reset_num_timesteps=False)
            took = time.perf_counter() - begin
            speeds[name].append(options.updates * one / took)
    print("| agent | steps/s, median (min to max) | of sb3-contrib |\n|---|---|---|")
    for name, values in speeds.items():
        ratio = statistics.median(
            a / b for a, b in zip(values, speeds["sb3-contrib"], strict=True)
        )
        print(
            f"| {name} | {statistics.median(values):,.0f} ({min(values):,.0f} to "
            f"{max(values):,.0f}) | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
