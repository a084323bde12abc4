"""Padded inputs for the model parity tests: samples of 2, 1 and 0 images and different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.models import IMAGE_TOKEN


def idefics_inputs(config: dict[str, Any], side: str = "right", size: int = 16) -> dict[str, Tensor]:
    """Three samples of 2, 1 and 0 images: tokens before, between and after images, some that see two, some none again."""
    generator = torch.Generator().manual_seed(5)
    vocab = config["vocab_size"] + config["additional_vocab_size"]
    lengths, counts = (14, 9, 6), (2, 1, 0)
    longest = max(lengths)
    ids = torch.zeros(3, longest, dtype=torch.int64)
    mask, image_mask = torch.zeros_like(ids), torch.zeros(3, longest, 2, dtype=torch.int64)
    for row, length in enumerate(lengths):
        start = longest - length if side == "left" else 0
        ids[row, start : start + length] = torch.randint(3, vocab, (length,), generator=generator)
        mask[row, start : start + length] = 1
        sight = torch.zeros(length, 2, dtype=torch.int64)
        if counts[row] == 2:
            sight[2:6, 0] = sight[5:9, 1] = sight[12:, 1] = 1  # token 5 sees both; 9 to 11 none
        elif counts[row] == 1:
            sight[1:, 0] = 1
        image_mask[row, start : start + length] = sight
    pixels = torch.randn(3, 2, 3, size, size, generator=generator)
    for row, count in enumerate(counts):
        pixels[row, count:] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_attention_mask": image_mask}


def real_labels(inputs: dict[str, Tensor]) -> Tensor:
    """Real tokens but the first of each row."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[torch.arange(labels.shape[0]), inputs["attention_mask"].argmax(1)] = -100
    return labels


def idefics2_inputs(config: dict[str, Any], side: str = "right") -> dict[str, Tensor]:
    """Three samples with 2, 1 and 0 images of different sizes, with partial patches and padding."""
    generator = torch.Generator().manual_seed(5)
    per_image = config["perceiver_config"]["resampler_n_latents"]
    sizes = [[(22, 17), (9, 30)], [(28, 28)], []]
    rows = []
    for images, length in zip(sizes, (14, 9, 6)):
        ids = torch.randint(3, 80, (length,), generator=generator).tolist()
        for k in range(len(images)):
            ids[2 + 3 * k : 2 + 3 * k] = [IMAGE_TOKEN] * per_image
        rows.append(ids)
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(ids)) for ids in rows]
    join = (lambda pad, ids: pad + ids) if side == "left" else (lambda pad, ids: ids + pad)
    pixels, mask = torch.zeros(3, 2, 3, 31, 33), torch.zeros(3, 2, 31, 33, dtype=torch.int64)
    for sample, images in enumerate(sizes):
        for i, (height, width) in enumerate(images):
            pixels[sample, i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
            mask[sample, i, :height, :width] = 1
    return {
        "input_ids": torch.tensor([join(pad, ids) for pad, ids in zip(pads, rows)]),
        "attention_mask": torch.tensor([join(pad, [1] * len(ids)) for pad, ids in zip(pads, rows)]),
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
    }


def idefics3_inputs(config: dict[str, Any], side: str = "right") -> dict[str, Tensor]:
    """Three samples with 2, 1 and 0 frames and different lengths; the second frame is partly padding."""
    generator = torch.Generator().manual_seed(5)
    size, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
    per_frame = (size // patch // config["scale_factor"]) ** 2
    frames = [2, 1, 0]
    rows = []
    for count, length in zip(frames, (14, 9, 6)):
        ids = torch.randint(3, 80, (length,), generator=generator).tolist()
        for k in range(count):
            ids[2 + 3 * k : 2 + 3 * k] = [IMAGE_TOKEN] * per_frame
        rows.append(ids)
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(ids)) for ids in rows]
    join = (lambda pad, ids: pad + ids) if side == "left" else (lambda pad, ids: ids + pad)
    pixels = torch.randn(3, 2, 3, size, size, generator=generator)
    pixel_mask = torch.ones(3, 2, size, size, dtype=torch.int64)
    for sample, count in enumerate(frames):
        pixels[sample, count:] = 0
        pixel_mask[sample, count:] = 0
    pixel_mask[0, 1, 9:] = 0
    pixel_mask[0, 1, :, 13:] = 0
    pixels[0, 1] *= pixel_mask[0, 1]
    return {
        "input_ids": torch.tensor([join(pad, ids) for pad, ids in zip(pads, rows)]),
        "attention_mask": torch.tensor([join(pad, [1] * len(ids)) for pad, ids in zip(pads, rows)]),
        "pixel_values": pixels,
        "pixel_attention_mask": pixel_mask,
    }


def labels_for(inputs: dict[str, Tensor]) -> Tensor:
    """Real text tokens but the first of each row: what both libraries count."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE_TOKEN), -100)
    labels[torch.arange(ids.shape[0]), mask.long().argmax(1)] = -100
    return labels


def labels_with_padding(inputs: dict[str, Tensor]) -> Tensor:
    """Every token but those of images, padding too: what only an attention mask can rule out."""
    return inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
