import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m4train.processing.pieces import ImagePiece, TextPiece, text_ids
from tests.helpers.processing import picture, tiny_idefics_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_idefics_processor()


@given(ids=st.lists(st.sampled_from([7, "image", "end"]), max_size=30), count=st.integers(1, 5))
@settings(max_examples=200)
def test_tokens_attend_to_the_latest_image(processor, ids, count):
    """Against a scan from left to right, as the rule is told."""
    marks = {"image": processor.image_token_id, "end": processor.eos_id}
    ids = [marks.get(i, i) for i in ids]
    seen, ended, expected = -1, False, []
    for id_ in ids:
        if id_ == processor.image_token_id:
            seen, ended = seen + 1, False
        expected.append([int(not ended and image == seen) for image in range(count)])
        ended = ended or id_ == processor.eos_id
    assert processor._image_attention(ids, count).tolist() == expected


def test_prompts_without_images(processor):
    inputs = processor([["only text"], ["and a longer one"]])
    assert inputs["pixel_values"].shape == (2, 1, 3, 28, 28)
    assert not inputs["pixel_values"].any()
    assert inputs["image_attention_mask"].shape == (*inputs["input_ids"].shape, 1)
    assert not inputs["image_attention_mask"].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_images_whose_places_are_left(side):
    processor = tiny_idefics_processor()
    processor.tokenizer.truncation_side = side
    images = [picture(20, 20, seed=number) for number in range(3)]
    prompt = [images[0], "one", images[1], "two", images[2]]
    alone = [processor.image_processor([image])[0] for image in images]
    for limit in range(1, 20):
        inputs = processor([prompt], truncation=True, max_length=limit)
        kept = int((inputs["input_ids"] == processor.image_token_id).sum())
        expected = alone[:kept] if side == "right" else alone[3 - kept :]
        assert inputs["input_ids"].shape[1] <= limit
        for number, image in enumerate(expected):
            assert (inputs["pixel_values"][0, number] == image).all()
        assert not inputs["pixel_values"][0, kept:].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_cuts_no_image_and_keeps_bos(side):
    processor = tiny_idefics_processor()
    processor.tokenizer.truncation_side = side
    prompt = ["one", picture(9, 9), picture(9, 9), "two", picture(9, 9), "three four"]
    bos, end = processor.bos_id, processor.eos_id
    image = "<fake_token_around_image><image><fake_token_around_image>"
    messages = [
        {"role": "user", "content": [{"image": picture(9, 9)} if i % 3 else {"text": "words"} for i in range(7)]}
    ]
    chat = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for limit in range(1, 25):
        layout = {"truncation": True, "max_length": limit, "padding": False}
        for inputs in (
            processor(prompt, add_eos_token=True, **layout),
            processor.apply_chat_template(messages, **chat, **layout),
        ):
            ids = inputs["input_ids"][0].tolist()
            assert len(ids) <= limit
            assert ids[0] == bos
            assert ids.count(bos) == 1
            text = processor.decode(ids).replace(image + "<image><fake_token_around_image>", "").replace(image, "")
            assert "<image>" not in text
            assert "fake" not in text
            assert inputs["pixel_values"].abs().flatten(2).any(2).sum() == ids.count(processor.image_token_id)
    whole = processor(prompt, add_eos_token=True, truncation=True, max_length=100)["input_ids"][0].tolist()
    assert whole == processor(prompt, add_eos_token=True)["input_ids"][0].tolist()
    assert whole[-1] == end


def test_placeholders_in_the_texts_of_prompts_are_refused(processor):
    for prompts in (["a <image> b"], [["x"], ["a <image> b", picture(5, 5), "c"]], "a <image> b"):
        with pytest.raises(ValueError, match=r"prompt [01] hold 1 placeholders <image>, which stand for no image"):
            processor(prompts)
    with pytest.raises(ValueError, match="prompt 0 hold 1 placeholders"):
        processor(text=["a <image> b"])


def test_padding_and_truncation_can_be_said_to_be_off(processor):
    prompts = [["a"], ["b c d e f"]]
    plain = processor(prompts, padding=False, return_tensors=None)["input_ids"]
    assert len(plain[0]) < len(plain[1])
    for off in ({"padding": None}, {"padding": "do_not_pad"}):
        assert processor(prompts, **off, return_tensors=None)["input_ids"] == plain
    for off in ("do_not_truncate", None):
        assert (
            processor(prompts, padding=False, truncation=off, max_length=2, return_tensors=None)["input_ids"] == plain
        )


def test_arguments_that_do_not_fit(processor):
    with pytest.raises(ValueError, match="2 texts and 1 images"):
        processor(images=[picture(5, 5)], text=["a", "b"])
    with pytest.raises(ValueError, match="texts without images"):
        processor(images=[picture(5, 5)], text=[picture(5, 5)])
    with pytest.raises(ValueError, match="Give the processor prompts"):
        processor()


def test_end_of_utterance_comes_between_texts_only(processor):
    ids = processor([["a", "b", picture(5, 5), "c"]], add_end_of_utterance_token=True, return_tensors="np")["input_ids"]
    image = "<fake_token_around_image><image><fake_token_around_image>"
    assert processor.decode(ids[0]) == f"<|begin_of_text|>a<end_of_utterance>b{image}c"


def test_pieces_are_the_ids_of_the_prompt(processor):
    items = [{"text": " one "}, {"image": "0"}, {"image": "1"}, {"text": "two"}, {"image": "2"}]
    prompt = [item.get("text") or picture(5, 5) for item in items]
    encoded = processor.encode_image(picture(5, 5))
    ids = text_ids(processor.encode_document(items), [encoded.ids] * 3)
    expected = processor([prompt], add_end_of_utterance_token=False, add_eos_token=True, return_tensors="np")[
        "input_ids"
    ]
    assert ids.tolist() == expected[0].tolist()
    assert encoded.frames.shape == (1, 3, 28, 28)
    assert not encoded.feature_mask.any()
    assert processor.tokens_for(99, 3) == 2
    assert processor.frames_for(99, 3) == 1


def test_dialogues(processor):
    messages = [
        {"role": "user", "content": [{"text": "What is this?"}, {"image": "0"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [{"image": "1"}, {"text": "and this?"}]},
    ]
    image = "<fake_token_around_image><image><fake_token_around_image>"
    rendered = (
        f"User: What is this?{image}<end_of_utterance>\nAssistant: a cat<end_of_utterance>\n"
        f"User:{image}and this?<end_of_utterance>"
    )
    pieces = processor.encode_messages(messages)
    ids = text_ids(pieces, [processor.encode_image(picture(5, 5)).ids] * 2)
    assert ids.tolist() == processor.tokenizer.encode(rendered)
    answers = [processor.decode(p.ids) for p in pieces if isinstance(p, TextPiece) and p.origin == "assistant"]
    assert answers == [" a cat<end_of_utterance>"]
    assert processor.apply_chat_template(messages, add_generation_prompt=True).endswith(
        "<end_of_utterance>\nAssistant:"
    )
    assert sum(isinstance(p, ImagePiece) for p in pieces) == 2


def test_transform_replaces_the_image_processor(processor):
    prompts = [[picture(5, 5), "a", picture(7, 5)], ["b"]]
    inputs = processor(prompts, transform=lambda image: torch.full((3, 14, 14), float(image.width)))
    assert inputs["pixel_values"][:, :, 0, 0, 0].tolist() == [[5, 7], [0, 0]]
    assert inputs["pixel_values"].shape == (2, 2, 3, 14, 14)
