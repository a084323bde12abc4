"""Pictures of one pixel's height or width, under every setting of every image processor; and pictures that are black."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from m4train import Idefics3ForConditionalGeneration
from m4train.models import Idefics3Config
from m4train.processing import (
    Idefics2ImageProcessor,
    Idefics2Processor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    IdeficsImageProcessor,
    IdeficsProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    Tokenizer,
)
from m4train.processing.idefics2_images import cut_patches
from tests.helpers.models import perturb, tiny_idefics3
from tests.parity.fixtures import make_processing_446 as made

SIZES = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 40), (40, 1), (1, 3000), (3000, 1), (2, 3000), (1, 20000))
SWITCHES = ("do_image_splitting", "do_resize", "do_pad", "do_normalize")
WORDS, BYTES = (Tokenizer.from_pretrained(folder) for folder in (made.FOLDER, made.BYTELEVEL))


def _processors():
    for values in itertools.product((True, False), repeat=len(SWITCHES)):
        switches = dict(zip(SWITCHES, values, strict=True))
        for size in (
            {"shortest_edge": 14, "longest_edge": 28},
            {"shortest_edge": 1, "longest_edge": 9},
            {"height": 9, "width": 9},
        ):
            yield Idefics2Processor(Idefics2ImageProcessor(size=size, **switches), WORDS, image_seq_len=2)
        for longest in (64, 32):
            sizes = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": 32}}
            yield Idefics3Processor(Idefics3ImageProcessor(**sizes, **switches), BYTES, image_seq_len=2)
            yield SmolVLMProcessor(SmolVLMImageProcessor(**sizes, **switches), BYTES, image_seq_len=2)
    yield IdeficsProcessor(IdeficsImageProcessor(image_size=28), WORDS)


@pytest.mark.parametrize("size", SIZES)
def test_a_thin_picture_is_framed_as_planned(size):
    for processor in _processors():
        encoded = processor.encode_image(Image.new("RGB", size))
        planned = processor.image_processor.frame_sizes(*size)
        assert [frame.shape[:0:-1] for frame in encoded.frames] == planned
        assert len(planned) == processor.frames_for(*size)
        assert len(encoded.ids) == processor.tokens_for(*size)
        assert all(frame.size for frame in encoded.frames)
        for frame in encoded.frames if isinstance(processor, Idefics2Processor) else []:
            patches, rows, columns = cut_patches(frame, 14)
            assert len(patches) == rows * columns > 0


def test_a_thin_frame_is_continued_by_its_edge():
    frame = np.arange(3 * 2, dtype=np.uint8).reshape(3, 1, 2)
    patches, rows, columns = cut_patches(frame, 4)
    assert (rows, columns) == (1, 1)
    assert patches[0, 0].tolist() == [[0, 1, 1, 1]] * 4


def test_a_black_picture_is_a_picture_without_normalisation():
    config = tiny_idefics3()
    side = config["vision_config"]["image_size"]
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(config))
    perturb(model)
    per_image = model.config.tokens_per_image
    settings = {"size": {"longest_edge": side}, "max_image_size": {"longest_edge": side}, "do_normalize": False}
    images = Idefics3ImageProcessor(**settings, do_image_splitting=False)
    black, grey = Image.new("RGB", (side, side)), Image.new("RGB", (side, side), (99, 99, 99))
    inputs = images([[black], [black, grey]], return_tensors="pt")
    assert not inputs["pixel_values"][0].any()
    ids = torch.full((2, 2 * per_image + 1), 5)
    ids[0, :per_image] = ids[1, : 2 * per_image] = model.config.image_token_id
    logits = model.eval()(input_ids=ids, **inputs).logits
    alone = model(input_ids=ids[:1], **images([[black]], return_tensors="pt")).logits
    torch.testing.assert_close(logits[:1], alone)
