import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m4train.processing.idefics2_images import Idefics2ImageProcessor, Idefics2ImageProcessorFast, cut_patches
from m4train.processing.pieces import ImagePiece, TextPiece, text_ids
from tests.helpers.processing import picture, tiny_idefics2_processor

SIZE = {"shortest_edge": 28, "longest_edge": 56}
FAKE = "<fake_token_around_image>"


@pytest.fixture(scope="module")
def processor():
    return tiny_idefics2_processor()


@given(width=st.integers(2, 150), height=st.integers(2, 150), split=st.booleans(), resize=st.booleans())
@settings(max_examples=80)
def test_counts_agree_with_encoded_images(processor, width, height, split, resize):
    changed = processor._with({"do_image_splitting": split, "do_resize": resize})
    encoded = changed.encode_image(Image.new("RGB", (width, height), (200, 30, 90)))
    sizes = changed.image_processor.frame_sizes(width, height)
    assert [frame.shape for frame in encoded.frames] == [(3, h, w) for w, h in sizes]
    assert len(encoded.frames) == changed.frames_for(width, height) == (5 if split else 1)
    assert len(encoded.ids) == changed.tokens_for(width, height)
    assert encoded.feature_mask.sum() == len(sizes) * changed.image_seq_len
    assert changed.opening + encoded.ids.tolist() == changed.tokenizer.encode(changed.image_string(), False)


def test_images_side_by_side_share_a_token(processor):
    items = [{"image": "0"}, {"image": "1"}, {"text": "between"}, {"image": "2"}]
    pieces = processor.encode_document(items)
    kinds = [processor.decode(p.ids) if isinstance(p, TextPiece) else p.image for p in pieces]
    assert kinds == ["<|begin_of_text|>", FAKE, 0, 1, "between", FAKE, 2, "<|end_of_text|>"]
    image = processor.encode_image(picture(9, 9)).ids
    text = f"{FAKE}{'<image>' * 4}{FAKE}{'<image>' * 4}{FAKE}between{FAKE}{'<image>' * 4}{FAKE}<|end_of_text|>"
    assert text_ids(pieces, [image] * 3).tolist() == processor.tokenizer.encode(text)


@pytest.mark.parametrize("written", ["<image>", f"{FAKE}<image>{FAKE}", f"{FAKE}{FAKE}<image>", f"<image>{FAKE}"])
def test_tokens_written_around_an_image_are_not_doubled(processor, written):
    ids = processor(picture(9, 9), f"a {written} b")["input_ids"]
    assert ids == processor(picture(9, 9), "a <image> b")["input_ids"]


@pytest.mark.parametrize("limit", range(1, 60))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("split", [False, True])
def test_truncation_never_cuts_an_image(limit, side, split):
    processor = tiny_idefics2_processor()
    processor.tokenizer.truncation_side = side
    images = [picture(10, 10), picture(30, 10)]
    options = {"truncation": True, "max_length": limit, "do_image_splitting": split}
    inputs = processor(images, "some words <image><image> and the end of it", **options)
    features = inputs["input_ids"][0].count(processor.image_token_id)
    frames = sum(len(row) for row in inputs.get("pixel_values", []))
    assert len(inputs["input_ids"][0]) <= limit
    assert features == frames * processor.image_seq_len
    assert inputs["input_ids"][0][0] == processor.bos_id
    if frames == (5 if split else 1):
        left = images[:1] if side == "right" else images[1:]
        alone = processor.image_processor(left, do_image_splitting=split)["pixel_values"]
        assert (inputs["pixel_values"] == alone).all()


def test_the_fast_processor_resizes_several_images_at_a_time(monkeypatch):
    together = threading.Barrier(4)
    alone = Idefics2ImageProcessor.frames

    def frames(self, image, size=None):
        together.wait(timeout=30)  # broken unless four images are here at once
        return alone(self, image, size)

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(Idefics2ImageProcessor, "frames", frames)
    images = [[picture(30 + n, 20, seed=n) for n in range(3)], [], [picture(9, 50, seed=n) for n in range(5)]]
    fast = Idefics2ImageProcessorFast(size=SIZE)(images, return_tensors="np")
    monkeypatch.undo()
    slow = Idefics2ImageProcessor(size=SIZE)(images, return_tensors="np")
    assert all((fast[name] == slow[name]).all() for name in slow)


@pytest.mark.parametrize("split", [False, True])
def test_images_that_are_left_are_opened_and_closed(split):
    processor = tiny_idefics2_processor()
    processor.tokenizer.truncation_side = "left"
    text = "some words <image><image><image> and the end of it"
    for limit in range(1, 90):
        options = {"truncation": True, "max_length": limit, "do_image_splitting": split}
        ids = processor([picture(10, 10)] * 3, text, **options)["input_ids"][0]
        assert len(ids) <= limit
        frames, rest = divmod(ids.count(processor.image_token_id), processor.image_seq_len)
        assert rest == 0
        assert ids.count(processor.opening[0]) == (frames + 1 if frames else 0)
        words = [i for i in ids if i not in (processor.image_token_id, *processor.opening)]
        assert words[0] == processor.bos_id


def test_padding_and_truncation_can_be_said_to_be_off(processor):
    texts = ["a", "b c d e f g h i j"]
    plain = processor(text=texts)["input_ids"]
    for off in ({"padding": None}, {"padding": "do_not_pad"}, {"truncation": None}, {"truncation": "do_not_truncate"}):
        assert processor(text=texts, max_length=3, **off)["input_ids"] == plain
    with pytest.raises(ValueError, match="truncation='yes' is not known"):
        processor(text=texts, truncation="yes", max_length=3)


def test_bos_of_a_conversation_is_kept():
    processor = tiny_idefics2_processor()
    processor.tokenizer.truncation_side = "left"
    messages = [{"role": "user", "content": "many words of a text"}]
    whole = processor.apply_chat_template(messages, tokenize=True)
    cut = processor.apply_chat_template(messages, tokenize=True, truncation=True, max_length=5)
    assert cut == [processor.bos_id, *whole[-4:]]


@pytest.mark.parametrize(("height", "width"), [(28, 42), (30, 55), (14, 99)])
def test_patches_are_those_of_a_strided_convolution(height, width):
    frame = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    patches, rows, columns = cut_patches(frame, 14)
    assert (rows, columns) == (height // 14, width // 14)
    unfolded = torch.nn.functional.unfold(torch.from_numpy(frame)[None].float(), 14, stride=14)[0].T
    np.testing.assert_array_equal(patches.reshape(rows * columns, -1), unfolded.numpy())


def test_masks_cover_the_images_and_not_their_canvas(processor):
    inputs = processor.image_processor([[picture(60, 30)], [picture(30, 60)]], return_tensors="np")
    assert inputs["pixel_values"].shape == (2, 1, 3, 56, 56)
    assert inputs["pixel_attention_mask"][0, 0].sum() == 56 * 28
    assert (inputs["pixel_values"][0, 0, :, 28:] == 0).all()
    assert inputs["pixel_attention_mask"][1, 0, :, :28].all()


def test_images_of_the_chat_are_opened_once():
    processor = tiny_idefics2_processor()
    content = [{"type": "text", "text": "compare"}, {"type": "image"}, {"type": "image"}]
    pieces = processor.encode_messages([{"role": "user", "content": content}])
    places = [number for number, piece in enumerate(pieces) if isinstance(piece, ImagePiece)]
    assert places[1] == places[0] + 1
    opening = pieces[places[0] - 1]
    assert opening.origin == "template"
    assert opening.ids.tolist() == processor.opening
