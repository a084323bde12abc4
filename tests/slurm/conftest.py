import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "launch" / "slurm" / "virtual_cluster.sh"
SHARED = "WHY_SHARED"  # why the nodes of a cluster share one address; empty if they do not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A SLURM of four virtual nodes; the environment in which srun, sbatch and squeue reach it."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not _find(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)")
    if os.getuid() != 0:
        pytest.skip("slurmd has to be started as root")
    folder = tmp_path_factory.mktemp("slurm")
    done = start_cluster(folder)
    if "belongs to a SLURM already" in done.stderr or "uses a SLURM already" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    try:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as in an activated environment
        settings = {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        yield {**os.environ, **settings, "PATH": path, SHARED: done.stderr.strip()}
    finally:
        stop_cluster(folder)


def start_cluster(folder, *through, nodes=4, owner=None):
    """`virtual_cluster.sh start`, by a program that runs it if one is given; it is stopped with the process `owner`, by default
    this one."""
    command = [*through, CLUSTER, "start", folder, str(nodes)]
    environment = {**os.environ, "OWNER": str(owner or os.getpid())}
    environment.pop("SLURM_CONF", None)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def stop_cluster(folder):
    subprocess.run([CLUSTER, "stop", folder], capture_output=True, timeout=120)


def on_node(cluster, *command):
    """Runs a command as one of the nodes of a cluster."""
    subprocess.run([CLUSTER, "on", Path(cluster["SLURM_CONF"]).parent, *command], check=True, timeout=120)


@pytest.fixture
def spaces(cluster):
    """Skips where the nodes of the cluster have no addresses of their own."""
    if cluster[SHARED]:
        pytest.skip(cluster[SHARED])


def _find(program):
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


class Jobs:
    """Jobs of one cluster, submitted from one folder."""

    def __init__(self, environment, folder):
        self.environment, self.folder = environment, folder

    def run(self, *command, check=True):
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=600,  # a guard against hangs; other work may slow this machine down
            cwd=self.folder,
            env=self.environment,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def m4train(self, *arguments, check=True):
        return self.run(sys.executable, "-m", "m4train", *arguments, check=check)

    def state(self, job):
        shown = dict(
            word.split("=", 1) for word in self.run("scontrol", "show", "job", job).stdout.split() if "=" in word
        )
        return shown["JobState"], int(shown["Restarts"])

    def wait(self, job, until=("COMPLETED",), seconds=900):
        """Until the job is in one of the states; a job that failed fails the test with what it and its ranks said."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)[0]) not in until:
            ended = state in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
            assert not ended, f"{state}\n{self.said(job)}"
            assert time.monotonic() < deadline, f"still {state}\n{self.said(job)}"
            time.sleep(0.2)

    def said(self, job):
        logs = [*self.folder.glob(f"*-{job}.log"), *sorted(self.folder.glob(f"m4train-logs/{job}/*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in logs)


@pytest.fixture
def jobs(cluster, tmp_path):
    return Jobs(cluster, tmp_path)
