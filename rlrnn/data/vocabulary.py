"""What the symbols of a text are: characters, bytes, words, or pieces of words.

A vocabulary is learned from the training part alone. Its `format` is a plain tree, from
which `from_format` makes it again, for a prediction.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rlrnn.data.files import DataError

Level = Literal["characters", "bytes", "words", "bpe"]
Symbols = NDArray[np.unsignedinteger[Any]]

UNKNOWN = "\ufffd"  # the character 0 of a vocabulary: what training did not have
UNKNOWN_WORD, END_OF_LINE = "<unk>", "<eol>"


@runtime_checkable
class Vocabulary(Protocol):
    """Text to symbols, which are integers below `count`, and back."""

    count: int
    format: dict[str, Any]

    def encode(self, text: str) -> Symbols:
        """In the smallest unsigned type. What the vocabulary lacks becomes 0."""
        ...

    def decode(self, symbols: Iterable[int]) -> str: ...

    def missing(self, text: str) -> int | None:
        """Where in a text the first symbol lies that a model cannot be asked for: one
        that it has never seen."""
        ...


def learn(level: Level, blocks: Iterable[str], limit: int) -> Vocabulary:
    """The vocabulary of a training part, which is read in blocks.

    `limit`: the most words, or the pieces of words, that are told apart.
    """
    match level:
        case "characters":
            seen = np.zeros(0x110000, bool)
            for block in blocks:
                seen[_codes(block)] = True
            return Characters(UNKNOWN + "".join(map(chr, np.flatnonzero(seen))))
        case "bytes":
            return Bytes()
        case "words":
            counts: Counter[str] = Counter()
            for block in whole_words(blocks):
                counts.update(_words(block))
            special = UNKNOWN_WORD, END_OF_LINE
            common = (word for word, _ in counts.most_common() if word not in special)
            kept = [word for word, _ in zip(common, range(limit - 2), strict=False)]
            return Words([*special, *kept])
        case "bpe":
            return Pieces(_learn_pieces(whole_words(blocks), limit))


def from_format(format: dict[str, Any]) -> Vocabulary:
    """The vocabulary that a model was trained with."""
    match format["level"]:
        case "characters":
            return Characters(format["vocabulary"])
        case "bytes":
            return Bytes()
        case "words":
            return Words(format["vocabulary"])
        case _:
            return Pieces(format["vocabulary"])


class Characters:
    """Unicode characters; number 0 is any that training did not have."""

    def __init__(self, known: str) -> None:
        self.known, self.count = known, len(known)
        self.format = {"level": "characters", "vocabulary": known}
        codes = _codes(known[1:])
        # the number of each code; all that lie above the last one share an entry
        self._numbers = np.zeros(int(codes.max(initial=0)) + 2, _smallest(self.count))
        self._numbers[codes] = np.arange(1, self.count)

    def encode(self, text: str) -> Symbols:
        return self._numbers[np.minimum(_codes(text), len(self._numbers) - 1)]

    def decode(self, symbols: Iterable[int]) -> str:
        return "".join(self.known[symbol] for symbol in symbols)

    def missing(self, text: str) -> int | None:
        unknown = np.flatnonzero(self.encode(text) == 0)
        return int(unknown[0]) if len(unknown) else None


class Bytes:
    """Any bytes. A text to encode has a character for each byte, as Latin-1 has; what
    is decoded is UTF-8."""

    count = 256

    def __init__(self) -> None:
        self.format: dict[str, Any] = {"level": "bytes"}

    def encode(self, text: str) -> Symbols:
        return np.frombuffer(text.encode("latin-1"), np.uint8)

    def decode(self, symbols: Iterable[int]) -> str:
        return bytes(symbols).decode("utf-8", "replace")

    def missing(self, text: str) -> int | None:
        return None


class Words:
    """What stands between blanks; ends of lines are words, too. Number 0 is any word
    that is too rare, or that training did not have."""

    def __init__(self, known: list[str]) -> None:
        self.known, self.count = known, len(known)
        self.format = {"level": "words", "vocabulary": known}
        self._numbers = {word: number for number, word in enumerate(known)}

    def encode(self, text: str) -> Symbols:
        numbers = (self._numbers.get(word, 0) for word in _words(text))
        return np.fromiter(numbers, _smallest(self.count))

    def decode(self, symbols: Iterable[int]) -> str:
        text = " ".join(self.known[symbol] for symbol in symbols)
        return re.sub(f" ?{END_OF_LINE} ?", "\n", text)

    def missing(self, text: str) -> int | None:
        return None


class Pieces:
    """Byte pair encoding (Sennrich et al. 2016) over bytes, so that nothing is unknown;
    by the package `tokenizers`, whose JSON is the vocabulary."""

    def __init__(self, json: str) -> None:
        self._tokenizer = _tokenizers().Tokenizer.from_str(json)
        self.count = int(self._tokenizer.get_vocab_size())
        self.format = {"level": "bpe", "vocabulary": json}

    def encode(self, text: str) -> Symbols:
        return np.array(self._tokenizer.encode(text).ids, _smallest(self.count))

    def decode(self, symbols: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(symbols)))

    def missing(self, text: str) -> int | None:
        return None


def _learn_pieces(blocks: Iterable[str], limit: int) -> str:
    library = _tokenizers()
    by_bytes = library.pre_tokenizers.ByteLevel
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = by_bytes(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=limit, initial_alphabet=by_bytes.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(blocks, trainer)
    return str(tokenizer.to_str())


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            "data.text.level is bpe, which needs the package tokenizers; install it "
            "with `pip install rlrnn[text]`"
        ) from None
    return tokenizers


def whole_words(blocks: Iterable[str]) -> Iterator[str]:
    """The same text, cut where a word has ended and blanks begin: a word that lies
    across two blocks is one."""
    left = ""
    for block in blocks:
        left += block
        head = left.rstrip()
        if len(head) == len(left):  # inside a word, which waits for its end
            *before, _ = left.rsplit(None, 1)
            head = before[0] if before else ""
        if head:
            yield head
            left = left[len(head) :]
    if left:
        yield left


def _words(text: str) -> list[str]:
    return text.replace("\n", f" {END_OF_LINE} ").split()


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _smallest(count: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest unsigned type that has the numbers below `count`."""
    return np.min_scalar_type(count - 1)
