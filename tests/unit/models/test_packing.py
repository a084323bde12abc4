"""What every model promises for packed batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from m4train.batch import CrossSegments, PackedBatch, PackedImages, Segments
from m4train.errors import DataError
from m4train.models import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
)
from m4train.positions import patch_position_ids
from tests.helpers.models import document, packed_batch, perturb, tiny_idefics, tiny_idefics2, tiny_idefics3

Document = tuple[Tensor, list[Tensor]]  # ids with image tokens, and the images
Build = Callable[[list[Document]], PackedBatch]


def frames_batch(documents: list[Document]) -> PackedBatch:
    images = [image for _, own in documents for image in own]
    frames = torch.stack(images or [torch.zeros(3, 16, 16, dtype=torch.float64)])
    return packed_batch([ids for ids, _ in documents], frames, len(images))


def grid_of(image: Tensor) -> tuple[int, int]:
    """Rows and columns of patches an image is cut down to, by its content."""
    return 1 + int(image[0, 0, 0] > 0), 2 + int(image[1, 0, 0] > 0)


def patches_batch(documents: list[Document]) -> PackedBatch:
    """The images cut to different shapes."""
    images = [image for _, own in documents for image in own] or [torch.zeros(3, 16, 16, dtype=torch.float64)]
    count = sum(len(own) for _, own in documents)
    shapes = [grid_of(image) for image in images]
    patches = [
        image[:, r * 4 : r * 4 + 4, c * 4 : c * 4 + 4]
        for image, (rows, columns) in zip(images, shapes)
        for r in range(rows)
        for c in range(columns)
    ]
    packed = PackedImages(
        torch.stack(patches),
        count,
        patches=Segments.of([r * c for r, c in shapes]),
        patch_position_ids=torch.cat([patch_position_ids(r, c, 7) for r, c in shapes]),
    )
    return replace(packed_batch([ids for ids, _ in documents]), images=packed)


def cross_batch(documents: list[Document]) -> PackedBatch:
    """Image k of a document is seen from the k-th equal share of its tokens on; the first share sees none."""
    lengths, seen, first = [], [], 0
    for ids, own in documents:
        lengths += [len(part) for part in ids.tensor_split(len(own) + 1)]
        seen += [[], *([first + k] for k in range(len(own)))]
        first += len(own)
    batch = frames_batch(documents)
    return replace(batch, cross=CrossSegments.of(lengths, seen), image_positions=None)


FAMILIES: dict[str, tuple[type, type, Callable[..., dict[str, Any]], Build, int]] = {
    "idefics": (IdeficsForVisionText2Text, IdeficsConfig, tiny_idefics, cross_batch, 1),
    "idefics2": (Idefics2ForConditionalGeneration, Idefics2Config, tiny_idefics2, patches_batch, 6),
    "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config, tiny_idefics3, frames_batch, 4),
}


def make(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[Any, Build, int]:
    kind, config, tiny, build, per_image = FAMILIES[family]
    model = kind(config.from_dict(tiny(**changes)))
    perturb(model)
    return model.to(dtype), build, per_image


def documents_of(sizes: list[tuple[int, int]], per_image: int, seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            document(generator, length, count, per_image),
            [torch.randn(3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(count)],
        )
        for length, count in sizes
    ]


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_packing_changes_nothing(model: Any, build: Build, documents: list[Document]) -> None:
    model.zero_grad()
    packed = model(build(documents), z_loss=0.01)
    packed.loss.backward()
    together = flat_gradient(model)
    model.zero_grad()
    alone = [model(build([one]), z_loss=0.01) for one in documents]
    total = sum(output.loss for output in alone)
    total.backward()
    torch.testing.assert_close(packed.token_losses, torch.cat([output.token_losses for output in alone]))
    assert abs(total - packed.loss) <= 1e-6 * abs(total)
    assert torch.cosine_similarity(together, flat_gradient(model), dim=0) > 0.999999


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[(9, 1), (9, 0), (9, 2)], [(5, 1), (200, 0), (12, 2)], [(2, 0), (3, 1)]])
def test_packing_changes_neither_loss_nor_gradient(family: str, sizes: list[tuple[int, int]]) -> None:
    model, build, per_image = make(family)
    assert_packing_changes_nothing(model, build, documents_of(sizes, per_image))


@pytest.mark.slow
@settings(max_examples=25)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    sizes=st.lists(st.tuples(st.integers(2, 50), st.integers(0, 3)), min_size=2, max_size=5),
    heads=st.sampled_from([1, 2, 4]),
    layers=st.sampled_from([1, 2, 3]),
    window=st.sampled_from([None, 3]),
    seed=st.integers(0, 1000),
)
def test_packing_any_shape(
    family: str, sizes: list[tuple[int, int]], heads: int, layers: int, window: int | None, seed: int
) -> None:
    text: dict[str, Any] = {"num_attention_heads": heads, "num_hidden_layers": layers}
    if family == "idefics":
        changes = {**text, "cross_layer_interval": 1, "use_resampler": seed % 2 == 0}
    else:
        changes = {"text_config": {**text, "num_key_value_heads": 1}}
        if family == "idefics2":
            changes["text_config"]["sliding_window"] = window
    model, build, per_image = make(family, **changes)
    assert_packing_changes_nothing(model, build, documents_of(sizes, per_image, seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_nobody_uses_give_zero_gradients(family: str) -> None:
    model, build, _ = make(family, torch.float32)
    batch = build(documents_of([(12, 0), (5, 0)], 1))
    assert batch.images is not None
    model(replace(batch, images=replace(batch.images, pixels=batch.images.pixels.float()))).loss.backward()
    vision = model.parts()["vision"]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(vision):
            assert not parameter.grad.any(), name
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_loss_tokens_still_reach_every_parameter(family: str) -> None:
    model, build, per_image = make(family)
    empty = torch.empty(0, dtype=torch.int64)
    output = model(replace(build(documents_of([(9, 1)], per_image)), loss_positions=empty, targets=empty))
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_sixty_four_images_are_one_call_of_the_tower(family: str) -> None:
    model, build, per_image = make(family)
    calls = []
    model.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    model(build(documents_of([(40, 32), (40, 32)], per_image)))
    assert len(calls) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_arguments_give_the_same_loss(family: str) -> None:
    model, build, per_image = make(family)
    documents = documents_of([(12, 2), (7, 1)], per_image)
    packed = model(build(documents))
    longest = max(len(ids) for ids, _ in documents)
    ids = torch.stack([nn.functional.pad(ids, (0, longest - len(ids))) for ids, _ in documents])
    mask = torch.stack([torch.arange(longest) < len(own) for own, _ in documents]).long()
    pixels = torch.zeros(2, 2, 3, 16, 16, dtype=torch.float64)
    for row, (_, own) in enumerate(documents):
        pixels[row, : len(own)] = torch.stack(own)
    images: dict[str, Any] = {"pixel_values": pixels}
    if family == "idefics2":
        images["pixel_attention_mask"] = torch.zeros(2, 2, 16, 16, dtype=torch.int64)
        for row, (_, own) in enumerate(documents):
            for k, image in enumerate(own):
                rows, columns = grid_of(image)
                images["pixel_attention_mask"][row, k, : 4 * rows, : 4 * columns] = 1
    if family == "idefics":
        images["image_attention_mask"] = torch.zeros(2, longest, 2, dtype=torch.int64)
        for row, (own_ids, own) in enumerate(documents):
            shares = torch.arange(len(own_ids)).tensor_split(len(own) + 1)
            for k, share in enumerate(shares[1:]):
                images["image_attention_mask"][row, share, k] = 1
    labels = ids.masked_fill((mask == 0) | (ids == 90), -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, **images).loss
    torch.testing.assert_close(loss * packed.token_losses.shape[0], packed.loss)


def called_modules(model: nn.Module, name: str) -> list[str]:
    """The module itself, or, of a list, which is never called, its members."""
    module = model.get_submodule(name)
    return [f"{name}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [name]


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_each_part_are_those_counted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m4train.models.attention._SHORT", 0)  # no padding to the longest, which would be counted
    model, build, per_image = make(family)
    batch = build(documents_of([(30, 2), (9, 0), (17, 1)], per_image))
    stated = model.flops(batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(batch)
    by_module = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    counted = {}
    for part in stated:
        called = [name for prefix in model.parts()[part] for name in called_modules(model, prefix.rstrip("."))]
        counted[part] = sum(by_module.get(f"{type(model).__name__}.{name}", 0) for name in called)
    text = model.config.text_config
    # The counter takes causal attention for full attention.
    hidden_pairs = sum(n**2 - n * (n + 1) // 2 for n in batch.segments.lengths)
    stated["text"] += 4.0 * text.num_hidden_layers * text.hidden_size * hidden_pairs
    assert counted == stated
    assert sum(counted.values()) == counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_part(family: str, tied: bool) -> None:
    model, _, _ = make(family, tie_word_embeddings=tied)
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        matching = sorted((len(p) for ps in model.parts().values() for p in ps if name.startswith(p)), reverse=True)
        assert matching, name
        assert matching.count(matching[0]) == 1, name  # the longest prefix decides
    for prefixes in model.parts().values():
        assert any(name.startswith(prefixes) for name in names), prefixes
    modules = dict(model.named_modules())
    for blocks in model.blocks().values():
        assert blocks
        assert all(any(block is module for module in modules.values()) for block in blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_initialisation_is_reproducible(family: str) -> None:
    weights = []
    for _ in range(2):
        model, _, _ = make(family)
        model.init_weights(torch.Generator().manual_seed(3))
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name, weight in weights[0].items():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", ".ln.weight")):
            assert bool((weight == 1).all()), name
        elif name.endswith("bias"):
            assert not weight.any(), name
        else:
            assert "alpha" in name or weight.std() > 0.005, name


def test_runs_of_cross_attention() -> None:
    cross = CrossSegments.of([2, 3, 0, 4], [[], [1], [0], [0, 2]])
    assert cross.tokens.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert cross.queries.lengths == (3, 4)
    assert cross.seen.lengths == (1, 2)
    assert cross.images.tolist() == [1, 0, 2]
    empty = CrossSegments.of([], [])
    assert (empty.tokens.shape, empty.queries.lengths) == ((0,), ())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["autocast", "half"])
def test_half_precision_trains(family: str, how: str) -> None:
    model, build, per_image = make(family, torch.float32)
    batch = build(documents_of([(9, 1), (40, 2)], per_image))
    expected = model(batch).loss.item()
    if how == "half":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = model(batch)
    assert output.loss.dtype == torch.float32
    assert abs(output.loss.item() - expected) < 0.02 * expected
    output.loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_need_a_table(family: str) -> None:
    model, build, per_image = make(family, torch.float32)
    batch = build(documents_of([(9, 1)], per_image))
    assert batch.images is not None
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, batch.images.pixels.shape, generator=generator, dtype=torch.uint8)
    table = torch.randn(3, 256, generator=generator)
    floats = torch.stack([table[c][bytes_[:, c].long()] for c in range(3)], dim=1)

    def loss(pixels: Tensor, table: Tensor | None) -> Tensor:
        assert batch.images is not None
        return model(replace(batch, images=replace(batch.images, pixels=pixels, pixel_table=table))).loss

    assert torch.equal(loss(bytes_, table), loss(floats, None))
    with pytest.raises(DataError, match=r"pixels are torch.uint8 with no pixel_table"):
        loss(bytes_, None)
    with pytest.raises(DataError, match=r"pixels are torch.float32 with a pixel_table"):
        loss(floats, table)
    with pytest.raises(DataError, match=r"pixel_values are torch.uint8"):
        model(
            torch.ones(1, 4, dtype=torch.int64),
            pixel_values=torch.zeros(1, 1, 3, 16, 16).byte(),
            **({"image_attention_mask": torch.zeros(1, 4, 1)} if family == "idefics" else {}),
        )


class HostReads(TorchDispatchMode):
    """Collects operations that make the host wait for a value, or whose output shape depends on one."""

    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.split(".")[0].startswith(self.waits):
            self.found.append(name)
        by_mask = name.startswith(("index.", "index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask:
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_never_waits_for_the_device(family: str) -> None:
    model, build, per_image = make(family)
    batch = build(documents_of([(9, 1), (40, 2)], per_image))
    with HostReads() as reads:
        model(batch, z_loss=0.01).loss.backward()
    assert reads.found == []
    with HostReads() as reads:
        torch.ones(2)[torch.tensor([True, False])].sum().item()
    assert len(reads.found) == 2
