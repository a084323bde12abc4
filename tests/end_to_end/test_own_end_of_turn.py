"""A pretrained model whose tokenizer has no <end_of_utterance> and no row to spare: it is trained on conversations, exported
and asked, with the token by which its own chat template closes a turn, or with a row that it gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m4train import AutoProcessor
from m4train.commands.export import export_checkpoint
from m4train.models.tensor_folder import TensorFolder
from m4train.stops import turn_end
from tests.helpers.checkpoints import saved_run
from tests.helpers.processing import picture

pytestmark = pytest.mark.slow
OWN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{{ c.text if c.type == 'text' else '<image>' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDITIONAL = "model.embed_tokens.additional_embedding.weight"


def started(folder: Path, model: str, template: str | None) -> Path:
    """A model folder of which no file knows <end_of_utterance>: its place in the vocabulary is that of <|im_end|>."""
    architecture = ["model.architecture.additional_vocab_size=2"] if model == "tiny_idefics" else []
    config, _ = saved_run(folder / "first", *architecture, model=model)
    config.export.verify = False
    made = export_checkpoint(config).folder
    for path in made.glob("*.json"):
        text = path.read_text(encoding="utf-8").replace("<end_of_utterance>", "<|im_end|>")
        path.write_text(text, encoding="utf-8")
    (made / "chat_template.json").unlink()
    (made / "chat_template.jinja").unlink()
    stated = json.loads((made / "tokenizer_config.json").read_text())
    stated.pop("chat_template", None)
    (made / "tokenizer_config.json").write_text(json.dumps(stated))
    if template is not None:
        (made / "chat_template.jinja").write_text(template, encoding="utf-8")
    return made


def rows(folder: Path) -> int:
    stored = TensorFolder(folder)
    table = next(name for name in stored.files if name.endswith("embed_tokens.weight"))
    return stored.shape(table)[0] + (stored.shape(ADDITIONAL)[0] if ADDITIONAL in stored.files else 0)


# Every pair of values occurs among those that are not left to `make test-full`.
CASES = [
    pytest.param(template, model, adapter, id=f"{name}-{model}-{adapter}", marks=() if quick else pytest.mark.full)
    for number, model in enumerate(("tiny_idefics3", "tiny_idefics2", "tiny_idefics"))
    for place, (name, template) in enumerate((("own", OWN), ("rows", None)))
    for adapter in ("lora", "none")
    for quick in [(adapter == "lora") == ((number + place) % 2 == 0)]
]


@pytest.mark.parametrize(("template", "model", "adapter"), CASES)
def test_a_tokenizer_without_end_of_utterance(template, model, adapter, m4train, tmp_path):
    start = started(tmp_path, model, template)
    run = ["experiment=digits_sft", f"model.family={model.removeprefix('tiny_')}", f"model.pretrained={start}"]
    run += [f"adapter={adapter}", "trainer.max_steps=2", "trainer.save_every=2"]
    run += ["freeze=none", "adapter.targets={}"] if adapter == "none" else []
    m4train("train", *run)
    m4train("export", *run)
    folder = tmp_path / "run" / "export"
    processor = AutoProcessor.from_pretrained(folder)
    end = "<|im_end|>" if template else "<end_of_utterance>"
    assert turn_end(processor) == processor.tokenizer.added_tokens[end]
    assert turn_end(processor) in json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert rows(folder) == rows(start) + (template is None) == len(processor.tokenizer)
    assert ("<end_of_utterance>" in processor.tokenizer.added_tokens) == (template is None)
    picture(20, 20).save(tmp_path / "digit.png")
    from m4train import cli

    assert (
        cli.main(["generate", str(folder), "which digit?", str(tmp_path / "digit.png"), "--max-new-tokens", "3"]) == 0
    )
