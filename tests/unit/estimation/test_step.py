"""The memory of a step under fake tensors against what the profiler counts of a real one."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from m4train.config import AdapterConfig, Config, FreezeRule
from m4train.estimation import published
from m4train.estimation.step import BatchShape, frames_at_most, step_memory, worst_case
from m4train.families import FAMILIES
from m4train.training.engines.single import SingleEngine
from m4train.training.equip import equip

SIGLIP = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
}
TEXT = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 2000}
CLIP = {"embed_dim": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "idefics": {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 2000,
        "additional_vocab_size": 2,
        "cross_layer_interval": 2,
        "use_resampler": True,
        "vision_config": {**CLIP, "image_size": 56, "patch_size": 14},
        "perceiver_config": {"use_resampler": True, "resampler_depth": 2, "resampler_n_heads": 2},
    },
    "idefics2": {
        "image_token_id": 1,
        "vision_config": {**SIGLIP, "image_size": 56},
        "text_config": TEXT,
        "perceiver_config": {"resampler_n_latents": 8, "resampler_n_heads": 4, "resampler_head_dim": 32},
    },
    "idefics3": {
        "image_token_id": 1,
        "scale_factor": 2,
        "vision_config": {**SIGLIP, "image_size": 56},
        "text_config": TEXT,
    },
}


def _config(family: str, adapter: str, checkpointing: bool, precision: str = "fp32") -> Config:
    config = Config()
    config.model.family, config.trainer.precision = family, precision
    config.trainer.gradient_checkpointing = checkpointing
    config.freeze.rules = [FreezeRule(trainable=True)]
    if adapter != "full":
        config.adapter = AdapterConfig(kind=adapter, rank=4, targets={"text": ["q_proj", "v_proj", "up_proj"]})
        config.freeze.rules = [FreezeRule(trainable=False), FreezeRule(part="connector", trainable=True)]
    return config


def _bytes(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _measured(config: Config, architecture, shape: BatchShape) -> float:
    """Bytes at the peak of a real step: what exists before it, and the most that the allocator handed out within it."""
    model = FAMILIES[config.model.family].model_class(architecture)
    equip(model, config)
    engine = SingleEngine(config, "cpu")
    engine.prepare(model)
    model.train()
    batch = worst_case(architecture, shape)
    states = [value for state in engine.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    scales = [m.weight.quant_state for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    scales = [tensor for s in scales for tensor in (s.absmax, s.offset, s.code, s.state2.absmax, s.state2.code)]
    images = batch.images
    inputs = [
        batch.input_ids,
        batch.position_ids,
        batch.loss_positions,
        batch.targets,
        images.pixels,
        images.pixel_table,
    ]
    held = _bytes([*model.parameters(), *model.buffers(), *states, *scales, *inputs])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = engine.forward(batch)
        engine.backward(output.loss, True)
        engine.update(1.0, 1.0)
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return held + most


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("adapter", ["full", "lora", "qlora"])
@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_the_peak_of_a_step_is_known_to_five_percent(family, adapter, checkpointing):
    config = _config(family, adapter, checkpointing)
    architecture = FAMILIES[family].load("Config").from_dict(ARCHITECTURES[family])
    shape = BatchShape(256, 6, 16 if family == "idefics2" else 0)
    estimated, measured = step_memory(config, architecture, shape).total, _measured(config, architecture, shape)
    assert estimated == pytest.approx(measured, rel=0.05)


@pytest.mark.full
@pytest.mark.parametrize(("adapter", "checkpointing"), [("full", True), ("lora", False)])
def test_so_is_that_of_a_whole_published_model(adapter, checkpointing):
    """SmolVLM-256M with all its layers: 4.6 GiB for the whole training, 1.5 GiB for LoRA."""
    values = published.ARCHITECTURES["HuggingFaceTB/SmolVLM-256M-Instruct"]
    config, shape = _config("idefics3", adapter, checkpointing), BatchShape(256, 2)
    architecture = FAMILIES["idefics3"].load("Config").from_dict(values)
    estimated, measured = step_memory(config, architecture, shape).total, _measured(config, architecture, shape)
    assert estimated == pytest.approx(measured, rel=0.05)


def test_autocast_and_its_copies_of_the_weights_are_counted():
    architecture = FAMILIES["idefics3"].load("Config").from_dict(ARCHITECTURES["idefics3"])
    config, shape = _config("idefics3", "full", True, "bf16"), BatchShape(256, 6)
    assert step_memory(config, architecture, shape).total == pytest.approx(
        _measured(config, architecture, shape), rel=0.05
    )


def test_eight_bit_moments_take_a_quarter():
    architecture = FAMILIES["idefics3"].load("Config").from_dict(ARCHITECTURES["idefics3"])
    wide = _config("idefics3", "full", True)
    narrow = _config("idefics3", "full", True)
    narrow.optimizer.name = "adamw_8bit"
    whole = step_memory(wide, architecture, BatchShape(64, 2)).optimizer
    assert step_memory(narrow, architecture, BatchShape(64, 2)).optimizer == pytest.approx(whole / 4, rel=0.05)


def test_nothing_is_allocated_for_a_model_of_eight_billion_parameters():
    text = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    given = {**ARCHITECTURES["idefics3"], "text_config": {**text, "num_key_value_heads": 8, "vocab_size": 128259}}
    architecture = FAMILIES["idefics3"].load("Config").from_dict(given)
    found = step_memory(_config("idefics3", "lora", True), architecture, BatchShape(1024, 4))
    assert found.parameters > 30e9


def test_a_batch_holds_no_more_images_than_its_tokens_have_room_for():
    architecture = FAMILIES["idefics3"].load("Config").from_dict(ARCHITECTURES["idefics3"])
    assert architecture.tokens_per_image == 4
    assert frames_at_most(architecture, BatchShape(32, 100)) == 8
    assert frames_at_most(architecture, BatchShape(32, 3)) == 3
    assert worst_case(architecture, BatchShape(32, 100)).images.count == 8
