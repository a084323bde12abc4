"""Calls of processors and tokenizers as people know them from transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from m4train.errors import ConfigError
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


@pytest.mark.parametrize("name", ["../../outside", "a/b", "..", "", "a\\b", ".hidden"])
def test_a_template_is_not_written_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    processor = tiny_idefics3_processor()
    processor.chat_template = {"default": PLAIN, name: SHORT}
    with pytest.raises(ConfigError, match="is not a name for a file"):
        processor.save_pretrained(tmp_path / "inside")
    assert [path.name for path in tmp_path.rglob("*.jinja")] == []


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


def _theirs(name: str, folder: Path) -> Any:
    import transformers

    MAKERS[name]().save_pretrained(folder)
    return getattr(transformers, type(MAKERS[name]()).__name__).from_pretrained(folder)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "smolvlm"])  # which there needs torchvision
def test_what_is_asked_of_any_processor(name: str, tmp_path: Path) -> None:
    ours, theirs = MAKERS[name](), _theirs(name, tmp_path)
    assert ours.image_token_id == theirs.image_token_id
    for attribute in (
        "image_token",
        "fake_image_token",
        "fake_image_token_id",
        "global_image_tag",
        "global_image_token",
    ):
        if hasattr(theirs, attribute):
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    rows = np.asarray([[ours.image_token_id, 5, 6], [7, 8, ours.tokenizer.eos_token_id]])
    assert ours.post_process_image_text_to_text(rows) == theirs.post_process_image_text_to_text(rows)
    assert ours.post_process_image_text_to_text(rows, skip_special_tokens=False) == ours.batch_decode(rows)
    assert set(ours.model_input_names) == set(theirs.model_input_names)
    text = ["What is it?"] if name == "idefics" else ["<image>What is it?"]
    assert set(ours(images=[[picture(20, 20)]], text=text)) == set(ours.model_input_names)
    assert set(ours.image_processor(picture(20, 20)) if name != "idefics" else ["pixel_values"]) == set(
        ours.image_processor.model_input_names
    )
    for part in (ours, ours.image_processor):
        part.to_json_file(tmp_path / "said.json")
        if part is not ours:
            assert type(part).from_json_file(tmp_path / "said.json").to_dict() == part.to_dict()
        assert json.loads((tmp_path / "said.json").read_text()) == json.loads(part.to_json_string()) == part.to_dict()


@pytest.mark.parametrize("name", ["idefics2", "idefics3"])
def test_what_is_asked_of_any_tokenizer(name: str, tmp_path: Path) -> None:
    ours, theirs = MAKERS[name]().tokenizer, _theirs(name, tmp_path).tokenizer
    text = "In this <image> we see"
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.convert_tokens_to_string(ours.tokenize("we see")) == theirs.convert_tokens_to_string(
        theirs.tokenize("we see")
    )
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert set(ours.all_special_tokens) >= set(theirs.all_special_tokens)  # there without those that have no name
    assert ours.is_fast
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A seven."}]
    for tokenizer in (ours, theirs):
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ end }}{% endfor %}"
    for options in (
        {"tokenize": False},
        {"return_dict": False},
        {"return_tensors": "np", "padding": True, "end": "<end_of_utterance>"},
    ):
        for given in (talk, [talk, talk[:1]]):
            found, expected = (t.apply_chat_template(given, **options) for t in (ours, theirs))
            if options.get("return_tensors"):
                assert all(np.array_equal(found[key], expected[key]) for key in ("input_ids", "attention_mask"))
            else:
                assert found == expected
    ours.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        ours.apply_chat_template(talk)


@pytest.mark.parametrize("name", MAKERS)
def test_a_tokenizer_of_transformers_is_taken_as_its_files_say_it(name: str, tmp_path: Path) -> None:
    import transformers

    ours = MAKERS[name]()
    ours.tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    made, again = (type(ours)(ours.image_processor, tokenizer) for tokenizer in (theirs, ours.tokenizer))
    assert made.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    text = ["What is it?"] if name == "idefics" else ["<image>What is it?"]
    found, expected = (p(images=[[picture(20, 20)]], text=text, return_tensors="np") for p in (made, again))
    assert np.array_equal(found["input_ids"], expected["input_ids"])
    with pytest.raises(ConfigError, match="tokenizer is a int"):
        type(ours)(ours.image_processor, 5)


@pytest.mark.parametrize("name", MAKERS)
def test_loading_and_saving_as_people_pass_it(name: str, tmp_path: Path) -> None:
    processor = MAKERS[name]()
    hub = {"token": None, "revision": "main", "local_files_only": True, "force_download": False, "cache_dir": None}
    hub |= {"use_fast": True, "trust_remote_code": False}
    for part in (processor, processor.image_processor):
        written = part.save_pretrained(save_directory=tmp_path, push_to_hub=False)
        assert str(tmp_path / "preprocessor_config.json") in written
        assert all(Path(path).is_file() for path in written)
        again = type(part).from_pretrained(pretrained_model_name_or_path=tmp_path, **hub)
        assert again.to_dict() == part.to_dict()
        with pytest.raises(ConfigError, match="nothing here uploads"):
            part.save_pretrained(tmp_path, push_to_hub=True)
    given = type(processor).from_pretrained(tmp_path, image_processor=processor.image_processor, tokenizer=None)
    assert given.image_processor is processor.image_processor
    inside = {"processor_kwargs": {"padding": "max_length", "max_length": 90}}
    if name != "idefics":
        row = processor.apply_chat_template(TALK, tokenize=True, **inside)
        assert len(row) == 90


def test_frames_of_an_image_of_a_size() -> None:
    import transformers

    ours = tiny_idefics3_processor(split=True, tiles=3).image_processor
    theirs = transformers.Idefics3ImageProcessorPil(**ours.to_dict())
    for height, width in ((40, 70), (70, 40), (20, 20), (96, 96), (10, 300)):
        for options in (None, {"do_image_splitting": False}):
            assert ours.get_number_of_image_patches(height, width, options) == theirs.get_number_of_image_patches(
                height, width, options
            )
