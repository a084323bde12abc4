"""What cannot work together is refused before anything is loaded, with the reason and the way out."""

import itertools

import pytest

from m4train.config import ADAPTERS, ENGINES, OPTIMIZERS, BatchRampConfig, Config, PartOptimizerConfig, SourceConfig
from m4train.config.checks import check
from m4train.config.combinations import why_not
from m4train.errors import ConfigError


def _config(**values):
    config = Config()
    config.model.architecture, config.model.tokenizer = {"model_type": "idefics3"}, "somewhere"
    config.data.sources = {"web": SourceConfig(path="web.tar")}
    config.adapter.targets = {"text": ["q_proj"]}
    for key, value in values.items():
        group, name = key.split("__")
        assert hasattr(getattr(config, group), name), key
        setattr(getattr(config, group), name, value)
    return config


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_engine_takes_every_adapter(engine, adapter):
    check(_config(engine__name=engine, adapter__kind=adapter, engine__offload=engine not in ("single", "ddp")))


@pytest.mark.parametrize(("engine", "optimizer", "adapter"), list(itertools.product(ENGINES, OPTIMIZERS, ADAPTERS)))
def test_the_table_is_what_is_checked(engine, optimizer, adapter):
    """What works is run for two steps in tests/distributed/test_combinations.py."""
    config = _config(engine__name=engine, optimizer__name=optimizer, adapter__kind=adapter)
    if optimizer == "schedule_free":
        config.schedule.name = "constant"
    reason = why_not(engine, optimizer, adapter)
    whole = ("single", "ddp", "fsdp2") if optimizer == "muon" else ("single", "ddp")
    assert (reason is None) == (optimizer == "adamw" or engine in whole)
    if reason is None:
        check(config)
    else:
        with pytest.raises(ConfigError) as caught:
            check(config)
        assert str(caught.value) == reason
        assert optimizer in reason
        assert engine in reason


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine__name": "horovod"}, ["engine.name", "zero3"]),
        ({"engine__name": "ddp", "engine__offload": True}, ["engine.offload", "fsdp2"]),
        ({"engine__name": "zero2", "engine__shard_within_node": True}, ["shard_within_node", "fsdp2"]),
        ({"engine__name": "fsdp2", "engine__deepspeed": "mine.json"}, ["engine.deepspeed", "zero1"]),
        ({"engine__name": "fsdp2", "optimizer__name": "adamw_8bit"}, ["adamw_8bit", "shards", "ddp"]),
        ({"engine__name": "zero1", "optimizer__name": "adamw_8bit"}, ["adamw_8bit", "zero1"]),
        ({"engine__name": "fsdp2", "optimizer__name": "muon", "engine__offload": True}, ["muon", "engine.offload"]),
        ({"engine__name": "zero1", "optimizer__name": "muon"}, ["muon", "flat shards", "adamw"]),
        ({"optimizer__momentum": 0.9}, ["optimizer.momentum", "betas"]),
        ({"optimizer__name": "muon", "optimizer__momentum": 1.0}, ["optimizer.momentum"]),
        ({"optimizer__betas": [0.9, 1.0]}, ["optimizer.betas"]),
        ({"optimizer__eps": 0.0}, ["optimizer.eps"]),
        ({"optimizer__weight_decay": -0.1}, ["optimizer.weight_decay"]),
        ({"optimizer__parts": {"text": PartOptimizerConfig(lr=0.0)}}, ["optimizer.parts.text.lr", "freeze"]),
        ({"optimizer__parts": {"text": PartOptimizerConfig(weight_decay=-1.0)}}, ["optimizer.parts.text.weight_decay"]),
        ({"adapter__start_from": "there"}, ["adapter.start_from", "lora"]),
        ({"freeze__new_rows_from": 0}, ["freeze.new_rows_from"]),
        ({"data__sources": {"a": SourceConfig(path="a.tar", loss_weight=0.0)}}, ["data.sources.a.loss_weight"]),
        ({"data__validation": {"a": SourceConfig(path="a.tar", loss_weight=2.0)}}, ["data.validation.a.loss_weight"]),
        ({"trainer__batch_ramp": BatchRampConfig(start=2)}, ["batch_ramp.increment"]),
        ({"trainer__batch_ramp": BatchRampConfig(steps=5)}, ["batch_ramp.start"]),
        ({"trainer__batch_ramp": BatchRampConfig(start=8, increment=1, steps=1)}, ["global_batch_size"]),
        ({"adapter__kind": "qlora", "adapter__quantize": []}, ["adapter.quantize"]),
        ({"adapter__kind": "lora", "adapter__targets": {}}, ["adapter.targets"]),
        ({"schedule__name": "wsd"}, ["decay_steps"]),
        ({"schedule__name": "wsd", "schedule__decay_steps": 10**6}, ["decay_steps", "max_steps"]),
        ({"schedule__decay_steps": 5}, ["decay_steps", "wsd"]),
        ({"freeze__frozen_dtype": "fp8"}, ["frozen_dtype", "bf16"]),
        ({"freeze__frozen_dtype": "bf16", "trainer__precision": "fp32"}, ["frozen_dtype", "precision"]),
        ({"trainer__neftune_alpha": -1.0}, ["neftune_alpha"]),
        ({"trainer__skip_outliers": -1.0}, ["skip_outliers"]),
        ({"trainer__hang_timeout": -1.0}, ["hang_timeout"]),
        ({"trainer__max_hours": 0.0}, ["max_hours"]),
        ({"trainer__keep_every": -1}, ["keep_every"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(values, words):
    with pytest.raises(ConfigError) as caught:
        check(_config(**values))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
