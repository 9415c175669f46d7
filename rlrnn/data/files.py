"""Files as people have them: a path, a folder, a glob, or a list of these; gzipped or
not."""

import glob
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """A data file that cannot be used, with its name and what to do."""


@dataclass(frozen=True)
class Paths:
    """Where the parts of a data set lie. Without `valid` and `test`, both are cut from
    `train`."""

    train: str
    valid: str | None = None
    test: str | None = None


def find(path: str | Path, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The files that `path` means, in the order of their names: itself, a folder's
    files that end in one of `suffixes` (or that and .gz), or what a glob matches.

    Raises DataError if there is none.
    """
    place = Path(path)
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
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"no such file: {path}")
    return [p for p in found if p.is_file()]


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes; those of a .gz unpacked. Raises DataError, in one line."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, expected a file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path} is no gzip file, or a damaged one") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
