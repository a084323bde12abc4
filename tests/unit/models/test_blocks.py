"""Blocks can be recomputed in the backward pass and compiled one by one."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch.utils.checkpoint import checkpoint

from tests.helpers.models import SHALLOW
from tests.unit.models.test_packing import FAMILIES, documents_of, flat_gradient, make


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_every_block_changes_no_gradient(family: str) -> None:
    model, build, per_image = make(family)
    batch = build(documents_of([(9, 1), (14, 2)], per_image))
    model(batch).loss.backward()
    expected = flat_gradient(model)
    model.zero_grad()
    runs: list[str] = []
    for part, blocks in model.blocks().items():
        for block in blocks:
            forward = block.forward

            def counted(*args: object, part: str = part, forward: object = forward) -> object:
                runs.append(part)
                return forward(*args)  # type: ignore[operator]

            block.forward = lambda *args, counted=counted: checkpoint(counted, *args, use_reentrant=False)
    model(batch).loss.backward()
    torch.testing.assert_close(flat_gradient(model), expected)
    assert len(runs) == 2 * sum(len(blocks) for blocks in model.blocks().values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.full if name == "idefics2" else ()) for name in FAMILIES]
)
def test_compiled_blocks_give_the_same(family: str) -> None:
    """One graph serves batches of any length; only the first batches compile anything."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, build, per_image = make(family, **SHALLOW[family])
    sizes = [[(9, 1), (14, 2)], [(20, 1), (5, 1), (31, 3)], [(40, 2), (18, 1)], [(7, 1), (8, 1), (9, 1), (50, 2)]]
    batches = [build(documents_of(size, per_image)) for size in sizes]
    expected = []
    for batch in batches:
        model.zero_grad()
        loss = model(batch).loss
        loss.backward()
        expected.append((loss.detach(), flat_gradient(model)))
    for blocks in model.blocks().values():
        for block in blocks:
            block.compile(backend="aot_eager", dynamic=True)
    graphs = []
    for batch, (loss, gradient) in zip(batches, expected):
        model.zero_grad()
        actual = model(batch).loss
        actual.backward()
        torch.testing.assert_close(actual.detach(), loss)
        torch.testing.assert_close(flat_gradient(model), gradient)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]
