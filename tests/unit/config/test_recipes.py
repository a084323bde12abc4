"""The recipes of conf/experiment: every number says where it is from or what it stands for, and every one of them composes."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from m4train.build import build_processor
from m4train.config.compose import load_config, load_stages

FOLDER = Path(__file__).parents[3] / "conf" / "experiment"
ALL = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.yaml"))
RECIPES = [recipe for recipe in ALL if not recipe.endswith("all")]
FREE = ("name", "run_dir")


def _header(recipe: str) -> tuple[dict[str, str], dict[str, str]]:
    """The lists `source` and `assumed` of the comments at the top."""
    lists: dict[str, dict[str, str]] = {"source": {}, "assumed": {}}
    current: dict[str, str] | None = None
    for line in (FOLDER / f"{recipe}.yaml").read_text().splitlines():
        if (start := re.match(r"# (source|assumed):", line)) is not None:
            current = lists[start[1]]
        elif current is not None and (entry := re.match(r"#   ([\w.]+): (.+)", line)) is not None:
            current[entry[1]] = entry[2]
        elif not line.startswith("#"):
            break
    return lists["source"], lists["assumed"]


def _numbers(value, key=""):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        if any(isinstance(inner, int | float) for inner in value):
            yield key
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key


def test_there_are_recipes_of_every_published_model_and_for_users():
    groups = {recipe.partition("/")[0] for recipe in RECIPES}
    assert groups == {"idefics", "idefics2", "idefics3", "smolvlm", "sft"}
    assert len(RECIPES) >= 40


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_is_published_or_said_to_be_assumed(recipe):
    source, assumed = _header(recipe)
    assert source
    stated = set(source) | set(assumed)
    content = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
    content.pop("defaults")
    for key in _numbers(content):
        path = key.split(".")
        assert any(".".join(path[:end]) in stated for end in range(1, len(path) + 1)), f"{key} is not stated"
    for key in stated:
        node = content
        for name in key.split("."):
            assert isinstance(node, dict), key
            assert name in node, f"{key} is stated, but not set"
            node = node[name]


@cache
def _composed(recipe):
    own = ["data.sources.mine.path=mine.json"] if recipe.startswith("sft/") else []
    return load_config([f"experiment={recipe}", *own])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(recipe):
    config = _composed(recipe)
    assert config.name.replace("_", "") == recipe.removeprefix("sft/").replace("/", "_").replace("_", "")
    weights = [source.weight for source in config.data.sources.values()]
    if config.data.mixture.by == "loss_tokens":
        assert 85 < sum(weights) < 106  # the rows that the papers print, in %


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.startswith("sft/")])
def test_recipes_for_users_hold_samples_out_by_themselves(recipe):
    config = _composed(recipe)
    assert config.data.validation["mine"].held_out
    assert config.trainer.eval_every


WHOLES = [recipe for recipe in ALL if recipe.endswith("all")]


@pytest.mark.parametrize(
    "whole", [pytest.param(w, marks=() if w == "smolvlm/2b_all" else pytest.mark.full) for w in WHOLES]
)
def test_the_stages_of_a_model_are_its_recipes_in_their_order(whole):
    configs = load_stages([f"experiment={whole}"]).configs
    listed = [stage["experiment"] for stage in yaml.safe_load((FOLDER / f"{whole}.yaml").read_text())["stages"]]
    model = whole.removesuffix("all")
    assert len(listed) > 1
    assert all(recipe in RECIPES and recipe.startswith(model) for recipe in listed)
    for config, recipe, start in zip(configs, listed, [None, *configs], strict=False):
        alone = _composed(recipe)
        assert (config.trainer, config.data, config.optimizer) == (alone.trainer, alone.data, alone.optimizer)
        assert config.model.pretrained == (start and start.run_dir)


def test_m4s_factors_are_one_in_so_many_of_a_set():
    lines = (FOLDER / "idefics3/sft_factors.yaml").read_text().splitlines()
    found = [re.search(r"weight: (\S+)}  # (\S+)$", line) for line in lines]
    pairs = [(float(match[1]), float(match[2])) for match in found if match]
    assert len(pairs) == 68
    assert max(factor for _, factor in pairs) == 4
    assert all(weight == pytest.approx(1 / int(4 / factor), rel=1e-5) for weight, factor in pairs)


def test_a_tiny_scale_leaves_what_is_no_number(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [/experiment/smolvlm/256m_stage1]\ntrainer: {save_every: epoch}\n"
    )
    config = load_config([f"experiment={tmp_path}/mine.yaml", "scale=tiny"])
    assert (config.trainer.save_every, config.trainer.max_steps) == ("epoch", 4)


def test_a_tiny_scale_brings_a_tokenizer_unless_there_is_one(tmp_path):
    tiny = ["experiment=sft/idefics2_lora", "data.sources.mine.path=mine.json", "scale=tiny", f"data.root={tmp_path}"]
    brought = load_config(tiny).model.tokenizer
    processor = build_processor(load_config(tiny))
    assert processor.tokenizer.decode(processor.tokenizer.encode("Straße, 猫 and a cat.")).endswith(
        "Straße, 猫 and a cat."
    )
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert load_config(tiny).model.tokenizer == f"{tmp_path}/tokenizer" != brought
    assert load_config([*tiny, "model.tokenizer=own"]).model.tokenizer == "own"
    digits = load_config(["experiment=digits_pretrain", "scale=tiny", "data.root=later"])  # which its preparing makes
    assert digits.model.tokenizer == "later/tokenizer"
