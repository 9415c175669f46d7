"""A checkpoint comes back the same, or not at all and with one line that says why."""

import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import stat
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from rlrnn import checkpoint
from rlrnn.checkpoint import CheckpointError, Checkpoints, load, load_info, save

FORMS = ["step_000000001", "model.zip"]


def same(a: Any, b: Any) -> bool:
    """Same types, keys in the same order, and the same bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [(type(k), k) for k in a] == [(type(k), k) for k in b] and all(
            same(a[key], b[key]) for key in a
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and same_bytes(a, b)
    if isinstance(a, np.ndarray):
        return bool((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()))
    if isinstance(a, float):
        return bool(a.hex() == b.hex())
    return bool(a == b)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    return a.numel() == 0 or torch.equal(flat(a), flat(b))


def small_tree() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "weights": {"w": torch.randn(3, 5, generator=generator), "b": torch.zeros(5)},
        "generator": generator.get_state(),
        "mean": np.arange(4.0),
        "epochs": (1, [2.5, None], "three"),
    }


def rich_tree() -> dict[str, Any]:
    wide = torch.arange(24.0).reshape(4, 6)
    generator = np.random.default_rng(7)
    return {
        "dtypes": [
            torch.tensor([1.5, math.nan, -0.0, math.inf], dtype=dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        ],
        "integers": {
            str(dtype): torch.tensor([[0, 1, 100]], dtype=dtype)
            for dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
        },
        "unsigned": torch.tensor([1, 65535]).to(torch.uint16),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j, -3j]),
        "scalar": torch.tensor(3.0),
        "empty": [
            torch.empty(0),
            torch.empty(0, 3),
            torch.empty(2, 0, dtype=torch.int8),
        ],
        "shared": (wide, wide[1], wide.T, wide[:, ::2]),
        "numpy": {
            "0-d": np.array(2, np.int16),
            "f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
            "backwards": np.arange(5)[::-1],
            "bool": np.array([[True], [False]]),
            "complex": np.array([1j, 2], np.complex128),
            "empty": np.empty((0, 2), np.uint8),
        },
        "pcg64": generator.bit_generator.state,
        "floats": [math.nan, math.inf, -math.inf, -0.0, 0.1, 1e-320, 1.0],
        "ints": [0, -1, 2**127 + 1, True, False, None],
        "strings": ["", "é\n\u2028", "\ud800", '"', "\\"],
        "tuples": ((), (1,), [(2, [3])], {}),
        "keys": {0: "int", "0": "str", -5: torch.ones(1), "-5": torch.zeros(1)},
        "sl/ash": {"a/b": torch.ones(2)},
        "__metadata__": torch.ones(1),
        "": {"": torch.ones(1)},
    }


def contiguous(tree: Any) -> Any:
    """What `same` can compare: F-order arrays come back in C order."""
    tree["numpy"]["f"] = np.ascontiguousarray(tree["numpy"]["f"])
    return tree


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(tmp_path: Path, form: str) -> None:
    save(tmp_path / form, rich_tree(), {"step": 3})
    assert same(load(tmp_path / form), contiguous(rich_tree()))
    assert load_info(tmp_path / form) == {"step": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == [form]


def test_file_object_and_replacement(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    save(buffer, small_tree())
    assert same(load(io.BytesIO(buffer.getvalue())), small_tree())
    for form in FORMS:
        for tree in (rich_tree(), small_tree()):
            save(str(tmp_path / "new" / form), tree)
        assert same(load(str(tmp_path / "new" / form)), small_tree())
    assert (tmp_path / "new" / "model.zip").read_bytes() == buffer.getvalue()
    leaf: Any
    for leaf in (torch.ones(2), 5, [], None):
        save(tmp_path / "leaf", leaf)
        assert same(load(tmp_path / "leaf"), leaf)


def test_loaded_tensors_are_independent_and_grown_by_torch(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    save(tmp_path / "x", {"w": weight, "scalar": np.float64(2), "again": weight})
    tree = load(tmp_path / "x")
    assert type(tree["w"]) is torch.Tensor and not tree["w"].requires_grad
    assert type(tree["scalar"]) is float
    tree["w"].add_(1).resize_(3, 3)
    assert torch.equal(tree["again"], torch.ones(2, 2))


@pytest.mark.parametrize("form", FORMS)
def test_same_tree_same_bytes(tmp_path: Path, form: str) -> None:
    def content(path: Path) -> list[bytes]:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [file.read_bytes() for file in files]

    save(tmp_path / "a" / form, rich_tree())
    time.sleep(0.01)
    save(tmp_path / "b" / form, rich_tree())
    assert content(tmp_path / "a" / form) == content(tmp_path / "b" / form)


def test_adam_continues_to_the_same_bits(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Linear(5, 3)
        groups: list[dict[str, Any]] = [
            {"params": [model.weight], "lr": 0.1},
            {"params": [model.bias]},
        ]
        return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9))

    def train(
        model: torch.nn.Module, optimizer: torch.optim.Optimizer, g: torch.Generator
    ) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(7, 5, generator=g)).square().mean().backward()
            optimizer.step()

    model, optimizer = build()
    generator = torch.Generator().manual_seed(0)
    train(model, optimizer, generator)
    state = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
    save(tmp_path / "x", {**state, "generator": generator.get_state()})
    train(model, optimizer, generator)

    tree = load(tmp_path / "x")
    other, other_optimizer = build()
    other.load_state_dict(tree["model"])
    other_optimizer.load_state_dict(tree["optimizer"])
    other_generator = torch.Generator()
    other_generator.set_state(tree["generator"])
    train(other, other_optimizer, other_generator)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(other_optimizer.state_dict(), optimizer.state_dict())


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"a": {"b": object()}}, "/a/b of type object"),
        ({"f": print}, "/f of type builtin_function"),
        ({"s": {1, 2}}, "/s of type set"),
        ({"z": 1j}, "/z of type complex"),
        ({(1, 2): 3}, "key (1, 2) of type tuple"),
        ({True: 3}, "key True of type bool"),
        ({"o": np.array([object()])}, "dtype object"),
        ({"o": np.array(["text"])}, "dtype <U4"),
        ({"o": np.arange(3, dtype=">f8")}, "dtype >f8"),
        ({"s": torch.eye(2).to_sparse()}, "layout torch.sparse_coo"),
        ({"m": torch.empty(2, device="meta")}, "on meta"),
        ({"i": 10**5000}, "cannot save the tree"),
        (nested(100), "nested over 64 levels"),
        (["x" * 1000] * 20_000, "structure of"),
        ([torch.empty(0)] * 100_001, "100001 tensors"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path: Path, tree: Any, says: str) -> None:
    error = fails(lambda: save(tmp_path / "x", tree))
    assert says in error and not any(tmp_path.iterdir())


def test_a_tree_that_holds_itself_is_refused(tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    tree["self"] = tree
    assert "nested" in fails(lambda: save(tmp_path / "x", tree))


def fails(action: Callable[[], object]) -> str:
    """The one line of the CheckpointError that `action` raises."""
    with pytest.raises(CheckpointError) as raised:
        action()
    line = str(raised.value)
    assert line and "\n" not in line and len(line) < 700
    return line


# --- damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_mutations_are_never_silent(tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    save(path, small_tree(), {"score": 1.0})
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    originals = {file: file.read_bytes() for file in files}
    draw = random.Random(form)
    refused = 0
    for _ in range(400):
        file = draw.choice(files)
        data = bytearray(originals[file])
        at = draw.randrange(len(data))
        match draw.choice(["flip", "byte", "cut", "insert", "swap", "zero"]):
            case "flip":
                data[at] ^= 1 << draw.randrange(8)
            case "byte":
                data[at] = draw.randrange(256)
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw.randbytes(draw.randrange(1, 9))
            case "swap":
                data[at:] = data[at:][::-1]
            case "zero":
                data[at : at + 64] = bytes(len(data[at : at + 64]))
        file.write_bytes(data)
        try:
            tree, info = load(path), load_info(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and form in str(error)
        else:  # unused bytes of the zip's own tables, or nothing was changed
            assert same(tree, small_tree()) and info == {"score": 1.0}
            if path.is_dir():
                assert data == originals[file]
        file.write_bytes(originals[file])
    assert refused > 250


def forge(
    path: Path,
    change: Callable[[dict[str, Any]], object] = lambda content: None,
    tensors: bytes | None = None,
) -> Path:
    """A checkpoint whose hashes are right and whose content is not."""
    save(path, small_tree())
    content = json.loads((path / "manifest.json").read_bytes())
    del content["sha256"]
    if tensors is not None:
        (path / "tensors.safetensors").write_bytes(tensors)
        content["files"]["tensors.safetensors"] = {
            "bytes": len(tensors),
            "sha256": hashlib.sha256(tensors).hexdigest(),
        }
    change(content)
    write_manifest(path, json.dumps(content)[1:])
    return path


def write_manifest(path: Path, rest: str) -> None:
    body = ('",' + rest).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    (path / "manifest.json").write_bytes(b'{"sha256": "' + digest + body)


def set_tree(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(tree=value)


SECRET = {"bytes": 1, "sha256": "0"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(format="pickle"), "'pickle'"),
        (lambda c: c.pop("files"), "files"),
        (lambda c: c.pop("tree"), "tree"),
        (lambda c: c.update(files={"/etc/passwd": SECRET}), "lists ['/etc/passwd']"),
        (lambda c: c.update(files={"../x": SECRET}), "lists ['../x']"),
        (lambda c: c["files"].update({"run.py": SECRET}), "run.py"),
        (
            lambda c: c["files"]["tensors.safetensors"].update(bytes=1),
            "manifest says 1",
        ),
        (set_tree(None), "does not mention"),
        (set_tree({"tensor": "/nope"}), "has no tensor '/nope'"),
        (set_tree([{"tensor": "/mean"}, {"array": "/mean"}]), "used twice"),
        (set_tree({"class": "os.system"}), "unknown node"),
        (set_tree({"float": "1e3"}), "unknown node"),
        (set_tree({"tuple": 3}), "unknown node"),
        (set_tree({"dict": [["a", 1], ["a", 2]]}), "repeated key"),
        (set_tree({"dict": [[None, 1]]}), "bad or repeated key"),
        (set_tree({"dict": [1]}), "damaged"),
        (set_tree({"tensor": "/weights/w", "complex": True}), "damaged"),
        (set_tree(nested(80)), "nested deeper"),
        (set_tree(math.nan), "NaN"),
    ],
)
def test_forged_manifests(tmp_path: Path, change: Any, says: str) -> None:
    path = forge(tmp_path / "forged", change)
    assert says in fails(lambda: load(path))


def safetensors_file(
    header: Any, data: bytes = b"", length: int | None = None
) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


@pytest.mark.parametrize(
    "tensors",
    [
        b"",
        b"\x00",
        bytes(8),
        safetensors_file(b"[" * 100_000),
        safetensors_file({}, length=2**63),
        safetensors_file({}, length=10**8),
        safetensors_file([]),
        safetensors_file({"x": 1}),
        safetensors_file(entry([2**40], 2**42)),
        safetensors_file(entry([2**62, 4], 0)),
        safetensors_file(entry([0, 2**62, 2**62], 0)),
        safetensors_file(entry([2], 4), bytes(4)),
        safetensors_file(entry([-1], 4), bytes(4)),
        safetensors_file(entry([1], 4, "PICKLE"), bytes(4)),
        safetensors_file(entry([1], 4), bytes(400)),
        safetensors_file({str(i): entry([0], 0)["x"] for i in range(100_001)}),
    ],
)
def test_forged_tensors(tmp_path: Path, tensors: bytes) -> None:
    path = forge(tmp_path / "forged", set_tree({"tensor": "x"}), tensors)
    assert "forged" in fails(lambda: load(path))


def test_forged_json(tmp_path: Path) -> None:
    path = forge(tmp_path / "forged")
    for rest in ("", "}", '"tree": 1', "[" * 10**6, "\x00", "é\ud7ff", '"version": 1}'):
        write_manifest(path, rest)
        assert "damaged" in fails(lambda: load(path))


def test_limits_are_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for name in ("manifest.json", "tensors.safetensors"):
        save(path, small_tree())
        os.truncate(path / name, 1 << 40)  # sparse: a terabyte that takes no room
        assert f"{name} has {1 << 40} bytes, at most" in fails(lambda: load(path))
    save(path, small_tree())
    assert "at most 100 are read" in fails(lambda: load(path, max_bytes=100))


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors"])
def test_links_and_other_files(tmp_path: Path, name: str) -> None:
    save(tmp_path / "real", small_tree())
    path = tmp_path / "x"
    save(path, small_tree())
    (path / name).unlink()
    assert f"{name} is missing" in fails(lambda: load(path))
    (path / name).symlink_to(tmp_path / "real" / name)
    assert f"{name} is not a plain" in fails(lambda: load(path))
    (path / name).unlink()
    os.mkfifo(path / name)
    assert f"{name} is not a plain" in fails(lambda: load(path))


def members() -> dict[str, bytes]:
    buffer = io.BytesIO()
    save(buffer, small_tree())
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(
    content: list[tuple[str, bytes]],
    compression: int = zipfile.ZIP_STORED,
    mode: int = 0,
) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in content:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = compression
            archive.writestr(info, data)
    return buffer


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bad_zips() -> None:
    good = list(members().items())
    assert same(load(zipped(good)), small_tree())
    (name, data), manifest = good
    for content in (
        [],
        [manifest],
        [manifest, ("../" + name, data)],
        [manifest, ("/tmp/" + name, data)],
        [manifest, (name.upper(), data)],
        [*good, ("evil.py", b"")],
        [*good, (name, data)],
        [("x/" + n, d) for n, d in good],
    ):
        assert "it holds [" in fails(lambda content=content: load(zipped(content)))  # type: ignore[misc]
    for bad in (
        zipped(good, zipfile.ZIP_DEFLATED),
        zipped([(name, bytes(50_000_000)), manifest], zipfile.ZIP_DEFLATED),
        zipped(good, mode=stat.S_IFLNK | 0o777),
    ):
        assert "not a plain" in fails(lambda bad=bad: load(bad))  # type: ignore[misc]
    for raw in (b"", b"PK", b"not a zip" * 100, zipped(good).getvalue()[:-30]):
        assert "damaged" in fails(lambda raw=raw: load(io.BytesIO(raw)))  # type: ignore[misc]


def test_a_stored_zip_with_a_lying_size() -> None:
    """The central directory promises 3 GiB; the file has a few hundred bytes."""
    raw = bytearray(zipped(list(members().items())).getvalue())
    at = raw.find(b"PK\x01\x02")
    raw[at + 20 : at + 28] = (3 << 30).to_bytes(4, "little") * 2
    assert "damaged" in fails(lambda: load(io.BytesIO(raw)))


def test_messages_name_the_file_and_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "step_000000100"
    assert fails(lambda: load(path)) == f"no checkpoint at {path}; check the path"
    save(path, small_tree())
    with (path / "tensors.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    line = fails(lambda: load(path))
    assert line.startswith(
        f"damaged checkpoint {path}: tensors.safetensors has SHA-256"
    )
    assert "its manifest says" in line and line.endswith("use an older checkpoint")


# --- writing --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(
    tmp_path: Path, form: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / form, small_tree())

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        line = fails(lambda: save(tmp_path / form, rich_tree()))
    assert line == (
        f"could not write {tmp_path / form}: no space left on device; "
        "the previous checkpoint is untouched"
    )
    assert same(load(tmp_path / form), small_tree())
    assert not list(tmp_path.glob(f"{checkpoint.SAVING}*"))
    save(tmp_path / form, rich_tree())
    assert [entry.name for entry in tmp_path.iterdir()] == [form]


def test_full_disk_through_a_file_object() -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    assert "no space left" in fails(lambda: save(Full(), small_tree()))


def test_folders_with_other_content_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    assert "other content" in fails(lambda: save(tmp_path / "thesis", small_tree()))
    assert (tmp_path / "thesis" / "chapter1.tex").exists()
    (tmp_path / "file").write_text("x")
    assert "could not write" in fails(lambda: save(tmp_path / "file", small_tree()))
    assert "could not write" in fails(
        lambda: save(tmp_path / "file" / "x", small_tree())
    )
    assert (tmp_path / "file").read_text() == "x"


def test_leftovers_of_killed_saves_are_swept_and_live_ones_are_not(
    tmp_path: Path,
) -> None:
    (tmp_path / f"{checkpoint.SAVING}killed" / "new").mkdir(parents=True)
    with checkpoint._workspace(tmp_path) as live:
        assert [entry.name for entry in tmp_path.iterdir()] == [live.name]
        save(tmp_path / "x", small_tree())
        assert live.is_dir()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


SAVER = """
import torch
from rlrnn.checkpoint import Checkpoints
torch.set_num_threads(1)
saved = Checkpoints(folder, keep=2)
report.send(0)
while True:
    step += 1
    tree = {"step": step, "x": torch.full((50_000,), float(step))}
    for _ in range(2):  # the second replaces the first
        saved.save(step, tree, score=-step)
    report.send(step)
"""


def test_kill_nine(tmp_path: Path) -> None:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["rlrnn.checkpoint"])
    draw = random.Random(0)
    step = 0
    for _ in range(10):
        reports, report = server.Pipe(duplex=False)
        names = {"folder": str(tmp_path), "step": step, "report": report}
        process = server.Process(target=exec, args=(SAVER, names), daemon=True)
        process.start()
        report.close()
        assert reports.poll(60)
        time.sleep(draw.uniform(0.05, 0.5))
        process.kill()
        process.join()
        committed = 0
        with suppress(EOFError):
            while True:
                committed = max(committed, reports.recv())
        if not Checkpoints(tmp_path).steps():
            assert committed == 0  # killed before the first save was done
            continue
        step, tree = Checkpoints(tmp_path).latest()
        assert step >= committed
        assert tree["step"] == step and bool((tree["x"] == step).all())
        best, tree = Checkpoints(tmp_path).best()
        assert tree["step"] == best == 1
    assert step > 8
    Checkpoints(tmp_path, keep=2).save(step + 1, {})
    assert len(list(tmp_path.iterdir())) == 3  # the last two, the best, no leftovers


# --- Checkpoints ----------------------------------------------------------------------


def test_what_killed_replacements_leave_is_swept_or_used(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        saved.save(step, {"step": step})
    old, new = saved.path(1), saved.path(2)
    # killed between the two renames: the only copy waits aside, and counts
    old.rename(checkpoint._aside(old))
    # killed after both: the new one is in place, the old one not yet gone
    shutil.copytree(new, checkpoint._aside(new))
    assert saved.steps() == [1, 2]
    assert load(old) == {"step": 1}
    saved.save(3, {"step": 3})
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {new.name, saved.path(3).name}


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert "no checkpoint in" in fails(saved.latest)
    scores = [0.0, math.nan, 5.0, math.inf, None, 5.0, -math.inf, 4.0]
    for step, score in enumerate(scores):
        path = saved.save(step, {"step": step}, score)
        assert path.name == f"step_00000000{step}" and path.is_dir()
    assert saved.steps() == [2, 6, 7]
    assert saved.latest() == (7, {"step": 7})
    assert saved.best() == (2, {"step": 2})


def test_a_score_that_is_not_finite_is_never_best(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path)
    for step, score in enumerate([math.nan, math.inf, -math.inf, None]):
        saved.save(step, {}, score)
    assert saved.best_step() is None
    assert "has a finite score" in fails(saved.best)
    saved.save(9, {}, -1e300)
    assert saved.best() == (9, {})


def test_a_damaged_latest_is_named_and_not_skipped(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path)
    for step in (1, 2):
        saved.save(step, small_tree(), score=step)
    (tmp_path / f"{checkpoint.SAVING}step_000000099").mkdir()
    (tmp_path / "notes.txt").touch()
    os.truncate(tmp_path / "step_000000002" / "tensors.safetensors", 100)
    assert "step_000000002: tensors.safetensors has 100 bytes" in fails(saved.latest)
    (tmp_path / "step_000000002" / "manifest.json").unlink()
    assert "manifest.json is missing" in fails(saved.latest)
    assert saved.best_step() == 1
    assert same(load(saved.path(1)), small_tree())


def test_killed_between_two_renames(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(1, {"a": 1})
    saved.path(1).rename(tmp_path / ".step_000000001.old")
    assert saved.latest() == (1, {"a": 1})
    saved.save(2, {"a": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000000002"]


def test_arguments() -> None:
    with pytest.raises(ValueError, match="keep is 0: expected at least 1"):
        Checkpoints("x", keep=0)
    with pytest.raises(ValueError, match="step is -1: expected 0 or more"):
        Checkpoints("x").save(-1, {})


@pytest.mark.gpu
def test_gpu(tmp_path: Path) -> None:
    save(tmp_path / "x", {"w": torch.arange(5.0, device="cuda")})
    assert load(tmp_path / "x")["w"].device.type == "cpu"
    assert load(tmp_path / "x", "cuda")["w"].tolist() == [0, 1, 2, 3, 4]
