import json

import pytest

from m4train.errors import ConfigError
from m4train.training.engines.deepspeed_config import deepspeed_config
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
        ({"optimizer": {"type": "AdamW"}}, r"optimizer\.type"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "auto"),
        ("{", "JSON"),
    ],
)
def test_conflicts_are_refused(theirs, word, tmp_path):
    with pytest.raises(ConfigError, match=word):
        deepspeed_config(_config(tmp_path, theirs), 1)
