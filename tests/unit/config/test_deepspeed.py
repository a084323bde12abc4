import json
from typing import ClassVar

import pytest

from m4train.config.compose import load_config
from m4train.config.deepspeed import deepspeed_config
from m4train.config.deepspeed_keys import TOP, ZERO
from m4train.errors import ConfigError
from tests.helpers.training import make_config


def _config(tmp_path, theirs=None, stage=2):
    config = make_config(tmp_path, max_grad_norm=0.7)
    config.engine.name = f"zero{stage}"
    if theirs is not None:
        path = tmp_path / "mine.json"
        path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
        config.engine.deepspeed = str(path)
    return config


def test_nothing_is_left_to_be_filled_in(tmp_path):
    config = _config(tmp_path, stage=3)
    config.engine.offload = True
    written = deepspeed_config(config, 4)
    assert "auto" not in json.dumps(written)
    assert written["train_batch_size"] == config.trainer.micro_batch_size * 4
    assert written["gradient_clipping"] == 0.7
    assert written["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_a_users_file_is_merged(tmp_path):
    theirs = {
        "zero_optimization": {"reduce_bucket_size": 7},
        "gradient_clipping": 0.7,
        "comms_logger": {"enabled": True},
    }
    written = deepspeed_config(_config(tmp_path, theirs), 1)
    assert written["zero_optimization"]["reduce_bucket_size"] == 7
    assert written["zero_optimization"]["stage"] == 2
    assert written["comms_logger"]["enabled"]


@pytest.mark.parametrize(
    ("theirs", "word"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.*set optimizer here"),
        ({"gradient_clipping": 0.5}, r"0\.5, but this run needs 0\.7.*trainer\.max_grad_norm"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"offload_optimizer\.device.*engine\.offload",
        ),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"prescale_gradients": True, "gradient_predivide_factor": 2.0}, "prescale_gradients"),
        ({"zero_optimizaton": {"overlap_comm": True}}, "did you mean zero_optimization"),
        ({"zero_optimization": {"overlap_com": True}}, r"did you mean zero_optimization\.overlap_comm"),
        ({"zero_optimization": 2}, "must be an object"),
        ([1, 2], "must be an object"),
        ({"train_batch_size": 3}, "train_batch_size"),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            r"round_robin_gradients to True, which is not known to leave",
        ),
        ({"zero_optimization": {"compute_grad_norm": False}}, r"compute_grad_norm to False, which is not known"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"communication_data_type": "bf16"}, "communication_data_type"),
        ({"weight_quantization": {"enabled": True}}, "weight_quantization"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "auto"),
        ("{", "JSON"),
    ],
)
def test_conflicts_are_refused(theirs, word, tmp_path):
    with pytest.raises(ConfigError, match=word):
        deepspeed_config(_config(tmp_path, theirs), 1)


def test_offload_asked_for_here_is_not_taken_back_there(tmp_path):
    for device in ({"device": "none"}, {"device": "nvme"}, None):
        config = _config(tmp_path, {"zero_optimization": {"offload_optimizer": device}})
        config.engine.offload = True
        with pytest.raises(ConfigError, match=r"offload_optimizer\.device"):
            deepspeed_config(config, 1)


@pytest.mark.parametrize(
    "theirs",
    [
        {"fp16": {"enabled": False}, "bf16": {"enabled": False}},
        {"zero_optimization": {"round_robin_gradients": False, "compute_grad_norm": True}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "offload_param": None}},
        {"sequence_parallel_size": 1, "prescale_gradients": False, "gradient_clipping": 0.7},
    ],
)
def test_what_says_the_same_or_the_default_is_no_conflict(theirs, tmp_path):
    deepspeed_config(_config(tmp_path, theirs), 2)


def test_the_file_is_checked_with_the_configuration(tmp_path):
    path = tmp_path / "mine.json"
    overrides = ["experiment=digits_pretrain", "engine=zero2", f"engine.deepspeed={path}"]
    path.write_text(json.dumps({"train_batch_size": 64}))  # how many ranks there will be is not known yet
    load_config(overrides)
    path.write_text(json.dumps({"sequence_parallel_size": 2}))
    with pytest.raises(ConfigError, match="sequence_parallel_size"):
        load_config(overrides)


class _Noting(dict):
    """Remembers the keys it was asked for."""

    asked: ClassVar[set[str]] = set()

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self


@pytest.mark.slow
def test_the_known_keys_are_those_that_deepspeed_reads(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import config as library
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    library.DeepSpeedConfig(_Noting(deepspeed_config(_config(tmp_path), 1)))
    removed = set(getattr(library, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", ()))
    assert "comms_logger" in _Noting.asked
    assert _Noting.asked - removed <= TOP
    current = {
        field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items() if not _deprecated(field)
    }
    assert current == ZERO


def _deprecated(field):
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("deprecated"))
