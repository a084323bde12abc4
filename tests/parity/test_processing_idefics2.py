"""The processors of Idefics and Idefics2 against the installed transformers: pixels, ids, masks, files (I1-I4, P1-P6)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from m4train.processing import (
    AutoProcessor,
    Idefics2ImageProcessor,
    Idefics2ImageProcessorFast,
    Idefics2Processor,
    Idefics3ImageProcessor,
    IdeficsImageProcessor,
    IdeficsProcessor,
    Tokenizer,
)
from m4train.processing.inputs import read_image
from m4train.processing.pieces import text_ids
from tests.helpers.processing import picture, tokenizer_folder
from tests.parity.fixtures import make_processing_446 as made

SIZES = [
    (640, 480), (480, 640), (1000, 300), (300, 1000), (364, 364), (365, 364), (980, 980), (981, 980),
    (20, 10), (2, 50), (1457, 728), (7, 5), (3000, 100),
]  # fmt: skip
LARGE = [(1999, 2000), (5000, 4000)]
MODES = ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16"]
SMALL = {"size": {"shortest_edge": 28, "longest_edge": 56}}


def assert_same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        left, right = np.asarray(ours[name]), np.asarray(theirs[name])
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)


def compare(image, ours=Idefics2ImageProcessor, **settings) -> None:
    expected = Idefics2ImageProcessorPil(**settings)(image, return_tensors="np")
    assert_same(ours(**settings)(image, return_tensors="np"), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("settings", [SMALL, {**SMALL, "do_image_splitting": True}], ids=str)
def test_pixels_of_idefics2(size, settings):
    if min(size) > 2:
        compare(picture(*size), **settings)
        compare(picture(*size), Idefics2ImageProcessorFast, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES + LARGE, ids=str)
@pytest.mark.parametrize("settings", [{}, {"do_image_splitting": True}, {"do_resize": False}], ids=str)
def test_pixels_of_idefics2_at_full_size(size, settings):
    compare(picture(*size), **settings)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_of_idefics(size):
    ours, theirs = IdeficsImageProcessor(), IdeficsImageProcessorPil()
    images = [picture(*size), picture(size[1], size[0], seed=1)]
    np.testing.assert_array_equal(ours(images), theirs(images, return_tensors="np"))


@pytest.mark.parametrize("mode", MODES)
def test_pixels_of_each_mode(mode):
    own = {"upstream_reading": True} if mode == "I;16" else {}  # transformers cuts off at 255
    compare(picture(50, 30, mode), partial(Idefics2ImageProcessor, **own), **SMALL)
    ours, theirs = IdeficsImageProcessor(image_size=28, **own), IdeficsImageProcessorPil(image_size=28)
    np.testing.assert_array_equal(ours(picture(50, 30, mode)), theirs(picture(50, 30, mode), return_tensors="np"))


LEVELS = ["float32", "float64", "int64", "tensor"]
FRACTIONS = ["fractions", "fractions of 4 bytes"]  # with do_rescale=True transformers takes them for levels below 1


@pytest.mark.parametrize(
    ("kind", "rescale"), [(kind, True) for kind in LEVELS] + [(kind, False) for kind in LEVELS + FRACTIONS]
)
def test_pixels_of_arrays(kind, rescale):
    levels = np.random.default_rng(0).integers(0, 256, (40, 50, 3))
    levels[0, 0] = 0, 1, 255
    image = levels.astype(kind) if hasattr(np, kind) else levels.astype(np.float32)
    if kind == "tensor":
        image = torch.from_numpy(image).permute(2, 0, 1)
    if kind.startswith("fractions"):
        image = np.random.default_rng(0).uniform(0, 1, levels.shape)
        image = image.astype(np.float32) if "4" in kind else image
    tiles = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    for ours, theirs, settings in (
        (IdeficsImageProcessor, IdeficsImageProcessorPil, {"image_size": 28}),
        (Idefics2ImageProcessor, Idefics2ImageProcessorPil, {**SMALL, "do_image_splitting": True}),
        (Idefics3ImageProcessor, Idefics3ImageProcessorPil, tiles),
    ):
        found = ours(**settings)(image, return_tensors="np", do_rescale=rescale)
        expected = theirs(**settings)(image, return_tensors="np", do_rescale=rescale)
        assert_same(*({"values": o} if isinstance(o, np.ndarray) else o for o in (found, expected)))


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_samples_as_arrays_of_four_dimensions(kind):
    batch = [np.random.default_rng(n).integers(0, 256, (n, 3, 40, 50), dtype=np.uint8) for n in (1, 2)]
    batch = [torch.from_numpy(sample) for sample in batch] if kind == "tensor" else batch
    compare(batch, **SMALL)
    compare(batch, Idefics2ImageProcessorFast, **SMALL)
    tiles = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    found = Idefics3ImageProcessor(**tiles)(batch, return_tensors="np")
    assert_same(found, Idefics3ImageProcessorPil(**tiles)(batch, return_tensors="np"))
    ours, theirs = IdeficsImageProcessor(image_size=28), IdeficsImageProcessorPil(image_size=28)
    np.testing.assert_array_equal(ours(batch, return_tensors="np"), theirs(batch, return_tensors="np"))
    processor = Idefics2Processor(Idefics2ImageProcessor(**SMALL), Tokenizer.from_pretrained(tokenizer_folder()))
    inputs = processor(images=batch, text=["<image>", "<image> a <image>"], padding=True, return_tensors="np")
    assert inputs["pixel_values"].shape[:2] == (2, 2)


def test_batches_of_uneven_samples():
    batch = [[picture(50, 30)], [], [picture(10, 90), picture(64, 64, seed=1), picture(3, 3)]]
    for options in ({"return_tensors": "np"}, {"return_tensors": "pt"}, {"do_pad": False}):
        ours = Idefics2ImageProcessorFast(**SMALL)(batch, **options)
        theirs = Idefics2ImageProcessorPil(**SMALL)(batch, **options)
        if "do_pad" not in options:
            assert_same(ours, theirs)
            continue
        for left, right in zip(ours["pixel_values"], theirs["pixel_values"]):
            for one, other in zip(left, right):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", [np.asarray, "first", "tensor", "gray"])
def test_arrays_and_tensors(kind):
    torch = pytest.importorskip("torch")
    image = picture(50, 30)
    array = np.asarray(image.convert("L") if kind == "gray" else image)
    given = {"first": array.transpose(2, 0, 1) if array.ndim == 3 else None, "gray": array}.get(kind, array)
    given = torch.from_numpy(array.transpose(2, 0, 1).copy()) if kind == "tensor" else given
    expected = Idefics2ImageProcessorPil(**SMALL)(image.convert("L") if kind == "gray" else image, return_tensors="np")
    assert_same(Idefics2ImageProcessor(**SMALL)(given, return_tensors="np"), expected)


def test_floating_point_arrays_are_the_levels_they_stand_for():
    array = np.asarray(picture(50, 30))
    for settings in (SMALL, {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}):
        ours = Idefics2ImageProcessor if settings is SMALL else Idefics3ImageProcessor
        theirs = Idefics2ImageProcessorPil if settings is SMALL else Idefics3ImageProcessorPil
        expected = theirs(**settings)(array, return_tensors="np")
        for kind in (np.float32, np.float64):
            floating = array.astype(kind) / 255
            assert_same(ours(**settings)(floating, return_tensors="np"), expected)
            upstream = theirs(**settings)(floating, do_rescale=False, return_tensors="np")
            assert_same(ours(**settings)(floating, do_rescale=False, return_tensors="np"), upstream)
    with pytest.raises(ValueError, match=r"all levels in 0\.\.255, or all fractions"):
        Idefics2ImageProcessor(**SMALL, do_rescale=False)([array, array / 255])


def rotated_jpeg(folder) -> str:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder / "rotated.jpg"
    picture(60, 40).save(path, exif=exif.tobytes())
    return str(path)


def stored_png(folder, mode: str) -> str:
    path = folder / "stored.png"
    picture(50, 30, mode).save(path)
    return str(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_upstream_reading_is_what_the_reference_reads(mode, tmp_path):
    """EXIF and transparency, for Pillow images and for files, through image processors and processors."""
    options = {"padding": True, "return_tensors": "np"}
    ours, theirs = pair(tmp_path)
    ours.image_processor.upstream_reading = True
    images = [Image.open(rotated_jpeg(tmp_path)), picture(50, 30, mode)]
    for image in images:
        assert_same(ours(text="<image> a", images=image, **options), theirs(text="<image> a", images=image, **options))
        compare(image, **SMALL, upstream_reading=True)
    for path in (rotated_jpeg(tmp_path), stored_png(tmp_path, mode)):
        compare(path, **SMALL, upstream_reading=True)
        expected = theirs(text="<image> a", images=[[path]], **options)
        assert_same(ours(text="<image> a", images=path, **options), expected)


def test_own_reading_rotates_and_lays_on_white_everywhere(tmp_path):
    path = rotated_jpeg(tmp_path)
    processor = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    data = Path(path).read_bytes()
    upright = Image.open(path).transpose(Image.Transpose.ROTATE_270)
    expected = processor(np.asarray(upright), return_tensors="np")
    for given in (path, data, Image.open(path)):
        assert_same(processor(given, return_tensors="np"), expected)
    for source in (path, data, Image.open(path)):
        assert read_image(source).size == (40, 60)


def pair(folder):
    """Idefics2's processor and the reference's, loaded from the folder that ours wrote, with a byte-level tokenizer."""
    ours = Idefics2Processor(
        Idefics2ImageProcessor(**SMALL), Tokenizer.from_pretrained(tokenizer_folder()), image_seq_len=3
    )
    ours.save_pretrained(folder / "saved")
    return ours, transformers.AutoProcessor.from_pretrained(folder / "saved")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "texts",
    [
        ["<image> In this", "bla bla<image>"],
        ["<image>glued", "<image>\nline<image> <image><image>"],
        ["<image><image><end_of_utterance>\nAssistant:", "a <image>."],
    ],
    ids=str,
)
def test_ids_with_the_space_rule_of_5x(tmp_path, texts, split):
    ours, theirs = pair(tmp_path)
    ours.space_after_image = True
    ours.image_processor.do_image_splitting = theirs.image_processor.do_image_splitting = split
    images = [[picture(40, 50, seed=i) for i in range(text.count("<image>"))] for text in texts]
    options = {"images": images, "text": texts, "padding": True, "return_tensors": "np"}
    assert_same(ours(**options), theirs(**options))
    flat = [image for sample in images for image in sample]
    assert_same(ours(**{**options, "images": flat}), theirs(**{**options, "images": flat}))
    items = [{"text": t} for t in texts[0].split("<image>") if t]
    items = [{"image": "0"}] * texts[0].count("<image>") + items
    if "<end_of_utterance>" not in texts[0]:
        ids = text_ids(ours.encode_document(items), [ours.encode_image(image).ids for image in images[0]])
        assert ids.tolist()[:-1] == theirs(text=texts[0], images=[images[0]])["input_ids"][0]


def messages() -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "text", "text": "What differs?"}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Nothing."}]},
    ]


def test_chat_pieces_of_idefics2(tmp_path):
    ours, theirs = pair(tmp_path)
    text = theirs.apply_chat_template(messages())
    assert text == ours.apply_chat_template(messages())
    images = [picture(40, 50), picture(30, 30)]
    ids = text_ids(ours.encode_messages(messages()), [ours.encode_image(image).ids for image in images])
    assert ids.tolist() == theirs(text=text, images=[images])["input_ids"][0]


@pytest.mark.parametrize("rule", ["4.46", "5.23"])
@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("name", ["glued", "spaced", "chat", "lines"])
def test_legacy_tokenizers_as_5x_rebuilds_them(tmp_path, name, legacy, rule):
    """5.23 rebuilds LLaMA tokenizers; the switch does the same, and without it the file counts, as in 4.46."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((made.FOLDER / file).read_bytes())
    config = (tmp_path / "tokenizer_config.json").read_text()
    replaced = {True: '"legacy": true', False: '"legacy": false', None: '"unused": 1'}[legacy]
    (tmp_path / "tokenizer_config.json").write_text(config.replace('"legacy": true', replaced))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"additional_special_tokens": made.MARKS})
    ours = Tokenizer.from_pretrained(tmp_path, rule=rule)
    ours.add_special_tokens(made.MARKS)
    differ = False
    for text in made.TEXTS[name]:
        expected = theirs(text)["input_ids"]
        differ |= ours.encode(text) != expected
        if rule == "5.23":
            assert ours.encode(text) == expected
            assert ours.decode(expected) == theirs.decode(expected)
    assert differ == (rule == "4.46" and (name == "spaced" or not legacy))


def idefics_pair(folder):
    ours = IdeficsProcessor(
        IdeficsImageProcessor(image_size=28), Tokenizer.from_pretrained(tokenizer_folder()), image_size=28
    )
    ours.save_pretrained(folder)
    return ours, transformers.AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"add_eos_token": True}, {"truncation": True, "max_length": 12}], ids=str)
def test_prompts_of_idefics(tmp_path, side, options):
    ours, theirs = idefics_pair(tmp_path)
    ours.tokenizer.padding_side = theirs.tokenizer.padding_side = side
    end = "<|end_of_text|>"
    prompts = [
        ["User:", picture(40, 50), "Describe.\nAssistant: trees.", picture(30, 20), picture(9, 9), f"a {end} b"],
        [picture(20, 20), f"one{end}two", "three", picture(10, 10)],
        ["no image"],
    ]
    for ends in (False, True):
        settings = {**options, "add_end_of_utterance_token": ends, "padding": True, "return_tensors": "pt"}
        assert_same(ours(prompts, **settings), theirs(text=prompts, **settings))


def test_text_and_images_of_idefics(tmp_path):
    ours, theirs = idefics_pair(tmp_path)
    images, texts = [picture(20, 20), picture(30, 30)], ["what is this?", "and this"]
    options = {"padding": True, "add_end_of_utterance_token": False}
    assert_same(ours(images=images, text=texts, **options), theirs(images=images, text=texts, **options))
    nested = [[images[0], images[1]], [images[1]]]
    assert_same(ours(images=nested, text=texts, **options), theirs(images=nested, text=texts, **options))
    assert_same(ours(["only text"], **options), theirs(text=["only text"], **options))


def test_folders_go_both_ways(tmp_path):
    ours, theirs = pair(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert type(again) is Idefics2Processor
    image = picture(33, 44)
    assert_same(again(image, "a <image> b", return_tensors="np"), theirs(image, "a <image> b", return_tensors="np"))
    assert again.chat_template == ours.chat_template
    ours, theirs = idefics_pair(tmp_path / "idefics")
    theirs.save_pretrained(tmp_path / "idefics_theirs")
    again = AutoProcessor.from_pretrained(tmp_path / "idefics_theirs")
    assert type(again) is IdeficsProcessor
    assert_same(again([image, "a"]), theirs(text=[image, "a"]))
