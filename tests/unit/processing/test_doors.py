"""Calls of processors and tokenizers as people know them from transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from m4train.processing.auto import AutoProcessor, AutoTokenizer
from tests.helpers.processing import (
    picture,
    tiny_idefics2_processor,
    tiny_idefics3_processor,
    tiny_idefics_processor,
    tiny_smolvlm_processor,
)

MAKERS = {
    "idefics": tiny_idefics_processor,
    "idefics2": tiny_idefics2_processor,
    "idefics3": tiny_idefics3_processor,
    "smolvlm": tiny_smolvlm_processor,
}
ALIKE = [name for name in MAKERS if name != "idefics"]


@pytest.mark.parametrize("name", MAKERS)
def test_images_text_audio_and_videos_by_position(name: str) -> None:
    processor, image = MAKERS[name](), picture(20, 20)
    text = ["What is it?"] if name == "idefics" else ["<image>What is it?"]
    expected = processor(images=[[image]], text=text, return_tensors="np")
    rest = [None] if name == "idefics" else [None, None]
    found = processor([[image]], text, *rest, return_tensors="np")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    if name != "idefics":
        with pytest.raises(ValueError, match="audio is given, but"):
            processor([[image]], text, "sound")


@pytest.mark.parametrize("option", ["do_center_crop", "crop_size", "foo", "return_mm_token_type_ids"])
@pytest.mark.parametrize("name", MAKERS)
def test_arguments_that_there_are_not_are_ignored_with_a_warning(name: str, option: str) -> None:
    processor, image = MAKERS[name](), picture(20, 20)
    text = ["What is it?"] if name == "idefics" else ["<image>What is it?"]
    expected = processor(images=[[image]], text=text, return_tensors="np")
    with pytest.warns(UserWarning, match=f"no setting '{option}'.*It is ignored"):
        found = processor(images=[[image]], text=text, return_tensors="np", **{option: 3})
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": [{"type": "text", "text": "A seven, "}]}]


@pytest.mark.parametrize("name", MAKERS)
def test_the_last_message_is_continued(name: str) -> None:
    processor = MAKERS[name]()
    whole = processor.apply_chat_template(TALK)
    begun = processor.apply_chat_template(TALK, continue_final_message=True)
    assert whole.startswith(begun)
    assert begun.endswith("A seven, ")
    assert processor.apply_chat_template([TALK, TALK], continue_final_message=True) == [begun, begun]
    for other in ({"tokenize": True}, {"add_generation_prompt": True}):
        with pytest.raises(ValueError, match="continue_final_message=True does not go with"):
            processor.apply_chat_template(TALK, continue_final_message=True, **other)
    with pytest.raises(ValueError, match="shows no text of the last message"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], continue_final_message=True)


PLAIN, SHORT = "{% for m in messages %}{{ m['role'] }}|{% endfor %}", "{{ messages | length }}"


@pytest.mark.parametrize("name", MAKERS)
def test_named_templates_are_kept(name: str, tmp_path: Path) -> None:
    processor = MAKERS[name]()
    processor.named_templates = {"short": SHORT}
    processor.chat_template = PLAIN
    assert processor.apply_chat_template(TALK, chat_template="short") == "2"
    processor.save_pretrained(tmp_path / "a")
    AutoProcessor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = AutoProcessor.from_pretrained(tmp_path / "b")
    assert again.named_templates == {"short": SHORT}
    assert again.apply_chat_template(TALK) == "user|assistant|"
    assert (tmp_path / "b" / "additional_chat_templates" / "short.jinja").read_text() == SHORT
    stored = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"]
    assert stored == [{"name": "default", "template": PLAIN}, {"name": "short", "template": SHORT}]


def test_templates_as_a_mapping(tmp_path: Path) -> None:
    processor = tiny_idefics3_processor(tmp_path)
    kind, tokenizer = type(processor), processor.tokenizer
    made = kind(processor.image_processor, tokenizer, chat_template={"default": PLAIN, "short": SHORT})
    assert (made.chat_template, made.named_templates) == (PLAIN, {"short": SHORT})


def test_an_older_template_next_to_a_newer_one(tmp_path: Path) -> None:
    tiny_idefics3_processor(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    with pytest.warns(UserWarning, match=r"chat_template.json that differs from chat_template.jinja, which counts"):
        assert AutoProcessor.from_pretrained(tmp_path).chat_template == PLAIN
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == PLAIN
    AutoProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path)  # and brings them into line
    assert json.loads((tmp_path / "chat_template.json").read_text())["chat_template"] == PLAIN


GIVEN: dict[str, tuple[Any, int]] = {
    "a list": (["<a>", "<b>"], 2),
    "a list of objects": ([AddedToken("<a>", special=True)], 1),
    "additional": ({"additional_special_tokens": ["<a>", "<b>"]}, 2),
    "named": ({"pad_token": "<a>", "additional_special_tokens": ["<b>"]}, 2),
    "old ones": ({"eos_token": "<|end_of_text|>"}, 0),
}


@pytest.mark.parametrize("name", GIVEN)
def test_special_tokens_in_every_form(name: str) -> None:
    tokenizer = tiny_idefics3_processor().tokenizer
    before, (given, new) = len(tokenizer), GIVEN[name]
    assert tokenizer.add_special_tokens(given) == new
    assert len(tokenizer) == before + new
    assert tokenizer.encode("<a>", add_special_tokens=False)[0] == before or not new
    if isinstance(given, dict) and "pad_token" in given:
        assert tokenizer.pad_token_id == before


@pytest.mark.parametrize("given", ["<a>", {"pad": "<a>"}])
def test_special_tokens_that_cannot_be(given: Any) -> None:
    with pytest.raises(ValueError, match="add_special_tokens"):
        tiny_idefics3_processor().tokenizer.add_special_tokens(given)
