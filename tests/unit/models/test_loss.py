"""The chunked loss against logits of everything at once."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m4train.models import loss as loss_module
from m4train.models.loss import LMHead, token_loss


def whole(
    head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ head.weight.T
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    total = losses + z_loss * logits.logsumexp(-1) ** 2
    return (total * (1 if weights is None else weights)).sum(), losses


class Adapted(nn.Module):
    """Stands for what an adapter makes of the head: another module around it, or in its place."""

    def __init__(self, head: LMHead) -> None:
        super().__init__()
        self.weight = head.weight
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden @ self.weight.T


@settings(max_examples=40)
@given(
    count=st.integers(0, 40),
    rows=st.integers(1, 50),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.01]),
    adapted=st.booleans(),
)
def test_equals_the_loss_of_whole_logits(count: int, rows: int, weighted: bool, z_loss: float, adapted: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    head = LMHead(6, 11).double()
    hidden = torch.randn(count, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (count,), generator=generator)
    weights = torch.rand(count, generator=generator) if weighted else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", rows * 11)
        loss, losses = token_loss(Adapted(head) if adapted else head, hidden, targets, weights, z_loss)
        (3 * loss).backward()
    actual = (hidden.grad.clone(), head.weight.grad.clone())
    hidden.grad = head.weight.grad = None
    expected, expected_losses = whole(head, hidden, targets, weights, z_loss)
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(actual, (hidden.grad, head.weight.grad))


def test_an_adapted_head_is_called_equally_often_on_every_rank() -> None:
    calls = []
    for count in (0, 3, 1000):
        head = Adapted(LMHead(6, 11))
        token_loss(head, torch.randn(count, 6), torch.zeros(count, dtype=torch.int64))
        calls.append(head.calls)
    assert len(set(calls)) == 1


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", 100 * 50)
    largest = 0
    chunk = loss_module._chunk

    def watched(logits: Tensor, *rest: Tensor) -> object:
        nonlocal largest
        largest = max(largest, logits.numel())
        return chunk(logits, *rest)

    monkeypatch.setattr(loss_module, "_chunk", watched)
    token_loss(LMHead(8, 50), torch.randn(1000, 8), torch.zeros(1000, dtype=torch.int64))
    assert 0 < largest <= 100 * 50


def test_logits_of_a_chunk_are_gone_before_those_of_the_next_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", 10 * 50)
    made: list[weakref.ref] = []
    held: list[int] = []
    product, chunk = loss_module.product, loss_module._chunk

    def multiplied(left: Tensor, right: Tensor) -> Tensor:
        held.append(sum(logits() is not None for logits in made))
        return product(left, right)

    def watched(logits: Tensor, *rest: Tensor) -> object:
        made.append(weakref.ref(logits.untyped_storage()))
        return chunk(logits, *rest)

    monkeypatch.setattr(loss_module, "product", multiplied)
    monkeypatch.setattr(loss_module, "_chunk", watched)
    hidden = torch.randn(30, 8, requires_grad=True)
    token_loss(LMHead(8, 50), hidden, torch.zeros(30, dtype=torch.int64))
    assert held == [0, 1] * 3  # logits, then the gradient of the hidden states from them


def test_no_gradient_work_for_what_needs_none() -> None:
    head = LMHead(6, 11).requires_grad_(False)
    hidden = torch.randn(5, 6, requires_grad=True)
    loss, _ = token_loss(head, hidden, torch.zeros(5, dtype=torch.int64))
    loss.backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    with torch.no_grad():
        loss, _ = token_loss(head, hidden, torch.zeros(5, dtype=torch.int64))
    assert not loss.requires_grad


def test_half_precision_sums_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    head, hidden = LMHead(16, 40), torch.randn(4000, 16, generator=generator)
    targets = torch.randint(0, 40, (4000,), generator=generator)
    exact, each = whole(head, hidden, targets, None, 0.0)
    head, hidden = head.bfloat16(), hidden.bfloat16()
    loss, losses = token_loss(head, hidden, targets)
    assert loss.dtype == losses.dtype == torch.float32
    logits = (hidden @ head.weight.T).float()
    reference = nn.functional.cross_entropy(logits, targets, reduction="none")
    # Where no sum is rounded, the errors of the tokens are all there is, and partly cancel.
    assert abs(loss - exact) < (reference - each).abs().sum()
    assert abs(losses.sum() - exact) < (reference - each).abs().sum()
