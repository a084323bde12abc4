"""datatrove's executors, made quiet, with a rank that failed not counted as done, and a local one that outlives its ranks."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.stats import PipelineStats
from loguru import logger

from data_pipelines.frame.config import ExecutorConfig
from data_pipelines.frame.rank import RANKS, RankRun, Stage, failure_path, record_failure

logger.disable("datatrove")  # in every process, as each of them imports this module to get its executor
_QUIET = 1  # datatrove's local rank: of 0 every message goes to the terminal, of others only errors


class _Stages(PipelineExecutor):
    """What all executors share."""

    stage_folder: Path

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        return super()._run_for_rank(rank, _QUIET, node_rank)

    def mark_rank_as_completed(self, rank: int) -> None:
        if not failure_path(self.stage_folder, rank).exists():
            super().mark_rank_as_completed(rank)


class LocalExecutor(_Stages, LocalPipelineExecutor):
    """A process for each rank, so many at the same time as there are workers. One that dies is recorded as failed; datatrove's own
    pool would wait for it forever."""

    def run(self) -> None:
        waiting = self.get_incomplete_ranks(range(self.tasks))
        if self.workers == 1:
            for rank in waiting:
                self._run_for_rank(rank)
            return
        context = multiprocessing.get_context(self.start_method)
        if self.start_method == "forkserver":
            context.set_forkserver_preload([__name__])
        running: dict[Any, tuple[int, Any]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    rank = waiting.pop(0)
                    process = context.Process(target=self._run_for_rank, args=(rank,))
                    process.start()
                    running[process.sentinel] = (rank, process)
                for sentinel in wait(list(running)):
                    self._ended(*running.pop(sentinel))
        finally:
            for _, process in running.values():
                process.kill()
                process.join()

    def _ended(self, rank: int, process: Any) -> None:
        process.join()
        if process.exitcode:
            how = f"by signal {-process.exitcode}" if process.exitcode < 0 else f"with exit code {process.exitcode}"
            record_failure(self.stage_folder, rank, f"the process of rank {rank} ended {how}")


class SlurmExecutor(_Stages, SlurmPipelineExecutor):
    """Jobs of an array. A job whose rank failed ends with an error, so that those that wait for it do not start."""

    def run(self) -> None:
        super().run()
        if "SLURM_ARRAY_TASK_ID" in os.environ and any(self.stage_folder.glob("failures/*.json")):
            mine = {rank for rank in range(self.tasks) if failure_path(self.stage_folder, rank).exists()}
            if mine & set(self._ranks_here):
                sys.exit(1)

    _ranks_here: tuple[int, ...] = ()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        self._ranks_here = (*self._ranks_here, rank)
        return super()._run_for_rank(rank, local_rank, node_rank)

    def launch_merge_stats(self) -> None:
        """Nothing: the runner merges the numbers of all attempts."""


def executor_of(stage: Stage, config: ExecutorConfig, depends: Any = None) -> Any:
    """The executor of a stage, ready to `run`. `depends`: that of the stage before, which SLURM waits for."""
    common: dict[str, Any] = {
        "pipeline": [RankRun(stage)],
        "tasks": stage.tasks,
        "logging_dir": str(stage.folder / RANKS),
        "workers": config.workers,
    }
    made: Any
    if config.kind == "local":
        made = LocalExecutor(**common)
    elif config.kind == "ray":
        made = _ray(common, config)
    else:
        made = SlurmExecutor(
            **common,
            time=config.time,
            partition=config.partition,
            qos=config.qos or None,
            cpus_per_task=config.cpus_per_task,
            mem_per_cpu_gb=config.mem_per_cpu_gb,
            tasks_per_job=config.tasks_per_job,
            max_array_size=config.max_array_size,
            job_name=stage.name,
            env_command=config.env_command or _environment(),
            sbatch_args={
                "mem-per-cpu": f"{round(config.mem_per_cpu_gb * 1024)}M",  # whole numbers alone are taken
                "kill-on-invalid-dep": "yes",  # jobs that wait for one that failed do not wait forever
                **config.sbatch_args,
            },
            depends=depends,
        )
    made.stage_folder = stage.folder
    return made


def _ray(common: dict[str, Any], config: ExecutorConfig) -> Any:
    from m4train.config.packages import need

    need("ray", "executor=ray", "executor=local")
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    class RayExecutor(_Stages, RayPipelineExecutor):
        pass

    if not ray.is_initialized():
        ray.init(address=config.address, log_to_driver=False, configure_logging=False)
    return RayExecutor(**common, cpus_per_task=config.cpus_per_task, mem_per_cpu_gb=config.mem_per_cpu_gb)


def _environment() -> str:
    """Commands after which a job finds this Python, its programs, and this package."""
    lines = [f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH"]
    root = str(Path(__file__).resolve().parents[2])
    lines.append(f"export PYTHONPATH={shlex.quote(root)}${{PYTHONPATH:+:$PYTHONPATH}}")
    return "\n".join(lines)
