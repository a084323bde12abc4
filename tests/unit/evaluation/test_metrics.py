"""Metrics against the values that their reference implementations gave once, and against values worked out by hand.

`metrics.json` holds the values of GT-Vision-Lab/VQA, the EvalAI processor of lmms-eval 0.7.3 (TextVQA), the RRC server's script,
pix2struct, MMMU, MultimodalOCR, VLMEvalKit's inference without a judge, lmms-eval's MME and HallusionBench, and pycocoevalcap 1.2
with its Java tokenizer, for the pairs of `answer_pairs`.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from m4train.errors import ConfigError, DataError
from m4train.evaluation.metrics.choices import inferred_letter, lettered, mmmu_letter
from m4train.evaluation.metrics.cider import cider
from m4train.evaluation.metrics.open_answers import open_answer
from m4train.evaluation.metrics.ptb import caption_words
from m4train.evaluation.metrics.registry import METRICS, load_metric, metric_name
from m4train.evaluation.metrics.said import Said, half_width
from m4train.evaluation.metrics.texts import anls, exact_match, relaxed_accuracy
from m4train.evaluation.metrics.vqa import normalised, textvqa_accuracy, vqa_accuracy
from m4train.evaluation.metrics.vqa_lenient import normalise, vqa_accuracy_lenient
from tests.helpers import answer_pairs

STORED: dict[str, Any] = json.loads((Path(__file__).parents[2] / "fixtures" / "metrics.json").read_text())
PAIRS = {
    "vqa_accuracy": answer_pairs.vqa_pairs,
    "textvqa_accuracy": answer_pairs.vqa_pairs,
    "anls": answer_pairs.text_pairs,
    "relaxed_accuracy": answer_pairs.number_pairs,
    "mmmu": answer_pairs.choice_pairs,
    "mmmu_random": answer_pairs.choice_pairs,
    "multiple_choice": answer_pairs.choice_pairs,
    "ocrbench": answer_pairs.text_pairs,
    "mme": answer_pairs.yes_no_pairs,
    "hallusionbench": answer_pairs.figure_pairs,
    "cider": answer_pairs.caption_pairs,
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_answer_scores_as_the_reference_implementation_says(name: str) -> None:
    pairs, expected = PAIRS[name](), STORED["samples"][name]
    samples = METRICS[name](pairs).samples
    assert len(samples) == len(expected) == answer_pairs.COUNT
    differ = [
        (pair.answer, pair.references, found, right)
        for pair, found, right in zip(pairs, samples, expected)
        if right is not None and abs(found - right) > 2e-6
    ]
    assert not differ, differ[:5]
    assert 0.05 < sum(value or 0 for value in expected) / len(expected) < 3  # the pairs tell right from wrong


def test_aggregates_are_those_of_the_reference_implementations() -> None:
    stored = STORED["aggregates"]
    found = METRICS["mme"](answer_pairs.yes_no_pairs())
    assert [found.others["perception"], found.others["cognition"]] == pytest.approx(stored["mme"])
    assert found.value == pytest.approx(sum(stored["mme"]))
    found = METRICS["hallusionbench"](answer_pairs.figure_pairs())
    assert [found.value, found.others["questions"], found.others["figures"]] == pytest.approx(stored["hallusionbench"])
    assert METRICS["cider"](answer_pairs.caption_pairs()).value == pytest.approx(stored["cider"], abs=1e-7)


def test_captions_are_split_as_by_the_java_tokenizer() -> None:
    found = "".join(
        hashlib.blake2b(" ".join(caption_words(pair.references[0])).encode(), digest_size=2).hexdigest()
        for pair in answer_pairs.caption_pairs()
    )
    assert found == STORED["caption_words"]


def test_the_probe_strings_are_normalised_as_officially() -> None:
    assert len(answer_pairs.PROBES) == len(STORED["probes"]) >= 61
    for text, expected in zip(answer_pairs.PROBES, STORED["probes"]):
        assert normalised(text.strip()) == expected, text
    differ = sum(normalise(text) != normalised(text) for text in answer_pairs.PROBES)
    assert differ >= 17  # what the lenient metric does differently


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # Leaving one of k agreeing out leaves k - 1 in k of ten cases, and k in the others.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_answers(agreeing: int, expected: float) -> None:
    references = ["yes"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    for metric in (vqa_accuracy, vqa_accuracy_lenient, textvqa_accuracy):
        assert metric("yes", references) == pytest.approx(expected)


def test_vqa_accuracy_of_references_that_all_agree_is_of_texts_as_they_stand() -> None:
    assert vqa_accuracy("the cat", ["cat"] * 10) == 0.0
    assert vqa_accuracy("the cat", ["cat"] * 9 + ["a cat"]) == 1.0
    assert textvqa_accuracy("the cat", ["cat"] * 10) == 1.0
    assert vqa_accuracy("Two", ["2"]) == 1.0  # a single reference: no other is left that could agree


def test_lenient_vqa_accuracy_asks_for_fewer_of_fewer_answers() -> None:
    assert vqa_accuracy_lenient("two", ["3"]) == 0.0
    assert vqa_accuracy_lenient("cat", ["cat", "dog"]) == pytest.approx(0.5)  # 0 of 1 other, then 1 of 1
    assert vqa_accuracy_lenient("cat", ["cat", "cat", "dog"]) == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert normalise("well-lit (room)!") == "well lit room"


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("harvard university", ["Harvard  University"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),  # k>s, e>i, +g
        ("abcd", ["abxy"], 0.5),  # a half counts
        ("abcd", ["axyz"], 0.0),
        ("ab  cd", ["abx  y"], 0.5),  # three edits of the collapsed texts, over the six letters as they stand
        ("", ["x"], 0.0),
        ("", [""], 1.0),
        ("flow", ["wolf", "flaw"], 0.75),
        ("3", [], 0.0),
    ],
)
def test_anls(answer: str, references: list[str], expected: float) -> None:
    assert anls(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("105", "100", True),
        ("105.01", "100", False),
        ("0", "0", True),
        ("0.0", "0", False),  # compared as texts
        ("-95", "-100", True),
        ("-200", "-100", False),
        ("10%", "10", False),
        ("0.1", "10%", True),
        ("1,234", "1234", False),
        ("YES", "yes", True),
    ],
)
def test_relaxed_accuracy(answer: str, reference: str, right: bool) -> None:
    assert relaxed_accuracy(answer, [reference]) == float(right)


def test_letters_are_read_from_what_is_said() -> None:
    options = lettered(["red", "blue whale", "42"])
    for said, expected in {
        "(A) or rather (B).": "B",
        "B": "B",
        "A, no: C": "C",
        "it must be the Blue Whale of course": "B",
        "blue whale": None,  # too short for MMMU's parser to look for texts
        "no idea": None,
    }.items():
        assert mmmu_letter(said, options) == expected, said
    assert inferred_letter("blue whale", options) == "B"
    assert inferred_letter("A or B", options) is None
    assert inferred_letter("**C**", options) == "C"
    said = [Said("none of them", ("A",), options=("x", "y")), Said("B", ("B",), options=("x", "y"))]
    found = METRICS["mmmu"](said)
    assert (found.samples, found.counts) == ([0.0, 1.0], {"unparsed": 1})


def test_open_answers() -> None:
    assert open_answer("therefore the answer is 3.14159", ["3.14"]) == 1.0
    assert open_answer("x = 1,234", ["1234"]) == 1.0
    assert open_answer("cat", ["a"]) == 0.0  # a single letter is not found within a word
    assert open_answer("it is a whale", ["whale", "dog"]) == 1.0


def test_cider_of_three_images_by_hand() -> None:
    said = [Said("a red dog", ("a red dog",)), Said("a cat", ("the cat",)), Said("tree", ("house",))]
    found = cider(said)
    common, rare = (
        math.log(3),
        math.log(3),
    )  # every n-gram is of one image, but "a" which the second has as well in no reference
    assert common == rare
    # image 1: uni-, bi- and trigrams agree, there is no 4-gram; image 2: "cat" of two words, no bigram agrees
    assert found.samples == pytest.approx([10 * 3 / 4, 10 * (1 / 2) / 4, 0.0])
    assert cider(said[::-1]).samples == pytest.approx(found.samples[::-1])
    assert cider(said[:1]).samples == [0.0]  # one image: no n-gram is rarer than another


def test_intervals() -> None:
    scores = METRICS["exact_match"]([Said("x", ("x",)), Said("x", ("y",)), Said("y", ("y",)), Said("y", ("y",))])
    half = 1.959963984540054 * math.sqrt((0.25**2 * 3 + 0.75**2) / 3 / 4)
    assert scores.value == 0.75
    assert scores.interval == pytest.approx((0.75 - half, 0.75 + half))
    assert half_width([1.0]) == math.inf


def test_perplexity_is_of_all_tokens_together() -> None:
    said = [Said("", ("x",), about={"loss": loss, "tokens": tokens}) for loss, tokens in ((2.0, 1), (1.0, 2), (3.0, 3))]
    found = METRICS["perplexity"](said)
    assert found.value == pytest.approx(math.exp(6.0 / 6))
    assert found.samples == [2.0, 0.5, 1.0]
    assert found.interval[0] < found.value < found.interval[1]


def test_mme_wants_whole_pairs() -> None:
    with pytest.raises(DataError, match="asks two questions of each picture, but count/p has 1"):
        METRICS["mme"]([Said("yes", ("Yes",), about={"category": "count", "question_id": "p"})])


def test_exact_match_is_of_any_reference_but_for_white_space() -> None:
    assert exact_match(" 3  and 4", ["3 and 4"]) == 1.0
    assert exact_match("4", ["3", "4"]) == 1.0
    assert exact_match("Three", ["three"]) == 0.0
    assert exact_match("", [""]) == 1.0


def first_letter(answer: str, references: list[str]) -> float:
    return float(answer[:1] == references[0][:1])


def test_a_metric_of_ones_own() -> None:
    name = f"{__name__}:first_letter"
    assert load_metric(name)([Said("seven", ("six",)), Said("x", ("y",))]).samples == [1.0, 0.0]
    assert metric_name(name) == "first_letter"
    assert load_metric("anls") is METRICS["anls"]
    for wrong in ("anl", "json:nothing", "no.such.module:x"):
        with pytest.raises(ConfigError, match=r"evaluation\.metric is .*exact_match, vqa_accuracy"):
            load_metric(wrong)
