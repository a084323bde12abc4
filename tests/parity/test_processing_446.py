"""The processors against stored results of transformers 4.46.3 (see fixtures/make_processing_446.py): P1, P2, P3."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4train.processing import (
    Idefics2ImageProcessor,
    Idefics2ImageProcessorFast,
    Idefics2Processor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    IdeficsImageProcessor,
    IdeficsProcessor,
    Tokenizer,
)
from m4train.processing.pieces import text_ids
from tests.parity.fixtures import make_processing_446 as made

CASES = json.loads((Path(made.__file__).parent / "processing_446.json").read_text())
TEXT_CASES = [
    (kind, name) for kind in ("idefics2", "idefics2_split", "idefics3", "idefics3_legacy") for name in made.TEXTS
]


def build(kind: str, images: type = Idefics2ImageProcessor):
    if kind == "idefics":
        return IdeficsProcessor(IdeficsImageProcessor(image_size=28), Tokenizer.from_pretrained(made.FOLDER))
    if kind.startswith("idefics3"):
        folder = made.FOLDER if kind == "idefics3_legacy" else made.BYTELEVEL
        settings = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
        return Idefics3Processor(Idefics3ImageProcessor(**settings), Tokenizer.from_pretrained(folder), image_seq_len=2)
    if kind == "idefics2_split":
        processor = images(size={"shortest_edge": 14, "longest_edge": 28}, do_image_splitting=True)
        return Idefics2Processor(processor, Tokenizer.from_pretrained(made.FOLDER), image_seq_len=2)
    processor = images(size={"shortest_edge": 30, "longest_edge": 50})
    return Idefics2Processor(processor, Tokenizer.from_pretrained(made.FOLDER), image_seq_len=3)


def pictures(texts: list[str]) -> list[list[Image.Image]]:
    numbers = iter(range(100))
    return [[made.picture(next(numbers)) for _ in range(text.count("<image>"))] for text in texts]


def assert_digest(values, expected) -> None:
    assert list(values.shape) == expected["shape"]
    assert hashlib.sha256(np.asarray(values).astype(np.float32).tobytes()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize(("kind", "name"), TEXT_CASES)
def test_texts_with_images(kind, name):
    texts, expected = made.TEXTS[name], CASES[kind][name]
    processor = build(kind)
    inputs = processor(text=texts, images=pictures(texts), padding=True, return_tensors="np")
    assert inputs["input_ids"].tolist() == expected["input_ids"]
    assert inputs["attention_mask"].tolist() == expected["attention_mask"]
    assert processor.batch_decode(inputs["input_ids"]) == expected["decoded"]
    assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == expected["spoken"]
    assert_digest(inputs["pixel_values"], expected["pixel_values"])
    assert_digest(inputs["pixel_attention_mask"], expected["pixel_attention_mask"])


@pytest.mark.parametrize("name", made.TEXTS)
@pytest.mark.parametrize("kind", ["idefics2", "idefics2_split"])
def test_the_fast_image_processor_gives_the_same(kind, name):
    texts, expected = made.TEXTS[name], CASES[kind][name]
    inputs = build(kind, Idefics2ImageProcessorFast)(
        text=texts, images=pictures(texts), padding=True, return_tensors="np"
    )
    assert_digest(inputs["pixel_values"], expected["pixel_values"])
    assert_digest(inputs["pixel_attention_mask"], expected["pixel_attention_mask"])


@pytest.mark.parametrize(("kind", "name"), TEXT_CASES)
def test_pieces_of_documents(kind, name):
    processor = build(kind)
    texts, expected = made.TEXTS[name], CASES[kind][name]
    for text, images, ids, mask in zip(texts, pictures(texts), expected["input_ids"], expected["attention_mask"]):
        if "<end_of_utterance>" in text:
            continue  # in a document that is plain text
        items: list[dict] = []
        for number, part in enumerate(text.split("<image>")):
            items += [{"image": "x.jpg"}] * (number > 0) + [{"text": part}] * bool(part)
        pieces = processor.encode_document(items)
        encoded = [processor.encode_image(image) for image in images]
        real = [i for i, seen in zip(ids, mask) if seen]
        assert text_ids(pieces, [e.ids for e in encoded]).tolist() == [*real, processor.eos_id]
        assert [len(e.ids) for e in encoded] == [processor.tokens_for(*image.size) for image in images]
        assert [len(e.frames) for e in encoded] == [processor.frames_for(*image.size) for image in images]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("name", made.PROMPTS)
def test_prompts_of_idefics(name, side, ends):
    expected = CASES["idefics"][f"{name}-{side}-{ends}"]
    processor = build("idefics")
    processor.tokenizer.padding_side = side
    prompts = [
        [made.picture(item) if isinstance(item, int) else item for item in prompt] for prompt in made.PROMPTS[name]
    ]
    inputs = processor(prompts, add_end_of_utterance_token=ends, add_eos_token=ends, return_tensors="np")
    assert inputs["input_ids"].tolist() == expected["input_ids"]
    assert inputs["attention_mask"].tolist() == expected["attention_mask"]
    assert inputs["image_attention_mask"].astype(int).tolist() == expected["image_attention_mask"]
    assert_digest(inputs["pixel_values"], expected["pixel_values"])


def test_prompts_of_idefics_as_pieces():
    processor = build("idefics")
    prompt = made.PROMPTS["one"][0]
    items = [{"image": "x"} if isinstance(item, int) else {"text": item} for item in prompt]
    ids = text_ids(processor.encode_document(items), [processor.encode_image(made.picture(i)).ids for i in (0, 1)])
    assert [ids.tolist()[:-1]] == CASES["idefics"]["one-left-False"]["input_ids"]


_LOAD = """
import json, sys, numpy as np
from transformers import AutoProcessor
from PIL import Image
for kind in sys.argv[2:]:
    folder = sys.argv[1] + "/" + kind
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(np.load(folder + "/image.npy"))
    options = {"padding": True, "return_tensors": "pt"}
    inputs = processor(text=["a", image, "b"], **options) if kind == "idefics" else processor(images=[[image]], text=["a <image> b"], **options)
    found = {"class": type(processor).__name__, "template": processor.chat_template, "ids": inputs["input_ids"].tolist()}
    found["side"] = processor.tokenizer.padding_side
    found["inputs"] = sorted(inputs)
    np.save(folder + "/pixels.npy", inputs["pixel_values"].numpy())
    with open(folder + "/found.json", "w") as file:
        json.dump(found, file)
"""
KINDS = ("idefics", "idefics2", "idefics2_split", "idefics3")


def left(kind):
    processor = build(kind)
    processor.tokenizer.padding_side = "left"
    return processor


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of ours for each kind, and what that release made of it; one process of it reads them all."""
    root = tmp_path_factory.mktemp("folders")
    for kind in KINDS:
        left(kind).save_pretrained(root / kind)
        np.save(root / kind / "image.npy", np.asarray(made.picture(1)))
    command = [os.environ["PYTHON_TRANSFORMERS_446"], "-c", _LOAD, str(root), *KINDS]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return root


@pytest.mark.skipif("PYTHON_TRANSFORMERS_446" not in os.environ, reason="needs an interpreter with transformers 4.46.3")
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_446_loads_our_folders(kind, root):
    ours, image, folder = left(kind), made.picture(1), root / kind
    found = json.loads((folder / "found.json").read_text())
    inputs = (
        ours(["a", image, "b"]) if kind == "idefics" else ours(text=["a <image> b"], images=[[image]], padding=True)
    )
    assert found["class"] == type(ours).__name__
    assert found["side"] == "left"
    assert found["inputs"] == sorted(inputs)
    assert found["ids"] == np.asarray(inputs["input_ids"]).tolist()
    np.testing.assert_array_equal(np.load(folder / "pixels.npy"), np.asarray(inputs["pixel_values"]))
    if kind != "idefics":
        assert found["template"] == ours.chat_template
