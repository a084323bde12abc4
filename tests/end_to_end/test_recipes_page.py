"""docs/recipes.md: a newcomer's walk from a LLaVA file to an exported adapter, every command as it is written there."""

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.test_tutorial import run_script

PAGE = Path(__file__).parents[2] / "docs/recipes.md"

pytestmark = pytest.mark.slow


def test_the_walk_as_written(tmp_path):
    pytest.importorskip("transformers", reason="the walk ends with transformers and peft")
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    done, commands = run_script("\n".join(blocks), tmp_path)
    assert done.returncode == 0, done.stderr + commands[-1].said()
    run = tmp_path / "runs/mine"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 4
    held = json.loads((run / "evaluation.json").read_text())["mine"]["count"]
    assert 0 < held < 20  # 2 % of 200 are held out
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert (run / "preview.html").exists()
    assert "fits" in commands[2].output.read_text()  # the estimate
    said = done.stdout.strip().splitlines()[-1]
    assert float(said.removeprefix("largest difference of a logit: ")) < 1e-4
