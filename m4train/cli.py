"""The command line: the table of commands, help, and exit codes. What a command does is in `commands/`."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

import click

from m4train.commands.arguments import CORES, EVALUATES, JSON, TRAINS, Command, number, option, words
from m4train.commands.launch_table import LAUNCH
from m4train.errors import ConfigError, M4Error, of_the_system
from m4train.exits import FAILED, INTERRUPTED, REFUSED, interrupts_noted, say_once

COMMANDS = {
    "train": Command(
        "Train a model, in stages if it lists some; continues by itself if run_dir holds a checkpoint.",
        "stages:train_stages",
        reads="stages",
        processes=True,
        needs=TRAINS,
        examples=(
            "train experiment=digits_pretrain trainer.max_steps=100",
            "train -m experiment=digits_pretrain optimizer.lr=1e-3,3e-3",
        ),
    ),
    "evaluate": Command(
        "Held-out loss and scored answers of a checkpoint or a Hugging Face folder.",
        "evaluate:evaluate",
        reads="run",
        processes=True,
        needs=EVALUATES,
        examples=("evaluate run_dir=runs/mine", "evaluate run_dir=runs/mine evaluation.max_samples=100"),
    ),
    "evaluate benchmarks": Command(
        "Public benchmarks with their official metrics and prompts.",
        "benchmark:benchmark",
        words("arguments", "benchmarks=[NAME,...] model=MODEL data=FOLDER [key=value ...]"),
        reads="",
        more="benchmark:KEYS",
        examples=(
            "evaluate benchmarks=[docvqa] model=runs/mine data=benchmarks",
            "evaluate benchmarks=[mmstar] model=runs/mine data=benchmarks max_samples=100",
        ),
    ),
    "evaluate follow": Command(
        "Benchmarks of each checkpoint of a run as it appears.",
        "follow:follow",
        words("arguments", "run_dir=RUN follow=true|false [key=value ...]"),
        reads="",
        more="follow:KEYS",
        examples=(
            "evaluate follow=true run_dir=runs/mine",
            "evaluate follow=false run_dir=runs/mine data=benchmarks",
        ),
    ),
    "evaluate lmms": Command(
        "Tasks of lmms-eval with a model of m4train, if it is installed.",
        "lmms:evaluate",
        words("arguments", "lmms_tasks=[NAME,...] model=MODEL [key=value ...]"),
        reads="",
        more="lmms:KEYS",
        examples=(
            "evaluate lmms_tasks=[mmmu_val] model=runs/mine",
            "evaluate lmms_tasks=[mme] model=runs/mine limit=50 out=mme.json",
        ),
    ),
    "evaluate compare": Command(
        "Which answers changed between two results of benchmarks, with the paired difference of their scores.",
        "compare_answers:compare",
        words("arguments", "A B [data=FOLDER] [out=FILE]"),
        reads="",
        examples=(
            "evaluate compare runs/a/benchmarks runs/b/benchmarks",
            "evaluate compare runs/a/benchmarks runs/b/benchmarks data=benchmarks out=changed.html",
        ),
    ),
    "generate": Command(
        "Answer a question about images, a file of questions, or a person at the terminal.",
        "generate:generate",
        click.Argument(["model"], metavar="MODEL"),
        click.Argument(["question"], metavar="[QUESTION]", required=False),
        words("images", "[IMAGE ...]"),
        option("--system", metavar="TEXT", help="what is said before the conversation"),
        option("--questions", metavar="FILE", help="JSON lines with `question` and `images`, or `messages`"),
        option("--answers", metavar="FILE", help="where the lines of --questions go, each with its `answer`"),
        option("--chat", is_flag=True, help="turn by turn; /image PATH adds a picture, /quit ends"),
        number("batch-size", 8, "questions of a file that are answered together"),
        number("max-new-tokens", 256, "tokens of an answer at most"),
        option("--sample", is_flag=True, help="draw each token by its probability, not the most likely one"),
        option("--temperature", type=float, metavar="X", help="with --sample: logits are divided by it"),
        option("--top-p", type=float, metavar="X", help="with --sample: the fewest tokens of this share"),
        option("--top-k", type=int, metavar="N", help="with --sample: among this many most likely tokens"),
        number("beams", 1, "width of a beam search"),
        option("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: less of what was said"),
        option("--seed", type=int, default=0, metavar="N", help="of what --sample draws"),
        option("--device", default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda:1, ..."),
        option(
            "--dtype",
            default="auto",
            type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
            help="of the weights; auto: half on a GPU",
        ),
        option("--4bit", "four_bits", is_flag=True, help="store the linear layers in 4 bits (needs bitsandbytes)"),
        option("--no-stream", is_flag=True, help="print an answer when it is whole"),
        reads="",
        examples=(
            'generate runs/mine "What is this?" photo.jpg',
            "generate runs/mine --questions asked.jsonl --answers answered.jsonl",
        ),
    ),
    "export": Command(
        "Write a checkpoint as a Hugging Face folder, adapters merged or apart, and push it to the Hub if asked.",
        "export:export",
        option("--push-to", metavar="ORG/NAME", help="the repository of the Hub that it is pushed to"),
        option("--private", is_flag=True, help="with --push-to: a repository that is made is private"),
        reads="run",
        needs=("adapter",),
        examples=(
            "export run_dir=runs/mine export.dtype=bf16",
            "export run_dir=runs/mine --push-to ORG/NAME --private",
        ),
    ),
    "init": Command(
        "Make a small project for data of your own: conf/, a script and a README.",
        "init:init",
        click.Argument(["place"], metavar="DIR"),
        option("--data", metavar="PATH", help="the file or folder of your data"),
        option("--model", metavar="NAME", help="the model to start from, a choice of model="),
        option("--epochs", metavar="N", help="passes over the data"),
        reads="",
        examples=("init mine --data train.json", "init mine --data shards/ --model smolvlm_500m --epochs 1"),
    ),
    "completion": Command(
        "Print what a shell needs to complete commands, groups, choices and keys.",
        "completion:completion",
        click.Argument(["shell"], metavar="bash|zsh|fish", required=False),
        option("--words", "line", hidden=True),
        reads="",
        examples=("completion bash >> ~/.bashrc", "completion fish | source"),
    ),
    "compare": Command(
        "A table of several runs, sorted by a metric, and one page of their curves.",
        "compare:compare",
        words("given", "RUN RUN ...", required=True),
        option("--metric", metavar="NAME", help="a value of metrics.jsonl; eval/loss, if it is logged, or loss"),
        option("--mode", type=click.Choice(["min", "max"]), default="min", help="whether small or large is good"),
        option("--out", metavar="FILE", default="compare.html", show_default=True, help="the page of curves"),
        JSON,
        reads="",
        examples=("compare runs/a runs/b", "compare runs/sweep --metric eval/loss"),
    ),
    "watch": Command(
        "Show runs in a browser while they train, each change at once; several over each other.",
        "watch:watch",
        words("given", "RUN RUN ...", required=True),
        option("--port", type=click.IntRange(0, 65535), default=0, metavar="N", help="of the loopback; 0: a free one"),
        option("--open", "open_browser", is_flag=True, help="open the browser"),
        reads="",
        examples=("watch runs/mine", "watch runs/sweep --port 8000"),
    ),
    "report": Command(
        "Write report.html into the run directory.",
        "inspect:report",
        reads="run",
        needs=(),
        examples=("report run_dir=runs/mine", "report resume=runs/mine/checkpoints/step-000100"),
    ),
    "sync": Command(
        "Send what a run wrote for W&B while it was offline, its starts as one run.",
        "sync:sync",
        words("arguments", "RUN [RUN ...]"),
        reads="",
        examples=("sync runs/mine", "sync runs/sweep/a runs/sweep/b"),
    ),
    "plan": Command(
        "Show what a run would see, from the indexes alone: epochs, mixture, padding, balance.",
        "inspect:plan",
        number("ranks", 1, "processes that the packs are shared by"),
        option("--page", metavar="FILE", help="write it as an HTML page, too"),
        JSON,
        examples=("plan experiment=digits_pretrain --ranks 8", "plan run_dir=runs/mine --json"),
    ),
    "estimate": Command(
        "Say whether a configuration fits a GPU, and how long it takes, before it runs.",
        "estimate:run",
        option("--gpu", metavar="NAME", help="the kind of GPU, such as h100"),
        number("ranks", 1, "GPUs"),
        option("--mfu", metavar="SHARE", help="the share of the peak that is reached, between 0 and 1"),
        option("--calibration", metavar="FILE", help="the estimate.json, or folder, of a run on such a GPU"),
        option("--what-if", is_flag=True, help="also what changes would need, and how much more would fit"),
        JSON,
        reads="shape",
        examples=(
            "estimate experiment=sft/smolvlm_2b_lora --gpu rtx4090",
            "estimate model=smolvlm_2b data=own engine=fsdp2 --gpu a100 --ranks 8 --mfu 0.4",
        ),
    ),
    "preview": Command(
        "Write run_dir/preview.html, the first packs as the model sees them.",
        "inspect:preview",
        number("packs", 4, "packs to show"),
        examples=("preview experiment=digits_sft --packs 4", "preview run_dir=runs/mine"),
    ),
    "validate": Command(
        "Read every sample of all sources and report what is wrong; fails above data.max_bad_fraction.",
        "inspect:validate",
        number("workers", CORES, "processes that read"),
        JSON,
        examples=("validate experiment=digits_sft --workers 4", "validate run_dir=runs/mine --json"),
    ),
    "bench": Command(
        "Measure the data side, stage by stage on one core and as a whole.",
        "inspect:bench",
        number("packs", 32, "packs to measure with"),
        JSON,
        examples=("bench experiment=digits_sft --packs 64", "bench run_dir=runs/mine data.num_workers=4 --json"),
    ),
    "replay": Command(
        "Show every sample of one step of a run, with the configuration it was started with.",
        "inspect:replay",
        number("step", None, "the optimizer step to show"),
        option("--losses/--no-losses", default=True, help="compute the loss of every document and token"),
        JSON,
        reads="run",
        examples=("replay --step 40 run_dir=runs/mine", "replay --step 40 run_dir=runs/mine --json"),
    ),
    "config": Command(
        "Print the composed configuration, or explain each KEY: type, default, meaning, which modules read it.",
        "config:config",
        reads="asked",
        examples=("config trainer.save_every", "config experiment=digits_sft"),
    ),
    "data index": Command(
        "Build the indexes of all sources; an interrupted build goes on.",
        "data:index",
        examples=(
            "data index experiment=digits_sft",
            "data index data=own 'data.sources={mine: {path: train.json, format: auto}}'",
        ),
    ),
    "data stats": Command(
        "Print what every source holds, as JSON, from the indexes alone.",
        "data:stats",
        examples=("data stats experiment=digits_sft", "data stats run_dir=runs/mine"),
    ),
    "data convert": Command(
        "Write all sources as canonical shards, stored image bytes kept.",
        "data:convert",
        option("--out", "folder", metavar="FOLDER", required=True, help="where the shards are written"),
        number("workers", 1, "processes that write"),
        examples=(
            "data convert experiment=digits_sft --out shards",
            "data convert data=own 'data.sources={mine: {path: train.json, format: auto}}' --out shards --workers 4",
        ),
    ),
    "pipeline": Command(
        "Raw web pages and public datasets -> shards, by the steps of data_pipelines.",
        "pipeline:pipeline",
        words("arguments", "NAME|FILE.yaml [key=value ...]"),
        reads="",
        more="pipeline:presets_help",
        examples=("pipeline web paths=[crawl/*.warc.gz] folder=shards", "pipeline dedup documents=shards/documents"),
    ),
    **LAUNCH,
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
        name, rest = command_of(arguments)
        with interrupts_noted():
            return COMMANDS[name].run(name, rest)
    except click.exceptions.Exit as shown:
        return shown.exit_code
    except click.UsageError as error:
        say_once(f"m4train {name}: {error.format_message()} `m4train {name} --help` says what there is.")
        return REFUSED
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


def command_of(arguments: list[str]) -> tuple[str, list[str]]:
    """The name of the command, of one word or two, and the arguments after it. Raises ConfigError if there is none."""
    for key, word in (("follow", "follow"), ("lmms_tasks", "lmms"), ("benchmarks", "benchmarks")):
        if arguments[0] == "evaluate" and any(argument.startswith(f"{key}=") for argument in arguments):
            return f"evaluate {word}", arguments[1:]
    for count in (2, 1):
        name = " ".join(arguments[:count])
        if name in COMMANDS:
            return name, arguments[count:]
    first = arguments[0]
    actions = [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]
    if not actions:
        raise ConfigError(f"{first!r} is not a command{_close(first)}; `m4train --help` lists them.")
    if {"-h", "--help"} & set(arguments):
        print(_help(f"{first} "))
        raise click.exceptions.Exit(0)
    raise ConfigError(f"{first} needs one of {', '.join(actions)}: m4train {first} ACTION [overrides].")


def _close(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, [command.split()[0] for command in COMMANDS], n=1)
    return f", did you mean {close[0]}" if close else ""


def _help(group: str = "") -> str:
    """The commands, or those of a group."""
    formatter = click.HelpFormatter(width=80)
    formatter.write("m4train trains the Idefics family of vision-language models.\n\n")
    formatter.write_usage("m4train", f"{group}COMMAND [options] [overrides]")
    with formatter.section("Commands"):
        formatter.write_dl([(name, one.summary) for name, one in COMMANDS.items() if name.startswith(group)])
    formatter.write("\n`m4train COMMAND --help` shows examples, options and keys.\n")
    formatter.write("A first run: m4train train experiment=digits_pretrain")
    return formatter.getvalue()


if __name__ == "__main__":
    sys.exit(main())
