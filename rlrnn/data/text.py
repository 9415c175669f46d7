"""Character text: any UTF-8 file, or the sources of the standard library."""

import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from rlrnn.data.chunks import Problem, split_symbols, training_part
from rlrnn.data.files import DataError, read_bytes

UNKNOWN = "\ufffd"


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises DataError, in one line, if it is none."""
    raw = read_bytes(path)
    if not raw:
        raise DataError(f"{path} is empty, expected UTF-8 text")
    if b"\0" in raw:
        where = raw.index(b"\0")
        raise DataError(
            f"{path} is binary (a zero byte at offset {where}), expected UTF-8 text"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = error.start + len(raw) - len(error.object)  # a byte-order mark is cut
        raise DataError(
            f"{path} is not UTF-8 (byte 0x{raw[where]:02x} at offset {where}); "
            f"convert it, for example with `iconv -f latin1 -t utf-8 {Path(path).name}`"
        ) from None


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


def text_problem(text: str, batch: int, source: str) -> Problem:
    """Next-character prediction. The vocabulary is the training part's characters;
    any other is the unknown one, number 0.

    Raises DataError if a split has less than one step of `batch` streams for each of
    64 steps: too little to train or to judge.
    """
    least = 20 * 64 * batch  # validation is one twentieth
    if len(text) < least:
        raise DataError(
            f"{source} has {len(text)} characters, expected at least {least} for "
            f"{batch} streams; give a longer text, or a smaller --data.batch"
        )
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.unique(codes[: training_part(len(codes))[1]])
    at = np.searchsorted(known, codes).clip(max=len(known) - 1)
    symbols = np.where(known[at] == codes, at + 1, 0)
    vocabulary = UNKNOWN + "".join(map(chr, known))
    format = {"kind": "text", "vocabulary": vocabulary}
    return split_symbols(symbols, batch, len(vocabulary), format)
