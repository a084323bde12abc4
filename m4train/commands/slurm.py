"""`m4train launch slurm`: submits launch/slurm/train.sbatch for the run that `m4train train` would start here, or for
`m4train evaluate run_dir=RUN follow=true`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from m4train.commands.arguments import TRAINS, Composed
from m4train.commands.slurm_job import FOLDER, JOB, JOBS, Job, job_text, read_site, write_job
from m4train.commands.slurm_watch import check_alone
from m4train.commands.sweep import points_of
from m4train.config import Config
from m4train.config.compose import load_config, load_stages, resource_folder, save_config
from m4train.config.packages import check_packages
from m4train.config.showing import show
from m4train.config.stages import Staged
from m4train.errors import ConfigError
from m4train.run_files import CONFIG

POINTS = "sweep.points"  # a line for each run of an array: what `m4train train` gets


def submit(asked: Composed, arguments: list[str], nodes: int, parallel: int | None, dry_run: bool) -> int:
    """Checks the configuration here, writes the job into run_dir/slurm, submits it, and prints what sbatch answers; returns 0.

    `arguments` are overrides and options of sbatch, which begin with `--` and win over those of the site. A sweep (-m) is an
    array of jobs, `parallel` of them at a time. With `dry_run` the job is shown alone. launch.processes is the number of
    processes, and of GPUs, of each node. Raises ConfigError for a configuration that cannot work, if a package that it needs or sbatch is missing, or if it refuses.
    """
    dry_run, arguments = dry_run or "dry_run=true" in arguments, [a for a in arguments if not a.startswith("dry_run=")]
    if arguments[:1] == ["evaluate"]:
        return _evaluation(nodes, arguments[1:], dry_run)
    if asked.cfg is not None or asked.info is not None:
        return show(asked, [argument for argument in arguments if not argument.startswith("--")])
    options = [argument for argument in arguments if argument.startswith("--")]
    overrides = [argument for argument in arguments if not argument.startswith("--")]
    if asked.multirun:
        folder, points, config = _array(asked, overrides)
        _check(config, nodes)
        array = f"--array=0-{len(points) - 1}{f'%{parallel}' if parallel else ''}"
        file = (folder / POINTS).resolve()
        job = Job(None, [*_sizes(nodes, config.launch.processes), array, *options], ["--points", str(file)])
        if not dry_run:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(shlex.join(point) + "\n" for point in points), encoding="utf-8")
        return _submitted(job, folder, JOB, dry_run)
    staged = load_stages(overrides, asked.where())
    for config in staged.configs:
        _check(config, nodes)
    launch = staged.configs[0].launch
    sizes = [*_sizes(nodes, launch.processes), *options]
    limits = (launch.attempts, launch.exclude_bad_nodes, launch.chain > 1)
    job = Job(staged.folder, sizes, [*asked.again(), *overrides], *limits)
    if dry_run:
        print(_text(job), end="")
        return 0
    _submit_all(staged, job, launch.chain)
    return 0


def _check(config: Config, nodes: int) -> None:
    check_packages(config, TRAINS)
    if config.engine.name == "single" and (nodes, config.launch.processes) != (1, 1):
        raise ConfigError(
            "engine.name is single, but the job starts several processes: choose engine=ddp, fsdp2 or zero1 to zero3, or "
            "--nodes 1 launch.processes=1."
        )


def _submit_all(staged: Staged, job: Job, chain: int) -> None:
    """Writes the job with its configurations and submits it `chain` times, each to start when the one before has ended."""
    _need_sbatch()
    if not any(option.startswith("--dependency") for option in job.options):
        check_alone(staged.folder)
    path = write_job(staged.folder, _text(job))
    for config in staged.configs:
        save_config(config, path.with_name(CONFIG if config.stage is None else f"{config.stage}-{CONFIG}"))
    before: str | None = None
    for _ in range(chain):
        after = [] if before is None else [f"--dependency=afterany:{before}"]
        said = _sbatch([*after, str(path)])
        print(said)
        found = re.search(r"(\d+)\s*$", said)
        before = found[1] if found else None
        if before is not None:
            with (staged.folder / FOLDER / JOBS).open("a", encoding="utf-8") as file:
                file.write(f"{before}\n")


def _array(asked: Composed, overrides: list[str]) -> tuple[Path, list[list[str]], Config]:
    """The folder of a sweep, what `m4train train` gets for each of its runs, and the last one's configuration. Raises ConfigError
    for a run that cannot work before any is queued, and for a chain."""
    folder, points = points_of(asked, overrides)
    configs = [load_config(_overrides(point), asked.where()) for point in points]
    if (chain := configs[-1].launch.chain) > 1:
        raise ConfigError(
            f"launch.chain is {chain}, but the jobs of a sweep are an array, which is submitted once: leave it out."
        )
    return folder, points, configs[-1]


def _evaluation(nodes: int, arguments: list[str], dry_run: bool) -> int:
    """A job that follows a run: it is checked here as far as it can be before it starts."""
    from m4train.commands.benchmark import engine_config
    from m4train.commands.follow import Watch, given_of

    options = [argument for argument in arguments if argument.startswith("--")]
    words = [argument for argument in arguments if not argument.startswith("--")]
    given = given_of(words)
    run_dir = Watch(given).run_dir
    config = engine_config(given, run_dir)
    if config.engine.name == "single" and nodes != 1:
        raise ConfigError(
            "engine is single, but the job starts several processes: choose engine=ddp, fsdp2 or zero1 to zero3."
        )
    sizes = ["--job-name=m4train-evaluate", *_sizes(nodes, config.launch.processes or 1)]
    job = Job(None, [*sizes, *options], words, command="evaluate")
    return _submitted(job, Path(run_dir), "evaluate.sbatch", dry_run)


def _submitted(job: Job, folder: Path, name: str, dry_run: bool) -> int:
    """Writes the job as `name` into `folder`, submits it, and prints what sbatch answers, or shows it alone; returns 0."""
    if dry_run:
        print(_text(job), end="")
        return 0
    _need_sbatch()
    print(_sbatch([str(write_job(folder, _text(job), name))]))
    return 0


def _text(job: Job) -> str:
    return job_text(_script().read_text(encoding="utf-8"), read_site(), job)


def _need_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on the PATH: `m4train launch slurm` works where jobs are submitted.")


def _sbatch(words: list[str]) -> str:
    """What sbatch answers. Raises ConfigError if it refuses."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(["sbatch", *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {' '.join((done.stderr or done.stdout).split())}.")
    return done.stdout.strip()


def _overrides(point: list[str]) -> list[str]:
    """Without Hydra's options."""
    return [word for number, word in enumerate(point) if "=" in word and not point[number - 1].startswith("--")]


def _sizes(nodes: int, processes: int | None) -> list[str]:
    """Of the job; without launch.processes the script's own number of processes per node is used."""
    per_node = [f"--ntasks-per-node={processes}", f"--gpus-per-node={processes}"] if processes else []
    return [f"--nodes={nodes}", *per_node]


def _script() -> Path:
    return resource_folder("launch") / "slurm" / "train.sbatch"
