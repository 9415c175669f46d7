"""Environments: partially observed tasks, and training as an environment.

Each is made by its id, `gymnasium.make("rlrnn/RepeatPreviousEasy-v0")` or
`gymnasium.make_vec("rlrnn/RepeatPreviousEasy-v0", num_envs=64, device="cpu")`, once
`import rlrnn` has registered it.
"""
