"""What ends an answer: one rule, whatever template closes a turn and whatever a folder states."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from m4train import AutoModelForImageTextToText, AutoProcessor, Idefics3Config, Idefics3ForConditionalGeneration
from m4train.stops import folder_turn_end, stop_ids, turn_end
from tests.helpers.models import perturb, tiny_idefics3
from tests.helpers.processing import (
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
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for i in m['content'] %}"
    "{{ i['text'] if i['type'] == 'text' else '<image>' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
OPEN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
BROKEN = "{{ raise_exception('never') }}"
TEMPLATES: dict[str, tuple[str, str | None]] = {  # template -> the token that closes a turn
    CHATML: "<|im_end|>",
    LLAMA: "<|eot_id|>",
    MISTRAL: "</s>",
    OPEN: None,
    BROKEN: None,
}


def equipped(family: str, template: str | None = None) -> Any:
    processor = MAKERS[family]()
    if template is not None:
        processor.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"])
        processor.chat_template = template
    return processor


@pytest.mark.parametrize("family", MAKERS)
def test_every_family_ends_with_its_own_template(family: str) -> None:
    processor = equipped(family)
    assert turn_end(processor) == processor.end_of_utterance_id
    assert stop_ids(processor, []) == [processor.eos_id, processor.end_of_utterance_id]


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("template", TEMPLATES, ids=["chatml", "llama", "mistral", "open", "broken"])
def test_the_template_in_use_decides(family: str, template: str) -> None:
    processor, closing = equipped(family, template), TEMPLATES[template]
    if closing == "</s>":
        closing = processor.tokenizer.eos_token
    expected = None if closing is None else processor.tokenizer.convert_tokens_to_ids(closing)
    assert turn_end(processor) == expected
    assert stop_ids(processor, [7, 7]) == list(dict.fromkeys([7, processor.eos_id, expected or processor.eos_id]))
    assert turn_end(pickle.loads(pickle.dumps(processor))) == expected
    processor.chat_template = CHATML  # another one from here on
    assert turn_end(processor) == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def saved(folder: Path, template: str | None, stated: dict[str, Any]) -> Any:
    processor = equipped("idefics3", template)
    config = tiny_idefics3(
        text_config={"vocab_size": len(processor.tokenizer)}, image_token_id=processor.image_token_id
    )
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(config))
    perturb(model)
    model.generation_config = stated
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def test_a_folder_that_does_not_state_its_end_of_turn(tmp_path: Path) -> None:
    processor = saved(tmp_path, CHATML, {"eos_token_id": 2})
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with pytest.warns(UserWarning, match=f"closes a turn with the id {end}, which its generation_config.json does not"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.stated_ends == [2, end]
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model.lm_head.weight[end] = 10 * model(prompt, output_hidden_states=True).hidden_states[-1][0, -1]
    assert model.generate(prompt, max_new_tokens=5).tolist() == [[5, 6, 7, end]]
    assert model.generate(prompt, max_new_tokens=5, eos_token_id=2).shape == (1, 8)  # what a call says goes first


@pytest.mark.parametrize("stated", [[2, "end"], ["end"]])
def test_a_folder_that_states_it_stays_as_it_is(
    tmp_path: Path, stated: list[Any], recwarn: pytest.WarningsRecorder
) -> None:
    end = equipped("idefics3", CHATML).tokenizer.convert_tokens_to_ids("<|im_end|>")
    stated = [end if one == "end" else one for one in stated]
    saved(tmp_path, CHATML, {"eos_token_id": stated})
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).generation_config == {"eos_token_id": stated}
    assert not [w for w in recwarn if "closes a turn" in str(w.message)]


def test_folders_without_a_template_of_their_own(tmp_path: Path) -> None:
    assert folder_turn_end(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(CHATML)  # and nothing it could be used with
    assert folder_turn_end(tmp_path) is None
    saved(tmp_path, CHATML, {})
    assert folder_turn_end(tmp_path) == turn_end(AutoProcessor.from_pretrained(tmp_path))
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / name).unlink()
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text())
    assert folder_turn_end(tmp_path) is not None
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "chat_template"}))
    assert folder_turn_end(tmp_path) is None
