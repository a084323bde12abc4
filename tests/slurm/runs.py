"""Runs on the virtual cluster: submitting them, what they have trained, and disturbing them at a chosen moment."""

from __future__ import annotations

import json
import os
import re
import time

import psutil

from tests.end_to_end.conftest import small_run

STEPS = 16

# Read by every Python whose PYTHONPATH names its folder. PAUSE, as "update:2", makes every beat of a stage take so many seconds
# longer, so that something can be done meanwhile; DEADLY, as "1:3", kills rank 1 when it comes to a micro-batch of step 3.
SITE = """
import os, signal, time
from m4train import deaths
usual = deaths.Note.write
stages, pause = (os.environ.get("PAUSE") or "none:0").split(":")
rank, deadly = (os.environ.get("DEADLY") or "none:0").split(":")
def write(self, stage, step, documents=(), ahead=False):
    usual(self, stage, step, documents, ahead)
    if stage == stages:
        time.sleep(float(pause))
    if step == int(deadly) and documents and os.environ.get("RANK") == rank:
        os.kill(os.getpid(), signal.SIGKILL)
deaths.Note.write = write
"""


def disturbed(jobs, **variables):
    """The same jobs, of which every process is disturbed as `variables` say."""
    (jobs.folder / "site").mkdir(exist_ok=True)
    (jobs.folder / "site" / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(jobs.folder / "site"), jobs.environment["PYTHONPATH"]])
    return type(jobs)({**jobs.environment, "PYTHONPATH": path, **variables}, jobs.folder)


class Run:
    """A run that is submitted into the folder of `jobs`, of one process on each of `nodes` nodes."""

    def __init__(self, jobs, digits_root, *options, nodes=1, name="run", check=True):
        self.jobs, self.folder = jobs, jobs.folder / name
        engine = "engine=single" if nodes == 1 else "engine=ddp"
        small = [word for word in small_run(digits_root, jobs.folder) if not word.startswith("run_dir=")]
        small += [f'run_dir="{self.folder}"', f"trainer.max_steps={STEPS}", "trainer.save_every=1", engine]
        command = ["launch", "slurm", f"--nodes={nodes}", "--cpus-per-task=1", "launch.processes=1"]
        self.answer = jobs.m4train(*command, *small, *options, check=check)
        self.ids = re.findall(r"Submitted batch job (\d+)", self.answer.stdout)
        self.job = self.ids[0] if self.ids else None

    def rows(self):
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [json.loads(line) for line in lines]

    def steps(self):
        return [row["step"] for row in self.rows()]

    def losses(self):
        """The losses of all steps, each of which was made once."""
        assert self.steps() == list(range(1, STEPS + 1)), self.said()
        return [row["loss"] for row in self.rows()]

    def said(self):
        return self.jobs.said(self.job)

    def until(self, condition, seconds=900):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def begun(self, steps=2):
        """Waits until some steps are made."""
        self.until(lambda: len(self.steps()) >= steps)

    def nodes(self):
        """The nodes of the job, that of the batch script first."""
        shown = self.jobs.run("scontrol", "show", "job", self.job).stdout
        listed = re.search(r" NodeList=(\S+)", shown)[1]
        return self.jobs.run("scontrol", "show", "hostnames", listed).stdout.split()

    def ranks(self, number):
        """The processes that are a rank of the run."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                ours = any(str(self.folder) in word for word in words) and "train" in words and "python" in words[0]
                if ours and process.environ().get("RANK") == str(number):
                    found.append(process)
            except (psutil.Error, IndexError):
                continue
        return found
