import pytest
import torch

from m4train.batch import PackedImages, Segments
from m4train.training.naming import canonical_parameters
from m4train.training.worst_batch import _filled, worst_batch
from tests.helpers.training import IDEFICS3, TinyModel, join, make_config, make_pack, make_trainer


def test_the_batch_reaches_both_budgets_and_can_be_run():
    batch = join([make_pack(n)[0] for n in range(3)])
    worst = worst_batch(batch, tokens=200, frames=9)
    assert worst.tokens == worst.segments.total == 200
    assert worst.images.pixels.shape[0] == 9
    assert worst.images.count == batch.images.count
    assert worst.loss_tokens == batch.loss_tokens + 200 - batch.tokens - 1
    assert worst.loss_positions.max() == 198
    output = TinyModel()(worst)
    torch.testing.assert_close(output.token_losses[: batch.loss_tokens], TinyModel()(batch).token_losses)


def test_a_batch_over_the_budgets_keeps_what_it_has():
    batch = join([make_pack(n)[0] for n in range(3)])
    worst = worst_batch(batch, tokens=1, frames=1)
    assert torch.equal(worst.input_ids, batch.input_ids)
    assert torch.equal(worst.images.pixels, batch.images.pixels)


def test_packed_patches_are_repeated_image_by_image():
    images = PackedImages(
        torch.arange(5.0).reshape(5, 1, 1, 1), 2, None, Segments.of([2, 3]), torch.tensor([0, 1, 0, 1, 2])
    )
    filled = _filled(images, 5)
    assert filled.patches.lengths == (2, 3) * 3
    assert filled.pixels.flatten().tolist() == [0, 1, 2, 3, 4] * 3
    assert filled.patch_position_ids.tolist() == [0, 1, 0, 1, 2] * 3
    assert filled.count == 2


@pytest.mark.parametrize("tied", [False, True])
def test_idefics3_runs_its_worst_batch(tied):
    from m4train.models import Idefics3Config, Idefics3ForConditionalGeneration
    from tests.helpers.models import tiny_idefics3

    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3(tie_word_embeddings=tied)))
    batch = join([make_pack(n, 0, IDEFICS3)[0] for n in range(3)], IDEFICS3)
    assert torch.isfinite(model(worst_batch(batch, 300, 12)).loss)


def test_the_first_step_sees_the_budgets_and_changes_nothing(tmp_path):
    """The model is called once more than it has micro-batches, at full size, and the run stays the same."""
    finals = []
    for first in (True, False):
        config = make_config(tmp_path / str(first), max_steps=3, worst_batch_first=first)
        config.data.sequence_length, config.data.images_per_pack = 50, 4
        model, seen = TinyModel(dropout=0.1), []
        model.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        trainer = make_trainer(config, model)
        result = trainer.train()
        assert result.metrics["skipped_steps"] == 0
        finals.append([p.detach().clone() for p in canonical_parameters(model).values()])
        if first:
            assert seen[0].tokens == 50 * config.trainer.micro_batch_size
            assert seen[0].images.pixels.shape[0] == 4 * config.trainer.micro_batch_size
        calls = len(seen)
        assert calls == 3 * 1 + int(first)
    assert all(torch.equal(a, b) for a, b in zip(*finals))
