"""What cannot work together is refused before anything is loaded, with the reason and the way out."""

import pytest

from m4train.config import Config, SourceConfig
from m4train.config_checks import check
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


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_every_engine_takes_full_training_lora_and_dora(engine, adapter):
    check(_config(engine__name=engine, adapter__kind=adapter, engine__offload=engine not in ("single", "ddp")))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine__name": "horovod"}, ["engine.name", "zero3"]),
        ({"engine__name": "ddp", "engine__offload": True}, ["engine.offload", "fsdp2"]),
        ({"engine__name": "zero2", "engine__shard_within_node": True}, ["shard_within_node", "fsdp2"]),
        ({"engine__name": "fsdp2", "engine__deepspeed": "mine.json"}, ["engine.deepspeed", "zero1"]),
        ({"engine__name": "fsdp2", "optimizer__name": "adamw_8bit"}, ["adamw_8bit", "shards", "ddp"]),
        ({"engine__name": "zero1", "optimizer__name": "adamw_8bit"}, ["adamw_8bit", "zero1"]),
        ({"engine__name": "fsdp2", "adapter__kind": "qlora"}, ["qlora", "fsdp2", "zero3"]),
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
