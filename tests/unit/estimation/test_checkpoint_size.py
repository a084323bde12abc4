"""The size of a checkpoint that an estimate gives, against files that are written."""

import pytest

from m4train.errors import ConfigError
from m4train.estimation.ranks import sizes
from m4train.estimation.step import BatchShape
from m4train.families import FAMILIES
from m4train.optimizers import OPTIMIZERS
from m4train.training.checkpoints.save import save_checkpoint
from m4train.training.engines.single import SingleEngine
from m4train.training.equip import equip
from tests.unit.estimation.test_step import ARCHITECTURES, _config

PER_TENSOR = 2048  # bytes at most that the format adds to each


def both(config):
    """Bytes that are expected of a checkpoint, its engine, and its architecture."""
    architecture = FAMILIES["idefics3"].load("Config").from_dict(ARCHITECTURES["idefics3"])
    expected = sizes(config, architecture, BatchShape(64, 2), None).checkpoint_bytes
    model = FAMILIES["idefics3"].model_class(architecture)
    equip(model, config)
    engine = SingleEngine(config, "cpu")
    engine.prepare(model)
    return expected, engine


def name_config(name):
    if name in OPTIMIZERS and OPTIMIZERS[name].package:
        pytest.importorskip(OPTIMIZERS[name].package)
    config = _config("idefics3", "full", False)
    config.optimizer.name = name
    return config


def check_tensors(config):
    expected, engine = both(config)
    tensors = engine.tensors()
    assert expected == pytest.approx(sum(t.numel() * t.element_size() for t in tensors.values()), rel=0.01)
    return expected, engine, tensors


def check_size(config, tmp_path):
    expected, engine, tensors = check_tensors(config)
    folder = save_checkpoint(tmp_path / "checkpoints", engine, {"step": 1}, 1) / "tensors"
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert 0 < written - expected < PER_TENSOR * len(tensors)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "torch.optim:RMSprop", "torch.optim:SGD"])
def test_each_optimizer_has_what_it_keeps(name):
    check_tensors(name_config(name))


@pytest.mark.parametrize(
    "name",
    ["paged_adamw_8bit", *(pytest.param(n, marks=pytest.mark.full) for n in OPTIMIZERS if n != "paged_adamw_8bit")],
)
def test_each_optimizer_is_written_with_it(name, tmp_path):
    check_size(name_config(name), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("adapter", "frozen"), [("lora", None), ("lora", "bf16"), ("qlora", "bf16")])
def test_so_are_adapters_and_what_is_frozen(adapter, frozen, tmp_path):
    if adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    config = _config("idefics3", adapter, True, "bf16")
    config.freeze.frozen_dtype = frozen
    check_size(config, tmp_path)


def test_an_optimizer_whose_state_depends_on_values_is_refused():
    config = _config("idefics3", "full", False)
    config.optimizer.name = "torch.optim:ASGD"
    with pytest.raises(ConfigError, match=r"keeps cannot be estimated, since it looks at values"):
        both(config)
