"""The processor examples of the documentation of Idefics, Idefics2 and Idefics3, on small local folders.

Where an example loads from the hub, a folder of the same form is loaded; its images come from a local server.
"""

from __future__ import annotations

import http.server
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import m4train
from m4train.downloads import ALLOW_PRIVATE
from m4train.image_utils import load_image
from tests.helpers.processing import picture, tiny_idefics3_processor
from tests.parity.fixtures import make_processing_446 as made


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """URLs of three images on a server of this process."""
    folder = tmp_path_factory.mktemp("served")
    for number in range(3):
        picture(60 + 20 * number, 50, seed=number).save(folder / f"{number}.png")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **options):
            super().__init__(*args, directory=str(folder), **options)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ALLOW_PRIVATE, "1")  # the server is on this machine
        yield [f"http://127.0.0.1:{server.server_port}/{number}.png" for number in range(3)]
    server.shutdown()


@pytest.fixture
def images(urls):
    return [picture(60 + 20 * number, 50, seed=number) for number in range(3)]


@pytest.fixture(scope="module")
def idefics2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics2")
    image_processor = m4train.Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56})
    m4train.Idefics2Processor(
        image_processor, m4train.processing.Tokenizer.from_pretrained(made.FOLDER)
    ).save_pretrained(folder)
    return folder


def test_idefics3_processor(tmp_path, images):
    tiny_idefics3_processor(tmp_path, split=True, image_seq_len=169)
    processor = m4train.Idefics3Processor.from_pretrained(tmp_path)
    processor.image_processor.do_image_splitting = False  # Force as False to simplify the example
    image1, image2, _ = images
    text = ["<image>In this image, we see", "bla bla bla<image>"]
    outputs = processor(images=[[image1], [image2]], text=text, return_tensors="pt", padding=True)
    input_ids = outputs.input_ids
    tokens = [t.replace("<image>" * 169, "((<image>)*169)") for t in processor.tokenizer.batch_decode(input_ids)]
    bos, pad, fake = "<|begin_of_text|>", "<|pad|>", "<fake_token_around_image>"
    image = f"{fake}<global-img>((<image>)*169){fake}"
    assert tokens[0].replace(pad, "") == f"{bos}{image}In this image, we see"
    assert tokens[1].replace(pad, "") == f"{bos}bla bla bla{image}"


def test_idefics3_sizes():
    processor = m4train.Idefics3ImageProcessor(do_resize=True, size={"longest_edge": 2 * 364}, max_image_size=364)
    assert processor(Image.new("RGB", (100, 50)), return_tensors="pt").pixel_values.shape == (1, 3, 3, 364, 364)


def test_idefics3_chat_of_two_prompts(tmp_path, images):
    tiny_idefics3_processor(tmp_path, split=True)
    processor = m4train.AutoProcessor.from_pretrained(tmp_path)
    says = "In this image, we can see the city of New York, and more specifically the Statue of Liberty."
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": says},
                {"type": "image"},
                {"type": "text", "text": "What can we see in this image?"},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "In which city is that bridge located?"}],
        },
    ]
    prompts = [processor.apply_chat_template([message], add_generation_prompt=True) for message in messages]
    image1, image2, image3 = images
    inputs = processor(text=prompts, images=[[image1, image2], [image3]], padding=True, return_tensors="pt").to("cpu")
    assert prompts[1].endswith("In which city is that bridge located?<end_of_utterance>\nAssistant:")
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    spoken = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert spoken[1] == "User:\n\nIn which city is that bridge located?\nAssistant:"


def test_idefics2_processor(idefics2, urls):
    processor = m4train.Idefics2Processor.from_pretrained(idefics2, image_seq_len=2)
    processor.image_processor.do_image_splitting = False  # Force as False to simplify the example
    images = [[urls[0]], [urls[1]]]
    text = ["<image>In this image, we see", "bla bla bla<image>"]
    outputs = processor(images=images, text=text, return_tensors="pt", padding=True)
    loaded = [[load_image(url) for url in sample] for sample in images]
    again = processor(images=loaded, text=text, return_tensors="pt", padding=True)
    assert torch.equal(outputs.pixel_values, again.pixel_values)
    fake = "<fake_token_around_image>"
    assert processor.tokenizer.batch_decode(outputs.input_ids) == [
        f"<s>{fake}<image><image>{fake} In this image, we see",
        f"<unk><unk><s> bla bla bla{fake}<image><image>{fake}",
    ]


MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What’s the difference between these two images?"},
            {"type": "image"},
            {"type": "image"},
        ],
    }
]
ANSWER = {"type": "text", "text": "The difference is that one image is about dogs and the other one about cats."}


def test_idefics2_chat(idefics2, images):
    processor = m4train.Idefics2Processor.from_pretrained(idefics2)
    text = processor.apply_chat_template(MESSAGES)
    assert text == "User: What’s the difference between these two images?<image><image><end_of_utterance>\n"
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    expected = "User: What’s the difference between these two images?<image><image><end_of_utterance>\nAssistant:"
    assert text == expected
    inputs = processor(images=images[:2], text=text, return_tensors="pt").to("cpu")
    assert (inputs.input_ids == processor.image_token_id).sum() == 2 * 64


def test_idefics2_labels(idefics2, images):
    processor = m4train.Idefics2Processor.from_pretrained(idefics2)
    text = processor.apply_chat_template([*MESSAGES, {"role": "assistant", "content": [ANSWER]}])
    inputs = processor(images=images[:2], text=text, return_tensors="pt")
    labels = inputs.input_ids.clone()
    labels[labels == processor.tokenizer.pad_token_id] = -100
    labels[labels == processor.image_token_id] = -100
    inputs["labels"] = labels
    assert (inputs["labels"] == -100).sum() == 2 * 64


def test_idefics2_bad_words(idefics2):
    processor = m4train.AutoProcessor.from_pretrained(idefics2)
    words = processor.tokenizer(["<image>", "<fake_token_around_image>"], add_special_tokens=False).input_ids
    assert words == [[421], [420]]
    assert [processor.tokenizer.eos_token_id] == [2]


def test_idefics_prompts(tmp_path, urls):
    image_processor = m4train.IdeficsImageProcessor(image_size=28)
    tokenizer = m4train.processing.Tokenizer.from_pretrained(made.FOLDER)
    m4train.IdeficsProcessor(image_processor, tokenizer).save_pretrained(tmp_path)
    processor = m4train.AutoProcessor.from_pretrained(tmp_path)
    img = processor.image_processor.fetch_images([urls[0]])[0]
    prompts = [
        "User:",
        img,
        "Describe this image.\nAssistant: An image of two kittens in grass.\n",
        "User:",
        urls[1],
        "Describe this image.\nAssistant:",
    ]
    inputs = processor(prompts, add_end_of_utterance_token=False, return_tensors="pt")
    image = "<fake_token_around_image><image><fake_token_around_image>"
    described = f"{image} Describe this image.\nAssistant:"
    assert processor.batch_decode(inputs["input_ids"]) == [
        f"<s> User:{described} An image of two kittens in grass.\nUser:{described}"
    ]
    assert inputs["pixel_values"].shape == (1, 2, 3, 28, 28)

    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((28, 28)))).permute(2, 0, 1) / 255

    trained = processor(prompts, transform=transform, return_tensors="pt")
    assert torch.equal(trained["pixel_values"][0, 1], transform(processor.image_processor.fetch_images(urls[1])))


def test_idefics_prompts_can_be_looked_at(tmp_path, capsys):
    tokenizer = m4train.AutoTokenizer.from_pretrained(made.FOLDER)
    processor = m4train.IdeficsProcessor(m4train.IdeficsImageProcessor(image_size=28), tokenizer)
    processor(["User:", picture(5, 5)], debug=True, padding=False, truncation=None, max_length=None)
    image = "<fake_token_around_image><image><fake_token_around_image>"
    assert capsys.readouterr().out == f"'<s>User:{image}'\n"


def test_idefics2_fast_arguments():
    processor = m4train.Idefics2ImageProcessorFast(size={"shortest_edge": 28, "longest_edge": 56})
    inputs = processor(
        picture(40, 40), return_tensors="pt", device="cpu", disable_grouping=True, do_image_splitting=True
    )
    assert inputs.pixel_values.shape == (1, 5, 3, 40, 40)
    with pytest.raises(ValueError, match="does not crop the centre"):
        processor(picture(40, 40), do_center_crop=True)


def test_idefics_tokenizer():
    tokenizer = m4train.AutoTokenizer.from_pretrained(made.FOLDER)
    inputs = tokenizer("Hey, are you consciours? Can you talk to me?", return_tensors="pt")
    decoded = tokenizer.batch_decode(inputs.input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
    assert decoded == "Hey, are you consciours? Can you talk to me?"
