"""launch/slurm/virtual_cluster.sh: nodes that are as far from each other as machines are, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.slurm.conftest import CLUSTER, start_cluster, stop_cluster

pytestmark = pytest.mark.slow

# The first task listens on an address, and says on which port; the last one reaches it there or not. No torch is loaded.
MEET = """
import os, pathlib, socket, sys, time
address, port = sys.argv[1], pathlib.Path(sys.argv[2])
if os.environ["SLURM_PROCID"] == "0":
    own = socket.gethostname()
    server = socket.create_server((own if address == "own" else address, 0))
    port.with_suffix(".new").write_text(f"{own} {server.getsockname()[1]}")
    port.with_suffix(".new").rename(port)
    time.sleep(0.3)
else:
    while not port.exists():
        time.sleep(0.01)
    try:
        own, number = port.read_text().split()
        socket.create_connection((own if sys.argv[3] == "own" else sys.argv[3], int(number)), timeout=5)
        print("reached")
    except ConnectionRefusedError:
        print("refused")
"""


def on_all(environment, *command, nodes=4):
    done = subprocess.run(
        ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--label", *command],
        capture_output=True,
        text=True,
        timeout=60,
        env={name: value for name, value in environment.items() if not name.startswith("SLURM_N")},
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in sorted(done.stdout.splitlines()))


def test_every_node_has_an_address_and_a_name_of_its_own(cluster, spaces):
    said = on_all(cluster, "bash", "-c", 'echo "$(hostname) $(hostname -I) $(getent hosts n3)"')
    rows = [line.split() for _, line in sorted(said.items())]
    assert [row[0] for row in rows] == ["n1", "n2", "n3", "n4"]
    assert len({row[1] for row in rows}) == 4
    assert {row[2] for row in rows} == {rows[2][1]}


@pytest.mark.parametrize(
    ("listens", "asked", "answer"),
    [("127.0.0.1", "own", "refused"), ("127.0.0.1", "127.0.0.1", "refused"), ("own", "own", "reached")],
)
def test_what_listens_on_localhost_is_not_reached_from_another_node(listens, asked, answer, cluster, spaces, tmp_path):
    said = on_all(cluster, sys.executable, "-S", "-c", MEET, listens, str(tmp_path / "port"), asked, nodes=2)
    assert list(said.values()) == [answer]


def test_a_second_cluster_is_gone_when_its_owner_was_killed(cluster, tmp_path):
    owner = subprocess.Popen(["sleep", "300"])
    try:
        done = start_cluster(tmp_path, nodes=1, owner=owner.pid)
        assert done.returncode == 0, done.stderr
        network = (tmp_path / "network").read_text().strip() if not done.stderr else None
        pids = {name: int((tmp_path / f"{name}.pid").read_text()) for name in ("munged", "slurmctld", "slurmd-n1")}
        environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
        subprocess.run(["sbatch", "--wrap=sleep 300"], check=True, capture_output=True, env=environment, cwd=tmp_path)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        deadline = time.monotonic() + 60
        while any(os.path.exists(f"/proc/{pid}") for pid in pids.values()) or (tmp_path / "network").exists():
            assert time.monotonic() < deadline, pids
            time.sleep(0.05)
        assert network is None or network not in os.popen("ip link; ip netns list").read()
    finally:
        owner.kill()
        stop_cluster(tmp_path)
    on_all(cluster, "true")  # the first one is as it was


def test_where_networks_cannot_be_made_the_nodes_share_one_address(tmp_path):
    if not all(map(shutil.which, ("setpriv", "srun"))):
        pytest.skip("setpriv (util-linux) or srun is not installed")
    try:
        done = start_cluster(tmp_path, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", nodes=2)
        assert done.returncode == 0, done.stderr
        assert "the nodes share the address of this machine: " in done.stderr
        assert done.stderr.strip()[-1] != ":"
        environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
        assert len(set(on_all(environment, "bash", "-c", "echo $(hostname) $SLURMD_NODENAME", nodes=2).values())) == 2
    finally:
        stop_cluster(tmp_path)


def test_a_cluster_that_is_no_virtual_one_is_not_touched(cluster, tmp_path):
    (tmp_path / "bin").mkdir()
    shutil.copy(shutil.which("sleep"), tmp_path / "bin" / "slurmd")
    other = subprocess.Popen([tmp_path / "bin" / "slurmd", "60"])
    try:
        again = start_cluster(tmp_path / "second")
    finally:
        other.kill()
        other.wait()
    assert again.returncode == 1
    assert "belongs to a SLURM already" in again.stderr
    assert not list((tmp_path / "second").iterdir())


def test_it_says_how_it_is_called():
    done = subprocess.run([CLUSTER, "start", "somewhere", "12"], capture_output=True, text=True)
    assert (done.returncode, "usage:" in done.stderr) == (1, True)
