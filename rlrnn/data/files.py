"""Files as people have them: a path, a folder, a glob, or a list of these; gzipped or
not."""

import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DATA = "RLRNN_DATA"  # the environment variable that names a folder of data sets


class DataError(ValueError):
    """A data file that cannot be used, with its name and what to do."""


def cache_folder() -> Path:
    """Where things are kept that can be made again: `$XDG_CACHE_HOME/rlrnn`, or
    `~/.cache/rlrnn`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlrnn"


@dataclass(frozen=True)
class Paths:
    """Where the parts of a data set lie. Without `valid` and `test`, both are cut from
    `train`."""

    train: str
    valid: str | None = None
    test: str | None = None


def expand(path: str | Path) -> Path:
    """`path`, in which a leading `$RLRNN_DATA/` stands for the folder that the
    environment variable names. Raises DataError if there is none."""
    first, *rest = Path(path).parts or ("",)
    if first != f"${DATA}":
        return Path(path)
    if DATA not in os.environ:
        raise DataError(
            f"{path}: the environment variable {DATA} is not set; set it to the folder "
            "with the data sets"
        )
    return Path(os.environ[DATA], *rest)


def find(path: str | Path, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The files that `path` means, in the order of their names: itself, a folder's
    files that end in one of `suffixes` (or that and .gz), or what a glob matches.

    Raises DataError if there is none.
    """
    place = expand(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        endings = tuple(f"{s}{gz}" for s in suffixes or ("",) for gz in ("", ".gz"))
        inside = sorted(p for p in place.rglob("*") if p.is_file())
        found = [p for p in inside if p.name.endswith(endings)]
        if not found:
            wanted = " or ".join(suffixes) or "any"
            raise DataError(f"no {wanted} files in the folder {place}")
        return found
    matches = map(Path, glob.glob(str(place), recursive=True))
    found = sorted(match for match in matches if match.is_file())
    if not found:
        raise DataError(f"no such file: {place}")
    return found


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes; those of a .gz unpacked. Raises DataError, in one line."""
    return b"".join(read_blocks(path))


def read_utf8(path: str | Path) -> str:
    """A file's text, without a byte order mark. Raises DataError, with the line."""
    raw = read_bytes(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Not of `raw`: what a decoder is at begins after the byte order mark
        at = error.start + len(raw) - len(error.object)
        raise not_utf8(path, raw.count(b"\n", 0, at) + 1, raw[at], at) from None


def not_utf8(path: str | Path, line: int, byte: int, offset: int) -> DataError:
    """What is said of a file with this byte."""
    return DataError(
        f"{path} is not UTF-8 (line {line}: byte 0x{byte:02x} at offset {offset}); "
        f"convert it, for example with `iconv -f latin1 -t utf-8 {Path(path).name}`"
    )


def read_blocks(path: str | Path, size: int = 1 << 20) -> Iterator[bytes]:
    """`read_bytes`, `size` bytes at a time."""
    path = expand(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while block := file.read(size):
                yield block
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, expected a file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path} is no gzip file, or a damaged one") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
