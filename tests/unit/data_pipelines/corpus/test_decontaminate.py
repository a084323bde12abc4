"""What evaluation sets hold is found in training documents, by brute force too, and nothing else is."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.corpus.decontaminate import Decontaminate
from data_pipelines.frame.step import Place
from m4train.data.shards import ShardWriter
from m4train.errors import ConfigError
from tests.helpers.corpus import json_lines, page


def _photo(seed, size=(240, 180)):
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def _stored(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _evaluation(folder, samples):
    """An evaluation set of (question, answer, image bytes or None)."""
    with ShardWriter(folder, "evaluation") as writer:
        for number, (question, answer, image) in enumerate(samples):
            content = ([{"image": "0.png"}] if image else []) + [{"text": question}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"text": answer}]}]
            writer.write(f"q{number}", {"messages": messages}, {"0.png": image} if image else {})
    return {"path": str(folder), "format": "canonical"}


def _cleaned(tmp_path, documents, evaluation, **options):
    step = Decontaminate([evaluation], **options)
    step.place = Place(tmp_path, "clean")
    left = list(step.run(documents))
    return left, json_lines(tmp_path / "clean" / "hits" / "00000.jsonl.gz"), step.ledger.counts


LONG = "the committee of the small town met on a Tuesday evening in May to discuss the old library"


def test_texts_of_evaluation_sets_are_found_whatever_their_punctuation(tmp_path):
    evaluation = _evaluation(tmp_path / "eval", [("Why did they meet?", LONG, None), ("Short question?", "Yes.", None)])
    shouted = "Intro. " + LONG.upper().replace(" ", ",  ") + "! And more."
    fewer = " ".join(LONG.split()[:12])
    documents = [
        page(1, [shouted]),
        page(2, [fewer]),
        page(3, ["Short question? Yes."]),
        page(4, [LONG.replace(" on ", " and sat ").replace(" in ", " of ")]),
    ]
    left, hits, counts = _cleaned(tmp_path, documents, evaluation)
    assert [document.id for document in left] == ["page-00002", "page-00003", "page-00004"]
    (hit,) = hits
    assert (hit["id"], hit["kind"], hit["evaluation"]) == ("page-00001", "text", "evaluation-000000.tar q0")
    assert hit["words"] == " ".join(LONG.lower().split()[:13])
    assert counts["kept"] == 3
    assert counts["dropped"] == counts["text"] == 1
    assert counts["evaluation texts too short to compare"] == 3
    assert counts["evaluation samples"] == 2


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), min_size=1, max_size=4),
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), min_size=1, max_size=6),
)
def test_texts_are_compared_as_brute_force_does(tmp_path_factory, questions, texts):
    folder = tmp_path_factory.mktemp("brute")
    evaluation = _evaluation(folder / "eval", [(" ".join(words), "answer", None) for words in questions])
    left, hits, _ = _cleaned(folder, [page(n, [" ".join(words)]) for n, words in enumerate(texts)], evaluation, ngram=3)
    runs = lambda words: {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
    held = set().union(*map(runs, questions))
    dropped = {f"page-{n:05d}" for n, words in enumerate(texts) if runs(words) & held}
    assert {document.id for document in left} == {f"page-{n:05d}" for n in range(len(texts))} - dropped
    assert {hit["id"] for hit in hits} == dropped


def test_words_that_many_samples_share_are_a_prompt(tmp_path):
    prompt = "answer the question about this picture with one word or with a short phrase please"
    evaluation = _evaluation(tmp_path / "eval", [(f"{prompt} number {chr(97 + n)}", "Yes.", None) for n in range(12)])
    documents = [page(1, [f"They say {prompt}."])]
    left, _, counts = _cleaned(tmp_path, documents, evaluation)
    assert len(left) == 1
    assert counts["evaluation runs of words taken for prompts"] >= 3
    assert not _cleaned(tmp_path, documents, evaluation, shared=12)[0]


@pytest.mark.parametrize("policy", ["drop_image", "drop_document"])
def test_images_are_found_by_content_and_by_looks(tmp_path, policy):
    shown = [_stored(_photo(1)), _stored(_photo(2)), _stored(Image.new("RGB", (90, 90), "white"))]
    evaluation = _evaluation(tmp_path / "eval", [("What?", "This.", image) for image in shown])
    smaller = _stored(_photo(2).resize((120, 90)), "JPEG", quality=80)
    documents = [
        page(1, ["a", shown[0], _stored(_photo(7))]),
        page(2, ["b", smaller]),
        page(3, ["c", _stored(_photo(8))]),
        page(4, ["d", _stored(Image.new("RGB", (64, 48), "gray"))]),  # shows nothing, as the white one
    ]
    left, hits, counts = _cleaned(tmp_path, documents, evaluation, images=policy)
    assert [(hit["id"], hit["kind"], hit["evaluation"][-2:]) for hit in hits] == [
        ("page-00001", "image", "q0"),
        ("page-00002", "picture", "q1"),
    ]
    assert hits[1]["distance"] <= 4
    assert hits[0]["image"] == "http://img/1-1.png"
    kept = {document.id: len(document.media) for document in left}
    whole = {"page-00003": 1, "page-00004": 1}
    assert kept == (whole | {"page-00001": 1, "page-00002": 0} if policy == "drop_image" else whole)
    assert counts["evaluation images"] == 3


def test_another_distance_finds_more(tmp_path):
    evaluation = _evaluation(tmp_path / "eval", [("What?", "This.", _stored(_photo(2)))])
    turned = _photo(2).rotate(4)
    counts = {
        d: _cleaned(tmp_path, [page(1, ["a", _stored(turned)])], evaluation, image_distance=d)[2]["picture"]
        for d in (0, 20)
    }
    assert counts == {0: 0, 20: 1}


@pytest.mark.parametrize(
    ("against", "options", "said"),
    [
        ([], {}, "against is empty"),
        ([{"format": "json"}], {}, r"against\[0\]=.* names no path"),
        ([{"path": "x"}], {"ngram": 0}, "ngram=0"),
        ([{"path": "x"}], {"image_distance": 40}, "image_distance=40"),
    ],
)
def test_what_cannot_be_is_refused(against, options, said):
    with pytest.raises(ConfigError, match=said):
        Decontaminate(against, **options)
