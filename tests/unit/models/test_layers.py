"""The layers that keep less for the backward pass give the gradients of the plain formulas, and keep what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m4train.batch import Segments
from m4train.models.backbone_configs import LlamaConfig
from m4train.models.contexts import PackedContext
from m4train.models.decoder import SelfAttention
from m4train.models.layers import GatedMLP, RMSNorm, Rotary, rotate
from m4train.models.products import flattened
from m4train.models.vision import LayerNorm, VisionMLP


def gradients(module: torch.nn.Module, function, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    result = function(x)
    torch.manual_seed(1)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [result.detach(), *torch.autograd.grad((result * torch.randn_like(result)).sum(), wanted)]


def plain_norm(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps))


def plain_gated(mlp: GatedMLP, x: torch.Tensor) -> torch.Tensor:
    down, gate, up = (m.weight for m in (mlp.down_proj, mlp.gate_proj, mlp.up_proj))
    return F.linear(mlp.act(F.linear(x, gate)) * F.linear(x, up), down)


def plain_vision(mlp: VisionMLP, x: torch.Tensor) -> torch.Tensor:
    inner = F.linear(x, mlp.fc1.weight, mlp.fc1.bias)
    return F.linear(mlp.act(inner), mlp.fc2.weight, mlp.fc2.bias)


MODULES = {
    "norm": (lambda: RMSNorm(12, 1e-5), plain_norm),
    "norm of Idefics": (lambda: RMSNorm(12, 1e-6, weight_first=True), plain_norm),
    "silu": (lambda: GatedMLP(12, 20), plain_gated),
    "relu, another width": (lambda: GatedMLP(12, 20, 8, act="relu"), plain_gated),
    "gelu": (lambda: VisionMLP(12, 24, "gelu_pytorch_tanh"), plain_vision),
    "quick_gelu": (lambda: VisionMLP(12, 24, "quick_gelu"), plain_vision),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (0, 12)])
def test_gradients_are_those_of_the_plain_formula(name: str, frozen: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    make, plain = MODULES[name]
    module = make()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
        parameter.requires_grad_(not frozen)
    x = torch.randn(shape)
    for found, expected in zip(gradients(module, module, x), gradients(module, lambda y: plain(module, y), x)):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def kept_by(function) -> set[int]:
    kept: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.untyped_storage().data_ptr()) or x, lambda x: x):
        function()
    return kept


def test_the_joined_outputs_of_segments_are_not_kept_next_to_the_outputs() -> None:
    torch.manual_seed(0)
    attend = SelfAttention(LlamaConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8))
    context = PackedContext(Rotary(8, 1e4).tables(torch.arange(100)), Segments.of([40, 60]))
    joined: list[torch.Tensor] = []
    attend.o_proj.register_forward_pre_hook(lambda module, given: joined.append(given[0]))
    x = torch.randn(100, 16, requires_grad=True)
    results: list[torch.Tensor] = []
    kept = kept_by(lambda: results.append(attend.o_proj(flattened(context(0, *attend.project(x, context.tables))))))
    assert joined[0].untyped_storage().data_ptr() not in kept
    wanted = [x, *attend.parameters()]
    found = torch.autograd.grad(results[0].sin().sum(), wanted)
    for one, other in zip(found, torch.autograd.grad(plain_attention(attend, x, context.tables).sin().sum(), wanted)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def plain_attention(attend: SelfAttention, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """By segments of 40 and 60 tokens, with torch's own layers."""
    query, key, value = (
        F.linear(x, m.weight).unflatten(-1, (-1, 8)) for m in (attend.q_proj, attend.k_proj, attend.v_proj)
    )
    query, key = rotate(query, tables), rotate(key, tables)
    parts = []
    for q, k, v in zip(query.split([40, 60]), key.split([40, 60]), value.split([40, 60])):
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return F.linear(torch.cat(parts).flatten(1), attend.o_proj.weight)


def test_between_norm_and_product_nothing_but_their_inputs_is_kept() -> None:
    x = torch.randn(6, 12, requires_grad=True)
    norm, mlp, layer_norm, seen = RMSNorm(12, 1e-5), GatedMLP(12, 20), LayerNorm(12), VisionMLP(12, 24, "gelu")
    made: list[torch.Tensor] = []
    for part in (mlp.gate_proj, mlp.up_proj, seen.fc1):
        part.register_forward_hook(lambda module, given, result: made.append(result))
    text = kept_by(lambda: made.append(mlp(norm(x))))
    vision = kept_by(lambda: made.append(seen(layer_norm(x))))
    own = {p.data_ptr() for m in (norm, mlp, layer_norm, seen) for p in m.parameters()}
    outputs = {t.untyped_storage().data_ptr() for t in made}
    # Next to those, only numbers of which there is one a row: the size of a row, its mean and its spread.
    assert len(text - own - {x.data_ptr(), *outputs}) <= 1
    assert len(vision - own - {x.data_ptr(), *outputs}) <= 2
