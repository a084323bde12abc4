"""The backend "torch" of the image processors against the torchvision backend of transformers 5, bit by bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import m4train.processing as processing
from m4train import AutoProcessor
from m4train.processing import resampling
from m4train.processing.idefics3_images import SmolVLMImageProcessor
from tests.helpers.processing import tiny_idefics2_processor
from tests.parity.make_fixtures_torchvision import CASES, FILE, HALF, SIZES, digest, picture

KINDS = {
    "Idefics": processing.IdeficsImageProcessor,
    "Idefics2": processing.Idefics2ImageProcessor,
    "Idefics3": processing.Idefics3ImageProcessor,
    "SmolVLM": SmolVLMImageProcessor,
}
MADE = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", list(CASES))
def test_pixels_are_those_of_torchvision(name):
    family, settings = CASES[name]
    processor = KINDS[family](**settings, backend="pil")
    if not resampling.torch_has(processor.resample):
        pytest.skip("this torch cannot resize with that filter")
    if not resampling._on_bytes(processor.resample):
        pytest.skip("this processor has no vectors of bytes, for which torchvision goes by way of floating point")
    for size in SIZES:
        values = processor(picture(*size), return_tensors="pt", backend="torch")
        values = values if family == "Idefics" else values["pixel_values"]
        assert digest(values) == MADE[f"{name} {size[0]}x{size[1]}"], size


@pytest.mark.parametrize("family", list(KINDS))
def test_backends_agree_to_a_few_levels(family):
    image = picture(333, 250)
    pil, torch = (np.stack(KINDS[family](backend=backend).frames(image)).astype(int) for backend in ("pil", "auto"))
    off = np.abs(pil - torch)
    assert off.max() <= 3
    assert (off > 1).mean() < 0.01


def test_the_slow_way_of_torch_is_within_a_level(monkeypatch):
    image, processor = picture(320, 240), processing.Idefics2ImageProcessor(backend="torch", **HALF)
    quick = processor.frames(image)[0].astype(int)
    monkeypatch.setattr(resampling, "_on_bytes", lambda resample: False)
    assert np.abs(processor.frames(image)[0].astype(int) - quick).max() <= 1
    assert resampling.resolved("auto", Image.Resampling.BILINEAR) == "pil"


def test_a_folder_says_which_backend_a_model_was_trained_with(tmp_path):
    processor = tiny_idefics2_processor()
    assert processor.image_processor.backend is None
    processor.image_processor = processor.image_processor.replace(backend="torch")
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.image_processor.backend == "torch"
    assert again.image_processor.replace(do_pad=False).backend == "torch"
    assert AutoProcessor.from_pretrained(tmp_path, backend="pil").image_processor.backend == "pil"
    assert AutoProcessor.from_pretrained(tmp_path, backend="torchvision").image_processor.backend == "torch"
    theirs = pytest.importorskip("transformers").AutoProcessor.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")  # and whoever saves it again keeps it
    assert AutoProcessor.from_pretrained(tmp_path / "again").image_processor.backend == "torch"


@pytest.mark.parametrize(
    ("backend", "resample", "said"),
    [("cuda", 2, "choose pil, torch or auto"), ("torch", 4, "resample=4: this torch has no such mode")],
)
def test_what_cannot_be_done_is_refused(backend, resample, said):
    with pytest.raises(ValueError, match=said):
        processing.Idefics2ImageProcessor(backend=backend, resample=resample)
    assert processing.Idefics2ImageProcessor(backend="auto", resample=4).backend == "pil"
