"""The segments contexts make on the device: their two forms, lengths and running sums, say the same."""

from __future__ import annotations

import pytest
import torch

from m4train.batch import CrossSegments, Segments
from m4train.models.contexts import CrossContext, KeyValueCache
from m4train.models.resampler import LatentContext, interleave


def assert_consistent(segments: Segments) -> None:
    expected = Segments.of(segments.lengths).cu_seqlens
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.cu_seqlens.tolist() == expected.tolist()


@pytest.mark.parametrize(("count", "length"), [(0, 4), (1, 1), (3, 5)])
def test_uniform_segments(count: int, length: int) -> None:
    segments = Segments.uniform(count, length, torch.device("cpu"))
    assert segments.lengths == (length,) * count
    assert_consistent(segments)


@pytest.mark.parametrize("lengths", [[3], [2, 7, 1], [40, 3, 90, 5]])
def test_latents_stand_behind_the_patches_of_their_image(lengths: list[int]) -> None:
    context = LatentContext(Segments.of(lengths), 2)
    assert context.keys.lengths == tuple(n + 2 for n in lengths)
    assert_consistent(context.keys)
    assert_consistent(context.queries)
    patches = torch.cat([torch.full((n, 1), float(i)) for i, n in enumerate(lengths)])
    latents = torch.arange(len(lengths)).repeat_interleave(2)[:, None] + 0.5
    found = interleave(patches, latents, context.slots).flatten().tolist()
    assert found == [value for i, n in enumerate(lengths) for value in [float(i)] * n + [i + 0.5] * 2]


def test_keys_of_cross_attention() -> None:
    context = CrossContext(CrossSegments.of([2, 3, 4], [[0], [], [1, 0]]), 5)
    assert context.keys.lengths == (5, 10)
    assert_consistent(context.keys)
    assert_consistent(context.queries)


def test_a_cache_grows_and_keeps_what_it_holds() -> None:
    cache = KeyValueCache()
    generator = torch.Generator().manual_seed(0)
    written = []
    for step in range(5):
        cache.extend(torch.ones(2, 1))
        new = torch.randn(2, 3, 4, generator=generator)
        cache.write(0, torch.arange(2), torch.full((2,), step), new, -new)
        written.append(new)
    keys, values = cache[0]
    assert torch.equal(keys, torch.stack(written, dim=2))
    assert torch.equal(values, -keys)
    cache.select(torch.tensor([1, 1, 0]))
    assert torch.equal(cache[0][0], keys[[1, 1, 0]])
    assert (cache.length, len(cache), list(map(len, cache))) == (5, 1, [2])
