import pytest
import torch

from m4train.errors import TrainingError
from m4train.training.metrics import StepSums
from tests.helpers.training import SOURCES, join, make_pack


def _vector(batches, sources=SOURCES):
    sums = StepSums(sources, torch.device("cpu"))
    for batch in batches:
        sums.add(batch, torch.arange(batch.loss_tokens, dtype=torch.float32) * 0 + 2.0 + batch.target_sources)
    return sums, sums.vector()


def test_sums_over_ranks_equal_those_of_one_rank():
    packs = [make_pack(n)[0] for n in range(8)]
    sums, whole = _vector([join(packs)])
    parts = _vector([join(packs[:3])])[1] + _vector([join(packs[3:]), join([])])[1]
    assert sums.read(whole.tolist()) == pytest.approx(sums.read(parts.tolist()))


def test_metrics_per_source_and_hash():
    packs = [make_pack(n)[0] for n in range(6)]
    sums, vector = _vector([join(packs)])
    metrics = sums.read(vector.tolist())
    assert metrics["loss/web"] == pytest.approx(2.0)
    assert metrics["loss/chat"] == pytest.approx(3.0)
    assert metrics["loss_tokens"] == metrics["loss_tokens/web"] + metrics["loss_tokens/chat"]
    assert metrics["images"] == 2 * (0 + 1 + 3)
    assert metrics["data_hash"] == f"{sum(p.data_hash for p in packs) % 2**64:016x}"
    assert metrics["padding_fraction"] == pytest.approx(1 - metrics["tokens"] / (6 * 32))


def test_an_unknown_source_is_an_error():
    with pytest.raises(TrainingError, match="chat"):
        _vector([join([make_pack(1)[0]])], sources=("web",))
