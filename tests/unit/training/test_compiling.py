"""Compiled blocks compute what eager ones do, with adapters and recomputation, for models of any depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from m4train import build
from m4train.config import AdapterConfig
from m4train.config.compose import load_config
from m4train.errors import ConfigError
from m4train.training.adapters import apply_adapters
from m4train.training.compiling import compile_blocks
from m4train.training.gradient_checkpointing import checkpoint_blocks
from tests.helpers.models import SHALLOW
from tests.unit.models.test_packing import FAMILIES, documents_of, make

SIZES = [[(9, 1), (14, 2)], [(20, 1), (5, 1), (31, 3)], [(9, 5), (6, 0)]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def results(model: Any, batch: Any) -> dict[str, Tensor]:
    """Loss, and the gradient of what trains."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(batch).loss
    loss.backward()
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **trained}


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    targets = {"text": ["q_proj", "v_proj", "down_proj"], "vision": ["q_proj", "fc1"]}
    apply_adapters(model, AdapterConfig(kind="lora", rank=4, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["idefics3", *(pytest.param(name, marks=pytest.mark.full) for name in ("idefics", "idefics2"))]
)
def test_compiled_blocks_beside_adapters_and_recomputation(family: str) -> None:
    model, build_batch, per_image = make(family, **SHALLOW[family])
    adapted(model)
    batches = [build_batch(documents_of(size, per_image)) for size in SIZES]
    expected = [results(model, batch) for batch in batches]
    compile_blocks(model.blocks(), backend="aot_eager")
    checkpoint_blocks(model.blocks())
    for batch, wanted in zip(batches, expected):
        torch.testing.assert_close(results(model, batch), wanted)
    assert graphs() > 0


@pytest.mark.slow
def test_more_layers_compile_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler gives up on code it has to compile more than eight times: a number of the layer in it would be that."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    counts = []
    for layers in (1, 9):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        depth = {"num_hidden_layers": layers}
        model, build_batch, per_image = make("idefics3", text_config=depth, vision_config={"num_hidden_layers": 1})
        compile_blocks(model.blocks(), backend="aot_eager")
        with torch.no_grad():
            model(build_batch(documents_of(SIZES[0], per_image)))
        counts.append(graphs())
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_compiler_of_the_run(family: str) -> None:
    model, build_batch, per_image = make(family)
    batch = build_batch(documents_of([(9, 1), (14, 2)], per_image))
    expected = results(model, batch)
    compile_blocks(model.blocks())
    torch.testing.assert_close(results(model, batch), expected)


def test_the_key_compiles_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = make("idefics3")
    monkeypatch.setattr(build, "_fresh_model", lambda *_: model)
    monkeypatch.setattr(build, "generation_config", lambda *_: {})
    compiled: list[Any] = []
    monkeypatch.setattr(build, "compile_blocks", lambda blocks: compiled.append(blocks))
    processor = type("Processor", (), {"tokenizer": range(10), "image_token_id": 90})
    for value, count in (("false", 0), ("true", 1)):
        build.build_model(load_config(["experiment=digits_pretrain", f"trainer.compile={value}"]), processor)
        assert len(compiled) == count
    assert compiled[0].keys() == model.blocks().keys()


def test_zero3_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"trainer.compile is true, but engine.name=zero3 gathers parameters by hooks"
    ):
        load_config(["experiment=digits_pretrain", "engine=zero3", "trainer.compile=true"])
