"""Encoder, recurrent core, head."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlrnn.recurrent import Cell, Recurrent


class SequenceModel(nn.Module):
    """Symbols in, logits of a class per step out."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden_size: int,
        layers: int = 1,
        cell: Cell = "lstm",
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        width = embedding_size or min(hidden_size, 64)
        self.encoder = nn.Embedding(inputs, width)
        # Unit-variance embeddings (torch's default) saturate small cells.
        nn.init.normal_(self.encoder.weight, std=width**-0.5)
        self.core = Recurrent(width, hidden_size, layers, cell)
        self.head = nn.Linear(hidden_size, outputs)

    def initial_state(self, batch: int) -> Float[Tensor, "S B H"]:
        return self.core.initial_state(batch)

    def forward(
        self,
        x: Int[Tensor, "T B"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Float[Tensor, "T B C"], Float[Tensor, "S B H"]]:
        """Logits, and the state after the last step. Resets as in `Recurrent`."""
        y, state = self.core(self.encoder(x), state, starts)
        return self.head(y), state
