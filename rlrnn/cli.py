"""The command line: `rlrnn train | fit | tune | evaluate | predict | ...`.

Exit codes: 0 done; 2 bad input, with one line that says what to do; 130 and 143
stopped by SIGINT and SIGTERM, after saving; anything else is our mistake.
"""

import argparse
import difflib
import io
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Never, Union, get_args, get_origin

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
  explain    what the controller of a fit did, and what it saw: rlrnn explain RUN
  predict    what a finished model makes of new data: rlrnn predict RUN INPUT
  export     a finished run's model or agent as ONNX: rlrnn export RUN
  play       an environment in the terminal, yourself or by a run's agent
  demo       all of it, in a few minutes

  rlrnn COMMAND --help           every option, with its default
  rlrnn train --config NAME      one of {{names}}, or a path
  rlrnn fit --resume RUN         goes on from the last checkpoint (train and tune too)

rlrnn {__version__}"""


class UsageError(ValueError):
    """Options that cannot be used."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise UsageError(_told(message))


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


def _nearest(name: str, names: Sequence[str], before: str = "") -> str:
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {before}{close[0]}?" if close else ""


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
        default=argparse.SUPPRESS,
        help="go on with this run; no other options but --run.track",
    )
    parser.add_class_arguments(config)
    return parser


def _options(config: type[Any], prefix: str = "") -> dict[str, Any]:
    """Each key of a config and its type, those of nested ones too."""
    found: dict[str, Any] = {}
    for entry in fields(config):
        name = f"{prefix}{entry.name}"
        found[name] = entry.type
        if isinstance(entry.type, type) and is_dataclass(entry.type):
            found |= _options(entry.type, f"{name}.")
    return found


def _normalised(
    command: str, arguments: Sequence[str], keys: Sequence[str]
) -> list[str]:
    """`--key=value` from all that may be written: `--key value`, and what W&B's sweep
    agents send, `a.b=1` and `--a=None`. Config files come first, so that options
    override them wherever they stand."""
    words = {"None": "null", "True": "true", "False": "false"}
    known = [*keys, "config", "resume"]
    configs: list[str] = []
    options: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-h" or argument.split("=")[0] in ("--help", "--print_config"):
            options.append(argument)
            continue
        key, equals, value = argument.partition("=")
        name = key.removeprefix("--")
        if name.removesuffix("+") not in known:
            if not (equals or key.startswith("-")):
                raise UsageError(f"{argument!r} is no option: expected --KEY=VALUE")
            raise UsageError(
                f"unknown option {key}"
                + (_nearest(name, known, "--") or f"; see rlrnn {command} --help")
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"{key} needs a value: --{name}=VALUE")
            value = rest.pop(0)
        if name == "config":
            configs.append(f"--config={config_path(value)}")
        else:
            options.append(f"--{name}={words.get(value, value)}")
    return configs + options


def _check_keys(path: Path, options: dict[str, Any]) -> None:
    """Names a mistyped key of a YAML file, with the nearest that there is."""
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{path}{where} is no YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path} is no config: expected keys and values")

    def visit(node: dict[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name not in options:
                hint = _nearest(name, list(options))
                raise UsageError(f"{path}: unknown key {name}{hint}")
            if isinstance(value, dict):
                visit(value, f"{name}.")
            elif is_dataclass(options[name]):
                raise UsageError(
                    f"{path}: {name} is {value!r}, expected {_in_words(options[name])}"
                )

    visit(tree, "")


def parse(command: str, arguments: Sequence[str]) -> tuple[Any, str | None]:
    """A flow's config, and the run to resume. Raises UsageError, in one line.

    Options override the config file, which overrides the defaults.
    """
    parser = _parser(command)
    options = _options(FLOWS[command])
    arguments = _normalised(command, arguments, list(options))
    for argument in arguments:
        if argument.startswith("--config="):
            _check_keys(Path(argument.split("=", 1)[1]), options)
    try:
        with redirect_stderr(io.StringIO()):
            values = parser.parse_args(arguments)
            resume = values.pop("resume", None)
            if resume is not None:
                return _resumed(command, resume, arguments), resume
            values.pop("config")
            # its name since jsonargparse 4.49, and before
            instantiate = getattr(parser, "instantiate", None)
            built = (instantiate or parser.instantiate_classes)(values)
            return FLOWS[command](**vars(built)), None
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError) as error:
        raise UsageError(_told(str(error), options)) from None
    except ValueError as error:
        raise UsageError(_in_full(str(error), options)) from None


def _in_full(message: str, options: dict[str, Any]) -> str:
    """`budget is 0, ...` of a nested config, with the option's whole name."""
    name = message.split(" is ")[0]
    if name in options:
        return message
    whole = [key for key in options if key.endswith(f".{name}")]
    return f"{whole[0]}{message.removeprefix(name)}" if len(whole) == 1 else message


def _told(message: str, options: dict[str, Any] | None = None) -> str:
    """A parser's complaint in plain words: the option, what it was given, what it
    expects."""
    line = " ".join(message.split())
    keys = re.findall(r'Parser key "([\w.+]+)"', line)
    given = re.search(
        r"(?:Got value: ?|Given value: ?|load config ')(.*?)(?:' - .*)?$", line
    )
    if options and keys and given and (key := keys[-1].rstrip("+")) in options:
        return f"{key} is {given[1]!r}, expected {_in_words(options[key])}"
    if match := re.fullmatch(r"argument (\S+): invalid int value: '(.*)'", line):
        return f"{match[1]} is {match[2]!r}, expected {_in_words(int)}"
    if match := re.fullmatch(
        r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", line
    ):
        return f"{match[1]} is {match[2]}, expected one of {match[3]}".replace("'", "")
    return line.removeprefix("argument ")


def _in_words(kind: Any) -> str:
    """What a value of this type looks like."""
    origin, parts = get_origin(kind), get_args(kind)
    simple = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        types.NoneType: "null",
    }
    if kind in simple:
        return simple[kind]
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_in_words, parts))
    if origin is list:
        return f"a list [..., ...], each {_in_words(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}, each {_in_words(parts[0])}"
    return "keys and values"


def _resumed(command: str, folder: str, arguments: Sequence[str]) -> Any:
    """The config of a run that is to be resumed."""
    others = [
        argument
        for argument in arguments
        if argument.split("=")[0] not in ("--resume", "--run.track")
    ]
    if others:
        raise UsageError(
            f"--resume goes on with the run's own config, but {others[0]} was given; "
            "leave it out"
        )
    config = stored_config(folder, command)
    tracks = [a.split("=")[1] for a in arguments if a.startswith("--run.track=")]
    track = tracks[-1] if tracks else config.run.track
    return replace(config, run=replace(config.run, track=track, folder=folder))


def load_config(command: str, name: str) -> Any:
    """The config of a flow, by its name in configs/ or the path of a YAML file."""
    return parse(command, ["--config", str(config_path(name))])[0]


def stored_config(folder: str, command: str | None = None) -> Any:
    """The config of a run folder. Raises UsageError if another command made it."""
    from rlrnn.running import run_config

    job, _ = run_config(folder)
    if command is not None and job != command:
        raise UsageError(
            f"{folder} was made by `rlrnn {job}`, not by `rlrnn {command}`; use "
            f"rlrnn {job} --resume {folder}"
        )
    return parse(job, ["--config", str(Path(folder, "config.yaml"))])[0]


def look_at(summary: dict[str, Any]) -> list[str]:
    """How to look at a run that W&B mirrors; nothing for one that it does not."""
    mirror = Path(summary["folder"], "wandb")
    if "url" in summary:
        return [f"look at it: {summary['url']}"]
    if not any(mirror.glob("offline-run-*")):
        return []
    return [
        f"look at it: wandb leet {mirror}",
        f"upload it:  wandb sync {mirror}/offline-run-*",
    ]


def _flow(command: str, arguments: Sequence[str]) -> int:
    config, resume = parse(command, arguments)
    from rlrnn import flows

    flow: Callable[..., dict[str, Any]] = getattr(flows, command)
    try:
        summary = flow(config, resume=resume)
    except ValueError as error:
        raise UsageError(_in_full(str(error), _options(FLOWS[command]))) from error
    _report(summary)
    print(f"\nrun folder: {summary['folder']}", *look_at(summary), sep="\n")
    return 0


def _report(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in summary.items():
        if key not in ("folder", "url"):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(key, shown)
    Console().print(table)


def _evaluate(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="rlrnn evaluate",
        description="A finished run's figures, measured anew.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    options = parser.parse_args(arguments)
    config = stored_config(options.run)
    from rlrnn import flows

    _report(flows.evaluate(options.run, config))
    return 0


def _explain(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="rlrnn explain",
        description="Each decision of the controller of a run of `rlrnn fit`: what it "
        "set, what it saw, and what came of it. Draws them in RUN/explain.png.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, finished or not")
    options = parser.parse_args(arguments)
    from rlrnn.explain import explain

    print(f"\npicture: {explain(options.run)}")
    return 0


def _predict(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="rlrnn predict",
        description="What a finished model makes of new data: text or music that goes "
        "on, forecasts, labels, transcriptions.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or its model.zip")
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="a prompt; for other data a file, a folder or a glob, as in training, or "
        "a manifest",
    )
    parser.add_argument(
        "--output",
        help="of a table, default: RUN/predictions.csv; of music, .json or .npz, "
        "default: RUN/continued.json",
    )
    parser.add_argument(
        "--score",
        action="store_true",
        help="INPUT is a file of text or music: how likely is it?",
    )
    parser.add_argument(
        "--length",
        type=int,
        default=300,
        help="of a text in symbols, of music in frames; default: 300",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest; default: 0.8"
    )
    parser.add_argument("--top_k", type=int, help="draw from so many symbols alone")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="of this share of the probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--levels", type=float, nargs="+", help="quantiles of a forecast"
    )
    options = vars(parser.parse_args(arguments))
    from rlrnn.prediction import predict

    made = predict(options.pop("run"), options.pop("input"), **options)
    if "text" in made:
        print(made["text"])
    else:
        _report(made)
    return 0


def _export(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="rlrnn export",
        description="A finished run's model or agent as an ONNX graph with an explicit "
        "recurrent state, replayed against torch.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--output", help="default: in the run folder")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="a model over any number of time steps; default: one step",
    )
    options = parser.parse_args(arguments)
    from rlrnn.export import export_run

    _report(export_run(options.run, options.output, options.whole))
    return 0


def _play(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="rlrnn play",
        description="Show an environment in the terminal, and play it.",
    )
    parser.add_argument("id", metavar="ID", nargs="?", help="of an environment")
    parser.add_argument("--agent", metavar="RUN", help="let this run's agent play")
    parser.add_argument("--steps", type=int, default=100, help="default: 100")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args(arguments)
    from rlrnn.play import play

    play(options.id, options.agent, options.steps, options.seed)
    return 0


def _demo(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="rlrnn demo",
        description="Train an agent with memory, then one text model four ways.",
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
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args(arguments)
    from rlrnn.demo import demo

    demo(options.folder, options.path, options.track, options.seed)
    return 0


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """In one line, without a place in the source, what is told to users."""
    if issubclass(category, UserWarning):
        return f"rlrnn: {' '.join(str(message).split())}\n"
    return _FORMAT(message, category, filename, lineno, line)


_FORMAT = warnings.formatwarning


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
    warnings.formatwarning = _warning
    command, rest = given[0], given[1:]
    try:
        if command in FLOWS:
            return _flow(command, rest)
        others = {
            "evaluate": _evaluate,
            "explain": _explain,
            "predict": _predict,
            "export": _export,
            "play": _play,
            "demo": _demo,
        }
        if command in others:
            return others[command](rest)
        commands = [*FLOWS, *others]
        raise UsageError(
            f"unknown command {command!r}: expected {', '.join(commands)}"
            + _nearest(command, commands)
        )
    except ValueError as error:
        if os.environ.get("RLRNN_TRACEBACK"):
            raise
        print(f"rlrnn: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        # of a file or a full disk; a broken pipe has no name
        if os.environ.get("RLRNN_TRACEBACK") or not error.filename:
            raise
        print(f"rlrnn: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nrlrnn: {str(stop) or 'stopped'}", file=sys.stderr)
        return int(getattr(stop, "exit_code", 130))
    except SystemExit as done:  # --help and --print_config end in this
        return int(done.code or 0)


if __name__ == "__main__":
    sys.exit(main())
