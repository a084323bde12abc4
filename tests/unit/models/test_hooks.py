"""Hooks of every module are called, those of the attention as well whose projections a layer uses without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from m4train.training.gradient_checkpointing import checkpoint_blocks
from tests.helpers.models import SHALLOW
from tests.unit.models.test_packing import FAMILIES, documents_of, make

ATTENTION = ("self_attn", "cross_attn")


def model_and_batch(family: str) -> tuple[Any, Any]:
    model, build, per_image = make(family, **SHALLOW[family])
    return model, build(documents_of([(9, 1), (14, 2), (6, 0)], per_image))


def gradients(model: Any, batch: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def attentions(model: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(ATTENTION)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_every_module_is_called_once_a_pass_and_computes_the_same(family: str, recomputed: bool) -> None:
    model, batch = model_and_batch(family)
    expected = gradients(model, batch)
    if recomputed:
        checkpoint_blocks(model.blocks())
    called: dict[str, int] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.update({name: called.get(name, 0) + 1}))
    found = gradients(model, batch)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    assert called.keys() == {name for name, _ in model.named_modules()} - lists
    watched = attentions(model)
    assert len(watched) >= 2
    assert {called[name] for name in watched} == {1 + recomputed}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "way", ["forward", "forward_pre", "full_backward", "full_backward_pre", "all modules", "replaced"]
)
def test_each_kind_of_hook_of_the_attention(family: str, way: str) -> None:
    model, batch = model_and_batch(family)
    called: list[nn.Module] = []
    watched = attentions(model)
    handle = None
    for module in watched.values():
        if way == "replaced":  # as accelerate does
            own = module.forward
            module.forward = lambda *given, module=module, own=own: (called.append(module), own(*given))[1]
        elif way != "all modules":
            getattr(module, f"register_{way}_hook")(lambda module, *_: called.append(module))
    if way == "all modules":
        handle = register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        model(batch).loss.backward()
    finally:
        if handle is not None:
            handle.remove()
    assert {id(module) for module in called} >= {id(module) for module in watched.values()}


def test_what_a_hook_gives_is_used_until_it_is_removed() -> None:
    model, batch = model_and_batch("idefics3")
    before = model(batch).loss
    handles = [m.register_forward_hook(lambda module, given, out: 0 * out) for m in attentions(model).values()]
    assert model(batch).loss != before
    for handle in handles:
        handle.remove()
    assert model(batch).loss == before


def test_a_second_derivative_is_refused_on_a_cpu_and_not_wrong() -> None:
    model, batch = model_and_batch("idefics3")
    first = model.get_input_embeddings().weight
    [gradient] = torch.autograd.grad(model(batch).loss, [first], create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|derivative for .*attention.* is not implemented"):
        gradient.sum().backward()
