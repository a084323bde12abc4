"""A data pipeline on a real SLURM of virtual nodes: the bytes of the local executor, stage after stage."""

import sys

import pytest

from data_pipelines.frame.config import load_pipeline
from data_pipelines.frame.runner import run_pipeline
from tests.helpers.pipelines import digests
from tests.unit.data_pipelines.frame.test_runner import YAML

pytestmark = pytest.mark.slow


def test_slurm_gives_the_bytes_of_the_local_executor_and_a_failed_rank_holds_up_the_next_stage(jobs, tmp_path):
    (tmp_path / "numbers.yaml").write_text(YAML)
    assert run_pipeline(load_pipeline(str(tmp_path / "numbers.yaml"), [f"folder={tmp_path / 'local'}"])) == 0
    partition = jobs.run("sinfo", "--noheader", "--format=%R").stdout.split()[0]
    command = [sys.executable, "-m", "m4train", "pipeline", tmp_path / "numbers.yaml", f"folder={tmp_path / 'slurm'}"]
    command += [
        "executor=slurm",
        f"executor.partition={partition}",
        "executor.mem_per_cpu_gb=0.25",
        "executor.wait=true",
    ]
    command += ["executor.tasks_per_job=2", "odd.fail_at=5", f"odd.once={tmp_path / 'failed'}"]
    failed = jobs.run(*command, check=False)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "rank 1: ValueError: page 5 cannot be read" in failed.stderr.replace("\n", " ")
    done = {path.name for path in (tmp_path / "slurm" / "even" / "ranks" / "completions").iterdir()}
    assert done == {"00000", "00002", "00003"}
    again = jobs.run(*command, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert digests(tmp_path / "slurm") == digests(tmp_path / "local")
