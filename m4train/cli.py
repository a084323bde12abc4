"""The command line: the table of commands, help, and exit codes. What a command does is in `commands/`."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from m4train.commands.arguments import (
    CORES,
    EVALUATES,
    JSON,
    OF_RUN,
    OVERRIDES,
    TRAINS,
    Command,
    Flag,
    Folder,
    Number,
    Word,
)
from m4train.errors import ConfigError, M4Error, of_the_system
from m4train.exits import FAILED, INTERRUPTED, REFUSED, interrupts_noted, say_once

COMMANDS = {
    "train": Command(
        "train a model, in stages if it lists some; continues by itself if run_dir holds a checkpoint",
        "stages:train_stages",
        reads="stages",
        processes=True,
        needs=TRAINS,
    ),
    "evaluate": Command(
        "held-out loss and scored answers of a checkpoint or a Hugging Face folder",
        "evaluate:evaluate",
        OF_RUN,
        reads="run",
        processes=True,
        needs=EVALUATES,
    ),
    "evaluate benchmarks": Command(
        "public benchmarks with their official metrics and prompts",
        "benchmark:benchmark",
        "benchmarks=[NAME,...] model=MODEL data=FOLDER [max_samples=N] [scoring=likelihood] [engine=NAME] [out=FOLDER]",
        reads="",
    ),
    "evaluate follow": Command(
        "benchmarks of each checkpoint of a run as it appears",
        "follow:follow",
        "run_dir=RUN follow=true|false [benchmarks={NAME: SAMPLES} data=FOLDER] [engine=NAME] [idle=SECONDS]",
        reads="",
    ),
    "evaluate lmms": Command(
        "tasks of lmms-eval with a model of m4train, if it is installed",
        "lmms:evaluate",
        "lmms_tasks=[NAME,...] model=MODEL [include=FOLDER] [limit=N] [out=FILE]",
        reads="",
    ),
    "evaluate compare": Command(
        "which answers changed between two results of benchmarks, with the paired difference of their scores",
        "compare_answers:compare",
        "A B [data=FOLDER] [out=FILE]",
        reads="",
    ),
    "generate": Command(
        "answer a question about images, a file of questions, or a person at the terminal",
        "generate:generate",
        "MODEL [QUESTION] [IMAGE ...] [--chat] [--questions FILE] [--OPTION ...]",
        parser="generate:parser",
        reads="",
    ),
    "export": Command(
        "write a checkpoint as a Hugging Face folder, adapters merged or apart, and push it to the Hub if asked",
        "export:export",
        f"[--push-to ORG/NAME [--private]] {OF_RUN}",
        (Word("push-to", "push_to", "ORG/NAME"), Flag("private", True)),
        reads="run",
        needs=("adapter",),
    ),
    "init": Command(
        "make a small project for data of your own: conf/, a script and a README",
        "init:init",
        "DIR [--data PATH] [--model NAME] [--epochs N]",
        reads="",
    ),
    "completion": Command(
        "print what a shell needs to complete commands, groups, choices and keys",
        "completion:completion",
        "bash|zsh|fish",
        reads="",
    ),
    "compare": Command(
        "a table of several runs, sorted by a metric, and one page of their curves",
        "compare:compare",
        "RUN RUN ... [--metric NAME] [--mode min|max] [--out FILE] [--json]",
        reads="",
    ),
    "sync": Command(
        "send what a run wrote for W&B while it was offline, its starts as one run",
        "sync:sync",
        "RUN [RUN ...]",
        reads="",
    ),
    "report": Command("write report.html into the run directory", "inspect:report", OF_RUN, reads="run", needs=()),
    "plan": Command(
        "show what a run would see, from the indexes alone: epochs, mixture, padding, balance",
        "inspect:plan",
        f"[--ranks N] [--json] {OVERRIDES}",
        (Number("ranks", 1), JSON),
    ),
    "estimate": Command(
        "say whether a configuration fits a GPU, and how long it takes, before it runs",
        "estimate:run",
        f"[--gpu NAME] [--ranks N] [--mfu SHARE] [--json] {OVERRIDES}",
        (Word("gpu"), Number("ranks", 1), Word("mfu"), JSON),
    ),
    "preview": Command(
        "write run_dir/preview.html, the first packs as the model sees them",
        "inspect:preview",
        f"[--packs N] {OVERRIDES}",
        (Number("packs", 4),),
    ),
    "validate": Command(
        "read every sample of all sources and report what is wrong; fails above data.max_bad_fraction",
        "inspect:validate",
        f"[--workers N] [--json] {OVERRIDES}",
        (Number("workers", CORES), JSON),
    ),
    "bench": Command(
        "measure the data side, stage by stage on one core and as a whole",
        "inspect:bench",
        f"[--packs N] [--json] {OVERRIDES}",
        (Number("packs", 32), JSON),
    ),
    "replay": Command(
        "show every sample of one step of a run, with the configuration it was started with",
        "inspect:replay",
        f"--step N [--json] run_dir=RUN | {OVERRIDES}",
        (Number("step", None, "the optimizer step to show: m4train replay --step N run_dir=RUN"), JSON),
        reads="run",
    ),
    "config": Command(
        "print the composed configuration, or explain one KEY: type, default, meaning, which modules read it",
        "config:config",
        f"[KEY ...] {OVERRIDES}",
        reads="",
    ),
    "data index": Command("build the indexes of all sources; an interrupted build goes on", "data:index"),
    "data stats": Command("print what every source holds, as JSON, from the indexes alone", "data:stats"),
    "data convert": Command(
        "write all sources as canonical shards, stored image bytes kept",
        "data:convert",
        f"--out FOLDER [--workers N] {OVERRIDES}",
        (
            Folder("out", "where the shards are written: m4train data convert --out FOLDER ...", "to"),
            Number("workers", 1),
        ),
    ),
    "pipeline": Command(
        "raw web pages and public datasets -> shards, by the steps of data_pipelines",
        "pipeline:pipeline",
        "NAME|FILE.yaml [key=value ...]",
        parser="pipeline:parser",
        reads="",
    ),
    "launch slurm": Command(
        "submit to SLURM the run that train would start, or an evaluation that follows one",
        "slurm:submit",
        f"[evaluate run_dir=RUN follow=true] [--nodes N] [--SBATCH_OPTION ...] {OVERRIDES}",
        reads="",
    ),
    "launch check": Command(
        "check processes, network, disk, versions and clocks before hours of queueing",
        "preflight:preflight",
        processes=True,
        needs=TRAINS,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 a run that failed, 2 a request that was refused, 3 a run that stopped
    early with a checkpoint, 130 an interrupt (exits.py)."""
    # Read when torch is imported: its threads then soon sleep while they wait for each other. To spin for long makes a step
    # many times as long if other programs want the same cores (benchmarks/README.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "help"
    try:
        if name in ("--version", "-V"):
            print(f"m4train {_version()}")
            return 0
        if not arguments:
            from m4train.commands.init import what_next

            print(what_next())
            return 0
        if name in ("-h", "--help", "help"):
            print(_help())
            return 0
        name, rest = _command_of(arguments)
        if any(argument in ("-h", "--help") for argument in rest):
            print(_command_help(name))
            return 0
        with interrupts_noted():
            return COMMANDS[name].run(name, rest)
    except ConfigError as error:
        say_once(f"m4train: {error}")
        return REFUSED
    except M4Error as error:
        say_once(f"m4train {name}: {error}")
        return FAILED
    except BrokenPipeError:  # whoever read the output has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except KeyboardInterrupt:
        say_once(
            f"m4train {name}: interrupted at once; what was written before is whole, and the same command goes on from it."
        )
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("M4TRAIN_DEBUG") == "1":
            raise
        say_once(f"m4train {name}: {of_the_system(error) or _unforeseen(error)}")
        return FAILED


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    import m4train

    try:
        return version("m4train")
    except PackageNotFoundError:  # a checkout that is not installed
        return m4train.__version__


def _unforeseen(error: Exception) -> str:
    """One sentence about an error that nothing here foresaw, whose traceback is kept in a file."""
    with tempfile.NamedTemporaryFile("w", prefix="m4train-", suffix=".txt", delete=False, encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} (where: {file.name}, or with M4TRAIN_DEBUG=1)"


def _command_of(arguments: list[str]) -> tuple[str, list[str]]:
    """The name of the command, of one word or two, and the arguments after it."""
    for key, word in (("follow", "follow"), ("lmms_tasks", "lmms"), ("benchmarks", "benchmarks")):
        if arguments[0] == "evaluate" and any(argument.startswith(f"{key}=") for argument in arguments):
            return f"evaluate {word}", arguments[1:]
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    first, actions = arguments[0], _actions(arguments[0])
    if not actions:
        raise ConfigError(f"{first!r} is not a command{_close(first)}; `m4train --help` lists them.")
    if any(argument in ("-h", "--help") for argument in arguments):
        return f"{first} {actions[0]}", ["--help"]
    raise ConfigError(f"{first} needs one of {', '.join(actions)}: m4train {first} ACTION [overrides].")


def _actions(group: str) -> list[str]:
    """The second words of the commands whose first word is `group`."""
    return [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]


def _close(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, [command.split()[0] for command in COMMANDS], n=1)
    return f", did you mean {close[0]}" if close else ""


# Two commands as people type them, for `m4train COMMAND --help`
EXAMPLES = {
    "train": (
        "train experiment=digits_pretrain trainer.max_steps=100",
        "train -m experiment=digits_pretrain optimizer.lr=1e-3,3e-3",
    ),
    "evaluate": ("evaluate run_dir=runs/mine", "evaluate run_dir=runs/mine evaluation.max_samples=100"),
    "export": ("export run_dir=runs/mine", "export run_dir=runs/mine export.dtype=bf16"),
    "plan": ("plan experiment=digits_pretrain --ranks 8", "plan run_dir=runs/mine --json"),
    "preview": ("preview experiment=digits_sft --packs 4", "preview run_dir=runs/mine"),
    "validate": ("validate experiment=digits_sft --workers 4", "validate run_dir=runs/mine --json"),
    "replay": ("replay --step 40 run_dir=runs/mine", "replay --step 40 run_dir=runs/mine --json"),
    "compare": ("compare runs/a runs/b", "compare runs/sweep --metric eval/loss"),
    "init": ("init mine --data train.json", "init mine --data shards/ --model smolvlm_500m --epochs 1"),
    "config": ("config trainer.save_every", "config experiment=digits_sft"),
}


def _keys_of(command: Command) -> list[str]:
    """The keys of the groups that a command reads, by their last words."""
    import textwrap

    from m4train.config.describe import all_keys

    groups = ("trainer", "schedule", *command.needs) if "optimizer" in command.needs else command.needs
    lines = []
    for group in groups:
        keys = [key.name.partition(".")[2] for key in all_keys() if key.name.startswith(f"{group}.") and not key.group]
        names = ", ".join(name for name in keys if "." not in name)
        lines += textwrap.wrap(f"  {group}.  {names}", 80, subsequent_indent=" " * 14)
    return [*lines, "", "`m4train config KEY` says what a key means."]


def _help() -> str:
    lines = [
        "m4train trains the Idefics family of vision-language models.",
        "",
        "usage: m4train COMMAND [overrides]",
        "",
    ]
    lines += [f"  {name:<14}{command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "`m4train COMMAND --help` lists the configuration groups. A first run: m4train train experiment=digits_pretrain",
    ]
    return "\n".join(lines)


def _command_help(name: str) -> str:
    family = [other for other in COMMANDS if other.split()[0] == name.split()[0]]
    lines: list[str] = []
    if (own := COMMANDS[name].parser_help()) is not None:
        return own
    for other in family:
        command = COMMANDS[other]
        lines += [f"m4train {other}: {command.summary}", "", f"usage: m4train {other} {command.usage}", ""]
        lines += [f"  m4train {example}" for example in EXAMPLES.get(other, ())] + [""] * (other in EXAMPLES)
    if "key=value" in COMMANDS[name].usage:
        from m4train.config.compose import groups

        lines += ["groups:"]
        lines += [f"  {group + '=':<12} {', '.join(choices)}" for group, choices in groups().items()]
        lines += [
            "",
            "keys: any key of these groups, such as trainer.max_steps=50 optimizer.lr=1e-4 data.num_workers=4",
        ]
        lines += ["      seed=0  run_dir=runs/NAME  resume=auto|never|CHECKPOINT", ""]
        lines += _keys_of(COMMANDS[name])
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(main())
