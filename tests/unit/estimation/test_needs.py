"""What an estimate says of memory per rank, time and ways out."""

import copy

import pytest
import torch

from m4train.config import AdapterConfig, Config, FreezeRule, SourceConfig
from m4train.errors import ConfigError
from m4train.estimation import changes
from m4train.estimation.needs import estimate
from m4train.estimation.published import ARCHITECTURES
from m4train.estimation.subject import Subject
from m4train.families import FAMILIES
from m4train.gpus import GPUS, Gpu

BILLIONS = {  # of the published checkpoints
    "HuggingFaceM4/idefics-9b": ("idefics", 8.93),
    "HuggingFaceM4/idefics-80b": ("idefics", 80.0),
    "HuggingFaceM4/idefics2-8b": ("idefics2", 8.403),
    "HuggingFaceM4/Idefics3-8B-Llama3": ("idefics3", 8.462),
    "HuggingFaceTB/SmolVLM-256M-Instruct": ("idefics3", 0.2565),
    "HuggingFaceTB/SmolVLM-500M-Instruct": ("idefics3", 0.5075),
    "HuggingFaceTB/SmolVLM-Instruct": ("idefics3", 2.2463),
}


def _subject(
    name="HuggingFaceTB/SmolVLM-256M-Instruct",
    ranks=1,
    gpu=None,
    engine="single",
    layers=2,
    calibration=None,
    **trainer,
) -> Subject:
    """A published model, with so few `layers` in each tower that it is quick to go through (all: None)."""
    config = Config()
    config.model.family, config.model.pretrained = BILLIONS[name][0], name
    config.engine.name, config.trainer.precision = engine, "bf16"
    config.trainer.micro_batch_size, config.data.images_per_pack = 1, 8
    config.data.sources = {"any": SourceConfig(path="any")}
    for key, value in trainer.items():
        setattr(config.trainer, key, value)
    shape = copy.deepcopy(ARCHITECTURES[name])
    if layers:
        shape["text_config"]["num_hidden_layers"] = shape["vision_config"]["num_hidden_layers"] = layers
    architecture = FAMILIES[config.model.family].load("Config").from_dict(shape)
    return Subject(config, architecture, torch.bfloat16, ranks, gpu, calibration=calibration)


@pytest.mark.parametrize("name", list(BILLIONS))
def test_the_published_models_have_the_published_numbers_of_parameters(name):
    assert _subject(name, layers=None).sizes().parameters / 1e9 == pytest.approx(BILLIONS[name][1], rel=2e-3)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_what_is_sharded_shrinks_with_the_ranks_and_what_is_not_stays(engine):
    few, many = (_subject(ranks=ranks, engine=engine).memory().components for ranks in (2, 8))
    for part in ("parameters", "optimizer"):
        assert many[part] == pytest.approx(few[part] / 4, rel=0.01)
    for part in ("activations", "gathered", "buckets"):
        assert many[part] == pytest.approx(few[part], rel=0.01)


def test_ddp_holds_everything_and_its_gradients_from_the_start():
    size = _subject().sizes()
    memory = _subject(ranks=2, engine="ddp", global_batch_size=2).memory().components
    assert memory["gradients"] == size.trained_bytes
    assert memory["optimizer"] == pytest.approx(2 * size.trained_bytes, rel=1e-3)
    several = _subject(ranks=2, engine="ddp", global_batch_size=4).memory().components
    assert several["gradients"] == 2 * size.trained_bytes  # the sums so far, next to the buckets


@pytest.mark.parametrize(("engine", "divided"), [("zero1", ["optimizer"]), ("zero2", ["gradients", "optimizer"])])
def test_early_zero_stages_divide_what_they_say(engine, divided):
    few, many = (
        _subject(ranks=ranks, engine=engine, global_batch_size=2 * ranks).memory().components for ranks in (2, 8)
    )
    shrunk = [name for name in ("parameters", "gradients", "optimizer") if many[name] < few[name]]
    assert shrunk == divided


def test_offloading_moves_to_the_host_what_it_takes_from_the_device():
    plain = _subject(ranks=2, engine="fsdp2")
    memory = plain.memory()
    plain.config.engine.offload = True
    moved = plain.memory()
    assert moved.tensors + moved.host == pytest.approx(memory.tensors)
    assert "optimizer" not in moved.components


def test_time_follows_from_operations_and_peak():
    found = estimate(_subject(gpu="h100", global_batch_size=8), mfu=0.5)
    (speed,) = found.speeds
    assert speed.step_seconds == pytest.approx(found.step_flops / (989e12 * 0.5))
    assert speed.tokens_per_second == pytest.approx(8 * 1024 / speed.step_seconds)
    assert speed.days == pytest.approx(speed.step_seconds * 1000 / 86400)


def test_recomputation_costs_time_and_not_more_than_a_forward_pass():
    plain, again = (
        estimate(_subject(gpu="h100", gradient_checkpointing=on)).speeds[0].step_seconds for on in (False, True)
    )
    assert 1.2 < again / plain < 1.34


def test_changes_that_make_it_fit_are_estimated_each(monkeypatch):
    monkeypatch.setattr(changes, "_allowed", lambda config: True)
    subject = _subject(gpu="h100", layers=12)
    need = subject.memory().expected
    monkeypatch.setitem(GPUS, "h100", Gpu(989e12, need * 0.7, 3e12))
    found = estimate(subject)
    assert not found.fits
    assert ("trainer.gradient_checkpointing=true",) in [change.overrides for change in found.changes]
    assert all(change.fits and change.memory.expected <= need * 0.7 for change in found.changes)


def test_changes_are_put_together_if_none_is_enough(monkeypatch):
    monkeypatch.setattr(changes, "_allowed", lambda config: True)
    subject = _subject(gpu="h100", layers=6)
    monkeypatch.setitem(GPUS, "h100", Gpu(989e12, subject.memory().expected * 0.35, 3e12))
    (change,) = estimate(subject).changes
    assert change.fits
    assert len(change.overrides) > 1


def test_frozen_weights_in_four_bits_take_half_a_byte():
    subject = _subject(layers=None)
    config = subject.config
    config.freeze.rules = [FreezeRule(trainable=False), FreezeRule(part="connector", trainable=True)]
    config.adapter = AdapterConfig(kind="qlora", rank=4, targets={"text": ["q_proj"]})
    size = subject.sizes()
    text = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert size.whole_bytes == text / 2


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.global_batch_size=8 cannot be shared among --ranks 16"):
        estimate(_subject(ranks=16, engine="fsdp2"))
