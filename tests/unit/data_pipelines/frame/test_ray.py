"""The same pipeline on Ray: the bytes of the local executor, and a rank that fails leaves the others alone."""

import pytest

from data_pipelines.frame.config import load_pipeline
from data_pipelines.frame.runner import run_pipeline
from tests.helpers.pipelines import digests
from tests.unit.data_pipelines.frame.test_runner import YAML

ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'm4train[ray]')")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_ray_gives_the_bytes_of_the_local_executor(cluster, tmp_path, capsys):
    (tmp_path / "numbers.yaml").write_text(YAML)

    def run(folder, *overrides):
        return run_pipeline(load_pipeline(str(tmp_path / "numbers.yaml"), [f"folder={tmp_path / folder}", *overrides]))

    assert run("local") == 0
    on_ray = (
        "executor=ray",
        "executor.mem_per_cpu_gb=0.1",
        "executor.workers=2",
        "odd.fail_at=5",
        f"odd.once={tmp_path / 'failed'}",
    )
    assert run("ray", *on_ray) == 1
    assert "rank 1: ValueError: page 5 cannot be read" in capsys.readouterr().err.replace("\n", " ")
    assert {path.name for path in (tmp_path / "ray" / "even" / "ranks" / "completions").iterdir()} == {
        "00000",
        "00002",
        "00003",
    }
    assert run("ray", *on_ray) == 0
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
