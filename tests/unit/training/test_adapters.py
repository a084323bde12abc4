import pytest
import torch

from m4train.config import AdapterConfig, Config, FreezeConfig, FreezeRule
from m4train.errors import CheckpointError, ConfigError
from m4train.training.adapters import apply_adapters, load_adapter, merge_adapters, save_adapter
from m4train.training.naming import canonical_parameters
from tests.helpers.training import TinyModel, join, make_config, make_pack, make_trainer, read_metrics

BATCH = join([make_pack(n)[0] for n in range(3)])


def _config(**targets):
    return AdapterConfig(kind="lora", rank=2, alpha=4.0, targets=targets or {"text": ["q_proj", "up_proj"]})


def _adapted(seed=0):
    model = TinyModel(seed=seed)
    targets = apply_adapters(model, _config())
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model, targets


def _logits(model):
    return model(BATCH, return_logits=True).logits


def test_adapters_land_only_in_the_named_part():
    model = TinyModel()
    targets = apply_adapters(model, _config())
    assert targets == [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up_proj")]
    assert not any("lora" in name for name, _ in model.vision.named_parameters())
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())


def test_base_names_stay_the_published_ones():
    model, _ = _adapted()
    names = {name for name in canonical_parameters(model) if "lora" not in name}
    assert names == set(canonical_parameters(TinyModel()))


def test_a_new_adapter_changes_nothing():
    model = TinyModel()
    before = _logits(model)
    apply_adapters(model, _config())
    assert torch.equal(before, _logits(model))


@pytest.mark.parametrize(
    ("targets", "word"),
    [({"text": ["k_proj"]}, "k_proj"), ({"nowhere": ["q_proj"]}, "nowhere"), ({"connector": ["q_proj"]}, "connector")],
)
def test_targets_that_match_nothing_are_refused(targets, word):
    with pytest.raises(ConfigError, match=word):
        apply_adapters(TinyModel(), _config(**targets))


def test_merging_keeps_the_logits_and_the_names():
    model, _ = _adapted()
    before = _logits(model)
    assert not torch.allclose(before, _logits(TinyModel()), atol=1e-3)
    merge_adapters(model)
    assert set(dict(model.named_parameters())) == set(dict(TinyModel().named_parameters()))
    torch.testing.assert_close(_logits(model), before, rtol=1e-5, atol=1e-5)


def test_saved_adapter_loads_in_peft_and_here(tmp_path):
    from peft import PeftModel

    model, targets = _adapted()
    save_adapter(tmp_path, _config(), targets, canonical_parameters(model))
    expected = _logits(model)
    again, _ = _adapted(seed=0)
    for name, parameter in again.named_parameters():
        if "lora" in name:
            parameter.data.zero_()
    load_adapter(again, tmp_path)
    assert torch.equal(_logits(again), expected)
    theirs = PeftModel.from_pretrained(TinyModel(), tmp_path)
    torch.testing.assert_close(_logits(theirs.base_model.model), expected)


def test_an_adapter_that_does_not_fit_or_is_broken_is_refused(tmp_path):
    model, targets = _adapted()
    save_adapter(tmp_path, _config(), targets, canonical_parameters(model))
    other = TinyModel()
    apply_adapters(other, _config(text=["q_proj"]))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(other, tmp_path)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        save_adapter(tmp_path, _config(), targets, canonical_parameters(model))
    with pytest.raises(CheckpointError, match="no adapter"):
        save_adapter(tmp_path, _config(), [], canonical_parameters(TinyModel()))


def test_a_tied_head_is_no_target_of_its_own():
    model = TinyModel(tied=True)
    parts = model.parts()
    del parts["lm_head"]
    model.parts = lambda: parts
    assert len(apply_adapters(model, _config())) == 4


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_every_kind_merges_saves_and_loads(kind, rank_stabilized, tmp_path):
    from peft import PeftModel

    config = AdapterConfig(kind=kind, rank=2, rank_stabilized=rank_stabilized, targets={"text": ["q_proj"]})
    model = TinyModel()
    targets = apply_adapters(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    expected = _logits(model)
    save_adapter(tmp_path, config, targets, canonical_parameters(model))
    theirs = PeftModel.from_pretrained(TinyModel(), tmp_path)
    torch.testing.assert_close(_logits(theirs.base_model.model), expected)
    again = TinyModel()
    apply_adapters(again, config)
    load_adapter(again, tmp_path)
    assert torch.equal(_logits(again), expected)
    merge_adapters(model)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-5)


def _wide():
    """A model wide enough for blocks of 64 values."""
    from m4train.models import Idefics3Config, Idefics3ForConditionalGeneration
    from tests.helpers.models import tiny_idefics3

    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3()))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_qlora_quantises_the_named_parts_only():
    from m4train.training.freezing import apply_freezing
    from m4train.training.parts_table import parameter_table

    model = _wide()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_adapters(model, AdapterConfig(kind="qlora", rank=2, targets={"text": ["q_proj"]}))
    apply_freezing(model, FreezeConfig([FreezeRule(part="connector", trainable=True)]))
    rows = {row.part: row for row in parameter_table(model, Config())}
    assert rows["text"].quantized > 0.9 * (rows["text"].parameters - rows["text"].adapted)
    assert all(rows[part].quantized == 0 for part in ("vision", "connector", "embeddings", "lm_head"))
    assert rows["connector"].trainable == rows["connector"].parameters
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora" not in name:
            assert torch.equal(parameter, plain[name.replace(".base_layer", "")])
    with pytest.raises(ConfigError, match="4 bits"):
        apply_freezing(model, FreezeConfig([FreezeRule(part="text", trainable=True)]))
    with pytest.raises(ConfigError, match="embeddings"):
        apply_adapters(_wide(), AdapterConfig(kind="qlora", targets={"text": ["q_proj"]}, quantize=["embeddings"]))


def test_qlora_merges_into_what_the_four_bits_stand_for():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from tests.helpers.training import IDEFICS3

    batch = join([make_pack(n, 0, IDEFICS3)[0] for n in range(3)], IDEFICS3)
    model, reference = _wide(), _wide()
    apply_adapters(model, AdapterConfig(kind="qlora", rank=2, targets={"text": ["q_proj"]}))
    for name, parameter in reference.named_parameters():
        if ".layers." in name and "text_model" in name and parameter.ndim == 2:
            packed, state = quantize_4bit(parameter.data, quant_type="nf4", compress_statistics=True)
            parameter.data = dequantize_4bit(packed, state)
    live = model(batch, return_logits=True).logits
    merge_adapters(model)
    assert set(dict(model.named_parameters())) == set(dict(reference.named_parameters()))
    merged, expected = (m(batch, return_logits=True).logits for m in (model, reference))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(live, expected, rtol=5e-2, atol=5e-2)  # 4-bit products are computed in bf16


@pytest.mark.parametrize("adapter", ["qlora", "dora"])
def test_training_an_adapter_resumes_to_the_last_bit(adapter, tmp_path):
    from tests.helpers.training import IDEFICS3

    for name, pieces in (("whole", (6,)), ("broken", (2, 4))):
        for steps in pieces:
            config = make_config(tmp_path / name, max_steps=6, stop_after=steps)
            config.adapter = AdapterConfig(kind=adapter, rank=2, targets={"text": ["q_proj", "down_proj"]})
            model = _wide()
            torch.manual_seed(0)
            apply_adapters(model, config.adapter)
            make_trainer(config, model, shape=IDEFICS3).train()
    whole, broken = (read_metrics(tmp_path / name) for name in ("whole", "broken"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in broken]
    assert whole[-1]["loss"] < whole[0]["loss"]
