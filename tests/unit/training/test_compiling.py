"""Compiled blocks compute what eager ones do, with adapters and recomputation, for models of any depth."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from m4train import build
from m4train.config import AdapterConfig, Config
from m4train.config.compose import load_config
from m4train.errors import ConfigError
from m4train.training import compiling
from m4train.training.adapters import apply_adapters
from m4train.training.compiling import compile_blocks, compiles, traced_whole
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


def adapted(model: Any, kind: str = "lora") -> Any:
    torch.manual_seed(0)
    targets = {"text": ["q_proj", "v_proj", "down_proj"], "vision": ["q_proj", "fc1"]}
    apply_adapters(model, AdapterConfig(kind=kind, rank=4, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["idefics3", *(pytest.param(name, marks=pytest.mark.full) for name in ("idefics", "idefics2"))]
)
def test_compiled_blocks_beside_adapters_and_recomputation(family: str) -> None:
    model, build_batch, per_image = make(family, **SHALLOW[family])
    adapted(model).double()
    batches = [build_batch(documents_of(size, per_image)) for size in SIZES]
    expected = [results(model, batch) for batch in batches]
    compile_blocks(model.blocks(), backend="aot_eager")
    checkpoint_blocks(model.blocks())
    for batch, wanted in zip(batches, expected):
        torch.testing.assert_close(results(model, batch), wanted)
    assert graphs() > 0


def packs(family: str, build_batch: Any, per_image: int) -> list[Any]:
    """50 packs of 1 to 8 documents with 0 to 3 images, among them such with one image, with one document, and with none that sees
    an image; in fp32."""
    draw = random.Random(0)
    sizes = [
        [(draw.randint(3, 60), draw.choice([0, 0, 1, 1, 2, 3])) for _ in range(draw.randint(1, 8))] for _ in range(47)
    ]
    sizes += [[(9, 1)], [(30, 0)], [(5, 0), (7, 1)]]
    return [
        build_batch([(ids, [image.float() for image in own]) for ids, own in documents_of(size, per_image, seed)])
        for seed, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    "family", ["idefics3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("idefics", "idefics2"))]
)
def test_fifty_packs_are_compiled_once_and_without_a_break(family: str) -> None:
    """For training and for evaluation; a break would be an error, as would be code for one size."""
    model, build_batch, per_image = make(family, torch.float32, **SHALLOW[family])
    compile_blocks(model.blocks(), backend="eager")
    batches = packs(family, build_batch, per_image)
    regions = sum(
        len(names) for names in {type(m): m.regions for m in model.modules() if hasattr(m, "regions")}.values()
    )
    with torch.no_grad():
        model.eval()(batches[0])
    model.train()(batches[0])
    assert graphs() == 2 * regions
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in batches:
            model(batch)
        with torch.no_grad():
            model.eval()(batches[-1])
    assert graphs() == 2 * regions
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_size_that_is_a_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *_: None)
    model, build_batch, per_image = make("idefics3", torch.float32, **SHALLOW["idefics3"])
    compile_blocks(model.blocks(), backend="eager")
    batches = packs("idefics3", build_batch, per_image)
    model(batches[0])
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        model(batches[1])


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("kind", ["dora", "qlora"])
def test_adapters_of_other_kinds(kind: str) -> None:
    """The layers of DoRA break the code of a region; it computes the same."""
    pytest.importorskip("bitsandbytes")
    model, build_batch, per_image = make("idefics3", torch.float32, **SHALLOW["idefics3"])
    adapted(model, kind)
    batches = packs("idefics3", build_batch, per_image)[:8]
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.stack([model(batch).loss for batch in batches])
        compile_blocks(model.blocks(), backend="aot_eager", whole=traced_whole(AdapterConfig(kind=kind)))
        model(batches[0]).loss.backward()
        with torch.compiler.set_stance("fail_on_recompile" if kind == "qlora" else "default"):
            found = torch.stack([model(batch).loss for batch in batches])
    assert bool(torch._dynamo.utils.counters["graph_break"]) == (kind == "dora")
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0.0)


def test_a_model_without_regions_is_refused() -> None:
    with pytest.raises(ConfigError, match="no block of this model names `regions` to compile"):
        compile_blocks({"text": [torch.nn.Linear(2, 2)]})


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
    monkeypatch.setattr(build, "compile_blocks", lambda blocks, whole: compiled.append(blocks))
    processor = type("Processor", (), {"tokenizer": range(10), "image_token_id": 90})
    for value, count in (("false", 0), ("auto", int(torch.cuda.is_available())), ("true", 1)):
        build.build_model(load_config(["experiment=digits_pretrain", f"trainer.compile={value}"]), processor)
        assert len(compiled) == count
        compiled = compiled[-1:]
    assert compiled[0].keys() == model.blocks().keys()


def test_zero3_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"trainer.compile is true, but engine.name=zero3 gathers parameters by hooks"
    ):
        load_config(["experiment=digits_pretrain", "engine=zero3", "trainer.compile=true"])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"engine": "zero3"}, False),
        ({"capability": (6, 1)}, False),
        ({"triton": None}, False),
        ({"compiler": None}, False),
        ({"adapter": "dora"}, False),
    ],
)
def test_auto_compiles_on_a_gpu_with_what_that_needs(
    changed: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "engine": "single",
        "adapter": "none",
        "capability": (9, 0),
        "triton": "there",
        "compiler": "/usr/bin/gcc",
        **changed,
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: given["capability"])
    monkeypatch.setattr(compiling, "find_spec", lambda _: given["triton"])
    monkeypatch.setattr(compiling.shutil, "which", lambda _: given["compiler"])
    config = Config()
    config.engine.name, config.adapter.kind = given["engine"], given["adapter"]
    assert compiles(config) is expected


def test_other_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer.compile is 'always', but must be true, false or auto"):
        load_config(["experiment=digits_pretrain", "trainer.compile=always"])
