import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m4train.processing.idefics3 import Idefics3Processor
from tests.helpers.processing import tiny_idefics3_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_idefics3_processor(split=True, image_size=16, tiles=3)


@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    longest=st.integers(1, 70),
    side=st.sampled_from([8, 14, 16]),
    split=st.booleans(),
    resize=st.booleans(),
)
@settings(max_examples=150)
def test_counts_agree_with_encoded_images(processor, width, height, longest, side, split, resize):
    changed = processor._with(
        {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": side}, "do_resize": resize}
        | {"do_image_splitting": split}
    )
    encoded = changed.encode_image(Image.new("RGB", (width, height), (200, 30, 90)))
    frames = changed.frames_for(width, height)
    assert encoded.frames.shape == (frames, 3, side, side)
    assert encoded.frames.dtype == np.uint8
    assert len(encoded.ids) == len(encoded.feature_mask) == changed.tokens_for(width, height)
    assert encoded.feature_mask.sum() == frames * changed.image_seq_len
    assert (encoded.ids[encoded.feature_mask] == changed.image_token_id).all()


def test_one_frame_of_a_tiny_image():
    processor = tiny_idefics3_processor(image_size=32, image_seq_len=4)
    encoded = processor.encode_image(Image.new("L", (32, 32), 7))
    assert encoded.frames.shape == (1, 3, 32, 32)
    assert (encoded.frames == 7).all()
    tokens = [processor.decode([i]) for i in encoded.ids]
    assert tokens == ["<fake_token_around_image>", "<global-img>", *["<image>"] * 4, "<fake_token_around_image>"]


def test_settings_changed_on_the_image_processor_take_effect(processor):
    changed = processor._with({"do_image_splitting": True})
    before = changed.tokens_for(100, 100)
    changed.image_processor.do_image_splitting = False
    assert changed.tokens_for(100, 100) < before
    assert changed.frames_for(100, 100) == 1
    changed.image_seq_len = 9
    assert changed.encode_image(Image.new("RGB", (5, 5))).feature_mask.sum() == 9


def test_image_seq_len_is_honoured_for_one_call(processor):
    image = Image.new("RGB", (10, 10))
    inputs = processor(image, "<image>", image_seq_len=7, do_image_splitting=False)
    assert inputs["input_ids"][0].count(processor.image_token_id) == 7
    assert processor.image_seq_len == 4


@pytest.mark.parametrize("limit", range(1, 70))
def test_truncation_never_cuts_an_image(processor, limit):
    images = [Image.new("RGB", (10, 10)), Image.new("RGB", (30, 10))]
    text = "some words <image> and some more <image> and the end of it"
    inputs = processor(images, text, truncation=True, max_length=limit)
    features = inputs["input_ids"][0].count(processor.image_token_id)
    frames = sum(len(row) for row in inputs.get("pixel_values", []))
    assert len(inputs["input_ids"][0]) <= limit
    assert features == frames * processor.image_seq_len


@pytest.mark.parametrize(("text", "count"), [("<image>", 0), ("<image>", 2), ("none", 1)])
def test_placeholders_and_images_must_agree(processor, text, count):
    with pytest.raises(ValueError, match="Text 1 holds"):
        processor([[Image.new("RGB", (5, 5))], [Image.new("RGB", (5, 5))] * count], ["<image>", text])


def test_fingerprint_follows_what_changes_ids(tmp_path):
    base = tiny_idefics3_processor(tmp_path)
    prints = {base.fingerprint()}
    assert Idefics3Processor.from_pretrained(tmp_path).fingerprint() in prints
    other = tiny_idefics3_processor(image_seq_len=9)
    prints.add(other.fingerprint())
    other.chat_template += " "
    prints.add(other.fingerprint())
    other.image_processor.size = {"longest_edge": 40}
    prints.add(other.fingerprint())
    other.tokenizer.add_special_tokens(["<new>"])
    prints.add(other.fingerprint())
    assert len(prints) == 5


def test_save_and_load_give_the_same_processor(tmp_path):
    processor = tiny_idefics3_processor(tmp_path, split=True)
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(tmp_path / "again")
    again = Idefics3Processor.from_pretrained(tmp_path / "again")
    assert again.tokenizer.padding_side == "right"
    assert again.image_processor.to_dict() == processor.image_processor.to_dict() | {
        "image_processor_type": "Idefics3ImageProcessor"
    }
    assert again.image_seq_len == processor.image_seq_len
    assert again.chat_template == processor.chat_template


def test_bos_is_never_doubled():
    processor = tiny_idefics3_processor()
    messages = [{"role": "user", "content": "what?"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.startswith("<|begin_of_text|>")
    ids = processor(text=[text])["input_ids"][0]
    assert ids.count(processor.bos_id) == 1
    assert ids == processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert processor(text="what?")["input_ids"][0][0] == processor.bos_id
