"""Attention on CUDA: the kernel for segments of any length against attention written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m4train.batch import Segments
from m4train.models.attention import attention
from tests.gpu.device import DEVICE, ON_A_GPU
from tests.helpers.rounding import apart, assert_near
from tests.unit.models.test_attention import written_out

pytestmark = ON_A_GPU


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((4, 2), 64), ((16, 16), 72), ((9, 3), 64), ((16, 4), 96), ((4, 4), 128)]
)
def test_variable_length_kernels(causal: bool, window: int | None, heads: tuple[int, int], head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q_lengths = [3, 200, 1, 70]
    k_lengths = q_lengths if causal else [50, 9, 130, 70]

    def draw(total: int, count: int) -> Tensor:
        return torch.randn(total, count, head_dim, generator=generator).bfloat16()

    inputs = [draw(sum(q_lengths), heads[0]), draw(sum(k_lengths), heads[1]), draw(sum(k_lengths), heads[1])]
    exact = [x.double().requires_grad_() for x in inputs]
    expected = written_out(*exact, q_lengths, k_lengths, causal, window if causal else None)
    expected.square().sum().backward()
    actual = [x.to(DEVICE).requires_grad_() for x in inputs]
    segments = Segments.of(q_lengths, DEVICE), Segments.of(k_lengths, DEVICE)
    out = attention(*actual, *segments, causal=causal, window=window)
    out.float().square().sum().backward()
    # The same written out in bf16 says how far that type is off.
    half = [x.detach().clone().requires_grad_() for x in inputs]
    reference = written_out(*half, q_lengths, k_lengths, causal, window if causal else None)
    reference.float().square().sum().backward()
    assert_near(out.cpu(), expected, apart(reference, expected))
    for mine, other, best in zip(actual, half, exact):
        assert_near(mine.grad.cpu(), best.grad, apart(other.grad, best.grad))


@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_gives_what_a_call_a_segment_gives(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 200, 1, 70]
    inputs = [torch.randn(sum(lengths), heads, 64, generator=generator).bfloat16().to(DEVICE) for heads in (8, 2, 2)]
    segments = Segments.of(lengths, DEVICE)
    fused = attention(*inputs, segments, segments, causal=causal)
    monkeypatch.setattr("m4train.models.attention._fits_varlen", lambda _: False)
    monkeypatch.setattr("m4train.models.attention._SHORT", 0)
    exact = written_out(*(x.cpu().double() for x in inputs), lengths, lengths, causal, None)
    apiece = attention(*inputs, segments, segments, causal=causal)
    assert_near(fused.cpu(), apiece.cpu(), apart(apiece.cpu(), exact))
