"""Jobs of SLURM, with programs that stand for SLURM's own: what is submitted, what follows a failure, and what is watched."""

import json
import os
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from m4train.cli import main
from m4train.commands import node_check
from m4train.commands.slurm_job import Job, Site, job_text, read_site
from m4train.config.compose import load_config, resource_folder
from m4train.errors import ConfigError
from tests.helpers.data import documents, write_shards
from tests.helpers.processing import tokenizer_folder

SCRIPT = (resource_folder("launch") / "slurm" / "train.sbatch").read_text()
RUN = ["experiment=digits_pretrain", "logging=none", "launch.processes=1"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Writes a program onto the PATH; each call is noted in `calls` with its words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name, body="true"):
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


@pytest.fixture
def site(tmp_path, monkeypatch):
    path = tmp_path / "site.yaml"
    path.write_text(
        "sbatch: {partition: gpu, account: me, qos: low, constraint: h100}\nenvironment: [module load cuda]\n"
        "container: {kind: apptainer, image: /a b.sif, options: --bind /shared}\n"
    )
    monkeypatch.setenv("M4TRAIN_SITE", str(path))


def test_a_dry_run_shows_the_job_and_submits_nothing(site, programs, tmp_path, capsys):
    programs("sbatch")
    given = [*RUN, f"run_dir={tmp_path}/run", "launch.attempts=5", "name=a b", "engine=ddp"]
    assert main(["launch", "slurm", "--nodes", "2", "dry_run=true", "--time=01:00:00", *given]) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "calls").exists()
    lines = text.splitlines()
    for line in ("#SBATCH --partition=gpu", "#SBATCH --qos=low", "#SBATCH --nodes=2", "#SBATCH --time=01:00:00"):
        assert lines.index(line) < lines.index("set -euo pipefail")
    assert "module load cuda" in lines
    assert "inside=(apptainer exec --nv --bind /shared '/a b.sif')" in lines
    assert "attempts=5" in lines
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not (tmp_path / "run").exists()


SWEEP = ["-m", *RUN, "seed=1,2"]


@pytest.mark.parametrize("words", [SWEEP, ["evaluate", "run_dir={}", "follow=true"]])
@pytest.mark.parametrize("dry", [["--dry-run"], ["dry_run=true"], []])
def test_sweeps_and_evaluations_are_jobs_of_the_site_as_well(words, dry, site, programs, tmp_path, monkeypatch, capsys):
    programs("sbatch", "echo Submitted batch job 7")
    monkeypatch.chdir(tmp_path)
    if words is not SWEEP:
        (tmp_path / "run").mkdir()
        monkeypatch.setattr("m4train.commands.follow.Watch", lambda given: SimpleNamespace(run_dir=tmp_path / "run"))
        monkeypatch.setattr("m4train.commands.benchmark.engine_config", lambda *_: load_config(RUN))
        words = [word.format(tmp_path / "run") for word in words]
    first, *rest = words
    assert main(["launch", "slurm", *([first, *dry] if first == "evaluate" else [*dry, first]), *rest]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "calls").exists() == (not dry)
    if not dry:
        (call,) = calls(tmp_path)
        text = (tmp_path / call.split()[1]).read_text()
    assert not list(tmp_path.rglob("*.points" if dry else "nothing"))
    for line in ("#SBATCH --partition=gpu", "#SBATCH --account=me", "module load cuda"):
        assert line in text.splitlines()
    assert "inside=(apptainer exec --nv --bind /shared '/a b.sif')" in text
    assert ("export M4TRAIN_COMMAND=evaluate" in text) == (first == "evaluate")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_options_of_a_site_may_be_words_alone():
    options = {"exclusive": True, "contiguous": None, "spread-job": False, "time": "1-00:00:00"}
    head = job_text(SCRIPT, Site(options), Job(Path("run"), [], []))
    own = [line for line in head.splitlines() if line.startswith("#SBATCH ")][-3:]
    assert own == ["#SBATCH --exclusive", "#SBATCH --contiguous", "#SBATCH --time=1-00:00:00"]


def test_what_is_submitted_lies_in_the_run_with_configuration_and_code(programs, tmp_path, capsys):
    programs("sbatch", f'n=$(wc -l < {tmp_path}/calls); echo "Submitted batch job $((40 + n))"')
    given = [*RUN, f"run_dir={tmp_path}/run", "launch.chain=3", "launch.exclude_bad_nodes=true"]
    assert main(["launch", "slurm", *given]) == 0
    job = tmp_path / "run" / "slurm" / "job.sbatch"
    assert calls(tmp_path) == [
        f"sbatch {job}",
        f"sbatch --dependency=afterany:41 {job}",
        f"sbatch --dependency=afterany:42 {job}",
    ]
    assert (job.parent / "jobs").read_text().split() == ["41", "42", "43"]
    assert "exclude_bad_nodes=yes\nchained=yes\n" in job.read_text()
    assert (job.parent / "git.txt").read_text().strip()
    assert "digits_pretrain" in (job.parent / "config.yaml").read_text()
    assert capsys.readouterr().out.count("Submitted batch job") == 3


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("--exclusive", "--exclusive"),
        ("--time=1-00:00:00", "--time=1-00:00:00"),
        ("--nodelist=n[1-3,7]", "--nodelist=n[1-3,7]"),
        ("--job-name=my own job", "--job-name='my own job'"),
        ("--comment=ask #12", "--comment='ask #12'"),
        ("--output=logs/%x-%j.log", "--output=logs/%x-%j.log"),
    ],
)
def test_options_of_sbatch_stay_one_word(given, line):
    text = job_text(SCRIPT, Site(), Job(Path("run"), [given], [], 3, False))
    assert f"#SBATCH {line}" in text.splitlines()


def test_an_option_over_two_lines_is_refused():
    with pytest.raises(ConfigError, match="--comment has a line break"):
        job_text(SCRIPT, Site(), Job(Path("run"), ["--comment=a\nb"], [], 3, False))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partion: gpu", "partion is not one of sbatch, environment, container"),
        ("container: {kind: docker, image: x}", "container needs kind (pyxis or apptainer)"),
        ("sbatch: [", "is not valid YAML"),
        ("sbatch: [gpu]", "sbatch must be options of sbatch with their values"),
        ("sbatch: {time: [1]}", "sbatch must be options of sbatch with their values"),
        ("environment: module load cuda", "environment must be a list of lines"),  # or each letter would be one
        ("environment: [{export A: b}]", "environment must be a list of lines"),
        ("container: x.sif", "container must be kind, image and options"),
        ("container: {kind: pyxis, image: [x]}", "container must be kind, image and options"),
    ],
)
def test_a_wrong_site_is_refused(text, said, tmp_path, monkeypatch):
    (tmp_path / "site.yaml").write_text(text)
    monkeypatch.setenv("M4TRAIN_SITE", str(tmp_path / "site.yaml"))
    with pytest.raises(ConfigError) as refused:
        read_site()
    assert said in str(refused.value)


def test_the_example_of_a_site_is_one(monkeypatch):
    monkeypatch.setenv("M4TRAIN_SITE", str(resource_folder("launch") / "slurm" / "site.example.yaml"))
    assert read_site().sbatch["partition"] == "gpu"


# The script itself, with an srun that stands for the ranks: `m4train launch node` is a program too.
@pytest.fixture
def job(programs, tmp_path, monkeypatch):
    def run(ranks, attempts=3, bad="", exclude=False, chained=False, scontrol="true", check="exit 0"):
        programs("srun", f'case "$*" in *"launch node"*) {check};; esac\n{ranks}')
        programs(
            "m4train",
            f'for w; do [[ $last == --judge ]] && {{ echo "{bad}" > "$w/bad"; }}; last=$w; done; [[ -z "{bad}" ]]',
        )
        programs("sbatch", "echo 77")
        programs("scontrol", scontrol)
        (tmp_path / "m4train-logs" / "7" / "nodes-0").mkdir(parents=True, exist_ok=True)
        described = Job(tmp_path / "run", [], ["name=x"], attempts, exclude, chained)
        for name, value in {"JOB_ID": 7, "JOB_NUM_NODES": 1, "NTASKS": 1, "JOB_NODELIST": "n1"}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        (tmp_path / "job").write_text(job_text(SCRIPT, Site(), described))
        return subprocess.run(["bash", "job"], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


STEP = "run/checkpoints/step-00000"


def test_a_crash_loop_ends_after_attempts_without_a_new_checkpoint(job, tmp_path):
    done = job("exit 1")
    assert done.returncode == 1
    assert "3 starts in a row failed without a new checkpoint: the job ends" in done.stdout
    assert sum("COMMAND" in call for call in calls(tmp_path)) == 3


def test_a_new_checkpoint_is_progress(job, tmp_path):
    done = job(
        f'n=$(grep -c "COMMAND" {tmp_path}/calls); mkdir -p {STEP}$n; [[ $n -gt 4 ]] && exit 0; sleep 0.02; exit 137'
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failure 2 of 3" not in done.stdout


@pytest.mark.parametrize("code", [0, 2, 3])
def test_what_is_no_failure_is_not_tried_again(code, job, tmp_path):
    assert job(f"exit {code}").returncode == code
    assert sum("COMMAND" in call for call in calls(tmp_path)) == 1


@pytest.mark.parametrize(("chained", "requeued"), [(False, True), (True, False)])
@pytest.mark.parametrize("code", [3, 138])
def test_told_to_wind_up_it_is_requeued_unless_a_chain_goes_on(code, chained, requeued, job, tmp_path):
    done = job(
        f'trap "exit {code}" USR1; kill -USR1 $PPID; for n in {{1..99}}; do sleep 0.05; done; exit {code}',
        chained=chained,
    )
    assert done.returncode == (0 if chained else 3), done.stdout + done.stderr
    assert ("scontrol requeue 7" in calls(tmp_path)) is requeued


@pytest.mark.parametrize(
    ("during", "batch", "code", "requeued"),
    [("check", True, 3, True), ("check", False, 3, False), ("start", False, 3, False), ("start", True, 3, True)],
)
def test_a_signal_before_training_hears_it_is_not_lost(during, batch, code, requeued, job, programs, tmp_path):
    """To the batch script, as ahead of the time limit, or to the tasks alone, as `launch stop` sends it: while nodes are looked
    at, or before the ranks listen."""
    told = "kill -USR1 $PPID; sleep 0.2; " if batch else ""
    end = "exit 138" if during == "start" or not batch else "exit 0"
    check, start = (f"{told}{end}", "exit 0") if during == "check" else ("exit 0", f"{told}{end}")
    done = job(start, check=check)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("scontrol requeue 7" in calls(tmp_path)) is requeued
    assert sum("COMMAND" in call for call in calls(tmp_path)) == (during == "start")


def test_a_bad_node_ends_the_job_or_is_left_out(job, tmp_path):
    done = job("exit 0", bad="n2")
    assert (done.returncode, "bad nodes: n2" in done.stdout) == (1, True), done.stdout + done.stderr
    done = job("exit 0", bad="n2", exclude=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(call.startswith("sbatch --parsable --exclude=n2 ") for call in calls(tmp_path))
    assert (tmp_path / "run/slurm/jobs").read_text().split() == ["77"]
    assert not any("COMMAND" in call for call in calls(tmp_path))


# What is found on a node
FINE = "81559, 550.54, 0, Not Active, Not Active"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([FINE, FINE], ""),
        ([FINE], "1 GPUs, but launch.processes asks for 2"),
        ([FINE, "81559, 550.54, 3, Not Active, Not Active"], "GPU 1 has 3 uncorrected ECC errors"),
        ([FINE, "81559, 550.54, 0, Not Active, Active"], "GPU 1 is slowed down"),
        (["81559, 550.54, 0, Active, Not Active", FINE], "GPU 0 is slowed down"),
        (["81559, 550.54, [N/A], Not Active, Not Active", FINE], ""),  # a card without ECC
    ],
)
def test_the_gpus_of_a_node(rows, said, programs, tmp_path):
    programs("nvidia-smi", "\n".join(f'echo "{row}"' for row in rows))
    programs("dmesg", "true")
    config = load_config(["experiment=digits_pretrain", "engine=ddp", "launch.processes=2"])
    problems = node_check._gpus(config)["problems"]
    assert (said in problems[0]) if said else not problems


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ""),
        (["usb 1-1: new device"], ""),
        (
            ["NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."],
            "1 Xid errors of the GPU driver, the last: [1.5] NVRM",
        ),
        (["NVRM: Xid (PCI:0000:3b:00): 31, pid=7, MMU Fault"], ""),  # a program read where it should not
        (["NVRM: Xid (PCI:0000:3b:00): 13, pid=7", "NVRM: Xid (PCI:0000:3b:00): 48, pid=7, DBE"], "1 Xid errors"),
        (["NVRM: Xid (PCI:0000:3b:00): 94, a", "NVRM: Xid (PCI:0000:3b:00): 95, b"], "2 Xid errors"),
    ],
)
def test_errors_of_the_driver_that_speak_against_a_card(lines, said, programs):
    programs("nvidia-smi")
    programs("dmesg", "\n".join(f'echo "[1.5] {line}"' for line in lines) or "true")
    problems = node_check._xid()
    assert (said in problems[0]) if said else not problems


def test_a_driver_that_does_not_answer_is_named(programs):
    programs("nvidia-smi", "echo 'Unable to determine the device handle' >&2; exit 9")
    problems = node_check._gpus(load_config(["experiment=digits_pretrain"]))["problems"]
    assert problems == ["nvidia-smi fails: Unable to determine the device handle"]


# What nodes found, and which of them are bad
ALIKE = {"gpus": 8, "memory": ["81559"], "driver": ["550.54"], "index": "ab12", "problems": []}


@pytest.mark.parametrize(
    ("nodes", "pairs", "expected", "bad"),
    [
        ({}, [], "n1,n2,n3", ""),
        (
            {"n2": {"memory": ["40960", "81559"]}},
            [],
            "",
            "n2: memory is ['40960', '81559'], but most nodes have ['81559']",
        ),
        ({"n3": {"driver": ["535.1"]}}, [], "", "n3: driver is"),
        ({"n1": {"gpus": 7}}, [], "", "n1: gpus is 7, but most nodes have 8"),
        ({"n3": {"index": "cd34"}}, [], "", "n3: index is cd34, but most nodes have ab12"),
        ({}, [], "n1,n2,n3,n9", "n9: it could not be checked"),
        (
            {},
            [["n1", "n2", 9.0], ["n1", "n3", 0.5], ["n2", "n3", 0.4]],
            "n1,n2,n3",
            "n3: slow to n1 0.50, n2 0.40 GiB/s, other",
        ),
        ({}, [["n1", "n2", 9.0], ["n1", "n3", 8.5], ["n2", "n3", 7.4]], "n1,n2,n3", ""),
    ],
)
def test_what_nodes_found_is_compared(nodes, pairs, expected, bad, tmp_path, capsys):
    for name in ("n1", "n2", "n3"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**ALIKE, **nodes.get(name, {}), "node": name}))
    if pairs:
        (tmp_path / "pairs").write_text(json.dumps(pairs))
    code = node_check.check_node(None, None, tmp_path, expected)
    said = capsys.readouterr().out
    assert code == bool(bad)
    assert (f"bad node {bad}" in said) if bad else not said
    assert (tmp_path / "bad").read_text().split() == ([bad.partition(":")[0]] if bad else [])


def test_where_no_node_reports_none_is_bad(tmp_path, capsys):
    assert node_check.check_node(None, None, tmp_path, "n1,n2") == 0
    assert "no node could say how it is" in capsys.readouterr().out


def test_nodes_are_compared_and_bad_ones_named(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "pages", documents(3))
    given = ["experiment=digits_pretrain", f"model.tokenizer={tokenizer_folder()}", "data.prepare=null"]
    good = load_config([*given, f"data.sources.documents.path={tmp_path}/pages/*.tar"])
    for name in ("n1", "n2", "n3"):
        monkeypatch.setenv("SLURMD_NODENAME", name)
        assert node_check.check_node(good, tmp_path / "found", None) == 0
    assert node_check.check_node(good, None, tmp_path / "found") == 0
    monkeypatch.setenv("SLURMD_NODENAME", "n4")
    missing = load_config([*given, f"data.sources.documents.path={tmp_path}/nowhere/*.tar"])
    assert node_check.check_node(missing, tmp_path / "found", None) == 0
    other = json.loads((tmp_path / "found" / "n2.json").read_text())
    (tmp_path / "found" / "n2.json").write_text(json.dumps({**other, "driver": ["1.0"]}))
    assert node_check.check_node(good, None, tmp_path / "found") == 1
    said = capsys.readouterr().out
    assert "bad node n2: driver is ['1.0'], but most nodes have []" in said
    assert "bad node n4: data.sources.documents cannot be reached" in said
    assert (tmp_path / "found" / "bad").read_text().split() == ["n4", "n2"]


def test_the_rest_of_a_chain_waits_for_the_job_without_the_bad_node(job, tmp_path):
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "jobs").write_text("6\n7\n8\n9\n")
    (tmp_path / "run" / "slurm" / "job.sbatch").write_text("#SBATCH --exclude=n5\n")
    done = job("exit 0", bad="n2", exclude=True, chained=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(call.startswith("sbatch --parsable --exclude=n2,n5 ") for call in calls(tmp_path))
    assert "scontrol update JobId=8 Dependency=afterany:77 ExcNodeList=n2,n5" in calls(tmp_path)


DEATH = 'echo "srun: error: n2: task 3: Killed" >&2; echo "srun: error: n1: task 0: Exited with exit code 1" >&2; '


@pytest.mark.parametrize(
    ("ranks", "asked"),
    [
        (f"{DEATH} exit 137", "3"),
        ("exit 1", None),
        (f"{DEATH} exit 86", None),  # a hang, whose ranks say more
        (f"{DEATH} exit 2", None),
        (f'echo "srun: error: Node failure on n1" >&2; {DEATH} exit 137', None),
        (f"{DEATH.replace('Killed', 'Terminated')} exit 143", None),
    ],
)
def test_the_rank_that_died_first_is_asked_after(ranks, asked, job, tmp_path):
    done = job(ranks, attempts=1)
    found = [call.split()[-1] for call in calls(tmp_path) if call.startswith("m4train launch died ")]
    assert found == ([asked] if asked else [])
    assert ("rank 3: Killed; " in done.stdout) == bool(asked)
    assert ("srun: error: n2: task 3: Killed" in done.stderr) == ("task 3: Killed" in ranks)  # it is shown as well


def test_a_run_that_has_a_job_gets_no_second_one(programs, tmp_path, capsys):
    programs("sbatch", "echo Submitted batch job 43")
    programs("squeue", 'case "$*" in *=42*) echo "PENDING 0:00 (Priority)";; esac')
    given = ["launch", "slurm", *RUN, f"run_dir={tmp_path}/run"]
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "jobs").write_text("41\n42\n")
    assert main(given) == 2
    assert "job 42 of this run is PENDING: it goes on by itself" in capsys.readouterr().err
    assert main([*given, "--dependency=afterany:42"]) == 0
    (tmp_path / "run" / "slurm" / "jobs").write_text("41\n")
    assert main(given) == 0


def test_too_little_shared_memory_is_named(tmp_path, monkeypatch):
    config = load_config(["experiment=digits_pretrain", "data.num_workers=1000000"])
    assert "but the readers of data need 32000000" in node_check._shared_memory(config, str(tmp_path))[0]


# Watching
@pytest.fixture
def submitted(programs, tmp_path):
    folder = tmp_path / "run" / "slurm"
    folder.mkdir(parents=True)
    (folder / "jobs").write_text("5\n6\n")
    logs = tmp_path / "logs"
    logs.mkdir()
    (folder / "logs").write_text(f"{logs}\n")
    (logs / "rank-0.log").write_text("step 1\nstep 2\n")
    (logs / "rank-2.log").write_text("step 1\n")
    (logs / "rank-3.log").write_text("step 1\nm4train train: Rank 3 has no GPU.\n")
    (tmp_path / "run" / "deaths.jsonl").write_text('{"rank": 2}\n')
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5}\n')
    programs("squeue", 'case "$*" in *=6*) echo "RUNNING 1:02 n2";; esac')
    programs("scancel")
    return tmp_path / "run"


def test_a_run_is_followed_and_ended(submitted, tmp_path, capsys):
    assert main(["launch", "status", str(submitted)]) == 0
    said = capsys.readouterr().out
    assert "job 5: ended\njob 6: RUNNING 1:02 n2\n" in said
    assert "step 2, loss 1.5000" in said
    assert main(["launch", "logs", f"run_dir={submitted}"]) == 0
    said = capsys.readouterr().out
    assert said.index("rank-2.log") < said.index("rank-3.log")
    assert said.index("rank-3.log") < said.index("Rank 3 has no GPU") < said.index("rank-0.log")
    assert main(["launch", "stop", str(submitted)]) == 0
    assert calls(tmp_path)[-1] == "scancel --signal=USR1 6"
    assert main(["launch", "interrupt", str(submitted)]) == 0
    assert calls(tmp_path)[-1] == "scancel --signal=USR1 --batch 6"


def test_a_run_without_a_job_says_so(tmp_path, capsys):
    for command in ("status", "logs", "stop", "interrupt"):
        assert main(["launch", command, str(tmp_path)]) == 2
        assert "holds no job of SLURM" in capsys.readouterr().err


@pytest.mark.parametrize(("restarts", "starts"), [(0, 3), (1, 1)])
def test_a_start_that_slurm_has_given_up_does_not_try_again(restarts, starts, job, tmp_path):
    """Its node no longer answers, so SLURM has started the job elsewhere; this script does not know."""
    done = job(
        "exit 1",
        scontrol=f'[[ $* == *"show job"* ]] && echo "JobId=7 JobName=x Requeue=1 Restarts={restarts} a=b"; true',
    )
    assert done.returncode == 1
    assert sum("COMMAND" in call for call in calls(tmp_path)) == starts
    assert ("SLURM has started the job again" in done.stdout) is (restarts == 1)
