import contextlib
import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from m4train.errors import BadSample
from m4train.processing.images import decode_image, decode_scaled, normalize_into, pixel_table, read_image_info, to_rgb


def stored(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rotated(orientation: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(Image.new("RGB", (30, 20), (250, 0, 0)), form, exif=exif.tobytes())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied_and_told_without_decoding(tmp_path, orientation, form):
    data = rotated(orientation, form)
    expected = (20, 30) if orientation >= 5 else (30, 20)
    path = tmp_path / "image"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        assert decode_image(source).size == expected
        info = read_image_info(source)
        assert (info.format, info.width, info.height) == (form, *expected)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_sizes_are_read_without_decoding(monkeypatch, form):
    data = stored(Image.new("RGB", (30, 20)), form)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert read_image_info(data).width == 30


def test_transparency_shows_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    pixels = np.asarray(decode_image(stored(image)))
    assert pixels.tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_rgb_with_a_transparent_colour_shows_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    decoded = decode_image(stored(image, transparency=(1, 2, 3)))
    assert np.asarray(decoded).tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize("data", [b"", b"not an image", stored(Image.new("RGB", (50, 50), 3), "JPEG")[:300]])
def test_unreadable_images_are_bad_samples(data):
    with pytest.raises(BadSample) as error:
        decode_image(data)
    assert error.value.reason == "unreadable_image"


GOOD = {form: stored(Image.new("RGB", (24, 16), (9, 80, 200)), form) for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")}


@given(
    form=st.sampled_from(sorted(GOOD)),
    damage=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
)
@settings(max_examples=150)
def test_damaged_images_are_read_or_are_bad_samples(form, damage):
    data = bytearray(GOOD[form])
    for place, value in damage:
        data[place % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (read_image_info, decode_image):
            with contextlib.suppress(BadSample):  # any other error fails
                found = read(bytes(data), max_pixels=10_000)
                assert found.width * found.height <= 10_000


def test_images_above_the_limit_are_refused_before_decoding():
    data = stored(Image.new("1", (200, 100)))
    assert decode_image(data, max_pixels=20_000).size == (200, 100)
    for read in (decode_image, read_image_info):
        with pytest.raises(BadSample, match="200x100 pixels, above the limit of 19999") as error:
            read(data, max_pixels=19_999)
        assert error.value.reason == "image_too_large"


def test_pixel_table_normalises_every_level():
    table = pixel_table([0.5, 0.4, 0.3], [0.5, 0.6, 0.7])
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    out = np.empty(levels.shape, np.float32)
    normalize_into(levels, table, out)
    for channel, (mean, std) in enumerate([(0.5, 0.5), (0.4, 0.6), (0.3, 0.7)]):
        expected = (np.arange(256) / 255 - mean) / std
        np.testing.assert_allclose(out[channel].ravel(), expected, atol=1e-6)


def test_opaque_modes_are_plain_conversions():
    image = Image.new("L", (3, 3), 100)
    assert np.asarray(to_rgb(image)).tolist() == np.full((3, 3, 3), 100).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "RGBA", "P", "1", "CMYK"])
def test_tiffs_of_every_orientation_are_upright_and_of_their_size(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(Image.new(mode, (30, 20)), "TIFF", exif=exif)
    expected = (20, 30) if orientation >= 5 else (30, 20)
    info = read_image_info(data)
    assert (info.width, info.height) == decode_image(data).size == expected
    assert decode_scaled(data, None)[1] == expected


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_that_cannot_be_written_back_is_no_fault_of_the_picture(form, orientation):
    """A tag whose value does not fit its type can be read, but Pillow refuses to write it."""
    entries = b"\x12\x01\x03\x00\x01\x00\x00\x00" + bytes([orientation, 0, 0, 0])
    entries += b"\x00\x01\x0c\x00\x01\x00\x00\x00\x00\x00\x00\x00"  # ImageWidth as a double that lies at byte 0
    entries += b"\x69\x87\x02\x00\x04\x00\x00\x00abc\x00"  # the Exif directory as a text
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x03\x00" + entries + b"\x00\x00\x00\x00"
    pixels = Image.new("RGB", (24, 16))
    pixels.paste((255, 0, 0), (0, 0, 12, 8))
    turned = decode_image(stored(pixels, form, exif=exif, **({} if form == "PNG" else {"quality": 100})))
    assert turned.size == ((16, 24) if orientation >= 5 else (24, 16))
    assert decode_image(stored(turned, "PNG")).tobytes() == turned.tobytes()  # turned once, whoever looks again
    corner = {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[orientation]  # of the red quarter: right by 1, below by 2
    centre = (turned.width * (1 + 2 * (corner % 2)) // 4, turned.height * (1 + 2 * (corner // 2)) // 4)
    assert turned.getpixel(centre)[0] > 200


EMPTY = {
    "TIFF": stored(Image.new("L", (3, 1)), "TIFF").replace(b"\x00\x01\x04\x00\x01\x00\x00\x00\x03", b"\x00\x01\x04\x00\x01\x00\x00\x00\x00"),
    "PPM": b"P6\n0 0\n255\n",
    "GIF": b"GIF89a\x00\x00\x00\x00\x00\x00\x00;",
    "BMP": stored(Image.new("RGB", (3, 3)), "BMP")[:18] + bytes(8) + stored(Image.new("RGB", (3, 3)), "BMP")[26:],
}  # fmt: skip


@pytest.mark.parametrize("form", EMPTY)
def test_a_picture_without_a_pixel_is_a_bad_sample_and_no_text(form):
    for read in (read_image_info, decode_image):
        with pytest.raises(BadSample) as error:
            read(EMPTY[form])
        assert error.value.reason == "unreadable_image"
        assert "\\x" not in error.value.detail
