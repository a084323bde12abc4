"""The documentation's examples with models and processors together, as small ones from folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m4train.models import (
    AutoModelForVision2Seq,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
)
from m4train.processing import AutoProcessor
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.helpers.processing import (
    picture,
    tiny_idefics2_processor,
    tiny_idefics3_processor,
    tiny_idefics_processor,
)
from tests.helpers.rounding import assert_near
from tests.parity.models_reference import rounding, transformers


def save(model_class: Any, config: Any, folder: Path) -> None:
    model = model_class(config)
    perturb(model)
    model.save_pretrained(folder)


def same_as_reference(
    kind: str, folder: Path, inputs: dict[str, Any], generated: torch.Tensor, **settings: Any
) -> None:
    reference = getattr(transformers, kind).from_pretrained(folder).eval()
    expected = reference.generate(**inputs, do_sample=False, pad_token_id=1, **settings)
    assert generated.tolist() == expected.tolist()


def test_idefics3(tmp_path: Path) -> None:
    made = tiny_idefics3_processor(tmp_path, image_size=16, image_seq_len=4, split=True)
    size = {"vocab_size": len(made.tokenizer)}
    save(
        Idefics3ForConditionalGeneration,
        Idefics3Config.from_dict(tiny_idefics3(image_token_id=made.image_token_id, text_config=size)),
        tmp_path,
    )
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path, torch_dtype=torch.float32, device_map="auto")
    image1, image2, image3 = picture(40, 30), picture(30, 40, seed=1), picture(20, 20, seed=2)
    seen = "In this image, we can see the city of New York, and more specifically the Statue of Liberty."
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": seen},
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
    images = [[image1, image2], [image3]]
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt").to(model.device)
    generated_ids = model.generate(**inputs, max_new_tokens=12, eos_token_id=[3], pad_token_id=1)
    generated_texts = processor.batch_decode(generated_ids, skip_special_tokens=True)
    assert len(generated_texts) == 2
    assert "What can we see in this image?" in generated_texts[0]
    same_as_reference(
        "Idefics3ForConditionalGeneration", tmp_path, inputs, generated_ids, max_new_tokens=12, eos_token_id=[3]
    )


def test_idefics2(tmp_path: Path) -> None:
    made = tiny_idefics2_processor(tmp_path, image_seq_len=6, shortest=12, longest=28)
    config = tiny_idefics2(image_token_id=made.image_token_id, text_config={"vocab_size": len(made.tokenizer)})
    save(Idefics2ForConditionalGeneration, Idefics2Config.from_dict(config), tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path, device_map="auto")
    bad = processor.tokenizer(["<image>", "<fake_token_around_image>"], add_special_tokens=False).input_ids
    prompts = [
        "<image>In this image, we can see the city of New York, and more specifically the Statue of Liberty.<image>In this",
        "In which city is that bridge located?<image>",
    ]
    images = [[picture(40, 30), picture(30, 40, seed=1)], [picture(20, 20, seed=2)]]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(model.device)
    settings = {"bad_words_ids": bad, "max_new_tokens": 12, "eos_token_id": [processor.tokenizer.eos_token_id]}
    generated_ids = model.generate(**inputs, pad_token_id=1, **settings)
    assert len(processor.batch_decode(generated_ids, skip_special_tokens=True)) == 2
    same_as_reference("Idefics2ForConditionalGeneration", tmp_path, inputs, generated_ids, **settings)


def test_idefics(tmp_path: Path) -> None:
    made = tiny_idefics_processor(tmp_path, image_size=16)
    rows = len(made.tokenizer)
    save(
        IdeficsForVisionText2Text,
        IdeficsConfig.from_dict(tiny_idefics(vocab_size=rows - 2, additional_vocab_size=2)),
        tmp_path,
    )
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = IdeficsForVisionText2Text.from_pretrained(tmp_path)
    prompts = [
        "User:",
        picture(40, 30),
        "Describe this image.\nAssistant: An image of two kittens in grass.\n",
        "User:",
        picture(30, 40, seed=1),
        "Describe this image.\nAssistant:",
    ]
    inputs = processor(prompts, return_tensors="pt")
    generated_ids = model.generate(**inputs, max_length=90, eos_token_id=[3], pad_token_id=1)
    text = processor.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert "An image of two kittens in grass." in text
    same_as_reference("IdeficsForVisionText2Text", tmp_path, inputs, generated_ids, max_length=90, eos_token_id=[3])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_loss_of_processed_inputs(padding_side: str, tmp_path: Path) -> None:
    processor = tiny_idefics3_processor(tmp_path, image_size=16, image_seq_len=4)
    processor.tokenizer.padding_side = padding_side
    config = tiny_idefics3(
        image_token_id=processor.image_token_id, text_config={"vocab_size": len(processor.tokenizer)}
    )
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(config))
    perturb(model)
    texts = ["<image>In this image, we see a digit", "a longer text and then: <image> 7"]
    inputs = processor(text=texts, images=[[picture(9, 9)], [picture(8, 9)]], padding=True, return_tensors="pt")
    mask = inputs["attention_mask"]
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    labels[torch.arange(2), mask.argmax(1)] = -100  # padding on the left would predict the first token
    together = model(**inputs, labels=labels, num_items_in_batch=1).loss
    alone = 0.0
    for text, image in zip(texts, (picture(9, 9), picture(8, 9))):
        one = processor(text=[text], images=[[image]], return_tensors="pt")
        alone += model(**one, labels=one["input_ids"], num_items_in_batch=1).loss
    assert_near(together, alone, rounding(model, inputs))
