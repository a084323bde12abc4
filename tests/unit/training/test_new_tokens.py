"""Tokens added to a pretrained model: ids in its tokenizer, rows in its embeddings and head, trained, exported and tuned again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m4train import AutoProcessor, build
from m4train.commands.export import export_checkpoint
from m4train.config.compose import load_config
from m4train.errors import ConfigError, M4Error
from m4train.processing.tokenizer import Tokenizer
from m4train.restore import restore_model
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.new_tokens import add_tokens, give_rows
from tests.helpers.checkpoints import export_rounding, saved_run
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.helpers.processing import tokenizer_folder

KINDS = {
    "Idefics": ("IdeficsForVisionText2Text", tiny_idefics, {"additional_vocab_size": 2}),
    "Idefics plain": ("IdeficsForVisionText2Text", tiny_idefics, {"additional_vocab_size": 0}),
    "Idefics2": ("Idefics2ForConditionalGeneration", tiny_idefics2, {}),
    "Idefics3": ("Idefics3ForConditionalGeneration", tiny_idefics3, {}),
}
TOKENS = {"<box>": "the digit", "<loc>": None}
ADDED = 'model.add_tokens={"<box>": "the digit", "<loc>": null}'
SIZE = len(Tokenizer.from_pretrained(tokenizer_folder()))
IDS = [SIZE, SIZE + 1]  # of those tokens


def _model(kind: str, tied: bool, spare: int = 0) -> Any:
    import m4train

    name, tiny, sizes = KINDS[kind]
    values = tiny(
        tie_word_embeddings=tied, **sizes, **({"vocab_size": SIZE - sizes["additional_vocab_size"]} if sizes else {})
    )
    if "text_config" in values:
        values["text_config"]["vocab_size"] = SIZE + spare
    model = getattr(m4train, name)(getattr(m4train, f"{kind.split()[0]}Config").from_dict(values))
    perturb(model)
    return model


def _table(model: Any, head: bool = False) -> torch.Tensor:
    owner = model.lm_head if head else model.get_input_embeddings()
    more = owner.additional_fc if head else getattr(owner, "additional_embedding", None)
    return owner.weight.detach() if more is None else torch.cat([owner.weight, more.weight]).detach()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_begin_as_the_mean_of_the_rows_asked_for(kind, tied):
    model, tokenizer = _model(kind, tied), Tokenizer.from_pretrained(tokenizer_folder())
    before = [_table(model, head).clone() for head in (False, True)]
    text = tokenizer.encode("the digit", add_special_tokens=False)
    add_tokens(tokenizer, list(TOKENS))
    assert give_rows(model, tokenizer, TOKENS, []) == IDS[0]
    assert model.config.token_rows == SIZE + 2
    for head, old in enumerate(before):
        new = _table(model, bool(head))
        assert torch.equal(new[:SIZE], old)
        torch.testing.assert_close(new[SIZE], old[text].mean(0))
        torch.testing.assert_close(new[SIZE + 1], old.mean(0))
    assert tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    assert model(input_ids=torch.tensor([[5, *IDS]]), **_no_images(kind)).logits.shape[-1] == SIZE + 2


def _no_images(kind: str) -> dict[str, Any]:
    if not kind.startswith("Idefics ") and kind != "Idefics":
        return {}
    return {"pixel_values": torch.zeros(1, 1, 3, 16, 16), "image_attention_mask": torch.zeros(1, 3, 1)}


def test_rows_to_spare_are_used_first():
    model, tokenizer = _model("Idefics3", False, spare=5), Tokenizer.from_pretrained(tokenizer_folder())
    before = _table(model).clone()
    add_tokens(tokenizer, list(TOKENS))
    give_rows(model, tokenizer, TOKENS, [])
    after = _table(model)
    assert after.shape == before.shape
    assert torch.equal(after[SIZE + 2 :], before[SIZE + 2 :])
    torch.testing.assert_close(after[SIZE + 1], before[:SIZE].mean(0))


def test_an_added_token_is_one_id_wherever_a_text_spells_it(tmp_path):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder())
    assert tokenizer.add_tokens(["<box>"]) == 1
    assert tokenizer.add_tokens(["<box>"]) == 0
    for place in ("start", "after_token", "inside"):
        ids, _ = tokenizer.encode_plain("a <box>b<box>", place)
        assert list(ids).count(SIZE) == 2
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode("a <box>b") == tokenizer.encode("a <box>b")
    assert again.decode(again.encode("a <box>b", False), skip_special_tokens=True) == "a <box>b"


def _built(overrides: list[str]) -> Any:
    config = load_config(overrides)
    return build.build_model(config, build.build_processor(config))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("['<image>']", "has already"),
        ('{"<a>": "x <b>", "<b>": null}', "new token itself"),
        ("['<a>', '<a>']", "twice"),
        ('{"<a>": ""}', "must name a text"),
        ("[5]", "must be a text"),
        ("[' ']", "must be a text"),
        ("'<a>'", "list of tokens"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(given, said, started):
    with pytest.raises(ConfigError, match=said):
        _built(["experiment=digits_pretrain", f"model.pretrained={started['true']}", f"model.add_tokens={given}"])


def test_a_new_model_has_a_row_for_every_token_anyway():
    with pytest.raises(ConfigError, match="a new model takes every token"):
        load_config(["experiment=digits_pretrain", f"model.tokenizer={tokenizer_folder()}", "model.add_tokens=['<a>']"])


def test_a_tokenizer_of_another_model_is_refused_as_before():
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder())
    tokenizer.add_tokens(["<other>"])
    with pytest.raises(ConfigError, match="use the tokenizer that belongs"):
        give_rows(_model("Idefics3", False), tokenizer, {}, ["<image>"])


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict[str, Path]:
    """Folders of a pretrained model, tied and untied."""
    folders = {}
    for tied in ("true", "false"):
        root = tmp_path_factory.mktemp("pretrained")
        config, _ = saved_run(root, f"model.architecture.tie_word_embeddings={tied}")
        config.export.verify = False
        folders[tied] = export_checkpoint(config).folder
    return folders


ADAPTED = ["adapter.rank=4", "adapter.targets={text: [q_proj]}", "freeze=none"]
WAYS = {
    "full": [],
    "lora": ["adapter=lora", *ADAPTED],
    "dora": ["adapter=dora", *ADAPTED],
    "qlora": ["adapter=qlora", *ADAPTED],
}


def _inputs(folder: Path) -> dict[str, torch.Tensor]:
    return AutoProcessor.from_pretrained(folder)(text="which <box> is <loc>?", return_tensors="pt")


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).logits.float()


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("way", WAYS)
def test_added_tokens_are_exported_read_by_transformers_and_tuned_again(way, tied, started, tmp_path):
    import transformers

    config, live = saved_run(tmp_path / "run", f"model.pretrained={started[tied]}", ADDED, *WAYS[way], moved="trained")
    assert live.get_input_embeddings().additional_embedding.weight.requires_grad
    assert live.get_input_embeddings().weight.requires_grad == (way == "full")
    done = export_checkpoint(config)
    inputs = _inputs(done.folder)
    assert set(IDS) <= set(inputs["input_ids"][0].tolist())
    expected = _logits(restore_model(config, find_checkpoint(config).folder), inputs)
    allowed = export_rounding(done.folder) if way != "qlora" else 0.1 * expected.abs().max().item()
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(done.folder)
    assert (_logits(theirs, inputs) - expected).abs().max() <= allowed
    again = load_config(
        ["experiment=digits_pretrain", f"model.pretrained={done.folder}", f"freeze.new_rows_from={IDS[0]}"]
    )
    model = build.build_model(again, build.build_processor(again))
    assert torch.equal(
        model.get_input_embeddings().additional_embedding.weight,
        live.get_input_embeddings().additional_embedding.weight,
    )


@pytest.mark.slow
@pytest.mark.parametrize("new", [ADDED, "freeze.new_rows_from=440"])
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("way", ["lora", "dora"])
def test_adapters_apart_hold_the_new_rows(way, tied, new, started, tmp_path):
    """peft reads them on a base that has a row for each token, and a further run starts from them."""
    import peft
    import transformers

    config, live = saved_run(tmp_path / "run", f"model.pretrained={started[tied]}", new, *WAYS[way], moved="trained")
    config.export.adapters = "apart"
    folder = export_checkpoint(config).folder
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str((folder / "base" if new == ADDED else started[tied]).resolve())
    inputs = _inputs(folder)
    expected = _logits(restore_model(config, find_checkpoint(config).folder), inputs)
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForImageTextToText.from_pretrained(base), folder)
    assert (_logits(loaded, inputs) - expected).abs().max() < 1e-4
    first = IDS[0] if new == ADDED else 440
    begin = [f"model.pretrained={base}", f"adapter.start_from={folder}", f"freeze.new_rows_from={first}"]
    again = load_config(["experiment=digits_pretrain", *begin, *WAYS[way]])
    model = build.build_model(again, build.build_processor(again))
    assert (_logits(model, inputs) - expected).abs().max() < 1e-4
    assert torch.equal(
        model.get_input_embeddings().additional_embedding.weight,
        live.get_input_embeddings().additional_embedding.weight,
    )


def test_the_rows_of_added_tokens_train_unless_a_rule_freezes_them(started):
    given = ["experiment=digits_pretrain", f"model.pretrained={started['false']}", ADDED, *WAYS["lora"]]
    for rules, trains in (([], True), (["freeze.rules=[{part: new_tokens}]"], False)):
        config = load_config([*given, *rules])
        model = build.build_model(config, build.build_processor(config))
        assert model.get_input_embeddings().additional_embedding.weight.requires_grad == trains
        assert model.lm_head.additional_fc.weight.requires_grad == trains
        assert not model.lm_head.weight.requires_grad


def test_a_run_with_added_tokens_cannot_add_them_twice(started, tmp_path):
    config, _ = saved_run(tmp_path / "run", f"model.pretrained={started['true']}", ADDED)
    with pytest.raises(M4Error, match="has already"):
        _built(["experiment=digits_pretrain", f"model.pretrained={config.run_dir}", ADDED])
