"""The layers that keep less for the backward pass give the gradients of the plain formulas, and keep what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m4train.models.layers import GatedMLP, RMSNorm
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
