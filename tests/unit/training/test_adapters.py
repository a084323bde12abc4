import pytest
import torch

from m4train.config import AdapterConfig
from m4train.errors import CheckpointError, ConfigError
from m4train.training.adapters import apply_adapters, load_adapter, merge_adapters, save_adapter
from m4train.training.naming import canonical_parameters
from tests.helpers.training import TinyModel, join, make_pack

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
