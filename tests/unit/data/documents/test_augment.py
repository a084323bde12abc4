"""Augmentation: a function of (seed, epoch, sample, image), within its bounds, and nothing where it is off."""

import numpy as np
from PIL import Image

from m4train.config import AugmentConfig
from m4train.data.documents.augment import augment, crop_box, draw_key, moved
from m4train.data.documents.variants import Draws

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def _augmented(config, seed=1, epoch=0, key="k", number=0):
    return np.asarray(augment(PICTURE, config, draw_key(config, seed, epoch, "source", key), number))


def test_nothing_is_drawn_where_augmentation_is_off():
    assert draw_key(AugmentConfig(), 1, 0, "source", "k") == b""
    assert np.array_equal(_augmented(AugmentConfig()), np.asarray(PICTURE))


def test_draws_depend_on_seed_epoch_sample_and_image_alone():
    config = AugmentConfig(shift_pixels=5, rotate_degrees=10)
    assert np.array_equal(_augmented(config), _augmented(config))
    for other in ({"seed": 2}, {"epoch": 1}, {"key": "other"}, {"number": 1}):
        assert not np.array_equal(_augmented(config), _augmented(config, **other)), other


def test_a_shift_stays_within_its_bound_and_repeats_the_edge():
    result = np.asarray(moved(PICTURE, 0.0, 2, -3))
    original = np.asarray(PICTURE)
    assert np.array_equal(result[:-3, 2:], original[3:, :-2])
    assert np.array_equal(result[:, 0], result[:, 2])
    config = AugmentConfig(shift_pixels=1)
    shifts = [np.asarray(moved(PICTURE, 0.0, right, down)) for right in (-1, 0, 1) for down in (-1, 0, 1)]
    seen = set()
    for number in range(60):
        found = [i for i, each in enumerate(shifts) if np.array_equal(each, _augmented(config, number=number))]
        assert found
        seen.update(found)
    assert seen == set(range(9))


def test_a_turn_keeps_size_and_centre_and_invents_no_corners():
    white = Image.new("L", (31, 21), 200)
    assert np.array_equal(np.asarray(moved(white, 17.0, 0, 0)), np.asarray(white))
    assert np.array_equal(np.asarray(moved(PICTURE, 0.0, 0, 0)), np.asarray(PICTURE))
    dot = np.zeros((21, 21), np.uint8)
    dot[10, 16] = 255
    turned = np.asarray(moved(Image.fromarray(dot), 90.0, 0, 0))
    assert np.unravel_index(turned.argmax(), turned.shape) == (4, 10)
    assert _augmented(AugmentConfig(rotate_degrees=20)).shape == np.asarray(PICTURE).shape


def test_a_crop_keeps_the_share_and_shape_asked_for():
    config = AugmentConfig(crop_scale=[0.5, 0.8], crop_ratio=[0.75, 4 / 3])
    boxes = [crop_box(300, 300, config, Draws("k", number)) for number in range(200)]
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= 300
        assert 0 <= upper < lower <= 300
        assert 0.49 < (right - left) * (lower - upper) / 300**2 < 0.81
        assert 0.74 < (right - left) / (lower - upper) < 1.35
    assert len(set(boxes)) == 200
    assert max(right for _, _, right, _ in boxes) == 300
    assert min(left for left, _, _, _ in boxes) == 0


def test_a_crop_that_cannot_have_its_shape_takes_the_middle():
    config = AugmentConfig(crop_scale=[0.9, 1.0])
    assert crop_box(400, 100, config, Draws("k")) == (133, 0, 266, 100)
    assert crop_box(100, 400, config, Draws("k")) == (0, 133, 100, 266)
    assert crop_box(1, 1, config, Draws("k")) == (0, 0, 1, 1)


def test_a_crop_is_a_part_of_the_picture():
    config = AugmentConfig(crop_scale=[0.9, 1.0], crop_ratio=[1.0, 2.0])
    box = crop_box(*PICTURE.size, config, Draws(draw_key(config, 1, 0, "source", "k").hex(), 0, "crop"))
    assert np.array_equal(_augmented(config), np.asarray(PICTURE.crop(box)))
