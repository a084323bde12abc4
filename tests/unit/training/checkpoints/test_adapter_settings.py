"""An adapter to start from agrees with the run, is what the run takes over, or is refused: never used as another one."""

from dataclasses import replace

import peft
import pytest
import torch

from m4train.config import AdapterConfig, FreezeConfig
from m4train.config.adapter_start import take_adapter
from m4train.errors import CheckpointError, ConfigError
from m4train.training.adapters import apply_adapters
from m4train.training.checkpoints.adapter_files import start_adapter
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.checkpoints.weights import CheckpointWeights
from m4train.training.freezing import apply_freezing
from m4train.training.naming import is_adapter
from tests.helpers.training import TinyModel, join, make_config, make_pack, make_trainer

BATCH = join([make_pack(n)[0] for n in range(3)])
TARGETS = {"text": ["q_proj", "up_proj"]}
PLAIN = {"r": 4, "lora_alpha": 8}
SETTINGS = {
    "alpha": {"lora_alpha": 3},
    "rank": {"r": 2},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"up_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {r"layers\.1\.q_proj": 32}},
    "both": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 1}},
    "in_full": {"modules_to_save": ["connector", "lm_head"]},
    "pattern": {"target_modules": r"layers\.\d\.q_proj"},
    "plain": {},
}


def _logits(model):
    with torch.no_grad():
        return model(BATCH, return_logits=True).logits


def _folder(path, **settings):
    """A folder that peft itself saved, every tensor off its initial value; and the logits of its model."""
    given = PLAIN | {"target_modules": r"layers\.\d\.(q_proj|up_proj)"} | settings
    theirs = peft.get_peft_model(TinyModel(), peft.LoraConfig(**given))
    torch.manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(path)
    return _logits(theirs.base_model.model)


def _started(config, folder):
    model = TinyModel()
    apply_adapters(model, config)
    apply_freezing(model, FreezeConfig(), config.modules_to_save)
    start_adapter(model, folder, config)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_taken_from_a_folder_of_peft_answers_as_peft_does(name, tmp_path):
    expected = _folder(tmp_path, **SETTINGS[name])
    config = AdapterConfig(kind="lora", start_from=str(tmp_path), from_config=True)
    take_adapter(config, [])
    torch.testing.assert_close(_logits(_started(config, tmp_path)), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "plain"])
def test_what_does_not_agree_is_refused_with_both_values(name, tmp_path):
    _folder(tmp_path, **SETTINGS[name])
    own = AdapterConfig(kind="lora", rank=4, alpha=8.0, targets=TARGETS)
    with pytest.raises(CheckpointError, match=r"but this run|only in the file"):
        _started(own, tmp_path)


def test_what_agrees_is_loaded(tmp_path):
    expected = _folder(tmp_path)
    own = AdapterConfig(kind="lora", rank=4, alpha=8.0, targets=TARGETS)
    torch.testing.assert_close(_logits(_started(own, tmp_path)), expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_bias", True), ("bias", "all"), ("init_lora_weights", "pissa"), ("peft_type", "LOHA"), ("r", "x")],
)
def test_an_adapter_of_another_kind_is_refused(key, value, tmp_path):
    import json

    _folder(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises((CheckpointError, ConfigError), match=str(value)):
        _started(AdapterConfig(kind="lora", rank=4, alpha=8.0, targets=TARGETS), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_damaged_folder_is_one_sentence(text, tmp_path):
    _folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    config = AdapterConfig(kind="lora", start_from=str(tmp_path), from_config=True)
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        take_adapter(config, [])
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter\.start_from"):
        take_adapter(config, [])


def test_a_setting_given_next_to_from_config_is_refused(tmp_path):
    config = AdapterConfig(kind="lora", start_from=str(tmp_path), from_config=True)
    with pytest.raises(ConfigError, match=r"adapter\.rank is given too"):
        take_adapter(config, ["adapter.rank=3"])
    with pytest.raises(ConfigError, match=r"adapter\.start_from is null"):
        take_adapter(replace(config, start_from=None), [])


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_taken_from_and_merged_by_its_patterns(tmp_path):
    config = make_config(tmp_path, max_steps=2)
    config.adapter = AdapterConfig(
        kind="lora", rank=4, alpha=8.0, targets=TARGETS, rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 1.0}
    )
    model = TinyModel()
    apply_adapters(model, config.adapter)
    make_trainer(config, model).train()
    point = find_checkpoint(config).folder
    again = AdapterConfig(kind="lora", start_from=str(point), from_config=True)
    take_adapter(again, [])
    assert torch.equal(_logits(_started(again, point)), _logits(model.eval()))
    with pytest.raises(CheckpointError, match=r"adapter\.rank_pattern .*but this run has \{\}"):
        _started(replace(config.adapter, rank_pattern={}), point)
    weights, plain = CheckpointWeights(point, config.adapter), TinyModel()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            assert not is_adapter(name)
            parameter.copy_(weights.merged(name, parameter.shape))
    torch.testing.assert_close(_logits(plain.eval()), _logits(model))
