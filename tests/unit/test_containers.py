"""The files for containers and clouds, as far as they can be checked without a daemon."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from m4train.cli import COMMANDS
from m4train.config.compose import load_stages

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def instructions():
    text = re.sub(r"^#.*\n", "", (ROOT / "launch/containers/Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def check_shell(script):
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def check_installs(script):
    """Rules of hadolint: nothing asks, nothing recommended comes along, no list of packages or cache stays."""
    if "apt-get install" in script:
        assert "--yes" in script
        assert "--no-install-recommends" in script
        assert "rm -rf /var/lib/apt/lists/*" in script
    for line in script.splitlines():
        if "pip install" in line:
            assert "--no-cache-dir" in line
            assert "--constraint constraints.txt" in line
    check_shell(script)


def linter(name):
    """The program of a package of the extra `lint`."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed (pip install '.[lint]', on x86-64 Linux)")
    return found


def check_lint(*command, script=None):
    done = subprocess.run(list(map(str, command)), input=script, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing_in_the_dockerfile():
    """But that versions of Debian's packages are not pinned (DL3008), of which it keeps only the newest ones."""
    check_lint(linter("hadolint"), "--ignore=DL3008", ROOT / "launch/containers/Dockerfile")


SCRIPTS = sorted(
    path
    for pattern in ("launch/*.sh", "launch/slurm/*.s*h", "launch/slurm/*.sbatch", ".ci/run")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("path", dict.fromkeys(SCRIPTS), ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_a_script(path):
    """But that `$` in single quotes stays one (SC2016), as it must for a shell that is started later."""
    check_lint(linter("shellcheck"), "--shell=bash", "--exclude=SC2016", path)


def sections():
    text = (ROOT / "launch/containers/m4train.def").read_text()
    parts = re.split(r"^%", text, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


@pytest.mark.parametrize("name", ["post", "environment", "runscript"])
def test_shellcheck_finds_nothing_in_the_apptainer_definition(name):
    """Which runs its parts with `sh -e`."""
    check_lint(linter("shellcheck"), "--shell=sh", "--exclude=SC2016", "-", script="set -e\n" + sections()[name])


@pytest.mark.parametrize("name", ["skypilot", "dstack"])
def test_shellcheck_finds_nothing_in_what_a_cloud_runs(name):
    check_lint(linter("shellcheck"), "--shell=bash", "-", script=script_of(name))


def check_image(image):
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", image), f"{image} has no tag"
    assert not image.endswith(":latest")


def check_copied(names):
    assert {"pyproject.toml", "m4train", "conf", "launch", "data_pipelines"} <= set(names)
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_dockerfile():
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    check_image(found[0][1])
    for name, rest in found:
        if name == "RUN":
            check_installs(rest)
    check_copied([word for name, rest in found if name == "COPY" for word in rest.split()[:-1]])
    args = [rest.partition("=")[0] for name, rest in found if name == "ARG"]
    used = set(re.findall(r"\$(\w+)", " ".join(rest for _, rest in found)))
    assert used == set(args)
    assert yaml.safe_load(dict(found)["ENTRYPOINT"]) == ["m4train"]


def test_the_apptainer_definition():
    text = (ROOT / "launch/containers/m4train.def").read_text()
    header = text.partition("%")[0]
    said = dict(line.split(": ", 1) for line in header.splitlines() if line and not line.startswith("#"))
    assert said["Bootstrap"] == "docker"
    check_image(said["From"])
    found = sections()
    assert set(found) == {"arguments", "files", "post", "environment", "runscript"}
    check_installs(found["post"])
    check_shell(found["runscript"])
    pairs = [line.split() for line in found["files"].strip().splitlines()]
    check_copied([source for source, _ in pairs])
    given = {line.partition("=")[0].strip() for line in found["arguments"].strip().splitlines()}
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == given


def test_both_container_files_install_the_same():
    docker, apptainer = ((ROOT / "launch/containers" / name).read_text() for name in ("Dockerfile", "m4train.def"))
    for pattern in (r"whl/\w+", r"python:[\w.-]+", r"'\.\[[\w,]+\]'"):
        assert set(re.findall(pattern, docker)) == set(re.findall(pattern, apptainer))


def script_of(name):
    document = yaml.safe_load((ROOT / "launch/clouds" / f"{name}.yaml").read_text())
    return document["run"] if name == "skypilot" else "\n".join(document["commands"])


def command_of(name):
    """The words that a file of a cloud starts on every node."""
    documents = list(yaml.safe_load_all((ROOT / "launch/clouds" / f"{name}.yaml").read_text()))
    if name == "kubernetes":
        service, job = documents
        pod = job["spec"]["template"]["spec"]
        assert service["spec"]["clusterIP"] == "None"
        assert pod["subdomain"] == service["metadata"]["name"]
        assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        return [*container["command"], *container["args"]]
    (document,) = documents
    script = script_of(name)
    assert (document["num_nodes"] if name == "skypilot" else document["nodes"]) == 2
    check_shell(script)
    script = re.sub(r"\$\(.*?\)", "HEAD", script).replace("\\\n", " ")
    return shlex.split(next(line for line in script.splitlines() if line.lstrip().startswith("torchrun")))


@pytest.mark.parametrize("name", ["kubernetes", "skypilot", "dstack"])
def test_a_cloud_starts_a_run_that_there_is(name):
    words = command_of(name)
    assert words[0] == "torchrun"
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options == {"--nnodes", "--nproc-per-node", "--node-rank", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
    start = words.index("m4train")
    assert words[start - 1] == "-m"
    assert words[start + 1] in COMMANDS
    staged = load_stages(words[start + 2 :])
    assert all(config.engine.name == "fsdp2" for config in staged.configs)
    assert str(staged.folder).startswith("/shared/")
    assert f"launch/clouds/{name}.yaml" in (ROOT / "docs/clouds.md").read_text()
