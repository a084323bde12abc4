"""The loss of a step does not depend on how its packs are split."""

import pytest
import torch

from m4train.errors import TrainingError
from m4train.training.engines.single import SingleEngine
from m4train.training.metrics import StepSums
from m4train.training.step import SkipCounter, reseed, run_micro_batches
from tests.helpers.training import SOURCES, TinyModel, join, make_config, make_pack


def _gradients(splits, tmp_path, dtype=torch.float64, **trainer):
    packs = [make_pack(n)[0] for n in range(8)]
    engine = SingleEngine(make_config(tmp_path, **trainer), "cpu")
    model = TinyModel()
    engine.prepare(model)
    model.to(dtype)
    micro_batches = [join(packs[start:stop]) for start, stop in splits]
    tokens = sum(batch.loss_tokens for batch in micro_batches)
    sums = StepSums(SOURCES, engine.device)
    run_micro_batches(engine, micro_batches, tokens, 0.0, sums)
    loss = sums.read(sums.vector().tolist())["loss"]
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_loss_and_gradients_do_not_depend_on_the_split(size, tmp_path):
    loss, gradients = _gradients([(0, 8)], tmp_path)
    splits = [(start, min(8, start + size)) for start in range(0, 8, size)]
    again, split_gradients = _gradients(splits, tmp_path)
    assert again == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(split_gradients[name], gradient, rtol=1e-6, atol=1e-9)


def test_an_empty_micro_batch_changes_nothing(tmp_path):
    loss, gradients = _gradients([(0, 8)], tmp_path)
    again, with_empty = _gradients([(0, 8), (0, 0)], tmp_path)
    assert again == loss
    assert all(torch.equal(gradients[name], with_empty[name]) for name in gradients)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    _, gradients = _gradients([(0, 8)], tmp_path, torch.float32)
    _, recomputed = _gradients([(0, 8)], tmp_path, torch.float32, gradient_checkpointing=True)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_gradient_checkpointing_recomputes_every_block(tmp_path):
    engine = SingleEngine(make_config(tmp_path, gradient_checkpointing=True), "cpu")
    model, calls = TinyModel(), []
    for block in [*model.layers, *model.vision.layers]:
        block.norm.register_forward_hook(lambda *_: calls.append(1))
    engine.prepare(model)
    run_micro_batches(engine, [join([make_pack(1)[0]])], 1, 0.0, None)
    assert len(calls) == 8


def test_bf16_computes_in_bf16_and_stores_fp32(tmp_path):
    engine = SingleEngine(make_config(tmp_path, precision="bf16"), "cpu")
    model, seen = TinyModel().to(torch.bfloat16), []
    model.layers[0].up_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    engine.prepare(model)
    run_micro_batches(engine, [join([make_pack(1)[0]])], 1, 0.0, None)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_clipping_scales_to_the_norm_and_reports_it_per_part(tmp_path):
    engine = SingleEngine(make_config(tmp_path), "cpu")
    model = TinyModel()
    engine.prepare(model)
    run_micro_batches(engine, [join([make_pack(1)[0]])], 1, 0.0, None)
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    clipped = []
    engine.optimizer.step = lambda: clipped.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    norms = engine.update(1.0, 0.5)
    assert norms.total == pytest.approx(expected.item(), rel=1e-5)
    assert norms.by_part.square().sum().sqrt() == pytest.approx(norms.total.item(), rel=1e-5)
    assert clipped[0] == pytest.approx(0.5, rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    engine = SingleEngine(make_config(tmp_path), "cpu")
    model, skips = TinyModel(), SkipCounter(torch.device("cpu"))
    engine.prepare(model)
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    run_micro_batches(engine, [join([make_pack(1)[0]])], 1, 0.0, None)
    model.norm.weight.grad[0] = float("inf")
    skips.update(engine.update(1.0, 1.0).skipped)
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.tensors().items())
    assert skips.read() == (1, 1)
    run_micro_batches(engine, [join([make_pack(1)[0]])], 1, 0.0, None)
    skips.update(engine.update(1.0, 1.0).skipped)
    assert skips.read() == (1, 1)
    assert not torch.equal(before["parameter/norm.weight"], model.norm.weight)


def test_draws_are_keyed_by_seed_step_and_rank():
    draws = set()
    for key in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]:
        reseed(*key)
        first = torch.rand(1).item()
        reseed(*key)
        assert torch.rand(1).item() == first
        draws.add(first)
    assert len(draws) == 4


def test_a_step_without_micro_batches_is_an_error(tmp_path):
    engine = SingleEngine(make_config(tmp_path), "cpu")
    engine.prepare(TinyModel())
    with pytest.raises(TrainingError, match="no micro-batch"):
        run_micro_batches(engine, [], 1, 0.0, None)


def test_a_frozen_bf16_part_is_computed_in_fp32_where_all_else_is(tmp_path):
    engine = SingleEngine(make_config(tmp_path, precision="fp32"), "cpu")
    model = TinyModel().to(torch.bfloat16)
    model.layers.requires_grad_(False)
    engine.prepare(model)
    run_micro_batches(engine, [join([make_pack(1)[0]])], 1, 0.0, None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
