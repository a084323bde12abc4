"""The recipes hold the published numbers: written here once more, by paper, card or file instead of by recipe."""

from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[3] / "conf" / "experiment"
# steps, packs a step, tokens of a pack, peak rate, warm-up (None: not published)
RUNS = {
    "idefics/80b_pretrain": (37_500, 3_584, 1_024, 5e-5, 2_000),
    "idefics/9b_pretrain": (65_000, 1_280, 1_024, 1e-5, 2_000),
    "idefics/80b_instruct": (3_000, 299, 2_048, 3e-6, 1_000),
    "idefics/9b_instruct": (8_000, 100, 2_048, 1e-5, 1_000),
    "idefics2/stage1": (None, 2_048, 2_048, 1e-4, None),
    "idefics2/stage2": (None, 2_048, 2_048, 1e-4, None),
    "idefics3/stage2": (3_000, 1_024, 10_240, 1e-4, None),
    "idefics3/stage3": (1_500, 1_024, 10_240, 1e-4, None),
    "idefics3/sft": (5_000, 1_024, 10_240, 5e-5, None),
    **{f"idefics3/stage1_{side}": (200, 1_024, 10_240, 1e-4, None) for side in (364, 728, 1092, 1456, 1820)},
    "smolvlm/256m_stage1": (25_750, 1_024, 7_000, 1e-4, 2_000),
    "smolvlm/500m_stage1": (24_750, 1_024, 7_000, 1e-4, 2_000),
    "smolvlm/2b_stage1": (22_250, 1_024, 7_000, 1e-4, 2_000),
    "smolvlm/256m_stage2": (3_000, 2_048, 7_000, 1e-4, 100),
    "smolvlm/500m_stage2": (3_000, 2_048, 7_000, 1e-4, 100),
    "smolvlm/2b_stage2": (None, 2_048, 7_000, 1e-4, 100),
    "smolvlm/256m_stage3": (2_000, 8_192, 7_000, 1e-4, 100),
    "smolvlm/500m_stage3": (2_000, 8_192, 7_000, 1e-4, 100),
    "smolvlm/256m_sft": (5_900, 512, 8_192, 2e-5, None),
    "smolvlm/500m_sft": (5_900, 512, 8_192, 2e-5, None),
    "smolvlm/2b_sft": (6_550, 512, 8_192, 2e-5, None),
}
PRETRAINED = {"obelics": 73.85, "wikipedia": 6.15, "laion": 17.18, "pmd": 2.82}
INSTRUCTED = {"m3it": 7.7, "lrv": 1.7, "llava_instruct": 5.9, "llavar": 6.3, "svit": 11.4, "differences": 2.1}
INSTRUCTED |= {"ultrachat": 29.1, "pairs": 5.1, "obelics": 30.7}
SMOL1, SMOL2 = {"laion_coco": 0.6, "ocr": 0.4}, {"ocr": 0.3, "sft": 0.7}
SFT = {"images": 33.8, "text": 21.5, "multi_image": 11.6}
MIXTURES = {  # unit, shares
    "idefics/80b_pretrain": ("tokens", PRETRAINED),
    "idefics/9b_pretrain": ("tokens", PRETRAINED),
    "idefics/80b_instruct": ("samples", INSTRUCTED),
    "idefics/9b_instruct": ("samples", INSTRUCTED),
    "idefics2/stage1": ("samples", {"obelics": 70, "pairs": 30}),
    "idefics2/stage2": ("samples", {"obelics": 45, "pairs": 35, "pdf": 20}),
    **{f"smolvlm/{size}_stage1": ("tokens", SMOL1) for size in ("256m", "500m", "2b")},
    **{f"smolvlm/{size}_stage2": ("tokens", SMOL2) for size in ("256m", "500m", "2b")},
    **{f"smolvlm/{size}_sft": ("samples", SFT) for size in ("256m", "500m")},
    "smolvlm/2b_sft": ("samples", {"images": 34.3, "text": 20.3, "multi_image": 12.3}),
}
# final / peak of the published line, its length, the steps of it that were trained, its warm-up
LINES = {
    "idefics/80b_pretrain": (3 / 5, 200_000, 37_500, 2_000),
    "idefics/9b_pretrain": (6 / 10, 200_000, 65_000, 2_000),
    "idefics/80b_instruct": (3.6e-7 / 3e-6, 22_000, 3_000, 1_000),
    "idefics/9b_instruct": (1.2e-6 / 1e-5, 22_000, 8_000, 1_000),
    "smolvlm/256m_stage1": (0.0, 500_000, 25_750, 2_000),
    "smolvlm/500m_stage1": (0.0, 500_000, 24_750, 2_000),
    "smolvlm/2b_stage1": (0.0, 500_000, 22_250, 2_000),
    "smolvlm/256m_stage2": (0.0, 6_000, 3_000, 100),
    "smolvlm/500m_stage2": (0.0, 6_000, 3_000, 100),
}
TABLE_14 = """5.72 1.47 1.43 1.21 .57 .40 .13 .09 4.56 .37 .21 5.57 3.46 2.00 1.86 1.31 .93 .86 .74 .63 .11 4.38 4.27 1.91 1.90 .65 .61
 .33 2.49 2.18 1.80 1.37 .99 .99 .97 .51 3.83 3.26 1.23 1.16 1.33 .48 .57 .28 .03 12.73 .81 .68 3.81 2.33 1.63 .06 3.50 .86"""
TABLE_1 = """13.03 1.40 1.28 1.23 .68 .23 3.46 2.10 .94 .92 .26 .13 10.31 7.15 2.22 1.19 1.17 .84 .60 .55 .47 .40 .07 4.38 4.27 1.90 .65
 .61 .33 1.60 1.40 1.15 .88 .64 .64 .62 .34 .33 2.95 2.45 2.09 .79 .78 .74 .51 .43 .43 .36 .36 .30 .16 .11 .08 .91 .02 8.16 2.44 2.24
 1.49 1.05 .55 .52 .44 .04"""


def recipe(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def group(content, name):
    return next((d[f"override /{name}"] for d in content["defaults"] if f"override /{name}" in d), None)


@pytest.mark.parametrize("name", RUNS)
def test_lengths_and_rates(name):
    content = recipe(name)
    steps, packs, tokens, rate, warmup = RUNS[name]
    trainer = content["trainer"]
    assert steps in (None, trainer["max_steps"])
    assert (trainer["global_batch_size"], content["data"]["sequence_length"]) == (packs, tokens)
    assert content["optimizer"]["lr"] == rate
    assert warmup in (None, content.get("schedule", {}).get("warmup_steps"))
    assert trainer.get("max_grad_norm", 1.0) == 1.0


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name):
    unit, shares = MIXTURES[name]
    data = recipe(name)["data"]
    assert data["mixture"]["by"] == unit
    assert {source: given["weight"] for source, given in data["sources"].items()} == shares


@pytest.mark.parametrize("name", LINES)
def test_the_rate_ends_where_the_published_line_was_when_it_was_left(name):
    left, length, steps, warmup = LINES[name]
    passed = (steps - warmup) / (length - warmup)
    content = recipe(name)
    assert content["schedule"]["final_fraction"] == pytest.approx(1 - passed * (1 - left), abs=0.01)
    assert group(content, "schedule") == "linear"


@pytest.mark.parametrize(("name", "rows"), [("idefics2/sft", TABLE_14), ("idefics3/sft", TABLE_1)])
def test_mixtures_by_answer_tokens(name, rows):
    data = recipe(name)["data"]
    assert data["mixture"]["by"] == "loss_tokens"
    assert [source["weight"] for source in data["sources"].values()] == [float(row) for row in rows.split()]


def test_the_resolution_ramp():
    sides = (364, 728, 1092, 1456, 1820)
    contents = [recipe(f"idefics3/stage1_{side}") for side in sides]
    assert [content["model"]["processor"]["size"]["longest_edge"] for content in contents] == list(sides)
    assert sum(content["trainer"]["max_steps"] for content in contents) == 1_000
    assert [content["optimizer"].get("start") for content in contents] == [None, *["kept"] * 4]
    assert {group(content, "schedule") for content in contents} == {"constant"}
    assert {group(content, "freeze") for content in contents} == {"connector_only"}
    assert [group(recipe(f"idefics3/{name}"), "adapter") for name in ("stage2", "stage3", "sft")] == ["dora"] * 3


@pytest.mark.parametrize("size", ["256m", "500m", "2b"])
def test_the_head_adapters_tiles_and_rates_of_smolvlm(size):
    first, later = recipe(f"smolvlm/{size}_stage1"), recipe(f"smolvlm/{size}_stage2")
    assert first["model"]["architecture"]["tie_word_embeddings"] is False
    assert first["model"]["architecture"]["scale_factor"] == (3 if size == "2b" else 4)
    assert (group(first, "adapter"), group(first, "freeze")) == ("smolvlm", "smolvlm")
    adapter = yaml.safe_load((FOLDER.parent / "adapter" / "smolvlm.yaml").read_text())
    assert [adapter[key] for key in ("kind", "rank", "alpha", "dropout")] == ["dora", 64, 16, 0.1]
    assert group(later, "freeze") == "full"
    assert [content["trainer"]["neftune_alpha"] for content in (first, later)] == [5.0, 5.0]
    tiles = [source["images"]["tiles"] for content in (first, later) for source in content["data"]["sources"].values()]
    law, most = {2: 0.4, 3: 0.3, 4: 0.2, 5: 0.1}, [3, 5, 5, 5] if size == "2b" else [3, 4, 4, 4]
    for found, limit in zip(tiles, most, strict=True):
        capped = {n: sum(share for k, share in law.items() if min(k, limit) == n) for n in range(2, limit + 1)}
        assert found == pytest.approx(capped)
    parts = recipe(f"smolvlm/{size}_sft")["optimizer"]["parts"]
    assert {part: own["lr"] for part, own in parts.items()} == {"connector": 1e-4, "vision": 5e-6}
