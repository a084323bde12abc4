from dataclasses import replace

import pytest
import torch

from m4train.config import BatchRampConfig
from m4train.data.plan.plan import packs_at
from m4train.training.engines.single import SingleEngine
from m4train.training.loss_weights import LossWeights
from m4train.training.step import run_micro_batches
from tests.helpers.training import TinyModel, join, make_config, make_pack, make_trainer, read_metrics

PACKS = [make_pack(n)[0] for n in range(4)]  # sources: web, chat, web, chat


def _gradients(weights, batches, tmp_path):
    engine = SingleEngine(make_config(tmp_path))
    model = TinyModel()
    engine.prepare(model)
    total = weights.total(weights.counts(batches))
    run_micro_batches(engine, batches, total, 0.0, None, weights.weighted)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_objective_is_the_weighted_mean(tmp_path):
    got = _gradients(LossWeights({"web": 0.5, "chat": 3.0}), [join(PACKS[:3]), join(PACKS[3:])], tmp_path)
    model = TinyModel()
    losses = [(0.5 if p.documents[0].source == "web" else 3.0, p.loss_tokens, model(p).loss) for p in PACKS]
    (sum(w * loss for w, _, loss in losses) / sum(w * n for w, n, _ in losses)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_equal_weights_are_none(tmp_path):
    weights = LossWeights({"web": 2.0, "chat": 2.0})
    assert weights.weighted(PACKS[0]) is PACKS[0]
    assert weights.total(weights.counts(PACKS)) == sum(p.loss_tokens for p in PACKS)
    assert weights.total(weights.counts([])) == 1.0


def test_logged_losses_stay_unweighted(tmp_path):
    lines = []
    for name, weight in (("plain", 1.0), ("weighted", 5.0)):
        config = make_config(tmp_path / name, max_steps=2)
        config.data.sources["chat"].loss_weight = weight
        make_trainer(config, TinyModel()).train()
        lines.append(read_metrics(tmp_path / name))
    first = ("loss", "loss/web", "loss/chat")
    assert [lines[0][0][key] for key in first] == [lines[1][0][key] for key in first]
    assert lines[0][0]["grad_norm"] != lines[1][0]["grad_norm"]
    assert lines[0][1]["loss/chat"] > lines[1][1]["loss/chat"], "a larger weight learns faster"


def test_a_ramp_depends_on_the_step_alone():
    ramp = BatchRampConfig(start=2, increment=3, steps=4)
    assert [packs_at(step, 7, ramp) for step in range(1, 13)] == [2] * 4 + [5] * 4 + [7] * 4
    assert packs_at(1, 7, BatchRampConfig()) == 7


@pytest.mark.parametrize("pieces", [[6], [1, 2, 4]])
def test_a_ramp_goes_on_where_it_stopped(pieces, tmp_path):
    """Stopped in the middle of a window and at its border; two micro-batches in some steps, one in others."""

    def run(name, stop_after=None):
        config = make_config(tmp_path / name, micro_batch_size=3, stop_after=stop_after)
        config.trainer.batch_ramp = BatchRampConfig(start=2, increment=3, steps=4)
        make_trainer(config, TinyModel(), packs=7).train()
        return read_metrics(tmp_path / name)

    whole = run("whole")
    for steps in pieces:
        run("broken", steps)
    broken = run("broken")
    keys = ("step", "loss", "grad_norm", "data_hash", "loss_tokens")
    assert [[line[key] for key in keys] for line in whole] == [[line[key] for key in keys] for line in broken]
    expected = [sum(make_pack(n)[0].tokens for n in numbers) for numbers in (range(2), range(2, 4), range(4, 6))]
    assert [line["tokens"] for line in whole[:3]] == expected
    assert whole[4]["tokens"] == sum(make_pack(n)[0].tokens for n in range(8, 13))


@pytest.mark.parametrize("sources", [{"web": 1.0, "chat": 1.0}, {"web": 0.5, "chat": 3.0}])
def test_weights_of_answers_count_in_the_objective(tmp_path, sources):
    """Half of the targets of one pack at a quarter, the others as they are."""
    given = torch.ones(PACKS[1].loss_tokens)
    given[::2] = 0.25
    record = replace(PACKS[1].documents[0], loss_weight=float(given.sum()))
    half = replace(PACKS[1], target_weights=given, documents=(record, *PACKS[1].documents[1:]))
    got = _gradients(LossWeights(sources), [PACKS[0], half], tmp_path)
    model = TinyModel()
    of = [sources[p.documents[0].source] for p in (PACKS[0], half)]
    summed = of[0] * model(PACKS[0]).loss + of[1] * model(half).loss
    (summed / (of[0] * PACKS[0].loss_tokens + of[1] * given.sum())).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
