"""Rows of new tokens set apart: the same function, the same folder, and frozen rows that nothing moves."""

import pytest
import torch

from m4train import models
from m4train.config import AdapterConfig, FreezeConfig, FreezeRule
from m4train.errors import ConfigError
from m4train.models.pretrained import TensorFolder
from m4train.training.adapters import apply_adapters, merge_adapters
from m4train.training.freezing import apply_freezing
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.helpers.rounding import apart, assert_near, own_error, widened
from tests.helpers.training import IDEFICS, IDEFICS2, IDEFICS3, join, make_config, make_pack, make_trainer

FIRST = 90
FAMILIES = {
    "idefics2": (models.Idefics2ForConditionalGeneration, models.Idefics2Config, tiny_idefics2, IDEFICS2),
    "idefics3": (models.Idefics3ForConditionalGeneration, models.Idefics3Config, tiny_idefics3, IDEFICS3),
}


def _model(family, tied, **changes):
    kind, config, values, shape = FAMILIES[family]
    model = kind(config.from_dict(values(tie_word_embeddings=tied, **changes)))
    perturb(model)
    return model, join([make_pack(n, 0, shape)[0] for n in range(3)], shape), shape


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_split_model_computes_the_same_and_is_saved_as_it_was(family, tied, tmp_path):
    plain, batch, _ = _model(family, tied)
    split = _model(family, tied)[0]
    split.split_token_rows(FIRST)
    plain_out, split_out = (model(batch, return_logits=True) for model in (plain, split))
    error = own_error(lambda model: model(batch, return_logits=True).logits, plain)
    assert_near(split_out.logits, plain_out.logits, error)
    assert_near(split_out.loss, plain_out.loss, error)
    ids = torch.tensor([[5, 94, 7, FIRST]])
    assert_near(split(ids).logits, plain(ids).logits, error)
    assert torch.equal(split.generate(ids, max_new_tokens=3), plain.generate(ids, max_new_tokens=3))
    for name, model in (("plain", plain), ("split", split)):
        model.save_pretrained(tmp_path / name)
    files = [TensorFolder(tmp_path / name) for name in ("plain", "split")]
    assert files[0].files.keys() == files[1].files.keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0].files)


def test_gradients_of_the_rows_are_those_of_the_whole_table():
    for tied in (False, True):
        plain, batch, _ = _model("idefics3", tied)
        split = _model("idefics3", tied)[0]
        split.split_token_rows(FIRST)
        exact = widened(plain)
        for model in (plain, split, exact):
            model(batch).loss.backward()
        expected, wide = ({name: p.grad for name, p in model.named_parameters()} for model in (plain, exact))
        got = split.hub_tensors({name: p.grad for name, p in split.named_parameters()})
        assert got.keys() == expected.keys()
        assert_near(got, expected, apart(expected, wide))


@pytest.mark.parametrize("tied", [False, True])
def test_an_idefics_without_rows_of_its_own_is_split_like_the_others(tied, tmp_path):
    values = tiny_idefics(vocab_size=99, additional_vocab_size=0, tie_word_embeddings=tied)
    plain, split = (models.IdeficsForVisionText2Text(models.IdeficsConfig.from_dict(values)) for _ in range(2))
    perturb(plain)
    perturb(split)
    split.split_token_rows(FIRST)
    batch = join([make_pack(n, 0, IDEFICS)[0] for n in range(3)], IDEFICS)
    error = own_error(lambda model: model(batch, return_logits=True).logits, plain)
    assert_near(split(batch).loss, plain(batch).loss, error)
    split.save_pretrained(tmp_path)
    again = models.IdeficsForVisionText2Text.from_pretrained(tmp_path)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in plain.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_only_the_new_rows_move_under_weight_decay(tied, adapter, tmp_path):
    model, _, shape = _model("idefics3", tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = make_config(tmp_path, max_steps=4)
    config.optimizer.weight_decay = 0.5
    config.freeze = FreezeConfig([FreezeRule(), FreezeRule(part="new_tokens", trainable=True)])
    config.adapter = AdapterConfig(kind=adapter, rank=2, targets={"text": ["q_proj"]})
    model.split_token_rows(FIRST)
    apply_adapters(model, config.adapter)
    apply_freezing(model, config.freeze)
    make_trainer(config, model, shape=shape).train()
    merge_adapters(model)
    after = model.hub_tensors({name: p.detach() for name, p in model.named_parameters()})
    tables = {"model.text_model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name in tables:
        assert torch.equal(after[name][:FIRST], before[name][:FIRST])
        assert not torch.equal(after[name][FIRST:], before[name][FIRST:])
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved - tables == {name for name in after if adapter == "lora" and "text_model" in name and "q_proj" in name}


@pytest.mark.parametrize("first", [0, 97, 200])
def test_rows_that_do_not_exist_are_refused(first):
    with pytest.raises(ConfigError, match="new_rows_from"):
        _model("idefics3", False)[0].split_token_rows(first)


def test_rows_of_their_own_cannot_be_split_or_adapted():
    model = models.IdeficsForVisionText2Text(models.IdeficsConfig.from_dict(tiny_idefics()))
    with pytest.raises(ConfigError, match="additional_vocab_size 2"):
        model.split_token_rows(90)
    with pytest.raises(ConfigError, match="rows of their own"):
        apply_adapters(model, AdapterConfig(kind="lora", targets={"lm_head": ["lm_head"]}))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.full)])
def test_rows_set_apart_are_exported_where_they_belong(tied, tmp_path):
    """The whole way: a preset by name, adapters, a checkpoint, its export, and transformers reading that."""
    import transformers

    from m4train.commands.export import export_checkpoint
    from tests.helpers.checkpoints import export_rounding, saved_run

    config, live = saved_run(
        tmp_path,
        "freeze=smolvlm",
        "freeze.new_rows_from=100",
        "adapter=lora",
        "adapter.targets={text: [q_proj]}",
        f"model.architecture.tie_word_embeddings={str(tied).lower()}",
    )
    done = export_checkpoint(config)
    assert done.drift <= export_rounding(done.folder)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(done.folder)
    table = theirs.model.text_model.embed_tokens.weight
    assert torch.equal(table[100:], live.model.text_model.embed_tokens.additional_embedding.weight)
    assert torch.equal(table[:100], live.model.text_model.embed_tokens.weight)
    if not tied:
        assert torch.equal(theirs.lm_head.weight[100:], live.lm_head.additional_fc.weight)
