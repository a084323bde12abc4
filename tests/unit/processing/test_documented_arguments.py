"""Every argument that the documentation names is taken, with its documented default; and does something."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m4train.errors import ConfigError
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
from tests.helpers.processing import (
    picture,
    tiny_idefics2_processor,
    tiny_idefics3_processor,
    tiny_idefics_processor,
    tokenizer_folder,
)

COMMON: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": None,
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": None,
    "image_std": None,
    "do_pad": True,
}
DEFAULTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "idefics": (
        IdeficsImageProcessor,
        {"image_size": 224, "image_mean": None, "image_std": None, "image_num_channels": 3},
    ),
    "idefics2": (
        Idefics2ImageProcessor,
        COMMON | {"resample": Image.Resampling.BILINEAR, "do_image_splitting": False},
    ),
    "idefics3": (
        Idefics3ImageProcessor,
        COMMON | {"resample": Image.Resampling.LANCZOS, "do_image_splitting": True, "max_image_size": None},
    ),
}
DEFAULTS["idefics2_fast"] = (Idefics2ImageProcessorFast, DEFAULTS["idefics2"][1])
SMALL: dict[str, dict[str, Any]] = {
    "idefics": {"image_size": 12},
    "idefics2": {"size": {"shortest_edge": 12, "longest_edge": 24}},
    "idefics2_fast": {"size": {"shortest_edge": 12, "longest_edge": 24}},
    "idefics3": {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 12}},
}
# argument -> another value, which gives other values, or is refused with what is said here
OTHER: dict[str, tuple[Any, str | None]] = {
    "image_size": (10, None),
    "image_num_channels": (1, "image_num_channels"),
    "do_resize": (False, None),
    "size": ({"shortest_edge": 8, "longest_edge": 16}, None),
    "resample": (Image.Resampling.NEAREST, None),
    "do_rescale": (False, None),
    "rescale_factor": (1 / 128, None),
    "do_normalize": (False, None),
    "image_mean": (0.1, None),
    "image_std": ([0.1, 0.2, 0.3], None),
    "do_image_splitting": ("other", None),
    "max_image_size": ({"longest_edge": 8}, None),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_the_documented_defaults(kind: str) -> None:
    processor, defaults = DEFAULTS[kind]
    assert processor(**defaults).to_dict() == processor().to_dict()


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, (_, d) in DEFAULTS.items() for n in d if n in OTHER])
def test_an_argument_does_something_for_one_call_as_in_the_constructor(kind: str, name: str) -> None:
    make = DEFAULTS[kind][0]
    other, refusal = OTHER[name]
    small = make(**SMALL[kind])
    if other == "other":
        other = not small.do_image_splitting
    image = picture(30, 20)
    if refusal is not None:
        for call in (lambda: small(image, **{name: other}), lambda: make(**SMALL[kind] | {name: other})(image)):
            with pytest.raises(ValueError, match=refusal):
                call()
        return
    plain, changed = values(small(image)), values(small(image, **{name: other}))
    assert plain.shape != changed.shape or not np.array_equal(plain, changed)
    assert np.array_equal(values(make(**SMALL[kind] | {name: other})(image)), changed)
    assert np.array_equal(values(small(image, **{name: None})), plain)


def values(output: Any) -> np.ndarray:
    found = output["pixel_values"] if hasattr(output, "keys") else output
    if isinstance(found, list):
        found = found[0][0] if len(found[0]) == 1 else np.stack(list(found[0]))
    return np.asarray(found)


SQUARE = {"height": 14, "width": 14}


def test_sizes_may_be_given_as_equal_height_and_width():
    image = picture(30, 20)
    small = Idefics3ImageProcessor(size={"longest_edge": 28}, max_image_size=14)
    assert Idefics3ImageProcessor(size={"longest_edge": 28}, max_image_size=SQUARE).to_dict() == small.to_dict()
    plain = IdeficsImageProcessor(image_size=14)(image)
    for settings in ({"image_size": SQUARE}, {"size": SQUARE}, {"size": 14}):
        assert np.array_equal(IdeficsImageProcessor()(image, **settings), plain)
        assert np.array_equal(IdeficsImageProcessor(**settings)(image), plain)


def test_sizes_of_the_fast_processor_may_be_one_number():
    fast = Idefics2ImageProcessorFast()
    assert values(fast(picture(30, 20), size=14, default_to_square=True)).shape == (1, 1, 3, 14, 14)
    for options in ({}, {"default_to_square": False}):
        with pytest.raises(ValueError, match="size=14 is not a size for these images"):
            fast(picture(30, 20), size=14, **options)


def test_options_of_the_fast_processor_may_be_given_to_its_constructor():
    image, options = picture(30, 20), {"device": "cpu", "return_tensors": "pt", "data_format": "channels_last"}
    fast = Idefics2ImageProcessorFast(size=14, default_to_square=True, disable_grouping=True, **options)
    pixels = fast(image, do_normalize=False)["pixel_values"]
    assert pixels.shape == (1, 1, 14, 14, 3)
    named = Idefics2ImageProcessorFast()(image, size=SQUARE, do_normalize=False, **options)["pixel_values"]
    assert torch.equal(pixels, named)
    assert fast(image, data_format="channels_first")["pixel_values"].shape == (1, 1, 3, 14, 14)
    with pytest.raises(ValueError, match="does not crop the centre"):
        Idefics2ImageProcessorFast(do_center_crop=True)(image)
    with pytest.raises(TypeError, match="no setting 'devise': did you mean 'device'"):
        Idefics2ImageProcessorFast(devise="cpu")


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (Idefics2ImageProcessor, {"size": {"longest_edge": 56}}, r"size=\{'longest_edge': 56\} is not a size for these "),
        (Idefics2ImageProcessor, {"size": 64}, "give {'shortest_edge': pixels, 'longest_edge': pixels} or {'height': "),
        (Idefics3ImageProcessor, {"size": {"shortest_edge": 64}}, "give {'longest_edge': pixels} or {'height': pix"),
        (Idefics3ImageProcessor, {"max_image_size": {"height": 32, "width": 28}}, "is not square, but every frame is"),
        (Idefics3ImageProcessor, {"max_image_size": {"shortest_edge": 32}}, "max_image_size=.* is not a size for these"),
        (IdeficsImageProcessor, {"image_size": {"height": 32, "width": 28}}, "is not square, but every frame is"),
        (IdeficsImageProcessor, {"size": {"shortest_edge": 32}}, "image_size=.* is not a size for these images"),
    ],
)  # fmt: skip
def test_sizes_that_fit_no_image_processor_are_refused_in_one_sentence(make, settings, said):
    for call in (lambda: make(**settings), lambda: make()(picture(30, 20), **settings)):
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert isinstance(error.value, ConfigError)  # the command line says it without a traceback


def test_documented_orders_of_arguments():
    image = picture(30, 20)
    processor = IdeficsImageProcessor()
    expected = IdeficsImageProcessor(image_size=14, image_mean=0.5, image_std=0.25)(image)
    assert np.array_equal(processor.preprocess(image, 3, 14, 0.5, 0.25), expected)
    assert np.array_equal(processor(image, 3, SQUARE, 0.5, 0.25), expected)
    transformed = processor.preprocess(image, 3, None, None, None, lambda image: torch.ones(3, 2, 2))
    assert transformed.shape == (1, 3, 2, 2)

    size, tiles = {"shortest_edge": 14, "longest_edge": 28}, {"longest_edge": 28}
    given = (True, True, size, 2, True, 1 / 128, True, 0.5, 0.25, True, False, "np", None, "channels_last")
    found = Idefics2ImageProcessor().preprocess(image, *given)["pixel_values"]
    settings = {"size": size, "rescale_factor": 1 / 128, "image_mean": 0.5, "image_std": 0.25}
    expected = Idefics2ImageProcessor(**settings)(image, return_tensors="np", data_format="channels_last")
    assert np.array_equal(found, expected["pixel_values"])
    given = (True, True, tiles, 1, True, True, 14, 1 / 128, True, 0.5, 0.25, True, "np", True)
    features = Idefics3ImageProcessor()(image, *given)
    settings |= {"size": tiles, "max_image_size": 14}
    expected = Idefics3ImageProcessor(**settings)(image, return_tensors="np", return_row_col_info=True)
    assert np.array_equal(features["pixel_values"], expected["pixel_values"])
    assert features["rows"] == expected["rows"] == [[2]]
    with pytest.raises(TypeError, match="Idefics2ImageProcessor takes at most 14 arguments after the images"):
        Idefics2ImageProcessor()(image, *[None] * 15)
    with pytest.raises(TypeError, match="multiple values"):
        Idefics2ImageProcessor()(image, True, do_convert_rgb=True)

    processor = tiny_idefics_processor()
    prompts = [["a", image], ["b c d e f g"]]
    named = {"padding": "longest", "truncation": True, "max_length": 5, "add_eos_token": True, "return_tensors": "np"}
    expected = processor(prompts, **named)
    found = processor(prompts, "longest", True, 5, None, True, None, False, "np")
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    assert type(found["pixel_values"]) is np.ndarray
    for padding in ("longest", True, "do_not_pad", False, None):
        assert processor(prompts[:1], padding)["input_ids"].shape == (1, 5)
    later = processor([image], ["a"])
    assert later["input_ids"].tolist() == processor(images=[image], text=["a"])["input_ids"].tolist()


def test_padding_can_be_left_out() -> None:
    small = Idefics2ImageProcessor(**SMALL["idefics2"])
    images = [[picture(30, 20)], [picture(20, 30)]]
    together, apart = small(images)["pixel_values"], small(images, do_pad=False)["pixel_values"]
    assert np.asarray(together).shape == (2, 1, 3, 24, 24)
    assert [np.asarray(sample[0]).shape for sample in apart] == [(3, 16, 24), (3, 24, 16)]


@pytest.mark.parametrize(
    ("make", "kind", "arguments"),
    [
        (tiny_idefics_processor, IdeficsProcessor, {"image_size": 224, "add_end_of_utterance_token": None}),
        (tiny_idefics2_processor, Idefics2Processor, {"image_seq_len": 64, "chat_template": None}),
        (tiny_idefics3_processor, Idefics3Processor, {"image_seq_len": 169, "chat_template": None}),
    ],
)
def test_processors_take_their_documented_arguments(make: Any, kind: Any, arguments: dict[str, Any]) -> None:
    image_processor = make().image_processor
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder())
    processor, plain = kind(image_processor, tokenizer, **arguments), kind(image_processor, tokenizer)
    for name in arguments:
        assert getattr(processor, name) == getattr(plain, name)
