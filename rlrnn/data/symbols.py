"""The symbols of a text, in memory or in a file, and windows of them.

A text that is too long for memory becomes a file of its symbols in a cache folder
(`$XDG_CACHE_HOME/rlrnn` or `~/.cache/rlrnn`), once for the same content and options;
windows are read from it. Deleting the folder costs nothing but making it again.

N: steps of one pass. K: steps of a window. B: streams.
"""

import errno
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from rlrnn.data import vocabulary
from rlrnn.data.chunks import Chunk
from rlrnn.data.files import DataError, cache_folder
from rlrnn.data.vocabulary import Level, Vocabulary

CACHE_VERSION = 1
SYMBOLS, DESCRIPTION = "symbols.bin", "text.json"


@runtime_checkable
class Blocks(Protocol):
    """A text that is read in blocks. `digest`: of the files that it is a part of."""

    @property
    def name(self) -> str: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def digest(self) -> str | None: ...
    def blocks(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class Part:
    """Symbols [n] in the smallest unsigned type that has them all.

    `mapped`: what tells this file from others, for symbols that lie in one, of which
    only those that are looked at come into memory.
    """

    symbols: Tensor
    mapped: int | None = None

    def cut(self, begin: int, end: int) -> "Part":
        return replace(self, symbols=self.symbols[begin:end])


class NextSymbols:
    """B equal stretches of one long sequence side by side, as streams; the target of
    each symbol is the next one. Windows wrap around the end, where sequences begin.

    The symbols move to a device in their small type, and become int64 in a window;
    those of a file stay there, and windows move.
    """

    whole = False

    def __init__(
        self, part: Part, batch: int, device: torch.device | None = None
    ) -> None:
        self.part, self.batch, self.device = part, batch, device
        self.length = (len(part.symbols) - 1) // batch
        # [N + 1, B], a view: the last row is the first of the next stretch
        self._lines = part.symbols.as_strided(
            (self.length + 1, batch), (1, self.length), part.symbols.storage_offset()
        )

    def to(self, device: torch.device) -> "NextSymbols":
        if self.part.mapped is not None:
            return NextSymbols(self.part, self.batch, device)
        moved = replace(self.part, symbols=self.part.symbols.to(device))
        return NextSymbols(moved, self.batch, device)

    def fingerprint(self) -> int:
        if self.part.mapped is not None:
            return self.part.mapped
        return zlib.crc32(self.part.symbols.cpu().numpy().tobytes())

    def span(self, t: int, truncation: int) -> int:
        return truncation

    def typical(self, truncation: int) -> float:
        return float(truncation)

    def window(self, t: int, steps: int) -> Chunk:
        t %= self.length
        scale = float(steps * self.batch)
        if t > 0 and t + steps <= self.length:
            lines = self._read(t, t + steps)
            return Chunk(lines[:-1], lines[1:], None, None, scale)
        pieces = []
        first, left = -t % self.length, steps
        while left:
            end = min(t + left, self.length)
            pieces.append(self._read(t, end))
            left -= end - t
            t = 0
        x = torch.cat([lines[:-1] for lines in pieces])
        y = torch.cat([lines[1:] for lines in pieces])
        starts = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        starts[first :: self.length] = True
        return Chunk(x, y, starts, None, scale)

    def _read(self, begin: int, end: int) -> Tensor:
        """Inputs of the steps `begin` to `end`, and the last ones' targets."""
        return self._lines[begin : end + 1].to(
            self.device, torch.int64, memory_format=torch.contiguous_format
        )


# ---------------------------------------------------------------------------- encoding


def in_memory(
    texts: Sequence[Blocks], level: Level, limit: int
) -> tuple[Vocabulary, list[Part]]:
    """The vocabulary of the first text, and the symbols of all of them."""
    known = vocabulary.learn(level, texts[0].blocks(), limit)
    parts = []
    for text in texts:
        blocks = [known.encode(""), *_encoded(text, known)]
        parts.append(Part(torch.from_numpy(np.concatenate(blocks))))
    return known, parts


def on_disk(
    texts: Sequence[Blocks], level: Level, limit: int
) -> tuple[Vocabulary, list[Part]]:
    """`in_memory`, but the symbols lie in a file of the cache folder.

    Raises DataError if it cannot be written.
    """
    contents = [(_digest(text), text.begin, text.end) for text in texts]
    described = json.dumps([CACHE_VERSION, level, limit, contents])
    name = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    root = cache_folder()
    folder = root / f"text-{name}"
    if not folder.is_dir():
        try:
            _store(folder, texts, level, limit)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = (
                "no room is left"
                if full
                else f"nothing can be written ({error.strerror})"
            )
            raise DataError(
                f"{texts[0].name} is kept as a file of symbols in {root}, where "
                f"{reason}; make room there, or set XDG_CACHE_HOME to another folder"
            ) from None
    return _mapped(folder, int(name[:8], 16))


def _encoded(text: Blocks, known: Vocabulary) -> Iterator[vocabulary.Symbols]:
    blocks = text.blocks()
    if known.format["level"] in ("words", "bpe"):
        blocks = vocabulary.whole_words(blocks)
    return map(known.encode, blocks)


def _digest(text: Blocks) -> str:
    if text.digest is not None:
        return text.digest
    content = hashlib.blake2b(digest_size=16)
    for block in text.blocks():
        content.update(block.encode())
    return content.hexdigest()


def _store(folder: Path, texts: Sequence[Blocks], level: Level, limit: int) -> None:
    """Writes `folder`: all of it, or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    known = vocabulary.learn(level, texts[0].blocks(), limit)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as place:
        new = Path(place, "new")
        new.mkdir()
        counts = []
        # written, not mapped: a full disk is an error of `write`, and the end of a
        # process that writes to mapped memory
        with (new / SYMBOLS).open("wb") as file:
            for text in texts:
                counts.append(sum(map(len, _written(file, _encoded(text, known)))))
            file.flush()
            os.fsync(file.fileno())
        tree = {"counts": counts, "format": known.format}
        (new / DESCRIPTION).write_text(json.dumps(tree), "utf-8")
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # no other process has made it in the meantime
                raise


def _written(
    file: Any, blocks: Iterator[vocabulary.Symbols]
) -> Iterator[vocabulary.Symbols]:
    for block in blocks:
        file.write(block.tobytes())
        yield block


def _mapped(folder: Path, fingerprint: int) -> tuple[Vocabulary, list[Part]]:
    tree = json.loads((folder / DESCRIPTION).read_text("utf-8"))
    known = vocabulary.from_format(tree["format"])
    # c: copied when written to, which nobody does; torch has no read-only tensors
    whole = np.memmap(folder / SYMBOLS, known.encode("").dtype, "c")
    ends = np.cumsum(tree["counts"])
    pairs = zip(ends - tree["counts"], ends, strict=True)
    return known, [Part(torch.from_numpy(whole[a:b]), fingerprint) for a, b in pairs]
