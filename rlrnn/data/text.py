"""Text as people have it, and its next symbol as what is to be predicted.

A text is read in blocks, so that its length costs no memory (`rlrnn.data.symbols` keeps
what it becomes). The vocabulary is the training part's.
"""

import codecs
import hashlib
import math
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrnn.checks import at_least, one_of
from rlrnn.data import vocabulary
from rlrnn.data.chunks import PROBE_STREAMS, Problem, Symbols
from rlrnn.data.files import DataError, find, not_utf8, read_blocks
from rlrnn.data.symbols import NextSymbols, in_memory, on_disk
from rlrnn.data.vocabulary import Level
from rlrnn.evaluation import mean_loss
from rlrnn.models import SequenceModel
from rlrnn.objectives import Classes

LARGE = 64 << 20  # bytes of files; a longer text is not kept in memory
BLOCK = 1 << 20  # bytes or characters that are worked on at a time
LEAST = 64  # steps that the training part's streams must have, 18 times


@dataclass(frozen=True)
class TextOptions:
    """What a symbol of a text is.

    Args:
        level: characters, bytes, words (what stands between blanks, and ends of lines)
            or bpe (pieces of words, by byte pair encoding).
        vocabulary: words or pieces that are told apart, the most frequent ones of the
            training part.
    """

    level: Level = "characters"
    vocabulary: int = 10_000

    def __post_init__(self) -> None:
        one_of("data.text.level", self.level, Level)
        least = 257 if self.level == "bpe" else 3
        at_least("data.text.vocabulary", self.vocabulary, least)


# ----------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Text:
    """The characters from `begin` to `end` of what `read` gives in blocks.

    `digest` is that of its files, for a text that is too long for memory.
    """

    name: str
    read: Callable[[], Iterable[str]]
    begin: int
    end: int
    digest: str | None = None

    @staticmethod
    def of(text: str, name: str, level: Level = "characters") -> "Text":
        """One that is in memory; for bytes, a character for each of them."""
        if level == "bytes":
            text = text.encode("utf-8", "surrogateescape").decode("latin-1")
        cuts = range(0, len(text), BLOCK)
        return Text(name, lambda: (text[a : a + BLOCK] for a in cuts), 0, len(text))

    def __len__(self) -> int:
        return self.end - self.begin

    def blocks(self) -> Iterator[str]:
        at = 0
        for block in self.read():
            part = block[max(0, self.begin - at) : max(0, self.end - at)]
            if part:
                yield part
            at += len(block)
            if at >= self.end:
                return

    def between(self, begin: float | int, end: float | int, name: str) -> "Text":
        """The part between two shares of it, in whole characters."""
        # rounded first: 0.9 + 0.05 is a little more than 0.95
        a, b = (self.begin + int(round(share, 9) * len(self)) for share in (begin, end))
        return Text(f"{self.name} ({name} part)", self.read, a, b, self.digest)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises DataError, in one line, if it is none."""
    text = "".join(_decoded(Path(path), "utf-8-sig"))
    if not text:
        raise DataError(f"{path} is empty, expected UTF-8 text")
    return text


def open_text(
    path: str, level: Level = "characters", skip: int = 0, size: int | None = None
) -> Text:
    """The text of a file, of the .txt files in a folder, or of what a glob matches, one
    after the other; files that end in .gz are unpacked.

    `skip` characters (of level bytes: bytes) are left out, and `size` come after them
    at most. Raises DataError, in one line, if there is nothing, or no text.
    """
    files = find(path, (".txt",))
    encoding = "latin-1" if level == "bytes" else "utf-8-sig"

    def read() -> Iterator[str]:
        for file in files:
            yield from _decoded(file, encoding)

    if sum(map(_size, files)) > LARGE:
        digest = _digest(files)
        begin, end = _cut(sum(map(len, read())), skip, size, path)
        return Text(path, read, begin, end, digest)
    text = "".join(read())
    begin, end = _cut(len(text), skip, size, path)
    return Text.of(text[begin:end], path)


def _cut(length: int, skip: int, size: int | None, path: str) -> tuple[int, int]:
    if not length:
        raise DataError(f"{path} is empty, expected UTF-8 text")
    begin = min(skip, length)
    return begin, length if size is None else min(begin + size, length)


def _size(file: Path) -> int:
    """Of its text in bytes; packed, text has about a quarter of its size."""
    return file.stat().st_size * (4 if file.suffix == ".gz" else 1)


def _digest(files: list[Path]) -> str:
    content = hashlib.blake2b(digest_size=16)
    for file in files:
        for raw in read_blocks(file, BLOCK):
            content.update(raw)
    return content.hexdigest()


def _decoded(path: Path, encoding: str) -> Iterator[str]:
    """One file's text in blocks."""
    decoder = codecs.getincrementaldecoder(encoding)()
    end, lines = 0, 1  # of what has been read, in bytes, and what it ends in
    for raw in read_blocks(path, BLOCK):
        if encoding != "latin-1" and b"\0" in raw:
            raise DataError(
                f"{path} is binary (a zero byte at offset {end + raw.index(0)}), "
                "expected UTF-8 text"
            )
        end += len(raw)
        yield _checked(decoder, raw, path, end, lines)
        lines += raw.count(b"\n")
    _checked(decoder, b"", path, end, lines)


def _checked(
    decoder: codecs.IncrementalDecoder, raw: bytes, path: Path, end: int, line: int
) -> str:
    """The text of `raw`, which begins in this line and ends at the offset `end` of its
    file."""
    try:
        return decoder.decode(raw, final=not raw)
    except UnicodeDecodeError as error:
        # its object begins with what the block before could not decode, and ends here
        at = error.start
        line += error.object.count(b"\n", 0, at)
        where = end - len(error.object) + at
        raise not_utf8(path, line, error.object[at], where) from None


@lru_cache(maxsize=2)
def standard_library(half: int) -> str:
    """The sources of half of the running standard library's modules, 0 or 1.

    Modules come in a fixed order that looks random (by the CRC of their names), so
    that neighbouring splits are alike, and are dealt in turn to the two halves.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    ranked = sorted(
        (zlib.crc32(name.as_posix().encode()), name.as_posix())
        for name in names
        if not skipped & set(name.parts)
    )
    texts = []
    for _, name in ranked[half::2]:
        try:
            texts.append((root / name).read_text("utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
    if not texts:
        raise DataError(
            f"no Python sources in {root}: give a text with --data.path FILE"
        )
    return "".join(texts)


# ----------------------------------------------------------------------------- problem


def divide(
    text: Text, valid: Text | None, test: Text | None, split: list[float]
) -> tuple[Text, Text, Text]:
    """Training, validation and test part: what has no text of its own is cut from
    `text`, by these shares. Without any test part it is the validation part."""
    a, b = split[0], split[0] + split[1]
    if valid is not None:
        return text, valid, test or valid
    if test is not None:
        a, b = a / b, 1.0
    train = text.between(0, a, "training")
    valid = text.between(a, b, "validation")
    if test is None and b < 1 - 1e-9:
        test = text.between(b, 1, "test")
    return train, valid, test or valid


def text_problem(
    parts: tuple[Text, Text, Text], batch: int, options: TextOptions | None = None
) -> Problem:
    """Prediction of the next symbol, on training, validation and test part.

    Raises DataError for a part that is too short to train or to judge.
    """
    options = options or TextOptions()
    large = any(text.digest for text in parts)
    known, (train, valid, test) = (on_disk if large else in_memory)(
        parts, options.level, options.vocabulary
    )
    streams = (batch, PROBE_STREAMS, PROBE_STREAMS)
    leasts = (18 * LEAST * batch, LEAST, LEAST)
    for text, part, count, least in zip(
        parts, (train, valid, test), streams, leasts, strict=True
    ):
        if len(part.symbols) < least:
            kind = "pieces" if options.level == "bpe" else options.level
            raise DataError(
                f"{text.name} has {len(part.symbols)} {kind}, expected at least "
                f"{least} for {count} streams; give a longer text"
                + (", or a smaller --data.batch" if text is parts[0] else "")
            )
    a = int(0.95 * len(train.symbols))
    objective = Classes(known.count)
    sources = {
        "train": NextSymbols(train.cut(0, a), batch),
        "probe": NextSymbols(train.cut(a, len(train.symbols)), PROBE_STREAMS),
        "valid": NextSymbols(valid, PROBE_STREAMS),
        "test": NextSymbols(test, PROBE_STREAMS),
    }

    def judge(model: SequenceModel, split: str) -> dict[str, float]:
        """The same unit for all vocabularies."""
        source = sources[split].to(next(model.parameters()).device)
        nats = float(mean_loss(model, objective, source, source.length))
        text, part = {"valid": (parts[1], valid), "test": (parts[2], test)}[split]
        each = len(part.symbols) / len(text)  # symbols of a character
        figures = {"bits_per_character": nats / math.log(2) * each}
        if options.level == "words":  # nobody has spelt these
            figures["unknown"] = float((part.symbols == 0).double().mean())
        return figures

    return Problem(
        inputs=Symbols(known.count),
        objective=objective,
        **sources,
        format={"kind": "text", **known.format},
        judge=judge if options.level in ("words", "bpe") else None,
        bias=None,
    )


# -------------------------------------------------------------------------- prediction


def encode_text(
    format: dict[str, Any], text: str, name: str = "the prompt"
) -> NDArray[np.int64]:
    """A text's symbols, for a model with this `format`. Words that training did not
    have are `<unk>`.

    Raises DataError for a character that training did not have.
    """
    text = "".join(Text.of(text, name, format["level"]).blocks())
    known = vocabulary.from_format(format)
    at = known.missing(text)
    if at is not None:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        raise DataError(
            f"{name} has {text[at]!r} (line {line}, column {column}), which is not "
            f"among the {known.count - 1} characters that the model has learned; "
            "leave it out"
        )
    return known.encode(text).astype(np.int64)


def decode_text(format: dict[str, Any], symbols: Iterable[int]) -> str:
    """The text that these symbols spell."""
    return vocabulary.from_format(format).decode(symbols)
