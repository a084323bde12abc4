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
    assert kinds == {"read", "remarked"}


def _readings(text, shown):
    """What a document says of its scans, and what it should say."""
    remarks = re.findall(r"The (\w+) digit is (\d)\.", text)
    compared = re.findall(r"The larger of the first two: (\d and \d, so [a-z ]+\.)", text)
    if remarks or compared:
        expected = [(place, str(shown[digits.ORDINALS.index(place)])) for place, _ in remarks]
        return "remarked", (remarks, compared), (expected, [_compared(*shown[:2])] * len(compared))
    return "read", [int(digit) for digit in re.findall(r"\d", text)], shown


def test_a_scan_survives_the_round_trip_and_has_a_margin():
    (_, _, png), *_ = digits.load_scans()[0]
    picture = np.asarray(Image.open(io.BytesIO(png)))
    assert picture.shape == (digits.SIDE, digits.SIDE)
    inner = picture[digits.MARGIN : -digits.MARGIN, digits.MARGIN : -digits.MARGIN]
    assert int(picture.sum()) == int(inner.sum()) > 0


def test_a_second_call_builds_nothing_and_the_same_seed_gives_the_same_samples(root):
    assert not digits.prepare(root)
    train, _ = digits.load_scans()
    draw = lambda: list(digits.multi_questions(train, 20, random.Random(3)))
    assert draw() == draw()
