"""Pictures of more than 8 bits, in every mode and format that Pillow writes them in, against levels computed by hand."""

import io

import numpy as np
import pytest
from PIL import Image

from m4train.errors import BadSample
from m4train.processing.idefics import IdeficsImageProcessor
from m4train.processing.idefics2_images import Idefics2ImageProcessor
from m4train.processing.idefics3_images import Idefics3ImageProcessor
from m4train.processing.images import decode_image, decode_scaled, to_rgb
from m4train.processing.inputs import read_image
from m4train.processing.levels import levels

DEEP = np.array([[0, 255, 256, 1000], [32768, 40000, 65278, 65535]], np.uint16)
EXPECTED = np.round(DEEP / 257).astype(np.uint8)


def stored(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    ("form", "image"),
    [
        ("PNG", Image.fromarray(DEEP)),
        ("TIFF", Image.fromarray(DEEP)),
        ("PPM", Image.fromarray(DEEP)),
        ("JPEG2000", Image.fromarray(DEEP)),
        ("TIFF", Image.fromarray(DEEP.astype(np.int32))),
        ("TIFF", Image.fromarray((DEEP / 65535).astype(np.float32))),
        ("TIFF", Image.fromarray(np.round(DEEP / 257).astype(np.float32))),
    ],
)
def test_deep_pictures_keep_their_range_in_files_and_in_memory(form, image):
    data = stored(image, form)
    readings = (decode_image(data), decode_scaled(data, (4, 2))[0], to_rgb(image))
    for found in (*readings, to_rgb(read_image(image)), read_image(data)):
        assert np.abs(grey(found).astype(int) - EXPECTED).max() <= (1 if image.mode == "F" else 0)


def test_a_dark_picture_of_16_bits_stays_dark():
    assert grey(decode_image(stored(Image.fromarray(DEEP // 300), "PNG"))).max() == 1


def test_white_is_zero_and_odd_numbers_of_bits_are_read_from_tiff():
    inverted = stored(Image.fromarray(65535 - DEEP), "TIFF", tiffinfo={262: 0})
    assert grey(decode_image(inverted)).tolist() == EXPECTED.tolist()
    twelve = bytearray(stored(Image.new("I;16", (2, 1)), "TIFF"))
    place = twelve.index(b"\x02\x01\x03\x00\x01\x00\x00\x00\x10\x00")  # BitsPerSample, a short, one of them: 16
    twelve[place + 8] = 12
    with Image.open(io.BytesIO(bytes(twelve))) as image:
        assert image.mode == "I;16"
    start = int.from_bytes(twelve[twelve.index(b"\x11\x01\x04\x00\x01\x00\x00\x00") + 8 :][:2], "little")
    twelve[start : start + 3] = b"\xff\xf8\x00"  # 4095 and 2048 in 12 bits
    assert grey(decode_image(bytes(twelve))).tolist() == [[255, 128]]


def test_a_transparent_value_of_16_bits_shows_white():
    data = stored(Image.fromarray(DEEP), "PNG", transparency=1000)
    assert grey(decode_image(data)).tolist() == np.where(DEEP == 1000, 255, EXPECTED).tolist()


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-1.0, 0.5]], np.float32),
        np.array([[0.0, 3000.0]], np.float32),
        np.array([[0.0, np.nan]], np.float32),
        np.array([[0.0, np.inf]], np.float32),
        np.array([[-5, 100]], np.int32),
        np.array([[0, 70000]], np.int32),
    ],
)
def test_values_without_a_known_range_are_a_bad_sample_until_it_is_given(values):
    image = Image.fromarray(values)
    for read in (lambda: decode_image(stored(image, "TIFF")), lambda: to_rgb(image)):
        with pytest.raises(BadSample, match="image_range") as error:
            read()
        assert error.value.reason == "unknown_range"
    given = decode_image(stored(image, "TIFF"), image_range=(-1000, 3000)) if np.isfinite(values).all() else None
    if given is not None:
        assert grey(given).tolist() == np.round(((values + 1000.0) / 4000).clip(0, 1) * 255).tolist()


def test_a_given_range_is_a_window_and_may_run_backwards():
    assert levels(DEEP, (0, 1000)).tolist()[0] == [0, 65, 65, 255]
    assert levels(np.array([0, 1]), (1, 0)).tolist() == [255, 0]


@pytest.mark.parametrize("processor", [IdeficsImageProcessor, Idefics2ImageProcessor, Idefics3ImageProcessor])
def test_processors_see_the_same_levels(processor):
    ramp = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None], 64, axis=0)
    eight = Image.fromarray(np.round(ramp / 257).astype(np.uint8))
    encode = processor.from_dict({})
    forms = [Image.fromarray(ramp), stored(Image.fromarray(ramp), "PNG"), Image.fromarray(ramp.astype(np.int32))]

    def frames(image):
        return np.stack(encode.frames_of_batch(encode.read_samples([[image]]))[0])

    expected = frames(eight)
    for image in forms:
        assert (frames(image) == expected).all()
    assert len(np.unique(expected)) > 50
