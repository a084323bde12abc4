"""Every recipe trains, made small by scale=tiny, on a few samples of the kind its sources hold."""

import json
from pathlib import Path

import pytest

from m4train.cli import main
from m4train.config.compose import load_config
from tests.helpers.data import conversations, documents, write_shards

FOLDER = Path(__file__).parents[2] / "conf" / "experiment"
RECIPES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.yaml"))
OFTEN = (  # of each family and way to train; the others with the full suite
    "idefics/9b_pretrain",
    "idefics2/stage2",
    "idefics2/sft",
    "idefics3/stage1_364",
    "idefics3/stage2",
    "smolvlm/256m_stage1",
    "smolvlm/256m_stage2",
    "sft/smolvlm_256m_qlora",
    "sft/idefics2_full",
)
DOCUMENTS = ("obelics", "wikipedia", "laion", "laion_coco", "pmd", "pairs", "pdf", "pdfa", "ocr")


@pytest.fixture(scope="module")
def samples(tmp_path_factory, digits_root):
    """Folders of a few documents and a few conversations, and a tokenizer."""
    folder = tmp_path_factory.mktemp("recipes")
    write_shards(folder / "documents", documents(24))
    write_shards(folder / "conversations", conversations(24))
    (folder / "tokenizer").symlink_to(digits_root / "tokenizer")
    return folder


@pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, marks=() if recipe in OFTEN else pytest.mark.full) for recipe in RECIPES]
)
def test_a_recipe_trains_at_a_tiny_scale(recipe, samples, tmp_path, capsys):
    own = [f"data.sources.mine.path={samples}/conversations/*.tar"] if recipe.startswith("sft/") else []
    root = tmp_path / "data"
    root.mkdir()
    (root / "tokenizer").symlink_to(samples / "tokenizer")
    for name in load_config([f"experiment={recipe}", *own]).data.sources:
        (root / name).symlink_to(samples / ("documents" if name in DOCUMENTS else "conversations"))
    given = [
        f"data.root={root}",
        f"run_dir={tmp_path}/run",
        "scale=tiny",
        "trainer.max_steps=2",
        "data.num_workers=0",
        *own,
    ]
    quick = ["engine=single", "trainer.precision=fp32", "logging=none", "data.holdout=0.2"]
    quick = quick if own else quick[:-1]
    code = main(["train", f"experiment={recipe}", *given, *quick])
    assert code == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
    assert all(line["loss"] > 0 for line in lines if "loss" in line)
