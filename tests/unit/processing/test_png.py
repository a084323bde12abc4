"""Changed bytes of a picture are noticed when it is read."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from m4train.errors import BadSample
from m4train.processing.images import decode_image, decode_scaled, read_image_info
from tests.helpers.data import digit_pictures


def _picture(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    digits, _ = digit_pictures()
    page = Image.new("RGB", (64, 64), "white")
    for number, digit in enumerate(digits[:16]):
        page.paste(digit.convert("RGB"), (16 * (number % 4), 16 * (number // 4)))
    page.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = _picture("png")


def test_every_flipped_bit_of_a_png_is_noticed_or_changes_nothing() -> None:
    whole = np.asarray(decode_image(PNG))
    rng = random.Random(0)
    noticed = 0
    for place in rng.sample(range(8 * len(PNG)), 400):
        changed = bytearray(PNG)
        changed[place // 8] ^= 1 << place % 8
        for read in (decode_image, lambda data: decode_scaled(data, (8, 8))[0]):
            try:
                assert np.array_equal(np.asarray(read(bytes(changed))), whole), place
            except BadSample:
                noticed += 1
    assert noticed > 700  # nearly all of 800: bits of the mark behind the end change nothing


def test_damage_is_named_when_the_index_is_built() -> None:
    changed = bytearray(PNG)
    changed[len(PNG) // 2] ^= 1
    with pytest.raises(BadSample, match=r"damaged PNG: chunk IDAT at byte \d+ differs from its checksum"):
        read_image_info(bytes(changed))
    with pytest.raises(BadSample, match="without its end chunk"):
        decode_image(PNG[:-12])
    assert decode_image(PNG + b"more behind the end").size == (64, 64)


def test_a_damaged_file_on_disk_is_named(tmp_path) -> None:
    changed = bytearray(PNG)
    changed[len(PNG) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(changed)
    with pytest.raises(BadSample, match=r"a\.png is a damaged PNG"):
        decode_image(tmp_path / "a.png")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_jpeg_that_ends_early_is_bad(options: dict) -> None:
    data = _picture("jpeg", quality=90, **options)
    assert decode_image(data).size == (64, 64)
    for end in (*range(len(data) // 2, len(data) - 2, 97), len(data) - 2, len(data) - 1):
        with pytest.raises(BadSample):
            decode_image(data[:end])
