"""What a recipe trains is known before anything is downloaded, or an earlier stage has run."""

from pathlib import Path

import pytest

from m4train.commands.architectures import architecture_of
from m4train.commands.estimate import estimated
from m4train.config.compose import load_config
from m4train.parts import NEW_TOKENS

FOLDER = Path(__file__).parents[3] / "conf" / "experiment"
RECIPES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
PUBLISHED = [recipe for recipe in RECIPES if "/" in recipe]
BILLIONS = {  # of parameters, by the start of a recipe's name
    "idefics/9b": (8.9, 9.0),
    "idefics/80b": (79.5, 80.5),
    "idefics2/": (8.3, 8.9),
    "idefics3/": (8.4, 8.6),
    "smolvlm/256m": (0.22, 0.26),
    "smolvlm/500m": (0.45, 0.52),
    "smolvlm/2b": (2.1, 2.3),
    "sft/idefics2": (8.3, 8.6),
    "sft/idefics3": (8.4, 8.6),
    "sft/smolvlm_256m": (0.25, 0.27),
    "sft/smolvlm_500m": (0.50, 0.52),
    "sft/smolvlm_2b": (2.2, 2.4),
}


def _load(recipe):
    return load_config(
        [f"experiment={recipe}", *(["data.sources.mine.path=mine.json"] if recipe.startswith("sft/") else [])]
    )


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No network, and a folder without data, tokenizers or earlier runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    "recipe", ["idefics/9b_pretrain", "idefics2/stage1", "idefics2/sft", "idefics3/stage1_1092", "smolvlm/500m_stage2"]
)
def test_the_architecture_of_a_recipe_is_known(recipe):
    config = _load(recipe)
    architecture, _ = architecture_of(config)
    named = any(rule.part == NEW_TOKENS for rule in config.freeze.rules)
    apart = config.freeze.new_rows_from is not None or getattr(architecture, "additional_vocab_size", 0)
    assert bool(apart) >= named


def test_tokens_that_are_added_have_rows_of_their_own():
    config = load_config(
        ["model=smolvlm_256m", "data=own", "data.sources={a: {path: x}}", 'model.add_tokens=["<a>", "<b>"]']
    )
    before = architecture_of(load_config(["model=smolvlm_256m", "data=own", "data.sources={a: {path: x}}"]))[
        0
    ].token_rows
    architecture, _ = architecture_of(config)
    assert architecture.token_rows == before + 2
    assert config.freeze.new_rows_from == before


def test_the_configuration_that_is_given_stays_as_it_was():
    config = load_config(["model=smolvlm_256m", "data=own", "data.sources={a: {path: x}}", 'model.add_tokens=["<a>"]'])
    config.trainer.micro_batch_size = config.data.images_per_pack = 1
    estimated(config, "h100", None, None)
    assert config.model.add_tokens
    assert config.trainer.precision == "auto"
    assert config.freeze.new_rows_from is None


@pytest.mark.full
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_recipe_is_estimated(recipe):
    ranks = 1 if recipe.startswith("sft/") else 64
    found = estimated(_load(recipe), "a100", ranks, None)
    low, high = next(size for name, size in BILLIONS.items() if recipe.startswith(name))
    assert low <= found.sizes.parameters / 1e9 <= high
    assert found.speeds[0].days > found.speeds[-1].days > 0
    assert found.fits or found.changes


@pytest.mark.full
@pytest.mark.parametrize(
    ("recipe", "gpu", "ranks", "fits"),
    [
        ("sft/idefics2_qlora", "rtx4090", 1, True),
        ("sft/idefics3_qlora", "rtx4090", 1, True),
        ("sft/idefics2_full", "a100", 1, False),
        ("sft/idefics2_full", "a100", 8, True),
        ("sft/smolvlm_256m_full", "rtx4090", 1, True),
        ("sft/smolvlm_2b_full", "rtx4090", 1, False),
        ("idefics/80b_pretrain", "a100", 8, False),
        ("idefics/80b_pretrain", "a100", 512, True),
    ],
)
def test_what_is_known_to_fit_does(recipe, gpu, ranks, fits):
    """QLoRA of 8 billion parameters was made for GPUs of 24 GB; their full training needs 16 bytes of each and several GPUs."""
    assert estimated(_load(recipe), gpu, ranks, None).fits == fits
