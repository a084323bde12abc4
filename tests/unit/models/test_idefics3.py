"""The packed door of Idefics3: packing changes nothing, images go through the tower once, images unused give zero gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m4train.batch import PackedBatch, PackedImages
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


@pytest.mark.parametrize("lengths", [(9, 9, 9), (5, 30, 12), (1, 2, 40), (300, 7, 150)])
def test_packing_changes_neither_loss_nor_gradient(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = (1, 0, 2)
    documents = [document(generator, n, k) for n, k in zip(lengths, counts)]
    frames = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    model = model_of()
    packed = model(packed_batch(documents, frames, 3), z_loss=0.01)
    packed.loss.backward()
    together = flat_gradient(model)
    model.zero_grad()
    losses, start = [], 0
    for ids, count in zip(documents, counts):
        own = frames[start : start + count] if count else frames[:1]
        output = model(packed_batch([ids], own, count), z_loss=0.01)
        output.loss.backward()
        losses.append(output.loss.detach())
        start += count
    assert abs(sum(losses) - packed.loss) / packed.loss < 1e-6
    assert torch.cosine_similarity(together, flat_gradient(model), dim=0) > 0.999999


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


def test_all_frames_in_one_call() -> None:
    generator = torch.Generator().manual_seed(0)
    model = model_of(torch.float32)
    calls: list[tuple[int, ...]] = []
    model.model.vision_model.register_forward_hook(lambda _, inputs, __: calls.append(tuple(inputs[0].shape)))
    documents = [document(generator, 40, 32), document(generator, 40, 32)]
    model(packed_batch(documents, torch.randn(64, 3, 16, 16, generator=generator), 64))
    assert calls == [(64 * 16, 3, 4, 4)]


def test_unused_frame_gives_zero_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    model = model_of(torch.float32)
    batch = packed_batch([document(generator, 12)], torch.randn(1, 3, 16, 16, generator=generator), 0)
    model(batch).loss.backward()
    parts = model.parts()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(parts["vision"] + parts["connector"]):
            assert not parameter.grad.any(), name
    assert model.lm_head.weight.grad.any()


def test_no_loss_tokens_still_reach_every_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    model = model_of(torch.float32)
    batch = packed_batch([document(generator, 5, 1)], torch.randn(1, 3, 16, 16, generator=generator), 1)
    empty = torch.empty(0, dtype=torch.int64)
    output = model(replace(batch, loss_positions=empty, targets=empty))
    output.loss.backward()
    assert output.loss.item() == 0
    assert output.token_losses.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_bytes_and_table_give_the_normalised_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    table = torch.randn(3, 256, generator=generator)
    floats = torch.stack([table[c][pixels[:, c].long()] for c in range(3)], dim=1)
    model = model_of(torch.float32)
    batch = packed_batch([document(generator, 9, 2)], pixels, 2, pixel_table=table)
    plain = replace(batch, images=PackedImages(floats, 2))
    assert torch.equal(model(batch).loss, model(plain).loss)


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


def test_ids_beyond_the_embedding_are_refused() -> None:
    with pytest.raises(DataError, match="holds the id 97, but the embedding has 97 rows"):
        model_of(torch.float32)(torch.tensor([[1, 97]]))


def test_pixel_shuffle_order() -> None:
    grid = torch.arange(36.0).view(1, 36, 1)
    shuffled = pixel_shuffle(grid, 3)
    assert shuffled.shape == (1, 4, 9)
    for row in range(2):
        for column in range(2):
            expected = [(3 * row + dy) * 6 + 3 * column + dx for dy in range(3) for dx in range(3)]
            assert shuffled[0, 2 * row + column].tolist() == expected


def test_a_factor_that_does_not_divide_the_grid() -> None:
    with pytest.raises(ConfigError, match="4 patches a side, which scale_factor 3 does not divide"):
        pixel_shuffle(torch.zeros(1, 16, 2), 3)


def test_every_parameter_is_in_one_part() -> None:
    for tied in (False, True):
        model = model_of(tie_word_embeddings=tied)
        for name, _ in model.named_parameters():
            assert sum(name.startswith(prefixes) for prefixes in model.parts().values()) == 1, name
        covered = {name for name, _ in model.named_parameters() for p in model.parts().values() if name.startswith(p)}
        assert covered == {name for name, _ in model.named_parameters()}
        for prefixes in model.parts().values():
            assert any(name.startswith(prefixes) for name, _ in model.named_parameters())


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
    model = model_of(torch.float32).eval()
    frames = torch.randn(2, 3, 16, 16, generator=generator)
    batch = packed_batch([document(generator, 30, 2)], frames, 2)
    counted = model.flops(batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(batch)
    text = model.config.text_config
    # The counter takes causal attention for full attention.
    dense = 4.0 * text.num_hidden_layers * text.hidden_size * (batch.tokens**2 - batch.tokens * (batch.tokens + 1) // 2)
    assert counter.get_total_flops() == sum(counted.values()) + dense
    halves = packed_batch([document(generator, 30), document(generator, 30)], frames, 0)
    whole = packed_batch([document(generator, 60)], frames, 0)
    assert model.flops(halves)["text"] < model.flops(whole)["text"]
    assert model.flops(halves)["vision"] == counted["vision"]


def _finite(output: Any) -> bool:
    return bool(torch.isfinite(output.loss)) and output.loss.dtype == torch.float32


@pytest.mark.parametrize("how", ["autocast", "half"])
def test_half_precision_trains(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch: PackedBatch = packed_batch([document(generator, 9, 1), document(generator, 4)], torch.randn(1, 3, 16, 16), 1)
    model = model_of(torch.float32)
    expected = model(batch).loss.item()
    if how == "half":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = model(batch)
    assert _finite(output)
    assert abs(output.loss.item() - expected) < 0.02 * expected
    output.loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
