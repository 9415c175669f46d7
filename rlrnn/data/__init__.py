"""Streams of sequences in the one form that the trainer knows: `Chunk`."""
