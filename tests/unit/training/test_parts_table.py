import pytest
import torch

from m4train.config import AdapterConfig, FreezeConfig, FreezeRule, PartOptimizerConfig
from m4train.training.adapters import apply_adapters
from m4train.training.engines.single import SingleEngine
from m4train.training.freezing import apply_freezing
from m4train.training.parts_table import format_table, parameter_table
from tests.helpers.training import TinyModel, make_config

CPU = torch.device("cpu")


def _table(config, model=None):
    model = model or TinyModel(tied=True)
    apply_adapters(model, config.adapter)
    apply_freezing(model, config.freeze)
    return model, {row.part: row for row in parameter_table(model, config, CPU)}


def test_each_parameter_is_counted_once(tmp_path):
    config = make_config(tmp_path)
    config.freeze = FreezeConfig([FreezeRule(part="vision")])
    model, rows = _table(config)
    assert rows["total"].parameters == sum(p.numel() for p in model.parameters())
    assert rows["vision"].trainable == rows["lm_head"].parameters == 0
    assert rows["text"].trainable == rows["text"].parameters
    assert (rows["vision"].state, rows["vision"].lr, rows["vision"].decay) == ("", None, ())


def test_what_training_does_with_each_part(tmp_path):
    config = make_config(tmp_path, precision="bf16")
    config.adapter = AdapterConfig(kind="lora", rank=2, targets={"text": ["q_proj"]})
    config.freeze = FreezeConfig([FreezeRule(part="connector", trainable=True)], frozen_dtype="bf16")
    config.optimizer.parts = {"connector": PartOptimizerConfig(lr=3e-4, weight_decay=0.2)}
    model, rows = _table(config)
    assert rows["text"].trainable == rows["text"].adapted == 2 * 2 * (16 + 16)
    assert rows["text"].storage == ("bf16", "fp32")
    assert rows["vision"].storage == ("bf16",)
    assert rows["connector"].storage == ("fp32",)
    assert (rows["connector"].compute, rows["connector"].state) == ("bf16", "fp32")
    assert (rows["connector"].lr, rows["connector"].decay) == (3e-4, (0.0, 0.2))
    SingleEngine(config).prepare(model)
    stored = {
        str(p.dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
        for p in model.parameters()
    }
    assert stored == set(rows["total"].storage)


def test_the_text_has_a_line_for_each_part(tmp_path):
    config = make_config(tmp_path)
    lines = format_table(list(_table(config)[1].values())).splitlines()
    assert lines[0].split() == [
        "part", "parameters", "trainable", "adapters", "4-bit", "storage", "compute", "attention", "state", "rate", "decay"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:]] == [*TinyModel().parts(), "total"]
    assert len({line.index(" fp32") for line in lines[1:] if not line.startswith(("lm_head", "total"))}) == 1


@pytest.mark.parametrize(
    ("device", "precision", "kernel"), [("cuda", "bf16", "varlen"), ("cuda", "fp32", "sdpa"), ("cpu", "bf16", "sdpa")]
)
def test_the_attention_kernel_of_each_tower_is_named(device, precision, kernel, tmp_path):
    from m4train.models import Idefics2Config, Idefics2ForConditionalGeneration
    from tests.helpers.models import tiny_idefics2

    config = make_config(tmp_path, precision=precision)
    model = Idefics2ForConditionalGeneration(Idefics2Config.from_dict(tiny_idefics2()))
    rows = {row.part: row for row in parameter_table(model, config, torch.device(device))}
    named = {part: row.attention for part, row in rows.items() if row.attention}
    assert named == dict.fromkeys(("vision", "connector", "text"), (kernel,))
    text = next(line for line in format_table(list(rows.values())).splitlines() if line.startswith("text"))
    assert text.split()[6:8] == [precision, kernel]


def test_frozen_parts_of_a_bf16_file_are_stored_as_the_run_computes(tmp_path):
    for precision, stored in (("fp32", ("fp32",)), ("bf16", ("bf16",))):
        model = TinyModel().to(torch.bfloat16)
        model.vision.requires_grad_(False)
        rows = parameter_table(model, make_config(tmp_path, precision=precision), CPU)
        assert next(row.storage for row in rows if row.part == "vision") == stored
