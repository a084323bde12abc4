"""docs/tutorial.md, as written: every command on the page is run, one after the other, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from tests.helpers import warm

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"
# `m4train ...` is handed to a process that has torch imported already, and the shell waits for its exit code.
SHELL = """
set -euo pipefail
m4train() { printf '%s\\0' "$@" > calls; local code; read -r code < codes; return "$code"; }
"""

pytestmark = pytest.mark.slow


def test_the_tutorial_as_written(digits_root, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits_root)
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    done, commands = run_script("\n".join(blocks), tmp_path)
    assert done.returncode == 0, done.stderr + commands[-1].said()
    shown = {line.split()[1] for block in blocks for line in block.splitlines() if line.startswith("m4train ")}
    assert shown == {
        "config",
        "validate",
        "plan",
        "preview",
        "train",
        "evaluate",
        "replay",
        "report",
        "export",
        "generate",
    }

    run = tmp_path / "runs/mine"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-6:] == [10, 20, 30, 40, 50, 60]
    assert json.loads((run / "evaluation.json").read_text())["mine"]["count"] == 60
    assert (run / "preview.html").exists()
    assert (run / "report.html").exists()
    answer = done.stdout.strip().splitlines()[-1]
    generated = commands[-1].output.read_text().strip().splitlines()[-1]
    assert answer == generated != ""  # `m4train generate` and the Python classes agree


def run_script(script, folder):
    """Runs a script of bash in `folder`; returns the finished shell, and the processes of its m4train commands in order."""
    os.mkfifo(folder / "calls")
    os.mkfifo(folder / "codes")
    commands = []

    def serve():
        while arguments := (folder / "calls").read_bytes().decode().split("\0")[:-1]:
            commands.append(warm.start_command(*arguments, folder=folder))
            (folder / "codes").write_text(f"{commands[-1].wait(400)}\n")

    server = Thread(target=serve, daemon=True)
    server.start()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(warm.ROOT)}
    done = subprocess.run(
        ["bash", "-c", SHELL + script], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    (folder / "calls").write_bytes(b"")  # ends the server
    server.join(10)
    return done, commands
