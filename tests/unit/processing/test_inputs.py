import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from m4train.errors import BadSample
from m4train.processing import Idefics2ImageProcessor, Idefics3ImageProcessor, IdeficsImageProcessor
from m4train.processing.inputs import is_url, nest_images, read_image
from m4train.processing.pieces import text_ids
from tests.helpers.processing import (
    picture,
    tiny_idefics2_processor,
    tiny_idefics3_processor,
    tiny_idefics_processor,
)


def test_every_form_of_an_image_is_the_same_image(tmp_path):
    image = picture(12, 9)
    path = tmp_path / "image.png"
    image.save(path)
    array = np.asarray(image)
    forms = [
        image, path, str(path), path.read_bytes(), array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()),
        array.astype(np.float32) / 255, torch.from_numpy(array.copy()).permute(2, 0, 1).double() / 255,
        array.astype(np.float32), torch.from_numpy(array.copy()).permute(2, 0, 1).float(), array.astype(np.int64),
    ]  # fmt: skip
    for form in forms:
        assert np.array_equal(np.asarray(read_image(form)), array), type(form)


def test_the_axis_of_the_channels_can_be_said():
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    assert read_image(array).size == (3, 5)
    assert read_image(array, channels="channels_last").size == (5, 3)
    processor = Idefics2ImageProcessor(do_resize=False)
    pixels = processor(array, input_data_format="channels_last", data_format="channels_last", return_tensors="np")
    assert pixels["pixel_values"].shape == (1, 1, 3, 5, 3)


def test_one_channel_and_alpha():
    gray = np.full((6, 5), 77, np.uint8)
    for form in (gray, gray[None], gray[..., None]):
        assert read_image(form).mode == "L"
    rgba = np.zeros((4, 5, 4), np.uint8)
    values = IdeficsImageProcessor(image_size=4, do_normalize=False)(rgba, return_tensors="np")
    assert (values == 1).all()  # transparent black is white


@pytest.mark.parametrize("array", [np.zeros((2, 5, 2)), np.zeros(7)])
def test_arrays_that_are_no_image_are_refused(array):
    with pytest.raises(ValueError, match="is not an image"):
        read_image(array)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.arange(16, dtype=np.int32) * 5000, "int32 go from 0 to 75000"),
        (np.arange(16) * 40, "int64 go from 0 to 600"),
        (np.arange(16) - 1, "int64 go from -1 to 14"),
        (np.arange(16) / 15 - 0.5, "float64 go from -0.5 to 0.5"),
        (np.arange(16, dtype=np.float32) * 32, "float32 go from 0.0 to 480.0"),
        (np.full(16, np.nan), "float64 go from nan to nan"),
    ],
)
def test_values_that_are_no_levels_are_refused_and_not_wrapped(values, found):
    for form in (values.reshape(4, 4), torch.from_numpy(values.reshape(4, 4))):
        with pytest.raises(ValueError, match=f"{found}: bring them to 0..255"):
            read_image(form)


def test_levels_and_fractions_do_not_mix_where_nothing_tells_them_apart():
    levels = np.full((8, 8, 3), 200.0)
    processor = Idefics2ImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    assert (processor([levels], return_tensors="np")["pixel_values"] == 200).all()
    assert (processor([levels / 250], return_tensors="np")["pixel_values"] == np.float32(204 / 255)).all()
    with pytest.raises(ValueError, match=r"all levels in 0..255, or all fractions"):
        processor([levels, levels / 250])


@pytest.mark.parametrize("images", [3, {"a": 1}, [[3]], [picture(2, 2), [picture(2, 2)]]])
def test_collections_that_are_no_images_are_refused(images):
    with pytest.raises(ValueError, match="not understood"):
        nest_images(images)


def test_unreachable_urls_and_missing_files_are_bad_samples(tmp_path):
    with pytest.raises(BadSample, match="cannot be downloaded") as error:
        read_image("http://127.0.0.1:9/image.png")
    assert error.value.reason == "unreachable_image"
    with pytest.raises(BadSample, match=r"none\.png is not an image"):
        read_image(str(tmp_path / "none.png"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://a.b/c.png", True),
        ("https://a.b", True),
        ("http://a.b and more", False),
        ("User:", False),
        ("a.png", False),
    ],
)
def test_urls(text, expected):
    assert is_url(text) == expected


def test_settings_for_one_call_change_nothing_else():
    processor = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    whole = processor(picture(20, 20), do_image_splitting=False, do_normalize=False, return_tensors="np")
    assert whole["pixel_values"].shape == (1, 1, 3, 32, 32)
    assert whole["pixel_values"].max() <= 1
    assert processor.do_image_splitting
    with pytest.warns(UserWarning, match="no setting 'do_magic'.* It is ignored"):  # as transformers takes it
        processor(picture(20, 20), do_magic=True)


@pytest.mark.parametrize("kind", [IdeficsImageProcessor, Idefics2ImageProcessor, Idefics3ImageProcessor])
def test_one_number_is_the_mean_of_every_channel(kind):
    table = kind(image_mean=0.0, image_std=2.0).pixel_table()
    np.testing.assert_allclose(table, np.tile(np.arange(256) / 510, (3, 1)), atol=1e-6)


def test_conversion_can_be_forbidden():
    processor = Idefics2ImageProcessor(do_convert_rgb=False)
    with pytest.raises(ValueError, match="mode L and do_convert_rgb is False"):
        processor(Image.new("L", (5, 5)))


def test_a_batch_without_images_is_refused():
    with pytest.raises(ValueError, match="No images found"):
        Idefics2ImageProcessor()([[], []])


def test_images_of_different_sizes_need_padding():
    processor = Idefics2ImageProcessor(size={"shortest_edge": 8, "longest_edge": 16})
    batch = [[picture(10, 20)], [picture(20, 10)]]
    assert processor(batch, return_tensors="np")["pixel_values"].shape == (2, 1, 3, 16, 16)
    with pytest.raises(ValueError, match="different lengths"):
        processor(batch, do_pad=False, return_tensors="np")


def test_chat_images_are_read_from_the_messages(tmp_path):
    processor = tiny_idefics3_processor()
    picture(9, 9).save(tmp_path / "a.png")
    buffer = io.BytesIO()
    picture(9, 9).save(buffer, "PNG")
    content = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "image": Image.open(buffer)},
        {"type": "text", "text": "same?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape == (1, 2, 3, 32, 32)
    assert torch.equal(inputs["pixel_values"][0, 0], inputs["pixel_values"][0, 1])
    assert (inputs["input_ids"] == processor.bos_id).sum() == 1


def test_messages_that_spell_special_tokens_ask_for_no_images():
    processor = tiny_idefics3_processor()
    spelled = "is <image> a <|end_of_text|>?"
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": spelled}]}],
        [{"role": "user", "content": spelled}],
    ]
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="np",
        images=[[picture(9, 9)], []],
    )  # fmt: skip
    assert (inputs["input_ids"] == processor.image_token_id).sum() == processor.image_seq_len
    assert not (inputs["input_ids"] == processor.eos_id).any()
    assert inputs["pixel_values"].shape == (2, 1, 3, 32, 32)
    with pytest.raises(ValueError, match="hold 1 images and 0 are given"):
        processor.apply_chat_template(conversations[0], tokenize=True)


def test_prompts_of_conversations_are_what_training_sees():
    processor = tiny_idefics3_processor()
    messages = [
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": "\n\none"},
        {"role": "user", "content": "on"},
    ]
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    trained = text_ids(processor.encode_messages([*messages, {"role": "assistant", "content": "\n\ntwo"}])).tolist()
    assert trained[: len(ids)] == ids


def test_text_may_come_first_as_in_older_versions():
    processor = tiny_idefics3_processor()
    image = picture(9, 9)
    assert processor("<image> a", image)["input_ids"] == processor(image, "<image> a")["input_ids"]


@pytest.mark.parametrize("make", [tiny_idefics_processor, tiny_idefics2_processor, tiny_idefics3_processor])
def test_videos_and_audio_are_refused(make):
    processor = make()
    inputs = processor(text="a<image>b", images=[[picture(9, 9)]], videos=None, audio=None, return_tensors="pt")
    assert "pixel_values" in inputs
    for name in ("videos", "audio"):
        with pytest.raises(
            ValueError, match=f"{name} is given, but Idefics.*Processor reads text and images: give the"
        ):
            processor(text="a<image>b", images=[[picture(9, 9)]], **{name: [[np.zeros((2, 9, 9, 3), np.uint8)]]})
    with pytest.raises(BadSample, match="neither text nor image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}]}])


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG file that says how large it is."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 1000), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


@pytest.mark.parametrize("make", [tiny_idefics_processor, tiny_idefics2_processor, tiny_idefics3_processor])
def test_options_may_come_in_groups(make):
    processor = make()
    images, texts = [[picture(30, 20)], [picture(9, 9)]], ["a <image>", "<image> b c d"]
    named = {"padding": True, "return_tensors": "np", "resample": 0}
    plain = processor(images=images, text=texts, **named)
    grouped = processor(
        images=images, text=texts, text_kwargs={"padding": True, "return_tensors": "np"},
        images_kwargs={"resample": 0, "return_tensors": "np"}, common_kwargs={"return_tensors": "np"},
    )  # fmt: skip
    other = processor(images=images, text=texts, **named | {"resample": 2})
    assert set(plain) == set(grouped)
    assert all(np.array_equal(plain[name], grouped[name]) for name in plain)
    assert not np.array_equal(plain["pixel_values"], other["pixel_values"])
    assert all(
        np.array_equal(processor(images=images, text=texts, **named, text_kwargs=None)[k], plain[k]) for k in plain
    )
    with pytest.raises(ValueError, match="padding is False in text_kwargs and True elsewhere: give it once"):
        processor(images=images, text=texts, padding=True, text_kwargs={"padding": False})


@pytest.mark.parametrize("make", [tiny_idefics_processor, tiny_idefics2_processor, tiny_idefics3_processor])
def test_texts_in_words_are_refused(make):
    processor = make()
    with pytest.raises(ValueError, match=r"is_split_into_words=True is given, but Idefics\w+ reads whole texts: join"):
        processor(text=[["a", "b"]], is_split_into_words=True)
    assert processor(text=["a"], is_split_into_words=False)["input_ids"] is not None


def test_texts_that_are_none_are_refused():
    processor = tiny_idefics2_processor()
    for text in ([["a", "b"]], [3], picture(5, 5)):
        with pytest.raises(ValueError, match="is not a text: give a string, or a list with a string per sample"):
            processor(text=text)


@pytest.mark.parametrize("given", ["hello", ["hello"], {"role": "user", "content": "a"}, [["a"]], [[], "b"], None, 3])
def test_conversations_that_are_none_are_refused(given):
    processor = tiny_idefics3_processor()
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=r"is not a conversation: give a list of messages, each like \{'role'"):
            processor.apply_chat_template(given, tokenize=tokenize)


def test_images_of_messages_in_every_form(tmp_path):
    processor = tiny_idefics3_processor()
    image = picture(30, 20)
    path = str(tmp_path / "image.png")
    image.save(path)
    written = base64.encodebytes((tmp_path / "image.png").read_bytes()).decode()
    address = "data:image/png;base64," + written
    items = [
        {"type": "image", "image": image},
        {"image": image},
        {"type": "image", "url": path},
        {"type": "image", "path": path},
        {"type": "image", "base64": written},
        {"type": "image", "url": address},
        {"type": "image", "image": np.asarray(image)},
        {"type": "image_url", "image_url": {"url": path}},
        {"type": "image_url", "image_url": path},
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "image_url", "url": path},
        {"type": "image_url", "path": path},
        {"type": "image_url", "base64": written},
        {"type": "image_url", "image": image},
        {"type": "image", "image": None, "path": path},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "np"}
    expected = None
    for item in items:
        content = [item, {"type": "text", "text": "what?"}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        expected = expected or inputs
        assert all(np.array_equal(inputs[name], expected[name]) for name in expected), item
    for broken in (
        {"type": "image", "base64": "no!"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}},
    ):
        with pytest.raises(BadSample, match="is not an image in base64"):
            processor.apply_chat_template([{"role": "user", "content": [broken]}], **options)


@pytest.mark.parametrize("side", [20_000, 60_000])
def test_decompression_bombs_are_refused_in_one_sentence_by_every_door(tmp_path, side):
    bomb = png_header(side, side)
    (tmp_path / "bomb.png").write_bytes(bomb)
    processor = tiny_idefics3_processor()
    for form in (bomb, tmp_path / "bomb.png", str(tmp_path / "bomb.png")):
        for read in (
            lambda: processor(text="<image>", images=[[form]]),  # noqa: B023
            lambda: processor.image_processor(form),  # noqa: B023
            lambda: processor.image_processor.fetch_images(form),  # noqa: B023
        ):
            with pytest.raises(BadSample) as error:
                read()
            assert error.value.reason == "image_too_large"
            assert "\n" not in str(error.value)
