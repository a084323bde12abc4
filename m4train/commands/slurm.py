"""`m4train launch slurm`: submits launch/slurm/train.sbatch for the run that `m4train train` would start here, or for
`m4train evaluate run_dir=RUN follow=true`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from m4train.commands.arguments import TRAINS, Number, hydra_options
from m4train.config.compose import load_config, resource_folder
from m4train.config.packages import check_packages
from m4train.config.showing import show
from m4train.errors import ConfigError


def submit(arguments: list[str]) -> int:
    """Checks the configuration here, submits it, and prints what sbatch answers; returns 0.

    `arguments` are `--nodes N`, Hydra's options, overrides, and options of sbatch, which begin with `--` and go before the script: they win over its own
    lines. launch.processes is the number of processes, and of GPUs, of each node. Raises ConfigError for a configuration
    that cannot work, if a package that it needs or sbatch is missing, or if it refuses.
    """
    nodes, arguments = Number("nodes", 1).take("launch slurm", arguments)
    if arguments[:1] == ["evaluate"]:
        return _evaluation(nodes, arguments[1:])
    asked, arguments = hydra_options(arguments)
    if asked.cfg is not None or asked.info is not None:
        return show(asked, [argument for argument in arguments if not argument.startswith("--")])
    options = [argument for argument in arguments if argument.startswith("--")]
    overrides = [argument for argument in arguments if not argument.startswith("--")]
    config = load_config(overrides, asked.where())
    check_packages(config, TRAINS)
    if config.engine.name == "single" and (nodes, config.launch.processes) != (1, 1):
        raise ConfigError(
            "engine.name is single, but the job starts several processes: choose engine=ddp, fsdp2 or zero1 to zero3, or "
            "--nodes 1 launch.processes=1."
        )
    return _submitted([*_sizes(nodes, config.launch.processes), *options], [*asked.again(), *overrides])


def _evaluation(nodes: int, arguments: list[str]) -> int:
    """A job that follows a run: it is checked here as far as it can be before it starts."""
    from m4train.commands.benchmark import engine_config
    from m4train.commands.follow import Watch, given_of

    options = [argument for argument in arguments if argument.startswith("--")]
    words = [argument for argument in arguments if not argument.startswith("--")]
    given = given_of(words)
    config = engine_config(given, Watch(given).run_dir)
    if config.engine.name == "single" and nodes != 1:
        raise ConfigError(
            "engine is single, but the job starts several processes: choose engine=ddp, fsdp2 or zero1 to zero3."
        )
    sizes = ["--job-name=m4train-evaluate", *_sizes(nodes, config.launch.processes or 1)]
    return _submitted([*sizes, *options], words, M4TRAIN_COMMAND="evaluate")


def _submitted(options: list[str], words: list[str], **variables: str) -> int:
    """Prints what sbatch answers; returns 0. Raises ConfigError if it is missing or refuses."""
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on the PATH: `m4train launch slurm` works where jobs are submitted.")
    command = ["sbatch", *options, str(_script()), *words]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {' '.join((done.stderr or done.stdout).split())}.")
    print(done.stdout.strip())
    return 0


def _sizes(nodes: int, processes: int | None) -> list[str]:
    """Of the job; without launch.processes the script's own number of processes per node is used."""
    per_node = [f"--ntasks-per-node={processes}", f"--gpus-per-node={processes}"] if processes else []
    return [f"--nodes={nodes}", *per_node]


def _script() -> Path:
    return resource_folder("launch") / "slurm" / "train.sbatch"
