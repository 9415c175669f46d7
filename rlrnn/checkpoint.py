"""One safe file format for agents, trainers and controllers.

A *tree* is nested dicts, lists and tuples; its leaves are torch tensors, numpy arrays
or plain scalars (None, bool, int, float, str). `save` writes one, `load` gives it back.

On disk a checkpoint is two members, in a directory or in an uncompressed zip:

    tensors.safetensors   the numbers
    manifest.json         the structure, and the SHA-256 and size of the other file;
                          its first 76 bytes are the SHA-256 of the rest of itself

Loading runs no code from the file, opens no path named in it, and checks sizes before
it allocates. A save that is killed leaves the previous checkpoint as it was.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.torch
import torch

from rlrnn import __version__

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed saves are then not swept
    fcntl = None  # type: ignore[assignment]

Tree: TypeAlias = Any
Where: TypeAlias = str | os.PathLike[str] | io.BufferedIOBase

FORMAT, VERSION = "rlrnn-checkpoint", 1
TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"
# JSON takes up to 20 times its size in memory; at 16 MiB that is still harmless.
MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000
MAX_BYTES = 8 << 30
MAX_DEPTH = 64
SAVING = ".saving-"  # names of unfinished saves begin with this


class CheckpointError(ValueError):
    """A checkpoint could not be written, or is missing, damaged or not one of ours."""


class _Foreign(ValueError):
    """Undamaged, but of another format or version."""


def save(
    path: Where,
    tree: Tree,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write `tree` to a directory, or to a zip if `path` ends in .zip or is a file.

    The same tree gives the same bytes. A checkpoint that is already there is replaced
    only when the new one is safely on the disk. `info` is a small tree without tensors
    that `load_info` reads without loading the rest.

    Tensors that share memory are stored once each and come back separate; subclasses of
    dict, list, tuple, tensor and of the scalars come back as the plain type.
    """
    members = _pack(tree, info or {})
    if not isinstance(path, (str, os.PathLike)):
        try:
            path.write(_zipped(members))
            path.flush()
        except OSError as error:
            raise CheckpointError(
                f"could not write {_name(path)}: {_reason(error)}; "
                "the file may be incomplete, write it again"
            ) from error
        return
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is a folder with other content: expected a new name or a "
            "checkpoint to replace; choose another path"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _workspace(path.parent) as temporary:
            new = temporary / "new"
            if path.suffix.lower() == ".zip":
                _write(new, _zipped(members))
            else:
                new.mkdir()
                for name, data in members.items():
                    _write(new / name, data)
                _sync(new)
            _move_in(new, path)
    except OSError as error:
        raise CheckpointError(
            f"could not write {path}: {_reason(error)}; "
            "the previous checkpoint is untouched"
        ) from error


def load(
    path: Where,
    device: torch.device | str = "cpu",
    max_bytes: int = MAX_BYTES,
) -> Tree:
    """The tree saved at `path`, its tensors on `device`; numpy arrays stay arrays.

    Generator states are tensors too, and `set_state` wants them on the CPU.
    """
    with _opened(path) as source:
        manifest = _manifest(source)
        tensors = _tensors(source, manifest, max_bytes)
        tree = _decode(manifest["tree"], tensors, device)
        if tensors:
            raise ValueError(f"the manifest does not mention tensor {min(tensors)!r}")
    return tree


def load_info(path: Where) -> dict[str, Any]:
    """The `info` given to `save`; the manifest is checked, the tensors are not read."""
    with _opened(path) as source:
        info = _decode(_manifest(source)["info"], {}, "cpu")
        if not isinstance(info, dict):
            raise ValueError(f"{MANIFEST} has an info that is not a dict")
    return info


class Checkpoints:
    """The numbered checkpoints of one run: the last `keep` and the best are kept.

    Each is a directory `folder/step_000000123`, which carries its own score: there is
    no index that could disagree with what is on the disk.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: expected at least 1")
        self.folder = Path(folder)
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}"

    def steps(self) -> list[int]:
        """The steps on the disk, oldest first."""
        if not self.folder.is_dir():
            return []
        # .old: this step was being replaced when the process was killed
        found = [
            re.fullmatch(r"step_(\d{9,})|\.step_(\d{9,})\.old", entry.name)
            for entry in self.folder.iterdir()
        ]
        return sorted({int(match[1] or match[2]) for match in found if match})

    def save(self, step: int, tree: Tree, score: float | int | None = None) -> Path:
        """Save as `step`, then drop what is neither recent nor best.

        The higher `score` is better, the earlier of two equal ones is best, and one
        that is not finite never is.
        """
        if step < 0:
            raise ValueError(f"step is {step}: expected 0 or more")
        score = None if score is None else float(score)
        save(self.path(step), tree, {"step": step, "score": score})
        kept = {*self.steps()[-self.keep :], step, self.best_step()}
        for there in self.steps():
            if there not in kept:
                self._drop(self.path(there))
            elif self.path(there).is_dir():
                # killed after the new one was in place, before the old one was gone
                shutil.rmtree(_aside(self.path(there)), ignore_errors=True)
        return self.path(step)

    def best_step(self) -> int | None:
        """The step with the highest finite score, or None."""
        scores: dict[int, float] = {}
        for step in self.steps():
            # a damaged one has no score; it is reported when somebody loads it
            with suppress(CheckpointError):
                score = load_info(self.path(step)).get("score")
                if isinstance(score, float) and math.isfinite(score):
                    scores[step] = score
        return max(scores, key=lambda step: (scores[step], -step), default=None)

    def latest(self, device: torch.device | str = "cpu") -> tuple[int, Tree]:
        """The newest step and its tree. A damaged one is an error, never skipped."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"no checkpoint in {self.folder}: expected a folder like "
                f"{self.path(0).name}; start a new run"
            )
        return steps[-1], load(self.path(steps[-1]), device)

    def best(self, device: torch.device | str = "cpu") -> tuple[int, Tree]:
        """The best step and its tree."""
        step = self.best_step()
        if step is None:
            raise CheckpointError(
                f"no checkpoint in {self.folder} has a finite score; use the latest one"
            )
        return step, load(self.path(step), device)

    def _drop(self, path: Path) -> None:
        """Delete at once as far as a reader can see: rename, then remove the files."""
        gone = self.folder / f"{SAVING}{path.name}"
        with suppress(OSError):  # what cannot be deleted now is tried at the next save
            shutil.rmtree(gone, ignore_errors=True)
            shutil.rmtree(_aside(path), ignore_errors=True)
            os.rename(path, gone)
            shutil.rmtree(gone)


# --- structure ------------------------------------------------------------------------


def _pack(tree: Tree, info: Mapping[str, Any]) -> dict[str, bytes]:
    """The two members, each as bytes."""
    tensors: dict[str, torch.Tensor] = {}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "rlrnn": __version__,
        "info": _encode(dict(info), "", tensors),
    }
    if tensors:
        raise CheckpointError(
            f"cannot save info{min(tensors)}: expected scalars; put it in the tree"
        )
    content["tree"] = _encode(tree, "", tensors)
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(
            f"cannot save {len(tensors)} tensors: at most {MAX_TENSORS} go into one "
            "checkpoint; stack them"
        )
    try:
        data = safetensors.torch.save(tensors)
    except Exception as error:  # an unusual dtype; the library's exceptions vary
        raise CheckpointError(f"cannot save the tensors: {_reason(error)}") from error
    content["files"] = {
        TENSORS: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    }
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError as error:  # an int of thousands of digits
        raise CheckpointError(f"cannot save the tree: {_reason(error)}") from error
    body = f'",\n{text[1:]}\n'.encode()
    manifest = b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + body
    if len(manifest) > MAX_HEADER:
        raise CheckpointError(
            f"cannot save a structure of {len(manifest)} bytes: expected at most "
            f"{MAX_HEADER}; keep long lists of numbers as arrays"
        )
    return {TENSORS: data, MANIFEST: manifest}


def _encode(node: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for `node`. Its tensors go into `tensors`, under names like /agent/bias."""
    if name.count("/") > MAX_DEPTH:
        raise CheckpointError(
            f"cannot save {name[:40]}…: nested over {MAX_DEPTH} levels; flatten it"
        )
    if isinstance(node, np.generic):
        node = node.item()
    if node is None or isinstance(node, bool):
        return node
    for scalar in (int, str):
        if isinstance(node, scalar):
            return scalar(node)
    if isinstance(node, float):
        return float(node) if math.isfinite(node) else {"float": repr(float(node))}
    if isinstance(node, (list, tuple)):
        items = [_encode(x, f"{name}/{i}", tensors) for i, x in enumerate(node)]
        return items if isinstance(node, list) else {"tuple": items}
    if isinstance(node, dict):
        for key in node:
            if type(key) not in (int, str):
                raise CheckpointError(
                    f"cannot save {name or '/'}: it has the key {key!r} of type "
                    f"{type(key).__name__}; expected str or int keys"
                )
        pairs = [
            [key, _encode(value, f"{name}/{str(key).replace('/', '|')}", tensors)]
            for key, value in node.items()
        ]
        return {"dict": pairs}
    if isinstance(node, torch.Tensor):
        kind, tensor = "tensor", node.detach()
    elif isinstance(node, np.ndarray):
        try:
            kind, tensor = "array", torch.from_numpy(node.copy(order="C"))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"cannot save {name or '/'}: a numpy array of dtype {node.dtype}; "
                "expected numbers or booleans in native byte order; convert it"
            ) from error
    else:
        raise CheckpointError(
            f"cannot save {name or '/'} of type {type(node).__name__}: expected dict, "
            "list, tuple, tensor, array, None, bool, int, float or str; convert it"
        )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(
            f"cannot save {name or '/'}: a {tensor.dtype} tensor with layout "
            f"{tensor.layout} on {tensor.device}; expected a dense one; convert it"
        )
    # safetensors wants names in UTF-8, memory of one's own, and real numbers
    name = (name or "/").encode("ascii", "backslashreplace").decode()
    while name in tensors:  # the keys 1 and "1"
        name += "'"
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    complex_ = {"complex": True} if tensor.is_complex() else {}
    if complex_:
        tensor = torch.view_as_real(tensor)
    tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    return {kind: name, **complex_}


def _decode(
    node: Any,
    tensors: dict[str, torch.Tensor],
    device: torch.device | str,
    depth: int = 0,
) -> Any:
    """The inverse of `_encode`; takes what it uses out of `tensors`."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{MANIFEST} is nested deeper than {MAX_DEPTH} levels")
    match node:
        case [*items]:
            return [_decode(x, tensors, device, depth + 1) for x in items]
        case {"tuple": [*items]}:
            return tuple(_decode(x, tensors, device, depth + 1) for x in items)
        case {"dict": [*pairs]}:
            result: dict[str | int, Any] = {}
            for key, value in pairs:
                if type(key) not in (int, str) or key in result:
                    raise ValueError(f"{MANIFEST} has a bad or repeated key {key!r}")
                result[key] = _decode(value, tensors, device, depth + 1)
            return result
        case {"float": "nan" | "inf" | "-inf" as number}:
            return float(number)
        case {"tensor": str(name)} | {"array": str(name)}:
            if name not in tensors:
                raise ValueError(
                    f"{TENSORS} has no tensor {name!r}, or it is used twice"
                )
            # A copy, as torch aligns its own memory, and sums depend on alignment.
            is_array = "array" in node
            tensor = tensors.pop(name).to("cpu" if is_array else device, copy=True)
            tensor = torch.view_as_complex(tensor) if node.get("complex") else tensor
            return tensor.numpy() if is_array else tensor
        case {}:
            raise ValueError(f"{MANIFEST} has an unknown node {str(node)[:60]}")
    return node


# --- reading --------------------------------------------------------------------------


@contextmanager
def _opened(
    path: Where,
) -> Iterator[Path | zipfile.ZipFile]:
    """The directory or zip at `path`; any error inside becomes one CheckpointError."""
    try:
        if isinstance(path, (str, os.PathLike)):
            path = Path(path)
            if not path.exists() and _aside(path).is_dir():
                path = _aside(path)  # killed in the instant between two renames
            if path.is_dir():
                yield path
                return
            if not path.exists():
                raise CheckpointError(f"no checkpoint at {path}; check the path")
            if not path.is_file():
                raise ValueError("it is neither a folder nor a file")
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
            if names != [MANIFEST, TENSORS]:
                raise ValueError(
                    f"it holds {str(names)[:120]}, expected {[MANIFEST, TENSORS]}"
                )
            yield archive
    except CheckpointError:
        raise
    except _Foreign as error:
        raise CheckpointError(
            f"cannot load {_name(path)}: {error}; use the version that wrote it"
        ) from error
    except Exception as error:  # parsers raise many kinds on bytes they did not expect
        raise CheckpointError(
            f"damaged checkpoint {_name(path)}: {_reason(error)}; "
            "use an older checkpoint"
        ) from error


def _read(source: Path | zipfile.ZipFile, name: str, limit: int) -> bytes:
    """All bytes of one member, whose size is checked before it is read."""
    if isinstance(source, Path):
        try:
            status = os.lstat(source / name)
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        plain, size = stat.S_ISREG(status.st_mode), status.st_size
    else:
        member = source.getinfo(name)
        size = member.file_size
        plain = (
            member.compress_type == zipfile.ZIP_STORED
            and member.compress_size == size
            and not stat.S_ISLNK(member.external_attr >> 16)
        )
    if not plain:
        raise ValueError(f"{name} is not a plain uncompressed file")
    if size > limit:
        raise ValueError(f"{name} has {size} bytes, at most {limit} are read")
    where = source / name if isinstance(source, Path) else zipfile.Path(source, name)
    with where.open("rb") as file:
        return bytes(file.read(size))


def _manifest(source: Path | zipfile.ZipFile) -> dict[str, Any]:
    raw = _read(source, MANIFEST, MAX_HEADER)
    stated, body = raw[12:76].decode("ascii", "replace"), raw[76:]
    if raw[:12] != b'{"sha256": "':
        raise ValueError(f"{MANIFEST} does not begin with its SHA-256")
    _compare(MANIFEST, body, stated)
    content = json.loads(b'{"": "' + body, parse_constant=_refuse)
    if content["format"] != FORMAT or content["version"] != VERSION:
        raise _Foreign(
            f"{MANIFEST} says {content['format']!r} version {content['version']!r}, "
            f"this rlrnn reads {FORMAT!r} version {VERSION}"
        )
    if list(content["files"]) != [TENSORS]:
        raise ValueError(
            f"{MANIFEST} lists {str([*content['files']])[:120]}, expected {[TENSORS]}"
        )
    return dict(content)


def _tensors(
    source: Path | zipfile.ZipFile, manifest: dict[str, Any], max_bytes: int
) -> dict[str, torch.Tensor]:
    stated = manifest["files"][TENSORS]
    data = _read(source, TENSORS, max_bytes)
    if len(data) != stated["bytes"]:
        raise ValueError(
            f"{TENSORS} has {len(data)} bytes, its manifest says {stated['bytes']}"
        )
    _compare(TENSORS, data, stated["sha256"])
    header = int.from_bytes(data[:8], "little")
    if header > min(MAX_HEADER, len(data) - 8):
        raise ValueError(f"{TENSORS} states a header of {header} bytes")
    count = len(json.loads(data[8 : 8 + header]))
    if count > MAX_TENSORS:
        raise ValueError(
            f"{TENSORS} has {count} tensors, at most {MAX_TENSORS} are read"
        )
    return safetensors.torch.load(data)


def _compare(name: str, data: bytes, stated: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != stated:
        owner = "it" if name == MANIFEST else "its manifest"
        raise ValueError(
            f"{name} has SHA-256 {found[:8]}…, {owner} says {str(stated)[:8]}…"
        )


def _refuse(constant: str) -> None:
    raise ValueError(f"{MANIFEST} has the number {constant}")


# --- writing --------------------------------------------------------------------------


def _zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            member = zipfile.ZipInfo(name)  # without a date of its own: 1980-01-01
            member.create_system = 3  # the same bytes on every system
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)
    return buffer.getvalue()


@contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A temporary folder in `parent`, after removing those that killed saves left.

    A live save holds a lock on its folder; the system drops it when the process dies.
    """
    for leftover in parent.glob(f"{SAVING}*"):
        with suppress(OSError), _locked(leftover):
            shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=SAVING, dir=parent))
    try:
        with _locked(temporary, required=False):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(folder: Path, required: bool = True) -> Iterator[None]:
    """Hold the lock on `folder`; OSError if somebody else does or it cannot be had."""
    if fcntl is None:
        if required:
            raise OSError("no file locks on this system")
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(*(() if required else (OSError,))):  # some file systems have none
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in `folder` durable."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_in(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`, which may exist."""
    aside = _aside(path)
    if path.is_dir() and new.is_dir():  # a directory cannot be renamed over another
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    os.replace(new, path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    """Where a directory waits while it is replaced; `load` finds it there."""
    return path.with_name(f".{path.name}.old")


def _name(path: object) -> str:
    if isinstance(path, (str, os.PathLike)):
        return str(path)
    return str(getattr(path, "name", "(a file object)"))


def _reason(error: Exception) -> str:
    """One line for any exception."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split())[:300]
    return (
        text if type(error) is ValueError else f"{type(error).__name__} {text}".strip()
    )
