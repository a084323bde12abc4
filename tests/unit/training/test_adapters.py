import pytest
import torch

from m4train.config import AdapterConfig, Config, FreezeConfig, FreezeRule, TrainerConfig
from m4train.errors import CheckpointError, ConfigError
from m4train.training.adapters import apply_adapters, merge_adapters, resolve_targets
from m4train.training.checkpoints.adapter_files import load_adapter, save_adapter, start_adapter, trained_whole
from m4train.training.freezing import apply_freezing
from m4train.training.naming import canonical_parameters, part_of
from tests.helpers.rounding import apart, assert_near
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
    with pytest.raises(ConfigError, match="untie"):
        apply_adapters(TinyModel(tied=True), _config(embeddings=["embed_tokens"]))


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
    from m4train.training.parts_table import parameter_table

    model = _wide()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_adapters(model, AdapterConfig(kind="qlora", rank=2, targets={"text": ["q_proj"]}))
    apply_freezing(model, FreezeConfig([FreezeRule(part="connector", trainable=True)]))
    config = Config(trainer=TrainerConfig(precision="bf16"))
    rows = {row.part: row for row in parameter_table(model, config, torch.device("cpu"))}
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
    halves = reference.bfloat16()(batch, return_logits=True).logits
    assert_near(live, expected, apart(halves, expected))  # 4-bit products are computed in bf16


@pytest.mark.parametrize("adapter", ["qlora", "dora"])
def test_training_an_adapter_resumes_to_the_last_bit(adapter, tmp_path):
    from tests.helpers.training import IDEFICS3

    for name, pieces in (("whole", (6,)), ("broken", (2, 4))):
        for steps in pieces:
            config = make_config(tmp_path / name, max_steps=6, stop_after=steps)
            config.adapter = AdapterConfig(kind=adapter, rank=2, dropout=0.2, targets={"text": ["q_proj", "down_proj"]})
            model = _wide()
            torch.manual_seed(0)
            apply_adapters(model, config.adapter)
            make_trainer(config, model, shape=IDEFICS3).train()
    whole, broken = (read_metrics(tmp_path / name) for name in ("whole", "broken"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in broken]
    assert whole[-1]["loss"] < whole[0]["loss"]


def _next_to_whole_modules(seed=0):
    """An adapter on text, the connector and the head in full, all of them moved; and what they learned."""
    model = TinyModel(seed=seed)
    targets = apply_adapters(model, _config())
    rules = [FreezeRule(part="connector", trainable=True), FreezeRule(part="lm_head", trainable=True)]
    apply_freezing(model, FreezeConfig(rules))
    torch.manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model, targets


def test_modules_trained_in_full_travel_with_the_adapter(tmp_path):
    from peft import PeftModel

    model, targets = _next_to_whole_modules()
    whole = trained_whole(model)
    assert whole == ["connector", "lm_head"]
    save_adapter(tmp_path, _config(), targets, canonical_parameters(model), whole)
    theirs = PeftModel.from_pretrained(TinyModel(), tmp_path)
    torch.testing.assert_close(_logits(theirs.base_model.model), _logits(model))
    again, _ = _next_to_whole_modules(seed=0)
    for parameter in again.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    load_adapter(again, tmp_path)
    assert torch.equal(_logits(again), _logits(model))


def test_what_trained_in_full_travels_as_whole_modules_or_not_at_all():
    model = TinyModel()
    apply_adapters(model, _config())
    apply_freezing(model, FreezeConfig([FreezeRule(names=["connector.bias"], trainable=True)]))
    assert trained_whole(model) == ["connector"]
    apply_freezing(model, FreezeConfig([FreezeRule(part="vision", trainable=True)]))
    assert "vision.layers" not in trained_whole(model)  # a list, which is not called
    apply_freezing(model, FreezeConfig([FreezeRule(names=["layers.*.q_proj.*"], trainable=True)]))
    with pytest.raises(CheckpointError, match=r"q_proj trained in full and has an adapter too"):
        trained_whole(model)
    apply_freezing(model, FreezeConfig([FreezeRule(names=["norm.weight"], trainable=True)]))
    with pytest.raises(CheckpointError, match=r"vision\.layers\.0\.norm"):
        trained_whole(model)


def test_tied_copies_in_a_file_must_agree(tmp_path):
    from safetensors.torch import load_file, save_file

    model = TinyModel(tied=True)
    targets = apply_adapters(model, _config())
    for name, parameter in model.named_parameters():
        parameter.data += float("lora_B" in name)
    save_adapter(tmp_path, _config(), targets, canonical_parameters(model), ["embed_tokens"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    table = tensors["base_model.model.embed_tokens.weight"]
    save_file({**tensors, "base_model.model.lm_head.weight": table.clone()}, path)
    load_adapter(model, tmp_path)
    save_file({**tensors, "base_model.model.lm_head.weight": table + 1}, path)
    with pytest.raises(CheckpointError, match="lm_head"):
        load_adapter(model, tmp_path)


def test_an_adapter_goes_on_from_another_run_or_a_folder(tmp_path):
    def run(name, start_from=None, steps=3):
        config = make_config(tmp_path / name, max_steps=steps)
        config.adapter = _config()
        config.freeze = FreezeConfig([FreezeRule(part="connector", trainable=True)])
        model = TinyModel()
        torch.manual_seed(0)
        targets = apply_adapters(model, config.adapter)
        apply_freezing(model, config.freeze)
        if start_from is not None:
            start_adapter(model, start_from, config.adapter)
        start = _logits(model)
        make_trainer(config, model).train()
        return model, targets, start

    first, targets, _ = run("first")
    save_adapter(tmp_path / "peft", _config(), targets, canonical_parameters(first), trained_whole(first))
    for folder in (tmp_path / "peft", tmp_path / "first" / "checkpoints" / "step-000003"):
        _, _, start = run(f"from-{folder.name}", folder)
        assert torch.equal(start, _logits(first))
    losses = [read_metrics(tmp_path / name)[-1]["loss"] for name in ("from-peft", "from-step-000003")]
    assert losses[0] == losses[1]
    with pytest.raises(ConfigError, match=r"adapter\.start_from"):
        start_adapter(first, tmp_path, _config())
    other = TinyModel()
    apply_adapters(other, AdapterConfig(kind="lora", rank=3, targets={"text": ["q_proj", "up_proj"]}))
    for folder in (tmp_path / "peft", tmp_path / "first" / "checkpoints" / "step-000003"):
        with pytest.raises(CheckpointError):
            start_adapter(other, folder, _config())


@pytest.mark.parametrize("family", ["idefics", "idefics2", "idefics3"])
def test_every_adapter_of_every_tower_learns_under_recomputation(family, tmp_path):
    """peft#2880: adapters in a tower whose inputs need no gradient got none."""
    from tests.distributed.cases import Case, build

    config, model, shape = build(Case(model=family, packs=6, steps=1, recompute=True, adapter="lora"), str(tmp_path))
    config.schedule.name, config.schedule.warmup_steps = "constant", 0
    make_trainer(config, model, packs=6, shape=shape).train()
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert {name.split(".layers.")[0] for name in adapters} >= {"model.vision_model.encoder"}
    assert len(adapters) > 2
    assert [name for name, p in adapters.items() if not p.any()] == []


def test_targets_are_patterns_and_all_linear_layers():
    model = TinyModel()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    text = {name for name in linear if part_of(f"{name}.weight", model.parts()) == "text"}
    assert set(resolve_targets(model, {"text": ["all-linear"]})) == text
    everywhere = resolve_targets(model, {"*": ["all-linear"]})
    assert set(everywhere) == {name for name in linear if part_of(f"{name}.weight", model.parts()) != "lm_head"}
    some = sorted(text)[0]
    assert resolve_targets(model, {"text": [f"*{some.split('.')[-1]}"]})
    assert resolve_targets(model, {"text": [some.replace(some[0], "?", 1)]}) == [some]
    with pytest.raises(ConfigError, match=r"names 'nothing\.\*', which matches no module"):
        resolve_targets(model, {"text": ["nothing.*"]})
