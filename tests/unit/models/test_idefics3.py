"""The packed door of Idefics3: packing changes nothing, images go through the tower once, images unused give zero gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m4train.errors import ConfigError, DataError
from m4train.models import Idefics3Config, Idefics3ForConditionalGeneration
from m4train.models.idefics3 import pixel_shuffle
from tests.helpers.models import document, packed_batch, perturb, tiny_idefics3


def model_of(dtype: torch.dtype = torch.float64, **changes: Any) -> Idefics3ForConditionalGeneration:
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3(**changes)))
    perturb(model)
    return model.to(dtype)


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_token_losses_and_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = packed_batch([document(generator, 12), document(generator, 7)])
    model = model_of()
    plain = model(batch, return_logits=True)
    expected = torch.nn.functional.cross_entropy(plain.logits[batch.loss_positions], batch.targets, reduction="none")
    torch.testing.assert_close(plain.token_losses, expected)
    assert not plain.token_losses.requires_grad
    weights = torch.rand(batch.loss_tokens, generator=generator)
    weighted = model(replace(batch, target_weights=weights))
    torch.testing.assert_close(weighted.loss, (expected * weights).sum())
    torch.testing.assert_close(weighted.token_losses, expected)


@pytest.mark.parametrize("count", [1, 3])
def test_image_count_must_match(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = packed_batch([document(generator, 9, 2)], torch.randn(3, 3, 16, 16), count)
    with pytest.raises(DataError, match=rf"8 image positions, but its {count} images give {4 * count}"):
        model_of(torch.float32)(batch)


def test_frames_of_another_size_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = packed_batch([document(generator, 9, 1)], torch.randn(1, 3, 20, 20), 1)
    with pytest.raises(DataError, match=r"\(3, 20, 20\).*\(3, 16, 16\)"):
        model_of(torch.float32)(batch)


def test_image_counts_are_checked_per_sample() -> None:
    model = model_of(torch.float32)
    image = [90] * 4
    ids = torch.tensor([[5, *image, 6, 7, 8, 9, 10], [5, *image, *image, 6]])
    pixels = torch.randn(2, 2, 3, 16, 16)
    pixels[1, 1] = 0
    with pytest.raises(DataError, match="sample 0 of the batch holds 4 image tokens, but its 2 images give 8"):
        model(ids, pixel_values=pixels)


def test_the_padded_loss_leaves_out_minus_100_and_nothing_else() -> None:
    """As in transformers: labels of image tokens and padding count too, and without any label the loss is not a number."""
    model = model_of(torch.float32)
    ids = torch.tensor([[5, 90, 90, 90, 90, 6, 7, 8, 0, 0]])
    mask = (ids != 0).long()
    pixels = torch.randn(1, 1, 3, 16, 16)
    for labels in (ids, ids.masked_fill((ids == 90) | (mask == 0), -100)):
        output = model(ids, mask, pixel_values=pixels, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:], ignore_index=-100)
        torch.testing.assert_close(output.loss, expected)
    nothing = model(ids, mask, pixel_values=pixels, labels=torch.full_like(ids, -100)).loss
    assert nothing.isnan()


def test_pixel_shuffle_order() -> None:
    grid = torch.arange(36.0).view(1, 36, 1)
    shuffled = pixel_shuffle(grid, 3)
    assert shuffled.shape == (1, 4, 9)
    for row in range(2):
        for column in range(2):
            expected = [(3 * row + dy) * 6 + 3 * column + dx for dy in range(3) for dx in range(3)]
            assert shuffled[0, 2 * row + column].tolist() == expected


def test_a_factor_that_does_not_divide_the_grid() -> None:
    with pytest.raises(ConfigError, match="4 patches per side, which scale_factor 3 does not divide"):
        pixel_shuffle(torch.zeros(1, 16, 2), 3)


def test_initialisation_is_reproducible_and_follows_the_table() -> None:
    config = Idefics3Config.from_dict(tiny_idefics3(text_config={"hidden_size": 128, "vocab_size": 997}))
    models = [Idefics3ForConditionalGeneration(config) for _ in range(2)]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(3))
    first, second = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert abs(first["model.text_model.embed_tokens.weight"].std().item() * 128**0.5 - 1) < 0.05
    assert abs(first["model.connector.modality_projection.proj.weight"].std().item() - (0.4 / 128) ** 0.5) < 0.003
    assert abs(first["lm_head.weight"].std().item() - 0.02) < 0.001
    assert bool((first["model.text_model.norm.weight"] == 1).all())
    assert not first["model.vision_model.encoder.layers.0.mlp.fc1.bias"].any()


def test_flops_count_segments_not_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    model = model_of(torch.float32)
    frames = torch.randn(2, 3, 16, 16, generator=generator)
    halves = packed_batch([document(generator, 30), document(generator, 30)], frames, 0)
    whole = packed_batch([document(generator, 60)], frames, 0)
    assert model.flops(halves)["text"] < model.flops(whole)["text"]
    assert model.flops(halves)["vision"] == model.flops(whole)["vision"] > 0
