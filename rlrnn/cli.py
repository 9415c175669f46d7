"""The command line: `rlrnn train | fit | tune | evaluate | demo`.

Exit codes: 0 done; 2 bad input, with one line that says what to do; 130 and 143
stopped by SIGINT and SIGTERM, after saving; anything else is our mistake.
"""

import argparse
import difflib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from rlrnn import __version__
from rlrnn.config import FitConfig, RunConfig, TrainConfig, TuneConfig

CONFIGS = Path(__file__).parent / "configs"
FLOWS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "fit": FitConfig,
    "tune": TuneConfig,
}
USAGE = f"""\
usage: rlrnn COMMAND [options]

  train      a recurrent agent on a partially observed task
  fit        a recurrent model on sequences, under a controller of rate and truncation
  tune       a controller: the agent, playing training runs
  evaluate   a finished run: rlrnn evaluate RUN
  demo       all of it, in a few minutes

  rlrnn COMMAND --help           every option, with its default
  rlrnn train --config NAME      one of {{names}}, or a path
  rlrnn fit --resume RUN         goes on from the last checkpoint (train and tune too)

rlrnn {__version__}"""


class UsageError(ValueError):
    """Options that cannot be used."""


def config_names() -> list[str]:
    """The configs that ship with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def config_path(name: str) -> Path:
    """A shipped config by its name, or a file by its path."""
    shipped = CONFIGS / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    raise UsageError(
        f"no config {name!r}: expected a file, or one of {', '.join(config_names())}"
        + _nearest(name, config_names())
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _parser(command: str) -> jsonargparse.ArgumentParser:
    config = FLOWS[command]
    parser = jsonargparse.ArgumentParser(
        prog=f"rlrnn {command}",
        description=(config.__doc__ or "").splitlines()[0],
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="config", help="a name from configs/, or a path"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with this run; no other options but --run.track",
    )
    parser.add_class_arguments(config)
    return parser


def _keys(parser: jsonargparse.ArgumentParser) -> list[str]:
    return [a.dest for a in parser._actions if a.dest not in (None, "help")]


def _normalised(arguments: Sequence[str], keys: list[str]) -> list[str]:
    """What W&B's sweep agents send, as dashed options: `a.b=1`, `--a=None`."""
    words = {"None": "null", "True": "true", "False": "false"}
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] == "--config":
            result.append(str(config_path(argument)))
            continue
        key, equals, value = argument.partition("=")
        if equals and not key.startswith("-"):
            key = f"--{key}"
        if key == "--config" and equals:
            value = str(config_path(value))
        name = key[2:]
        if key.startswith("--") and name not in (*keys, "help", "print_config"):
            if name not in {k.split(".")[0] for k in keys}:
                raise UsageError(f"unknown option {key}{_nearest(name, keys)}")
        result.append(f"{key}={words.get(value, value)}" if equals else key)
    return result


def _check_keys(path: Path, keys: list[str]) -> None:
    """Names a mistyped key of a YAML file, with the nearest that there is."""
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path} is no config: expected keys and values")

    def visit(node: dict[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name not in keys and not any(k.startswith(f"{name}.") for k in keys):
                raise UsageError(f"{path}: unknown key {name}{_nearest(name, keys)}")
            if isinstance(value, dict):
                visit(value, f"{name}.")

    visit(tree, "")


def parse(command: str, arguments: Sequence[str]) -> tuple[Any, str | None]:
    """A flow's config, and the run to resume. Raises UsageError, in one line.

    Options override the config file, which overrides the defaults.
    """
    parser = _parser(command)
    keys = _keys(parser)
    arguments = _normalised(arguments, keys)
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            _check_keys(Path(arguments[i + 1]), keys)
        elif argument.startswith("--config="):
            _check_keys(Path(argument.split("=", 1)[1]), keys)
    try:
        with redirect_stderr(io.StringIO()):
            values = parser.parse_args(arguments)
            resume = values.pop("resume")
            if resume is not None:
                return _resumed(command, resume, arguments, values.run.track), resume
            values.pop("config")
            built = parser.instantiate_classes(values)
            return FLOWS[command](**vars(built)), None
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UsageError(_told(error)) from None
    except TypeError as error:
        raise UsageError(_told(error)) from None


def _told(error: Exception) -> str:
    """jsonargparse's words without the line breaks, the last and most precise first."""
    return " ".join(str(error).split())


def _resumed(command: str, folder: str, arguments: Sequence[str], track: str) -> Any:
    """The config of a run that is to be resumed."""
    others = [
        a
        for i, a in enumerate(arguments)
        if a.startswith("--") and a.split("=")[0] not in ("--resume", "--run.track")
    ]
    if others:
        raise UsageError(
            f"--resume goes on with the run's own config, but {others[0]} was given; "
            "leave it out"
        )
    config = stored_config(folder, command)
    return replace(config, run=replace(config.run, track=track, folder=folder))


def stored_config(folder: str, command: str | None = None) -> Any:
    """The config of a run folder. Raises UsageError if another command made it."""
    from rlrnn.flows import run_config

    job, _ = run_config(folder)
    if command is not None and job != command:
        raise UsageError(
            f"{folder} was made by `rlrnn {job}`, not by `rlrnn {command}`; use "
            f"rlrnn {job} --resume {folder}"
        )
    return parse(job, ["--config", str(Path(folder, "config.yaml"))])[0]


def _flow(command: str, arguments: Sequence[str]) -> int:
    config, resume = parse(command, arguments)
    from rlrnn import flows

    flow: Callable[..., dict[str, Any]] = getattr(flows, command)
    summary = flow(config, resume=resume)
    _report(summary)
    folder = summary["folder"]
    print(f"\nrun folder: {folder}")
    if config.run.track != "disabled":
        print(f"look at it: wandb leet {folder}   or: wandb sync {folder}/wandb/*run*")
    return 0


def _report(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in summary.items():
        if key != "folder":
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(key, shown)
    Console().print(table)


def _evaluate(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rlrnn evaluate",
        description="A finished run's figures, measured anew.",
        exit_on_error=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    options = parser.parse_args(arguments)
    config = stored_config(options.run)
    from rlrnn import flows

    _report(flows.evaluate(options.run, config))
    return 0


def _demo(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rlrnn demo",
        description="Train an agent with memory, then one text model four ways.",
        exit_on_error=False,
    )
    parser.add_argument("--folder", help="new or empty; default: runs/demo-DATE")
    parser.add_argument("--data.path", dest="path", help="a UTF-8 text of your own")
    parser.add_argument(
        "--run.track",
        dest="track",
        default=RunConfig().track,
        choices=("auto", "online", "offline", "disabled"),
        help="Weights & Biases; default: online if there is a key, else offline",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    from rlrnn.demo import demo

    demo(options.folder, options.path, options.track, options.seed)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    usage = USAGE.format(names=", ".join(config_names()))
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage)
        return 0
    if given[0] == "--version":
        print(f"rlrnn {__version__}")
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command, rest = given[0], given[1:]
    try:
        if command in FLOWS:
            return _flow(command, rest)
        if command == "evaluate":
            return _evaluate(rest)
        if command == "demo":
            return _demo(rest)
        commands = [*FLOWS, "evaluate", "demo"]
        raise UsageError(
            f"unknown command {command!r}: expected {', '.join(commands)}"
            + _nearest(command, commands)
        )
    except (ValueError, argparse.ArgumentError) as error:
        if os.environ.get("RLRNN_TRACEBACK"):
            raise
        print(f"rlrnn: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nrlrnn: {stop or 'stopped'}", file=sys.stderr)
        return int(getattr(stop, "exit_code", 130))


if __name__ == "__main__":
    sys.exit(main())
