"""What stands in the place of a `Recurrent`: nothing that remembers, or dropout.

Shapes: T time steps, B columns, D inputs, H units, S state rows.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlrnn.recurrent import Recurrent


class Memoryless(nn.Module):
    """A dense layer and a tanh with the face of a `Recurrent`; its state has no rows.

    The control that shows how much of a task can be done without memory.
    """

    layers = 1

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        linear = nn.Linear(input_size, hidden_size)
        self.dense = nn.Sequential(linear, nn.Tanh())

    def initial_state(self, batch: int) -> Float[Tensor, "0 B H"]:
        weight = next(self.parameters())
        return weight.new_zeros(0, batch, self.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "T B D"],
        state: Float[Tensor, "0 B H"],
        starts: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "0 B H"]]:
        return self.dense(x), state


class Dropping:
    """A `Recurrent` in training, with dropout between its layers, as `nn.LSTM` has it.

    The layers run one by one, on the weights of `core`. What is dropped comes from
    `generator`: torch's dropout would draw from the global one.
    """

    def __init__(
        self, core: Recurrent, rate: float, generator: torch.Generator
    ) -> None:
        self.rate = rate
        self.generator = generator
        self.layers = [core.layer(i) for i in range(core.layers)]

    def __call__(
        self,
        x: Float[Tensor, "T B D"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "S B H"]]:
        rows = []
        for i, layer in enumerate(self.layers):
            if i > 0:
                kept = torch.empty(x.shape).bernoulli_(
                    1 - self.rate, generator=self.generator
                )
                x = x * kept.to(x) / (1 - self.rate)
            x, after = layer(x, state[i :: len(self.layers)], starts)
            rows.append(after)
        return x, torch.stack(rows, 1).flatten(0, 1)  # all h, then all c
