"""The command line: `m4train COMMAND [overrides]`. Thin: it finds the command, loads the configuration and calls `build`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m4train.errors import ConfigError, M4Error

if TYPE_CHECKING:
    from m4train.config import Config

USAGE_EXIT = 2
OVERRIDES = "[group=choice ...] [key=value ...]"
OF_RUN = f"run_dir=RUN | resume=CHECKPOINT | {OVERRIDES}"


@dataclass(frozen=True)
class Command:
    summary: str
    run: Callable[[list[str]], int]
    usage: str = OVERRIDES


def _train(arguments: list[str]) -> int:
    from m4train.config.compose import load_config

    config = load_config(arguments)
    if _handed_over(config, ["train", *arguments]):
        return 0
    from m4train.run import train

    return train(config)


def _evaluate(arguments: list[str]) -> int:
    from m4train.config.compose import load_run_config

    config = load_run_config(arguments)
    if _handed_over(config, ["evaluate", *arguments]):
        return 0
    from m4train.evaluate_run import evaluate

    return evaluate(config)


def _export(arguments: list[str]) -> int:
    from m4train.config.compose import load_run_config

    config = load_run_config(arguments)
    from m4train.export_run import export

    return export(config)


def _report(arguments: list[str]) -> int:
    from m4train.config.compose import load_run_config

    config = load_run_config(arguments)
    from m4train.inspection.report import write_report

    print(f"report: {write_report(config)}")
    return 0


def _generate(arguments: list[str]) -> int:
    from m4train.evaluation.answer import answer

    return answer(arguments)


def _data(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in DATA_ACTIONS:
        raise ConfigError(f"data needs one of {', '.join(DATA_ACTIONS)}: m4train data ACTION [overrides].")
    action, rest = arguments[0], arguments[1:]
    given = [argument.partition("=")[2] for argument in rest if argument.startswith("to=")]
    workers, rest = _number("workers", rest, 1)
    if action == "convert" and not (given and given[-1]):
        raise ConfigError(
            "data convert needs to=FOLDER, where the shards are written: m4train data convert to=FOLDER ..."
        )
    from m4train.config.compose import load_config

    config = load_config([argument for argument in rest if not argument.startswith("to=")])
    from m4train import data_run

    if action == "convert":
        return data_run.convert(config, Path(given[-1]), workers)
    return data_run.index(config) if action == "index" else data_run.stats(config)


def _plan(arguments: list[str]) -> int:
    ranks, arguments = _number("ranks", arguments, 1)
    as_json, arguments = _flag("--json", arguments)
    from m4train.config.compose import load_config

    config = load_config(arguments)
    from m4train.inspect_run import plan

    return plan(config, ranks, as_json)


def _validate(arguments: list[str]) -> int:
    workers, arguments = _number("workers", arguments, os.cpu_count() or 1)
    as_json, arguments = _flag("--json", arguments)
    from m4train.config.compose import load_config

    config = load_config(arguments)
    from m4train.inspect_run import validate

    return validate(config, workers, as_json)


def _bench(arguments: list[str]) -> int:
    packs, arguments = _number("packs", arguments, 32)
    as_json, arguments = _flag("--json", arguments)
    from m4train.config.compose import load_config

    config = load_config(arguments)
    from m4train.inspect_run import bench

    return bench(config, packs, as_json)


def _preview(arguments: list[str]) -> int:
    packs, arguments = _number("packs", arguments, 4)
    from m4train.config.compose import load_config

    config = load_config(arguments)
    from m4train.inspect_run import preview

    return preview(config, packs)


def _replay(arguments: list[str]) -> int:
    step, arguments = _number("step", arguments, 0)
    as_json, arguments = _flag("--json", arguments)
    if not step:
        raise ConfigError("replay needs step=N, the optimizer step to show: m4train replay step=N run_dir=RUN.")
    from m4train.config.compose import load_config

    named = [argument for argument in arguments if not argument.startswith("run_dir=")]
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("run_dir=")]
    run_dir = given[-1] if given and not named else load_config(arguments).run_dir
    from m4train.inspect_run import replay

    return replay(Path(run_dir), step, as_json)


def _launch(arguments: list[str]) -> int:
    if arguments[:1] == ["check"]:
        return _check(arguments[1:])
    if arguments[:1] != ["slurm"]:
        raise ConfigError(
            "launch needs slurm or check: m4train launch slurm nodes=N [--SBATCH_OPTION ...] [overrides]."
        )
    nodes, arguments = _number("nodes", arguments[1:], 1)
    from m4train.slurm import submit

    return submit(nodes, arguments)


def _check(arguments: list[str]) -> int:
    from m4train.config.compose import load_config

    config = load_config(arguments)
    if _handed_over(config, ["launch", "check", *arguments]):
        return 0
    from m4train.preflight import preflight

    return preflight(config)


def _handed_over(config: Config, arguments: list[str]) -> bool:
    """Runs `m4train ARGUMENTS` on the processes of launch.processes, where this process has to start them.

    Raises ConfigError where this process is one of a group that does not fit the configuration.
    """
    from m4train import launching

    launching.check_launched(config)
    if not launching.starts_processes(config):
        return False
    launching.launch(arguments, config.launch.processes or 1)
    return True


def _number(name: str, arguments: list[str], default: int) -> tuple[int, list[str]]:
    """The value of `name=N`, which belongs to a command and not to the configuration, and the arguments without it."""
    rest = [argument for argument in arguments if not argument.startswith(f"{name}=")]
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{name}=")]
    if not all(value.isdigit() and int(value) for value in given):
        raise ConfigError(f"{name}={given[-1]} is no number of at least 1.")
    return int(given[-1]) if given else default, rest


def _flag(name: str, arguments: list[str]) -> tuple[bool, list[str]]:
    return name in arguments, [argument for argument in arguments if argument != name]


DATA_ACTIONS = ("index", "stats", "convert")

COMMANDS = {
    "train": Command("train a model; continues by itself where run_dir holds a checkpoint", _train),
    "evaluate": Command("held-out loss and scored answers of a checkpoint or a Hugging Face folder", _evaluate, OF_RUN),
    "generate": Command(
        "answer one question about images with an exported model", _generate, "MODEL QUESTION [IMAGE ...]"
    ),
    "export": Command("write a checkpoint as a Hugging Face folder, adapters merged or apart", _export, OF_RUN),
    "report": Command("write report.html into the run directory", _report, OF_RUN),
    "plan": Command(
        "say what a run would see, from the indexes alone: epochs, mixture, padding, balance",
        _plan,
        f"[ranks=N] [--json] {OVERRIDES}",
    ),
    "preview": Command(
        "write run_dir/preview.html, the first packs as the model sees them", _preview, f"[packs=N] {OVERRIDES}"
    ),
    "validate": Command(
        "read every sample of all sources and report what is wrong; fails above data.max_bad_fraction",
        _validate,
        f"[workers=N] [--json] {OVERRIDES}",
    ),
    "bench": Command(
        "measure the data side, stage by stage on one core and as a whole", _bench, f"[packs=N] [--json] {OVERRIDES}"
    ),
    "replay": Command(
        "show every sample of one step of a run, with the configuration it was started with",
        _replay,
        f"step=N [--json] run_dir=RUN | {OVERRIDES}",
    ),
    "launch": Command(
        "submit the run that train would start to SLURM, or check its processes, their network and disk",
        _launch,
        f"slurm nodes=N [--SBATCH_OPTION ...] {OVERRIDES} | check {OVERRIDES}",
    ),
    "data": Command(
        "index the shards of a configuration, say what they hold, or write them as canonical shards",
        _data,
        f"index|stats|convert [to=FOLDER] [workers=N] {OVERRIDES}",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 a run that failed, 2 a request that was refused."""
    # Read when torch is imported: its threads then soon sleep where they wait for each other. To spin for long makes a step
    # many times as long where other programs want the same cores (benchmarks/README.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, rest = arguments[0], arguments[1:]
    command = COMMANDS.get(name)
    if command is None:
        return _refuse(f"{name!r} is no command{_close(name)}; `m4train --help` lists them.")
    if any(argument in ("-h", "--help") for argument in rest):
        print(_command_help(name, command))
        return 0
    try:
        return command.run(rest)
    except M4Error as error:
        if isinstance(error, ConfigError):
            return _refuse(str(error))
        print(f"m4train {name}: {error}", file=sys.stderr)
        return 1


def _refuse(sentence: str) -> int:
    print(f"m4train: {sentence}", file=sys.stderr)
    return USAGE_EXIT


def _close(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f", did you mean {close[0]}" if close else ""


def _help() -> str:
    lines = [
        "m4train trains the Idefics family of vision-language models.",
        "",
        "usage: m4train COMMAND [overrides]",
        "",
    ]
    lines += [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "`m4train COMMAND --help` lists the configuration groups. A first run: m4train train experiment=digits_pretrain",
    ]
    return "\n".join(lines)


def _command_help(name: str, command: Command) -> str:
    lines = [f"m4train {name}: {command.summary}", "", f"usage: m4train {name} {command.usage}"]
    if "key=value" in command.usage:
        from m4train.config.compose import groups

        lines += ["", "groups:"]
        lines += [f"  {group + '=':<12} {', '.join(choices)}" for group, choices in groups().items()]
        lines += [
            "",
            "keys: any key of these groups, such as trainer.max_steps=50 optimizer.lr=1e-4 data.num_workers=4",
        ]
        lines += ["      seed=0  run_dir=runs/NAME  resume=auto|never|CHECKPOINT"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
