"""An installed wheel brings what a checkout has: configuration, launch scripts, the page of the report."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def test_the_wheel_runs_outside_the_checkout(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    done = subprocess.run(build, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("m4train-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert (installed / "m4train" / "inspection" / "report.html.j2").is_file()
    assert (installed / "m4train" / "_launch" / "digits.sh").is_file()
    own = tmp_path / "conf" / "experiment" / "receipts" / "lora.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [/experiment/digits_sft, override /adapter: dora]\nname: receipts\n")
    code = (
        "import m4train, sys; from m4train.config.compose import load_config, resource_folder;"
        f"assert m4train.__file__.startswith({str(installed)!r}), m4train.__file__;"
        "assert resource_folder('conf').name == '_conf';"
        "print(load_config(['experiment=digits_sft']).name);"
        "config = load_config(['experiment=receipts/lora']); print(config.name, config.adapter.kind, config.engine.name)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["digits_sft", "receipts", "dora", "single"]
