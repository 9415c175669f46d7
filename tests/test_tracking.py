"""metrics.jsonl is the truth; W&B mirrors it and can never hurt the run."""

import errno
import gzip
import http.server
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from stable_baselines3.common.logger import Figure, Logger

from rlrnn import tracking
from rlrnn.checkpoint import CheckpointError, save
from rlrnn.tracking import (
    LoggerMirror,
    NotARunError,
    Run,
    RunError,
    RunExistsError,
    read_metrics,
)

CANARY = "c0ffee" * 6 + "beef"  # an API key of the right length


@pytest.fixture(autouse=True)
def clean_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings of the user; wandb reads the environment once per set-up."""
    if "wandb" in sys.modules:  # or its service's address would be restored, stale
        sys.modules["wandb"].teardown()
    os.environ.pop("WANDB_SERVICE", None)
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


def rows(count: int) -> list[dict[str, tracking.Scalar]]:
    return [{"env_steps": 10 * i, "train/loss": 1 / (i + 1)} for i in range(count)]


def equal(a: Any, b: Any) -> bool:
    """The same keys in the same order, equal values; nan equals nan, 1 equals 1.0."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return bool(a == b or (a != a and b != b))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a user sees on stderr: one line each."""
    lines = [r.getMessage() for r in caplog.records if r.name == "rlrnn.tracking"]
    assert not any("\n" in line for line in lines)
    return lines


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def contains(folder: Path, text: str) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


# --- the folder -----------------------------------------------------------------------


def test_a_run_is_a_folder(folder: Path) -> None:
    config = {"seed": 1, "env": {"id": "x"}, "sizes": [1, 2], "rate": 0.1, "é": None}
    written: list[dict[str, tracking.Scalar]] = [
        {"env_steps": 0, "train/loss": math.nan, "a": math.inf, "b": -math.inf},
        {"update": 1, "note": "é \u2028 \n", "flag": True, "none": None, "x": 0.1},
    ]
    with Run.create(folder, config, "train", mode="disabled") as run:
        assert run.url is None and run.folder == folder
        for row in written:
            run.log(row)
        run.summary({"final/return": 1.5, "steps": 3})
        run.summary({"final/return": math.nan})
        run.artifact(folder / "config.yaml", "config", "config")
        run.image("plot", folder / "nothing.png")
    run.close()
    assert yaml.safe_load((folder / "config.yaml").read_text("utf-8")) == config
    assert equal(read_metrics(folder), written)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == {"final/return": "NaN", "steps": 3}
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON
    assert "wandb" not in [entry.name for entry in folder.iterdir()]


def test_an_existing_folder_is_not_touched(folder: Path) -> None:
    folder.mkdir(parents=True)
    Run.create(folder, {}, "train", mode="disabled").close()
    before = sorted(folder.iterdir())
    with pytest.raises(RunExistsError) as error:
        Run.create(folder, {"new": 1}, "train", mode="disabled")
    assert f"choose another name, or --resume {folder}" in one_line(error)
    assert sorted(folder.iterdir()) == before


def test_bad_folders_and_configs(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as error:
        Run.create(tmp_path / "file", {}, "train", mode="disabled")
    assert "could not write" in one_line(error)
    with pytest.raises(RunError) as error:
        Run.create(folder, {"x": object()}, "train", mode="disabled")
    assert "expected plain values" in one_line(error) and not folder.exists()
    for wrong in (tmp_path / "missing", tmp_path, tmp_path / "file"):
        with pytest.raises(NotARunError) as not_a_run:
            Run.resume(wrong)
        assert str(wrong) in one_line(not_a_run)
        with pytest.raises(NotARunError):
            read_metrics(wrong)


def test_resume_without_a_usable_checkpoint(folder: Path) -> None:
    run = Run.create(folder, {}, "train", mode="disabled")
    run.close()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Run.resume(folder, mode="disabled")
    save(run.checkpoints.path(1), {"weights": 1})
    with pytest.raises(NotARunError) as error:
        Run.resume(folder, mode="disabled")
    assert "was not written by a run" in one_line(error)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def train(run: Run, start: int, stop: int) -> None:
        for row in rows(20)[start:stop]:
            run.log(row)
            run.flush()
            step = int(row["env_steps"] or 0) // 10 + 1
            if step % 4 == 0:
                run.checkpoint(step, {"x": torch.full((3,), step)}, score=-step)

    with Run.create(tmp_path / "a", {}, "train", mode="disabled") as run:
        train(run, 0, 20)
    run = Run.create(tmp_path / "b", {}, "train", mode="disabled", keep=2)
    start = 0
    for stop in (6, 11, 11, 20):
        train(run, start, stop)
        if stop < 20:
            run.log({"env_steps": -1, "lost": "x" * 100})
            run.close()
            run, start, tree = Run.resume(tmp_path / "b", mode="disabled")
            assert tree["x"].tolist() == [start] * 3
    run.close()
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab")
    assert a == b and len(read_metrics(tmp_path / "b")) == 20
    assert run.checkpoints.steps() == [4, 16, 20]  # keep=2 was not forgotten
    (tmp_path / "b" / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(RunError) as error:
        Run.resume(tmp_path / "b", mode="disabled")
    assert "has 0 bytes: expected at least" in one_line(error)


def test_a_torn_last_line_and_a_damaged_one(folder: Path) -> None:
    with Run.create(folder, {}, "train", mode="disabled") as run:
        for row in rows(3):
            run.log(row)
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert read_metrics(folder) == rows(3)[: whole[:cut].count(b"\n")]
    for bad in (b"[1]\n", b"\x00\xff\n", b'{"a": \n'):
        path.write_bytes(bad + whole)
        with pytest.raises(RunError) as error:
            read_metrics(folder)
        assert "metrics.jsonl line 1 is damaged" in one_line(error)


def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = Run.create(folder, {}, "train", mode="disabled")
    run.log({"env_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError) as error:
            run.checkpoint(1, {})
    assert "metrics.jsonl: no space left on device; make room" in one_line(error)
    run.close()


LOGGER = """
import sys, time
from rlrnn.tracking import Run
run = Run.create(sys.argv[1], {}, "train", mode="offline")
for i in range(100):
    run.log({"env_steps": i})
run.flush()
time.sleep(1)
for i in range(100, 105):
    run.log({"env_steps": i})
print("logged", flush=True)
time.sleep(600)
"""


def test_kill_nine_keeps_what_was_flushed(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOGGER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "logged\n"
    process.kill()
    process.communicate()
    assert [row["env_steps"] for row in read_metrics(folder)][:100] == [*range(100)]
    mirrored = [row["env_steps"] for row in mirror(folder)]
    assert mirrored[:100] == [*range(100)]


# --- Stable-Baselines3 ----------------------------------------------------------------


def test_sb3_logger(folder: Path) -> None:
    with Run.create(folder, {}, "train", mode="disabled") as run:
        logger = Logger(None, [LoggerMirror(run)])
        logger.record("train/loss", np.float32(0.5))
        logger.record("train/kl", torch.tensor([0.25]))
        logger.record("train/n_updates", np.int64(3), exclude="tensorboard")
        logger.record("train/hidden", 1, exclude="json")
        logger.record("train/array", np.ones(3))
        logger.record("rollout/figure", Figure(object(), close=True))  # type: ignore[arg-type]
        logger.record_mean("rollout/ep_rew_mean", 1.0)
        logger.record_mean("rollout/ep_rew_mean", 2.0)
        logger.record("time/fps", 100)
        logger.record("eval/success", np.bool_(True))
        logger.dump(step=2048)
        assert read_metrics(folder) == [  # flushed
            {
                "env_steps": 2048,
                "eval/success": True,
                "rollout/ep_rew_mean": 1.5,
                "time/fps": 100,
                "train/kl": 0.25,
                "train/loss": 0.5,
                "train/n_updates": 3,
            }
        ]
        logger.close()
        run.log({"env_steps": 2049})


# --- the mirror -----------------------------------------------------------------------


def mirror(folder: Path) -> list[dict[str, Any]]:
    """The rows in the wandb folder of an offline run, without wandb's own keys."""
    found = []
    for path in sorted(folder.glob("wandb/*run-*/*.wandb")):
        command = ["-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in done.stdout.splitlines()]
        found += [r["history"]["item"] for r in records if r["type"] == "history"]
    return [visible(row) for row in found]


def visible(row: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in row.items() if not key.startswith("_")}
    return {k: tracking.NOT_IN_JSON.get(str(v), v) for k, v in sorted(own.items())}


def test_offline_mirror_and_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stub_server(monkeypatch):
        monkeypatch.delenv("WANDB_API_KEY")  # so "auto" is offline
        run = Run.create(folder, {"seed": 1, "env": {"id": "x"}}, "train", group="g")
        assert run.url is None
        for row in rows(4):
            run.log({**row, "train/bad": math.nan, "text": "é", "flag": True})
        run.summary({"final": 2.0})
        run.checkpoint(4, {"w": torch.ones(2)})
        run.close()
        run, step, tree = Run.resume(folder)
        assert step == 4 and tree["w"].tolist() == [1, 1]
        run.log({"env_steps": 40, "train/loss": 7.0, "none": None})
        run.close()
        assert Stub.requests == []
    logged = [dict(sorted(row.items())) for row in read_metrics(folder)]
    assert equal(mirror(folder), logged) and len(logged) == 5
    logs = [path.name for path in folder.glob("wandb/offline-run-*/*.wandb")]
    assert len(logs) == 2 and len(set(logs)) == 1  # they are named after the id
    assert "WANDB_ERROR_REPORTING" not in os.environ
    names = {path.name for path in folder.glob("wandb/*run-*/files/*")}
    assert names <= {"requirements.txt", "wandb-summary.json", "config.yaml"}


def test_artifacts_and_images(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Run.create(folder, {}, "train", mode="offline") as run:
        Image.new("RGB", (2, 2)).save(folder / "plot.png")
        run.image("plots/one", folder / "plot.png")
        path = run.checkpoint(1, {"w": torch.ones(100_000)})
        run.artifact(path, "agent", "model")
        run.artifact(folder / "plot.png", "plot", "picture")
        assert not warnings(caplog)
        run.artifact(folder / "missing", "missing", "model")
        run.image("plots/two", folder / "missing.png")
        run.log({"env_steps": 1})
        assert len(warnings(caplog)) == 1
    picture, row = mirror(folder)
    assert "plots/one.path" in picture and row == {"env_steps": 1}
    at_home = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in at_home) < 100_000  # no copy of `w`


def test_modes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(tracking, "_init", lambda f, i, mode: started.append(mode))
    for key, variable, mode, expected in [
        (False, None, "auto", ["offline"]),
        (True, None, "auto", ["online"]),
        (True, "offline", "auto", ["offline"]),
        (True, "disabled", "auto", []),
        (True, "disabled", "offline", ["offline"]),
        (True, "offline", "online", ["online"]),
        (False, "online", "auto", ["offline"]),
        (False, None, "online", ["offline"]),
        (True, None, "disabled", []),
    ]:
        with monkeypatch.context() as patch:
            started.clear()
            patch.setattr(tracking, "_has_key", lambda expected, key=key: key)
            if variable:
                patch.setenv("WANDB_MODE", variable)
            assert tracking._start_wandb(folder, {}, mode) is None  # type: ignore[arg-type]
        assert started == expected, (key, variable, mode)


def test_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the environment or in a netrc file; neither a person nor a server is asked."""
    with stub_server(monkeypatch) as server:
        assert tracking._has_key(expected=False)
        monkeypatch.delenv("WANDB_API_KEY")
        assert not tracking._has_key(expected=False)
        (tmp_path / "home").mkdir(exist_ok=True)
        machine = f"machine 127.0.0.1:{server.server_port}"
        netrc = f"{machine}\n  login user\n  password {CANARY}\n"
        (tmp_path / "home" / ".netrc").write_text(netrc)
        assert tracking._has_key(expected=False)
        assert Stub.requests == []
    assert not sys.modules["wandb"].setup().settings.silent  # as it was


def test_a_mirror_that_breaks_is_reported_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        calls = 0

        def __getattr__(self, name: str) -> Any:
            type(self).calls += 1
            raise ConnectionResetError("gone\naway")

    with Run.create(folder, {}, "train", mode="disabled") as run:
        run._wandb = Broken()
        run.image("plot", folder / "config.yaml")
        run.artifact(folder / "config.yaml", "a/b", "model")
        for row in rows(5):
            run.log(row)
    assert read_metrics(folder) == rows(5)
    assert Broken.calls <= 3  # not tried again after a failed log
    assert len(warnings(caplog)) == 1


class Stub(http.server.BaseHTTPRequestHandler):
    """As much of a W&B server as a run needs. `behaviour` says how it fails."""

    protocol_version = "HTTP/1.1"
    behaviour: ClassVar[str] = "works"
    history: ClassVar[list[dict[str, Any]]] = []
    uploads: ClassVar[dict[str, bytes]] = {}
    variables: ClassVar[list[dict[str, Any]]] = []
    requests: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.requests.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.behaviour == "hangs":
            time.sleep(60)
        status = {"answers 500": 500, "refuses the key": 401}.get(self.behaviour, 200)
        answer = self.answer(body) if status == 200 else {"error": "no"}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def answer(self, body: bytes) -> dict[str, Any]:
        if self.command == "PUT":
            self.uploads[self.path.removeprefix("/upload/")] = body
        if self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            for line in history["content"] if history else []:
                self.history.append(json.loads(line))
        if not self.path.endswith("/graphql"):
            return {}
        request = json.loads(body)
        query, given = request["query"], request.get("variables") or {}
        if "viewer" in query:
            return {"data": {"viewer": {"id": "1", "entity": "me", "username": "me"}}}
        if "upsertBucket" in query:
            self.variables.append(given)
            entity = {"id": "2", "name": "me"}
            project = {"id": "3", "name": given["project"], "entity": entity}
            bucket = {"id": "4", "name": given["name"], "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            url = f"http://{self.headers['Host']}/upload/"
            files = [{"name": n, "uploadUrl": url + n} for n in given["files"]]
            reply = {"runID": "4", "uploadHeaders": [], "files": files}
            return {"data": {"createRunFiles": reply}}
        return {"data": {}}


@contextmanager
def stub_server(
    monkeypatch: pytest.MonkeyPatch, behaviour: str = "works"
) -> Iterator[http.server.ThreadingHTTPServer]:
    monkeypatch.setattr(Stub, "behaviour", behaviour)
    for name in ("history", "uploads", "variables", "requests"):
        monkeypatch.setattr(Stub, name, type(getattr(Stub, name))())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_online(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with stub_server(monkeypatch) as server:
        run = Run.create(folder, {"seed": 3}, "fit", project="p", group="g")
        address = f"http://127.0.0.1:{server.server_port}/me/p/runs/"
        assert run.url is not None and run.url.startswith(address)
        for i in range(50):
            run.log({"tokens": 64 * i, "fit/loss": 1 / (i + 1), "fit/bad": math.nan})
        run.summary({"final/loss": 0.25})
        run.close()
        assert run.url is None
        logged = [dict(sorted(row.items())) for row in read_metrics(folder)]
        received = [visible(row) for row in Stub.history]
        assert equal(received, logged) and len(logged) == 50
        assert json.loads(Stub.uploads["wandb-summary.json"])["final/loss"] == 0.25
        first = Stub.variables[0]
        assert (first["groupName"], first["jobType"]) == ("g", "fit")
        assert first["displayName"] == folder.name
        assert json.loads(first["config"])["seed"] == {"value": 3}
    assert not warnings(caplog)
    assert contains(folder, CANARY) == []
    assert not list(folder.rglob("wandb-metadata.json"))  # the command line


def test_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody listens: the run starts offline after the time-out."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    start = time.monotonic()
    run = Run.create(folder, {}, "train")
    assert time.monotonic() - start < 15  # ours is 10; the rest is a busy machine
    assert run.url is None
    trains_on(run)
    assert len(mirror(folder)) == 20
    (line,) = warnings(caplog)
    assert line.startswith("W&B is offline for this run: ")
    assert contains(folder, CANARY) == []


@pytest.mark.parametrize("behaviour", ["hangs", "answers 500", "refuses the key"])
def test_bad_servers(
    folder: Path,
    behaviour: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tracking, "INIT_SECONDS", 1.0)
    with stub_server(monkeypatch, behaviour):
        run = Run.create(folder, {}, "train")
        assert run.url is None
        trains_on(run)
    (line,) = warnings(caplog)
    assert "offline for this run" in line
    assert len(mirror(folder)) == 20
    assert contains(folder, CANARY) == []


def test_a_server_that_dies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.0)
    with stub_server(monkeypatch):
        run = Run.create(folder, {}, "train")
        run.log({"env_steps": -1})
    start = time.monotonic()
    for row in rows(1000):
        run.log(row)
    assert time.monotonic() - start < 10
    run.close()
    assert time.monotonic() - start < 30
    assert read_metrics(folder)[1:] == rows(1000)


def test_a_key_that_is_no_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee")
    trains_on(Run.create(folder, {}, "train"))
    assert "offline for this run" in warnings(caplog)[0]
    assert "c0ffee" not in caplog.text and contains(folder, "c0ffee") == []


def trains_on(run: Run) -> None:
    """The loop sees nothing of the server's troubles."""
    for row in rows(20):
        run.log(row)
    run.checkpoint(1, {})
    run.close()
    assert read_metrics(run.folder) == rows(20)
