"""The commands of `m4train launch`, as `cli.py` lists them."""

from __future__ import annotations

import click

from m4train.commands.arguments import TRAINS, Command, number, option, words

LAUNCH = {
    "launch slurm": Command(
        "Submit to SLURM the run that train would start, a sweep of them, or an evaluation that follows one.",
        "slurm:submit",
        number("nodes", 1, "machines of the job"),
        option("--parallel", type=click.IntRange(1), metavar="N", help="with -m: runs at a time"),
        option("--dry-run", is_flag=True, help="show the job and submit nothing"),
        reads="asked",
        needs=TRAINS,
        examples=(
            "launch slurm --nodes 4 --time=24:00:00 experiment=digits_pretrain engine=fsdp2 launch.processes=8",
            "launch slurm -m experiment=digits_pretrain optimizer.lr=1e-3,3e-3",
        ),
    ),
    **{
        f"launch {word}": Command(
            summary,
            f"slurm_watch:{word}",
            words("arguments", "RUN"),
            reads="",
            examples=(f"launch {word} runs/mine", f"launch {word} run_dir=runs/mine"),
        )
        for word, summary in (
            ("status", "Show the jobs of a run on SLURM, and how far it has come."),
            ("logs", "Show the last lines of every rank of a run on SLURM, failed ones first."),
            ("stop", "End a run on SLURM, with a checkpoint."),
            ("interrupt", "Rehearse a preemption of a run on SLURM: a checkpoint, back into the queue, and on."),
        )
    },
    "launch node": Command(
        "Check this machine alone: GPUs, shared memory, data, indexes; a job does it first on every node.",
        "node_check:check_node",
        option("--out", metavar="FOLDER", help="where what was found is written"),
        option("--judge", metavar="FOLDER", help="compare what is in this folder instead, and name the bad nodes"),
        option("--nodes", metavar="NAMES", help="with --judge: all nodes, of which none may be missing"),
        examples=("launch node experiment=digits_pretrain", "launch node --judge nodes experiment=digits_pretrain"),
    ),
    "launch died": Command(
        "Say where a rank of a run was when it died, and which samples one died with before; a job asks it.",
        "slurm_watch:say_died",
        click.Argument(["outcome"], metavar="FOLDER"),
        click.Argument(["rank"], metavar="RANK", type=click.IntRange(0)),
        reads="",
        examples=("launch died m4train-logs/7/outcome-0-0 3", "launch died m4train-logs/7/outcome-0-0 0"),
    ),
    "launch check": Command(
        "Check processes, network, disk, versions and clocks before hours of queueing.",
        "preflight:preflight",
        processes=True,
        needs=TRAINS,
        examples=("launch check experiment=digits_pretrain", "launch check engine=fsdp2 launch.processes=8"),
    ),
}
