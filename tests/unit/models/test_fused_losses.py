"""The losses of torch and Liger instead of the chunked one: the same figures, and refused if they cannot work."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m4train import build
from m4train.batch import PackedBatch
from m4train.config.compose import load_config
from m4train.errors import ConfigError
from m4train.models import Idefics3Config, Idefics3ForConditionalGeneration, fused_losses
from m4train.models.loss import LMHead, token_loss
from tests.helpers.models import packed_batch, tiny_idefics3
from tests.helpers.rounding import apart, assert_near

HAS_TORCH_LOSS = hasattr(nn, "LinearCrossEntropyOptions")
needs_torch_loss = pytest.mark.skipif(not HAS_TORCH_LOSS, reason="this torch has no chunked linear cross-entropy")


def results(
    kind: str,
    dtype: torch.dtype = torch.float32,
    count: int = 40,
    weights: Tensor | None = None,
    autocast: bool = False,
) -> tuple[Tensor, ...]:
    """Loss, token losses, and the gradients of hidden states and head of 3 x loss."""
    generator = torch.Generator().manual_seed(0)
    head = LMHead(16, 50).to(dtype)
    head.weight.data = torch.randn(50, 16, generator=generator).to(dtype)
    hidden = torch.randn(count, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (count,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, losses = token_loss(head, hidden, targets, weights, kind=kind)
    (3 * loss).backward()
    assert not losses.requires_grad
    return loss, losses, hidden.grad, head.weight.grad


def assert_as_near_as_rounding_lets(kind: str, **options: Any) -> None:
    """In fp32, and the same in float64, whose own error is far below the bound."""
    expected, exact = results("chunked", **options), results("chunked", torch.float64, **options)
    for value, wanted, best in zip(results(kind, **options), expected, exact):
        assert_near(value, wanted, apart(wanted, best))
    torch.testing.assert_close(results(kind, torch.float64, **options), exact)


@needs_torch_loss
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_gives_what_the_chunked_loss_gives(weighted: bool) -> None:
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1)) if weighted else None
    assert_as_near_as_rounding_lets("torch", weights=weights)


@needs_torch_loss
def test_torch_in_half_precision() -> None:
    actual, expected = results("torch", autocast=True), results("chunked", autocast=True)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    for value, wanted, exact in zip(actual, expected, results("chunked", torch.float64)):
        assert_near(value, wanted, apart(wanted, exact))


@needs_torch_loss
def test_no_targets_give_a_loss_of_zero_that_reaches_every_parameter() -> None:
    loss, losses, hidden_grad, head_grad = results("torch", count=0)
    assert loss == 0
    assert losses.shape == (0,)
    assert hidden_grad.shape == (0, 16)
    assert not head_grad.any()


class FakeLiger:
    """What Liger's documentation says its function computes, on the CPU; `calls` collects dtypes and options."""

    calls: list[tuple[Any, ...]] = []

    @staticmethod
    def apply(hidden: Tensor, table: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, None]:
        FakeLiger.calls.append((hidden.dtype, table.dtype, *options))
        return nn.functional.cross_entropy((hidden @ table.T).float(), targets, reduction="none"), None


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the package on the CPU, and its calls."""
    function = ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    function.LigerFusedLinearCrossEntropyFunction = FakeLiger  # type: ignore[attr-defined]
    for module in (ModuleType("liger_kernel"), ModuleType("liger_kernel.ops"), function):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fused_losses, "_LIGER_DEVICES", ("cpu",))
    monkeypatch.setattr(FakeLiger, "calls", [])
    fused_losses._liger_loss.cache_clear()
    yield FakeLiger.calls
    fused_losses._liger_loss.cache_clear()


@pytest.mark.parametrize("kind", ["auto", "liger"])
def test_liger_is_called_as_its_signature_says(liger: list[tuple[Any, ...]], kind: str) -> None:
    for value, wanted, best in zip(results(kind), results("chunked"), results("chunked", torch.float64)):
        assert_near(value, wanted, apart(wanted, best))
    results(kind, autocast=True)
    options = (None, None, -100, 0.0, 0.0, "none", None, False, torch.float32)
    assert liger == [(torch.float32, torch.float32, *options), (torch.bfloat16, torch.bfloat16, *options)]


CANNOT = {
    "a z-loss": ({}, {"z_loss": 0.01}),
    "token weights": ({}, {"weights": torch.ones(5)}),
    "additional token rows": ({"additional": 3}, {}),
}


@pytest.mark.parametrize("feature", CANNOT)
def test_what_liger_cannot_do_is_done_by_the_chunked_loss_or_refused(
    liger: list[tuple[Any, ...]], feature: str
) -> None:
    head_options, loss_options = CANNOT[feature]
    head, hidden, targets = LMHead(6, 11, **head_options), torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)
    token_loss(head, hidden, targets, **loss_options)
    assert not liger
    with pytest.raises(ConfigError, match=f"model.loss is liger, but it has no {feature}, which this run asks for"):
        token_loss(head, hidden, targets, **loss_options, kind="liger")


@pytest.mark.parametrize("feature", ["a z-loss", "additional token rows"])
@needs_torch_loss
def test_what_torch_cannot_do_is_refused(feature: str) -> None:
    head_options, loss_options = CANNOT[feature]
    head, hidden, targets = LMHead(6, 11, **head_options), torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ConfigError, match=f"model.loss is torch, but it has no {feature}"):
        token_loss(head, hidden, targets, **loss_options, kind="torch")


def test_a_loss_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = LMHead(6, 11), torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"but it runs on CUDA and this is cpu: set model\.loss to"):
        token_loss(head, hidden, targets, kind="liger")
    monkeypatch.setattr(fused_losses, "_LIGER_DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match="but the package liger-kernel is not installed"):
        token_loss(head, hidden, targets, kind="liger")
    assert token_loss(head, hidden, targets)[0].isfinite()  # auto takes the chunked loss
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(ConfigError, match=r"model.loss is torch, but torch 2\..* has no such loss"):
        token_loss(head, hidden, targets, kind="torch")


def test_a_head_that_an_adapter_replaced_takes_no_other_loss() -> None:
    head, hidden, targets = nn.Linear(6, 11, bias=False), torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"model\.loss is torch, but the head is a Linear"):
        token_loss(head, hidden, targets, kind="torch")


def batch() -> PackedBatch:
    return packed_batch([torch.arange(5, 15)])


@needs_torch_loss
def test_the_model_uses_the_loss_of_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3()))
    chunked = model(batch()).loss
    calls: list[int] = []
    own = fused_losses._LOSSES["torch"]
    monkeypatch.setitem(fused_losses._LOSSES, "torch", lambda: calls.append(1) or own())
    model.loss_kind = "torch"
    torch.testing.assert_close(model(batch()).loss, chunked)
    assert calls


DIGITS = ["experiment=digits_pretrain"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.loss=fast"], "model.loss is 'fast', but must be one of auto, chunked, torch, liger"),
        (["model.loss=torch", "model.z_loss=0.1"], "model.loss is torch, which has no z-loss, but model.z_loss is 0.1"),
        (
            ["model.loss=torch", "adapter=lora", "adapter.targets={lm_head: [lm_head]}"],
            "needs the plain head, but adapter.targets names lm_head",
        ),
    ],
)
def test_the_configuration_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([*DIGITS, *overrides])


def test_the_key_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config([*DIGITS, "model.loss=chunked"])
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3()))
    monkeypatch.setattr(build, "_fresh_model", lambda *_: model)
    monkeypatch.setattr(build, "generation_config", lambda *_: {}, raising=False)
    processor = type("Processor", (), {"tokenizer": range(10), "image_token_id": 90})
    assert build.build_model(config, processor).loss_kind == "chunked"
