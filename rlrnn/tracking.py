"""The run folder and its mirror in Weights & Biases.

A run is one folder:

    config.yaml     what was asked for, resolved
    metrics.jsonl   one JSON object a line: the truth
    checkpoints/    step_000000123/, see `rlrnn.checkpoint`
    summary.json    final figures
    wandb/          a mirror, which may fail without hurting the run

A row of `metrics.jsonl` names its own place in the run (`env_steps`, `tokens`,
`update`, `decision`) and carries no wall-clock time; what depends on the clock is under
keys that begin with `time/`. Without those, the same seed gives the same file. Numbers
that JSON does not have are written as the strings "NaN", "Infinity" and "-Infinity".

This is the only module that imports wandb, and it does so when a run is tracked.
"""

import io
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import yaml
from stable_baselines3.common.logger import KVWriter

from rlrnn.checkpoint import Checkpoints, Tree

Mode: TypeAlias = Literal["auto", "online", "offline", "disabled"]
Scalar: TypeAlias = float | int | str | bool | None

# W&B draws each metric over the axis that belongs to it. `time/*` follows the loop.
AXES = {
    "train/*": "env_steps",
    "rollout/*": "env_steps",
    "eval/*": "env_steps",
    "tune/*": "env_steps",
    "fit/*": "tokens",
    "decision/*": "decision",
}
NOT_IN_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
INIT_SECONDS = 7.0  # for a server that does not answer; with the import, at most 10
FINISH_SECONDS = 30.0  # for an upload that does not end

log = logging.getLogger(__name__)


class RunError(ValueError):
    """Something is wrong with a run folder."""


class RunExistsError(RunError):
    """A new run was asked for where there is already something."""


class NotARunError(RunError):
    """A run was to be resumed or read where there is none."""


class Run:
    """One run folder, open for writing. Made by `Run.create` or `Run.resume`."""

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], mode: Mode, offset: int
    ) -> None:
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints", identity["keep"])
        self._identity = dict(identity)
        self._metrics = _open_metrics(folder / "metrics.jsonl", offset)
        self._wandb = _start_wandb(folder, identity, mode)
        self._warned = False

    @classmethod
    def create(
        cls,
        folder: Path | str,
        config: dict[str, Any],
        job_type: str,
        *,
        mode: Mode = "auto",
        project: str = "rlrnn",
        group: str | None = None,
        name: str | None = None,
        keep: int = 3,
    ) -> "Run":
        """Start a run in a folder that is new or empty.

        `mode` "auto" takes WANDB_MODE if that is set; else it is online if there is an
        API key, and offline if there is none or the server does not answer.
        """
        folder = Path(folder)
        try:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise RunError(
                f"config cannot be written as YAML ({_line(error)}): expected plain "
                "values; convert it"
            ) from error
        try:
            if folder.is_dir() and any(folder.iterdir()):
                raise RunExistsError(
                    f"{folder} already holds something: expected a new or empty "
                    f"folder; choose another name, or --resume {folder}"
                )
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        except OSError as error:
            raise _unwritten(folder, error) from error
        identity = {
            # a sweep's agent has chosen the id already
            "id": os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8],
            "job_type": job_type,
            "project": project,
            "group": group,
            "name": name or folder.resolve().name,
            "keep": keep,
        }
        return cls(folder, identity, mode, 0)

    @classmethod
    def resume(
        cls,
        folder: Path | str,
        *,
        mode: Mode = "auto",
        device: torch.device | str = "cpu",
    ) -> tuple["Run", int, Tree]:
        """The run, its last step and the tree saved then.

        `metrics.jsonl` is cut back to that moment, so that a run which was interrupted
        and resumed leaves the same rows as one which was not. W&B goes on with the same
        id, and has the rows in between twice.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise NotARunError(
                f"{folder} is not a run: expected a folder with config.yaml and "
                "checkpoints/; check the path"
            )
        step, saved = Checkpoints(folder / "checkpoints").latest(device)
        try:
            tree, offset, identity = (saved[k] for k in ("tree", "metrics", "run"))
        except (KeyError, TypeError):
            raise NotARunError(
                f"{folder / 'checkpoints'} was not written by a run: expected what "
                "Run.checkpoint saves; use rlrnn.checkpoint.load"
            ) from None
        return cls(folder, identity, mode, offset), step, tree

    @property
    def url(self) -> str | None:
        """Where W&B shows this run; None offline."""
        if self._wandb is None or self._wandb.settings.mode != "online":
            return None
        return str(self._wandb.url)

    def log(self, row: Mapping[str, Scalar]) -> None:
        """Append one row; it is safe from a crash of this process after `flush`."""
        with self._writing():
            self._metrics.write(_json(row).encode() + b"\n")
        self._mirror(lambda run: run.log(dict(row)))

    def flush(self) -> None:
        """Hand the rows so far to the operating system; called at each update."""
        with self._writing():
            self._metrics.flush()

    def checkpoint(
        self, step: int, tree: Tree, score: float | int | None = None
    ) -> Path:
        """Make the rows so far durable, then save `tree` with the place they reach."""
        with self._writing():
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        saved = {"tree": tree, "metrics": self._metrics.tell(), "run": self._identity}
        return self.checkpoints.save(step, saved, score)

    def summary(self, values: Mapping[str, Scalar]) -> None:
        """Add to `summary.json`, the final figures."""
        path = self.folder / "summary.json"
        with self._writing(path):
            known = _parsed(path.read_text("utf-8")) if path.is_file() else {}
            new = path.with_suffix(".tmp")
            new.write_text(_json({**known, **values}, indent=1) + "\n", "utf-8")
            os.replace(new, path)
        self._mirror(lambda run: run.summary.update(dict(values)))

    def artifact(self, path: Path | str, name: str, type: str) -> None:
        """Send a file or folder to W&B, if it is on."""

        def send(run: Any) -> None:
            import wandb

            # immutable: sent from where it is, not from a copy in the home folder
            artifact = wandb.Artifact(name, type)
            add = artifact.add_dir if Path(path).is_dir() else artifact.add_file
            add(str(path), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

        self._mirror(send, vital=False)

    def image(self, name: str, path: Path | str) -> None:
        """Send a picture to W&B, if it is on."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))})

        self._mirror(send, vital=False)

    def video(self, name: str, path: Path | str) -> None:
        """Send an animated picture to W&B, if it is on."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Video(str(path), format="gif")})

        self._mirror(send, vital=False)

    def close(self, exit_code: int = 0) -> None:
        """Flush and end the run. Closing twice does nothing."""
        try:
            with self._writing():
                self._metrics.close()
        finally:
            self._mirror(lambda run: run.finish(exit_code=exit_code))
            self._wandb = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def _mirror(self, call: Callable[[Any], object], vital: bool = True) -> None:
        """Do `call` with the W&B run; nothing that it raises reaches the training.

        The first failure is reported. A vital call that fails ends the mirror, as the
        next would only fail later.
        """
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:
            if vital:
                self._wandb = None
            if not self._warned:
                log.warning(
                    "W&B failed (%s); the run goes on, and %s has all of it",
                    _line(error),
                    self.folder / "metrics.jsonl",
                )
            self._warned = True

    @contextmanager
    def _writing(self, path: Path | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritten(path or self.folder / "metrics.jsonl", error) from error


class LoggerMirror(KVWriter):
    """A Stable-Baselines3 logger output that writes into a run, over `env_steps`.

    Figures, videos and other values that are no scalars are left out. SB3's own keys
    that depend on the clock already begin with `time/`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        row: dict[str, Scalar] = {"env_steps": int(step)}
        for key, value in sorted(key_values.items()):
            if "json" in (key_excluded.get(key) or ()):
                continue
            if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
                if math.prod(value.shape) != 1:
                    continue
                value = value.item()
            if value is None or isinstance(value, (bool, int, float, str)):
                row[key] = value
        self.run.log(row)
        self.run.flush()

    def close(self) -> None:
        """The run is closed by whoever opened it."""


def read_metrics(folder: Path | str) -> list[dict[str, Scalar]]:
    """The rows of a run's `metrics.jsonl`; a last line that was cut off is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise NotARunError(
            f"{folder} is not a run: expected a folder with metrics.jsonl; "
            "check the path"
        )
    *lines, _torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_parsed(line))
        except ValueError as error:
            raise RunError(
                f"{path} line {number} is damaged ({_line(error)}): expected one JSON "
                "object; delete the line"
            ) from error
    return rows


# --- the files ------------------------------------------------------------------------


def _open_metrics(path: Path, offset: int) -> io.BufferedWriter:
    """`path`, cut back to `offset` and open at its end."""
    try:
        file = path.open("ab")
        size = file.tell()
        if size >= offset:
            file.truncate(offset)
            file.seek(offset)  # or tell() would still say `size`
            return file
    except OSError as error:
        raise _unwritten(path, error) from error
    file.close()
    raise RunError(
        f"{path} has {size} bytes: expected at least the {offset} that its checkpoint "
        "counted; restore the file"
    )


def _json(row: Mapping[str, Scalar], indent: int | None = None) -> str:
    strict = {key: _finite(value) for key, value in row.items()}
    return json.dumps(strict, allow_nan=False, indent=indent)


def _finite(value: Scalar) -> Scalar:
    if not isinstance(value, float):
        return value
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parsed(line: bytes | str) -> dict[str, Scalar]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}")
    return {
        key: NOT_IN_JSON.get(value, value) if isinstance(value, str) else value
        for key, value in row.items()
    }


def _unwritten(path: Path, error: OSError) -> RunError:
    reason = (error.strerror or str(error)).lower()
    return RunError(
        f"could not write {path}: {reason}; make room or choose another folder"
    )


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# --- Weights & Biases -----------------------------------------------------------------


def _start_wandb(folder: Path, identity: Mapping[str, Any], mode: Mode) -> Any:
    """A W&B run, or None if it is off. Never asks, never raises."""
    wish = os.environ.get("WANDB_MODE") if mode == "auto" else mode
    if wish == "disabled":
        return None
    try:
        with _no_error_reports():
            if wish != "offline" and _has_key(wish == "online"):
                try:
                    return _init(folder, identity, "online")
                except Exception as error:
                    log.warning("W&B is offline for this run: %s", _line(error))
                    _release()
            return _init(folder, identity, "offline")
    except Exception as error:
        log.warning("W&B is off for this run: %s", _line(error))
        return None


@contextmanager
def _no_error_reports() -> Iterator[None]:
    """wandb reads this variable when it starts; its crash reports look up a name."""
    name = "WANDB_ERROR_REPORTING"
    if name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _has_key(expected: bool) -> bool:
    """Whether wandb has an API key, in the environment or in a netrc file."""
    import wandb

    try:
        if any(
            os.environ.get(f"WANDB_{x}") for x in ("API_KEY", "IDENTITY_TOKEN_FILE")
        ):
            return True
        settings = wandb.setup().settings
        silent, settings.silent = settings.silent, True  # or login greets the server
        try:
            found = wandb.login(verify=False, prompt=False)
        except TypeError:  # before wandb 0.31, login would ask
            found = bool(wandb.api.api_key)
        finally:
            settings.silent = silent
    except Exception as error:  # a key that is not well formed
        log.warning("W&B is offline for this run: %s", _line(error))
        return False
    if expected and not found:
        log.warning("W&B is offline for this run: no API key; use `wandb login`")
    return found


def _release() -> None:
    """Stop wandb's service, which still holds the id of the run that did not start."""
    import wandb

    if wandb.run is None:  # it would end the runs of others too
        wandb.teardown()


def _init(folder: Path, identity: Mapping[str, Any], mode: str) -> Any:
    import wandb

    wishes: dict[str, Any] = {
        "mode": mode,
        "root_dir": str(folder),
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "console": "off",
        "silent": True,
        "x_disable_meta": True,  # it holds the command line
        # what is older than this survives kill -9; not in every version
        "x_transaction_log_flush_interval": 0.1,
    }
    if wandb.run is not None:  # somebody else's
        wishes["reinit"] = "create_new"
    known = wandb.Settings.model_fields
    run = wandb.init(
        config=yaml.safe_load((folder / "config.yaml").read_text("utf-8")),
        id=identity["id"],
        resume="allow",
        project=identity["project"],
        group=identity["group"],
        job_type=identity["job_type"],
        name=identity["name"],
        settings=wandb.Settings(**{k: v for k, v in wishes.items() if k in known}),
    )
    time_axis = "tokens" if identity["job_type"] == "fit" else "env_steps"
    for axis in ("env_steps", "tokens", "update", "decision"):
        run.define_metric(axis)
    for metric, axis in {**AXES, "time/*": time_axis}.items():
        run.define_metric(metric, step_metric=axis)
    return run
