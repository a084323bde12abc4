"""Every recipe plans with the processor of its own model, and trains, made small by scale=tiny, on a few samples of the kind its
sources hold."""

import json
from pathlib import Path

import pytest

from m4train.cli import main
from m4train.config.compose import load_stages
from m4train.estimation.published import ARCHITECTURES
from m4train.families import FAMILIES
from tests.helpers.data import conversations, documents, write_shards

FOLDER = Path(__file__).parents[2] / "conf" / "experiment"
RECIPES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.yaml"))
OFTEN = (  # of each family and way to train; the others with the full suite
    "idefics/9b_pretrain",
    "idefics2/stage2",
    "idefics2/chatty",
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


RUNS = {  # where runs begin that are not at the hub -> the published model of the same shapes
    "runs/idefics2": "HuggingFaceM4/idefics2-8b",
    "runs/idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "runs/smolvlm_256m": "HuggingFaceTB/SmolVLM-256M-Base",
    "runs/smolvlm_500m": "HuggingFaceTB/SmolVLM-500M-Base",
    "runs/smolvlm_2b": "HuggingFaceTB/SmolVLM-Base",
}
TILES = {"256m": (4, 512), "500m": (4, 512), "runs/smolvlm_2b": (5, 384), "smolvlm": (4, 384), "idefics3": (4, 364)}
BACKBONES = {  # model_type, keys of config.json that a plan depends on
    "siglip-base": {"model_type": "siglip_vision_model", "image_size": 512, "patch_size": 16, "hidden_size": 768},
    "siglip-so400m": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "hidden_size": 1152},
    "CLIP-ViT-H": {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14, "num_attention_heads": 16},
    "Mistral": {"model_type": "mistral", "num_attention_heads": 32, "vocab_size": 32000},
    "lama": {"model_type": "llama", "num_attention_heads": 32, "vocab_size": 32000},
    "SmolLM2": {"model_type": "llama", "hidden_size": 576, "vocab_size": 49152},
}


def _mine(recipe, samples):
    return [f"data.sources.mine.path={samples}/conversations/*.tar"] if recipe.startswith("sft/") else []


def _linked(recipe, samples, root):
    """A folder for data.root that holds every source of a recipe; the stages of the recipe."""
    root.mkdir()
    (root / "tokenizer").symlink_to(samples / "tokenizer")
    staged = load_stages([f"experiment={recipe}", *_mine(recipe, samples)])
    for name in {name for config in staged.configs for name in config.data.sources}:
        (root / name).symlink_to(samples / ("documents" if name in DOCUMENTS else "conversations"))
    return staged


def _backbone(name, folder):
    """A folder with what a plan reads of a published backbone."""
    folder.mkdir()
    keys = next(keys for part, keys in BACKBONES.items() if part in name)
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def _published(name, tokenizer, folder):
    """A folder with what a plan reads of a published model, or of the run that becomes one."""
    hub = next((published for run, published in RUNS.items() if name.startswith(run)), name)
    family = next((family for family in ("idefics2", "idefics3", "idefics") if family in hub.lower()), "idefics3")
    architecture = FAMILIES[family].load("Config").from_dict({**ARCHITECTURES[hub], "model_type": family})
    architecture.save_pretrained(folder)
    kind, settings = FAMILIES[family].load("Processor"), {}
    if (found := next((sizes for part, sizes in TILES.items() if part in name.lower()), None)) is not None:
        settings = {"size": {"longest_edge": found[0] * found[1]}, "max_image_size": {"longest_edge": found[1]}}
    kind.from_settings(tokenizer, {**settings, **kind.settings_for(architecture)}).save_pretrained(folder)
    return folder


def _often(recipes, often):
    return [pytest.param(recipe, marks=() if recipe in often else pytest.mark.full) for recipe in recipes]


@pytest.mark.parametrize("recipe", _often([r for r in RECIPES if not r.endswith("all")], OFTEN))
def test_a_recipe_plans_with_the_processor_of_its_own_model(recipe, samples, tmp_path, capsys):
    (config,) = _linked(recipe, samples, tmp_path / "data").configs
    given = [
        f"data.root={tmp_path}/data",
        "trainer.global_batch_size=2",
        "trainer.micro_batch_size=1",
        "trainer.max_steps=2",
        "schedule.warmup_steps=0",
    ]
    if (name := config.model.pretrained) is not None:
        given.append(f"model.pretrained={_published(name, samples / 'tokenizer', tmp_path / 'model')}")
    for key in ("vision_pretrained", "text_pretrained"):
        if (name := getattr(config.model, key)) is not None:
            given.append(f"model.{key}={_backbone(name, tmp_path / key)}")
    own = _mine(recipe, samples)
    given += ["data.holdout=0.2", *own] if own else ["data.max_dropped_fraction=1"]
    code = main(["plan", "--json", f"experiment={recipe}", *given, "engine=single"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert '"steps"' in said.out or '"padding' in said.out


@pytest.mark.parametrize("recipe", _often(RECIPES, OFTEN))
def test_a_recipe_trains_at_a_tiny_scale(recipe, samples, tmp_path, capsys):
    staged, own = _linked(recipe, samples, tmp_path / "data"), _mine(recipe, samples)
    given = [
        f"data.root={tmp_path}/data",
        f"run_dir={tmp_path}/run",
        "scale=tiny",
        "trainer.max_steps=2",
        "data.num_workers=0",
    ]
    quick = [
        "engine=single",
        "trainer.precision=fp32",
        "logging=none",
        *own,
        *(["data.holdout=0.2", "data.epochs=null"] if own else []),
    ]
    code = main(["train", f"experiment={recipe}", *given, *quick])
    assert code == 0, capsys.readouterr().err
    for name in [config.stage or "" for config in staged.configs]:
        metrics = (tmp_path / "run" / name / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in metrics]
        assert lines[-1]["step"] == 2
        assert all(line["loss"] > 0 for line in lines if "loss" in line)
