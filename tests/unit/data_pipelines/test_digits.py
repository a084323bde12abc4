"""The digits recipe: what is held out stays out, and the answers are true."""

import io
import json
import random
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_pipelines import digits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "set"
    assert digits.prepare(root)
    return root


def _samples(root, name, split):
    for shard in sorted((root / name).glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    yield json.load(tar.extractfile(member))


def test_held_out_scans_appear_in_no_training_sample(root):
    scans = {
        split: {
            scan
            for name in ("documents", "single", "multi")
            for sample in _samples(root, name, split)
            for scan in sample["source"]["scans"]
        }
        for split in ("train", "heldout")
    }
    assert not scans["train"] & scans["heldout"]
    assert len(scans["train"]) == 1437
    assert len(scans["heldout"]) == 360


def test_every_held_out_scan_is_asked_about_once(root):
    asked = [sample["source"]["scans"] for sample in _samples(root, "single", "heldout")]
    assert len(asked) == 360
    assert len({scan for (scan,) in asked}) == 360


def _labels():
    from sklearn.datasets import load_digits

    return load_digits().target


def _compared(first, second):
    return (
        f"{first} and {second}, so {'neither' if first == second else 'the first' if first > second else 'the second'}."
    )


def test_answers_are_true(root):
    labels = _labels()
    for split in ("train", "heldout"):
        for sample in _samples(root, "multi", split):
            shown = [int(labels[int(scan[5:])]) for scan in sample["source"]["scans"]]
            question = sample["messages"][0]["content"][-1]["text"]
            answer = sample["messages"][1]["content"][0]["text"]
            assert len(sample["messages"][0]["content"]) == len(shown) + 1
            assert answer == _truth(question, shown), (question, shown)


def _truth(question, shown):
    if "larger" in question:
        return _compared(*shown[:2])
    places = [digits.ORDINALS.index(word) for word in re.findall("|".join(digits.ORDINALS), question)]
    return str(shown[places[0]]) if places else ", ".join(map(str, shown))


def test_documents_tell_the_truth_about_their_scans(root):
    labels = _labels()
    kinds = set()
    for sample in _samples(root, "documents", "train"):
        shown = [int(labels[int(scan[5:])]) for scan in sample["source"]["scans"]]
        text = "".join(item["text"] for item in sample["items"] if "text" in item)
        for number, word in enumerate(digits.WORDS):
            text = text.replace(f"{word}.", f"{number}.")
        kind, found, expected = _readings(text, shown)
        kinds.add(kind)
        assert found == expected, text
    assert kinds == {"read", "placed", "compared", "practised"}


def _readings(text, shown):
    """What a document says of its scans, and what it should say."""
    if not shown:
        pairs = re.findall(r"(\d) and (\d), so [a-z ]+\.", text)
        return "practised", text, "".join(f" {_compared(int(first), int(second))}" for first, second in pairs)
    placed = re.findall(r"What is the (\w+) digit\? (\d)\.", text)
    compared = re.findall(r"Which is larger, the first or the second\? (\d and \d, so [a-z ]+\.)", text)
    if compared:
        return "compared", compared, [_compared(*shown[:2])]
    if placed:
        return "placed", sorted(placed), sorted((digits.ORDINALS[n], str(digit)) for n, digit in enumerate(shown))
    return "read", [int(digit) for digit in re.findall(r"\d", text)], shown


def test_a_scan_survives_the_round_trip_and_has_a_margin():
    (_, _, png), *_ = digits.load_scans()[0]
    picture = np.asarray(Image.open(io.BytesIO(png)))
    assert picture.shape == (digits.SIDE, digits.SIDE)
    inner = picture[digits.MARGIN : -digits.MARGIN, digits.MARGIN : -digits.MARGIN]
    assert int(picture.sum()) == int(inner.sum()) > 0


def test_training_scans_are_bent_and_stay_what_they_are():
    train, _ = digits.load_scans()
    forms = digits.bent(train[:3], 2, random.Random(0))
    assert forms[:3] == train[:3]
    assert [form[:2] for form in forms] == [scan[:2] for scan in train[:3]] * 3  # what they show, and their names
    assert len({form[2] for form in forms}) == 9
    before, after = (np.asarray(Image.open(io.BytesIO(png)), np.float32) for png in (forms[0][2], forms[3][2]))
    assert after.shape == before.shape
    assert 0 < np.abs(after - before).mean() < before.mean()  # moved, and not beyond recognition


def test_pictures_of_held_out_samples_are_the_scans(root):
    scans = {png for _, _, png in digits.load_scans()[1]}
    for name in ("documents", "single", "multi"):
        for shard in (root / name).glob("heldout-*.tar"):
            with tarfile.open(shard) as tar:
                pictures = [tar.extractfile(member).read() for member in tar if member.name.endswith(".png")]
            assert pictures
            assert scans.issuperset(pictures)


def test_some_training_comparisons_are_made_equal_and_no_held_out_ones(root):
    train, _ = digits.load_scans()
    group = train[:3]
    digits._tie(group, train, random.Random(1))
    assert [group[0], group[2]] == [train[0], train[2]]
    assert group[1][0] == train[0][0]
    assert group[1][1] != train[0][1]
    for split, least, most in (
        ("heldout", 0.02, 0.2),
        ("train", 0.34, 0.5),
    ):  # a tenth by chance, and a third of the rest
        answers = [sample["messages"][1]["content"][0]["text"] for sample in _samples(root, "multi", split)]
        compared = [answer for answer in answers if "so" in answer]
        assert least < sum("neither" in answer for answer in compared) / len(compared) < most


def test_a_second_call_builds_nothing_and_the_same_seed_gives_the_same_samples(root):
    assert not digits.prepare(root)
    train, _ = digits.load_scans()
    draw = lambda: list(digits.multi_questions(train, 20, random.Random(3)))
    assert draw() == draw()
