"""The attention operator against softmax written out, whichever of its paths is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m4train.batch import Segments
from m4train.models.attention import attention


def written_out(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int], causal: bool, window: int | None
) -> Tensor:
    """One segment, one head at a time."""
    group, outputs = q.shape[1] // k.shape[1], []
    for qs, ks, vs in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths)):
        heads = []
        for head in range(q.shape[1]):
            scores = qs[:, head] @ ks[:, head // group].T / q.shape[2] ** 0.5
            rows, columns = torch.meshgrid(torch.arange(len(qs)), torch.arange(len(ks)), indexing="ij")
            hidden = torch.zeros_like(scores, dtype=torch.bool)
            if causal:
                hidden |= columns > rows
                if window is not None:
                    hidden |= columns <= rows - window
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ vs[:, head // group])
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 45), st.integers(1, 45)), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    head_dim=st.sampled_from([2, 5, 8]),
    window=st.sampled_from([None, 1, 3, 17]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_softmax_written_out(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    causal: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q_lengths = [a for a, _ in lengths]
    k_lengths = q_lengths if causal else [b for _, b in lengths]

    def draw(total: int, count: int) -> Tensor:
        return torch.randn(total, count, head_dim, generator=generator, dtype=torch.float64)

    q, k, v = draw(sum(q_lengths), heads[0]), draw(sum(k_lengths), heads[1]), draw(sum(k_lengths), heads[1])
    out = attention(q, k, v, Segments.of(q_lengths), Segments.of(k_lengths), causal=causal, window=window)
    expected = written_out(q, k, v, q_lengths, k_lengths, causal, window if causal else None)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 9, 1], [40, 3, 70]])
def test_a_segment_does_not_see_another(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(total, 2, 4, generator=generator, requires_grad=True) for _ in range(3))
    segments = Segments.of(lengths)
    out = attention(q, k, v, segments, segments, causal=True)
    out[: lengths[0]].sum().backward()
    for x in (q, k, v):
        assert not x.grad[lengths[0] :].any()
        assert x.grad[: lengths[0]].any()


def test_training_after_an_evaluation_in_inference_mode() -> None:
    segments = Segments.of([5, 11, 2])
    q, k, v = (torch.randn(18, 2, 4, requires_grad=True) for _ in range(3))
    with torch.inference_mode():
        attention(q, k, v, segments, segments, causal=True)
    attention(q, k, v, segments, segments, causal=True).sum().backward()
    assert q.grad is not None
