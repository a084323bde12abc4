"""Metrics against values worked out by hand from their definitions."""

import pytest

from m4train.errors import ConfigError
from m4train.evaluation.metrics import anls, exact_match, load_metric, metric_name, normalise, vqa_accuracy


def test_exact_match_is_of_any_reference_but_for_white_space():
    assert exact_match(" 3  and 4", ["3 and 4"]) == 1.0
    assert exact_match("4", ["3", "4"]) == 1.0
    assert exact_match("Three", ["three"]) == 0.0
    assert exact_match("", [""]) == 1.0


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # Leaving one of k agreeing out leaves k - 1 in k of ten cases, and k in the others.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_answers(agreeing, expected):
    references = ["yes"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_accuracy("yes", references) == pytest.approx(expected)


def test_vqa_accuracy_of_fewer_answers():
    assert vqa_accuracy("Two", ["2"]) == 1.0
    assert vqa_accuracy("two", ["3"]) == 0.0
    assert vqa_accuracy("a", ["b", "c"]) == 0.0
    assert vqa_accuracy("cat", ["cat", "dog"]) == pytest.approx(0.5)  # 0 of 1 other, then 1 of 1
    assert vqa_accuracy("cat", ["cat", "cat", "dog"]) == pytest.approx((0.5 + 0.5 + 1.0) / 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("a  dog\nand an owl", "dog and owl"),
        ("Two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("black/white", "black white"),
        ("well-lit (room)!", "well lit room"),
    ],
)
def test_answers_are_compared_as_vqa_states(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("harvard university", ["Harvard  University"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),  # k>s, e>i, +g
        ("abcd", ["abxy"], 0.0),  # 2 of 4 is not below the threshold
        ("abcd", ["abcx"], 0.75),
        ("", ["x"], 0.0),
        ("flow", ["wolf", "flaw"], 0.75),
        ("3", [], 0.0),
    ],
)
def test_anls(answer, references, expected):
    assert anls(answer, references) == pytest.approx(expected)


def first_letter(answer, references):
    return float(answer[:1] == references[0][:1])


def test_a_metric_of_ones_own():
    name = f"{__name__}:first_letter"
    assert load_metric(name)("seven", ["six"]) == 1.0
    assert metric_name(name) == "first_letter"
    assert load_metric("anls") is anls
    for wrong in ("anl", "json:nothing", "no.such.module:x"):
        with pytest.raises(ConfigError, match=r"evaluation\.metric is .*exact_match, vqa_accuracy, anls"):
            load_metric(wrong)
