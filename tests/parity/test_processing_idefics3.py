"""Idefics3's processor against the reference: pixels, expansion strings, ids, chat templates, files (I1-I4, P1, P2, P4, P6)."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from m4train.processing.idefics3 import Idefics3Processor
from m4train.processing.idefics3_images import Idefics3ImageProcessor
from m4train.processing.pieces import text_ids
from m4train.processing.tokenizer import Tokenizer
from tests.helpers.processing import picture, tiny_idefics3_processor, tokenizer_folder

SIZES = [
    (640, 480), (480, 640), (1000, 300), (300, 1000), (364, 364), (365, 364),
    (20, 10), (2, 50), (1457, 728), (7, 5), (1, 1), (3000, 100),
]  # fmt: skip
LARGE = [(1999, 2000), (1456, 1456), (4500, 900)]  # the last is larger than what is resized at all
SETTINGS = [
    {},
    {"do_image_splitting": False},
    {"do_resize": False},
    {"do_resize": False, "do_image_splitting": False},
    {"size": {"longest_edge": 1500}},
    {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}},
    {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False},
]
MODES = ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16"]


def assert_same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        left, right = np.asarray(ours[name]), np.asarray(theirs[name])
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)


def compare(image, own=None, **settings) -> None:
    ours, theirs = Idefics3ImageProcessor(**settings, **(own or {})), Idefics3ImageProcessorPil(**settings)
    options = {"return_tensors": "np", "return_row_col_info": True}
    a, b = ours(image, **options), theirs(image, **options)
    assert_same(a, b)
    rows, columns = ours.grid(*image.size)
    assert ([[rows]], [[columns]]) == (b["rows"], b["cols"])


FAST = SETTINGS[:2] + SETTINGS[6:]


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        pytest.param(size, settings, marks=[] if size in SIZES and settings in FAST else pytest.mark.slow)
        for settings in SETTINGS
        for size in SIZES + LARGE
    ],
    ids=str,
)
def test_pixels_of_each_size_and_setting(size, settings):
    compare(picture(*size), **settings)


@pytest.mark.parametrize("mode", MODES)
def test_pixels_of_each_mode(mode):
    own = {"upstream_reading": True} if mode == "I;16" else {}  # transformers cuts off at 255
    compare(picture(50, 30, mode), own, size={"longest_edge": 128}, max_image_size={"longest_edge": 32})


def test_pixels_of_a_palette_with_transparency():
    image = picture(50, 30, "P")
    image.info["transparency"] = 3
    compare(image, size={"longest_edge": 128}, max_image_size={"longest_edge": 32})


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"rescale_factor": 1 / 127},
        {"do_rescale": False, "do_normalize": False},
        {"resample": 2},
    ],
    ids=str,
)
def test_values_of_each_normalisation(settings):
    compare(picture(50, 30), size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, **settings)


def test_batches_of_uneven_samples():
    settings = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
    batch = [[picture(50, 30)], [], [picture(10, 90), picture(64, 64, seed=1), picture(3, 3)]]
    ours, theirs = Idefics3ImageProcessor(**settings), Idefics3ImageProcessorPil(**settings)
    for options in ({"return_tensors": "np"}, {"return_tensors": "pt"}):
        assert_same(ours(batch, **options), theirs(batch, **options))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our processor and the reference's, loaded from the folder that ours wrote."""
    folder = tmp_path_factory.mktemp("processor")
    ours = tiny_idefics3_processor(folder, split=True)
    return ours, transformers.AutoProcessor.from_pretrained(folder)


def test_reference_loads_our_folder(pair):
    ours, theirs = pair
    assert type(theirs).__name__ == "Idefics3Processor"
    assert theirs.tokenizer.get_vocab() == ours.tokenizer.backend.get_vocab(with_added_tokens=True)
    assert theirs.tokenizer.padding_side == ours.tokenizer.padding_side == "left"
    assert theirs.image_seq_len == ours.image_seq_len
    assert theirs.chat_template == ours.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(theirs.tokenizer, name) == getattr(ours.tokenizer, name), name


def test_we_load_the_reference_folder(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    again = Idefics3Processor.from_pretrained(tmp_path)
    assert again.image_seq_len == ours.image_seq_len
    assert again.chat_template == ours.chat_template
    assert again.tokenizer.added_tokens == ours.tokenizer.added_tokens
    assert again.tokenizer.special_tokens_map == ours.tokenizer.special_tokens_map
    image = picture(40, 70)
    assert_same(again(image, "a<image>b", return_tensors="np"), theirs(image, "a<image>b", return_tensors="np"))


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 1), (2, 3), (1, 7)])
def test_expansion_string(pair, rows, columns):
    ours, theirs = pair
    expected = theirs.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
    assert ours.image_string(rows, columns) == expected


TEXTS = [
    ["<image>In this image, we see", "bla bla bla<image>"],
    ["no image at all", "<image><image> two\n\nof <image>them"],
    ["<image>", "  spaces \n<image>\n\n around<end_of_utterance>"],
]


@pytest.mark.parametrize("texts", TEXTS, ids=str)
@pytest.mark.parametrize("options", [{"padding": True}, {"padding": "longest", "add_special_tokens": False}], ids=str)
def test_processor_inputs(pair, texts, options):
    ours, theirs = pair
    sizes = iter([(40, 70), (64, 64), (9, 200), (50, 50), (64, 32)])
    images = [[picture(*next(sizes)) for _ in range(text.count("<image>"))] for text in texts]
    kept = [sample for sample in images if sample] if not all(images) else images
    if len(kept) == len(texts):
        expected = theirs(text=texts, images=images, return_tensors="np", **options)
        assert_same(ours(text=texts, images=images, return_tensors="np", **options), expected)
    flat = [image for sample in images for image in sample]
    expected = theirs(text=texts, images=flat, return_tensors="np", **options)
    assert_same(ours(text=texts, images=flat, return_tensors="np", **options), expected)


def test_processor_without_images(pair):
    ours, theirs = pair
    texts = ["only text", "and more of it, longer"]
    assert_same(
        ours(text=texts, padding=True, return_tensors="np"), theirs(text=texts, padding=True, return_tensors="np")
    )
    assert ours(text="only text")["input_ids"] == theirs(text="only text")["input_ids"]


def turns(*contents) -> list[dict]:
    roles = ("user", "assistant")
    return [
        {
            "role": roles[i % 2],
            "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content],
        }
        for i, content in enumerate(contents)
    ]


CHATS = [
    turns([None, "What is this?"], ["A digit."]),
    turns(["What is this?", None], ["A digit."], ["Sure?"], ["Yes, it is\n seven."]),
    turns([None, None, " compare "], [" the first\n"], ["Why? ", None, "and this"], ["é — ünïcode 数字"]),
    turns(["no image"], ["fine"]),
    [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *turns([None, "?"], ["7"])],
]


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("prompt", [False, True])
def test_chat_template(pair, messages, prompt):
    ours, theirs = pair
    expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
    assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected
    assert ours.apply_chat_template([messages] * 2, add_generation_prompt=prompt) == [expected] * 2


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_pieces_of_a_chat_are_the_ids_of_its_string(pair, messages):
    ours, theirs = pair
    text = theirs.apply_chat_template(messages)
    images = [picture(40 + 30 * i, 70) for i in range(text.count("<image>"))]
    expected = theirs(text=text, images=[images] if images else None, add_special_tokens=False, return_tensors="np")
    encoded = [ours.encode_image(image) for image in images]
    ids = text_ids(ours.encode_messages(messages), [e.ids for e in encoded])
    np.testing.assert_array_equal(ids, expected["input_ids"][0])
    if images:
        frames = np.concatenate([e.frames for e in encoded])
        values = ours.pixel_table()[np.arange(3)[:, None, None], frames]
        np.testing.assert_array_equal(values, expected["pixel_values"][0])


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("prompt", [False, True])
def test_chat_is_tokenized_without_a_second_bos(pair, messages, prompt):
    ours, theirs = pair
    sizes = iter([(40, 70), (64, 30), (9, 9)])
    filled = [
        message
        | {"content": [i | {"image": picture(*next(sizes))} if i["type"] == "image" else i for i in message["content"]]}
        for message in messages
    ]
    options = {"add_generation_prompt": prompt, "tokenize": True, "return_dict": True, "return_tensors": "np"}
    expected = theirs.apply_chat_template(filled, **options)
    assert_same(ours.apply_chat_template(filled, **options), expected)
    images = [item["image"] for message in filled for item in message["content"] if item["type"] == "image"]
    assert_same(ours.apply_chat_template(messages, images=[images], **options), expected)


def test_pieces_of_a_document_are_the_ids_of_its_string(pair):
    ours, theirs = pair
    items = [
        {"text": "first paragraph."}, {"text": "\n\nsecond, "}, {"text": "third"}, {"image": "0.jpg"},
        {"image": "1.jpg"}, {"text": "\nafter both"}, {"text": " end"}, {"image": "2.jpg"},
    ]  # fmt: skip
    images = [picture(64, 40), picture(30, 30), picture(10, 99)]
    expected = theirs(text="".join(i.get("text", "<image>") for i in items), images=[images])["input_ids"][0]
    ids = text_ids(ours.encode_document(items), [ours.encode_image(image).ids for image in images])
    assert ids.tolist() == [*expected, ours.eos_id]


def test_trained_tokenizer_loads_as_the_reference_tokenizer():
    ours = Tokenizer.from_pretrained(tokenizer_folder())
    texts = ["In this image", " leading", "a<image>b<row_1_col_2>\n\n", "é 数字 \U0001f600", ""]
    for load in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = load.from_pretrained(tokenizer_folder())
        for text in texts:
            ids = theirs(text)["input_ids"]
            assert ours.encode(text) == ids
            for skip in (False, True):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


words = st.text(alphabet="aIn the\n .,:12é数<>", max_size=20)


@given(
    samples=st.lists(
        st.tuples(words, st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90), words), max_size=3)),
        min_size=1,
        max_size=3,
    ),
    longest=st.integers(20, 100),
    side=st.sampled_from([14, 16, 32]),
    split=st.booleans(),
    resize=st.booleans(),
)
@settings(max_examples=60)
def test_random_batches(pair, samples, longest, side, split, resize):
    ours, theirs = pair
    options = {
        "size": {"longest_edge": longest}, "max_image_size": {"longest_edge": side},
        "do_image_splitting": split, "do_resize": resize,
    }  # fmt: skip
    texts = [first + "".join("<image>" + word for _, _, word in rest) for first, rest in samples]
    images = [[picture(w, h, seed=w) for w, h, _ in rest] for _, rest in samples]
    if not any(images):
        return
    call = {"text": texts, "images": images, "padding": True, "return_tensors": "np"}
    assert_same(ours(**call, **options), theirs(**call, **options))
