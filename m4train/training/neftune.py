"""NEFTune: uniform noise on the text embeddings while training (Jain et al., 2023, algorithm 1)."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch
from m4train.errors import ConfigError
from m4train.parts import EMBEDDINGS
from m4train.training.model_protocol import TrainableModel


class EmbeddingNoise:
    """Adds noise of amplitude alpha / sqrt(document tokens x width) to what the model's embedding returns.

    The draw is a function of (seed, step, pack, sample), so that it does not depend on ranks or micro-batches. Image
    positions are overwritten by image features afterwards, so that the noise stays on text.
    """

    def __init__(self, model: TrainableModel, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self._batch: PackedBatch | None = None
        self._step = 0
        _embedding(model).register_forward_hook(self._add)

    def prepare(self, batch: PackedBatch, step: int) -> None:
        """Says which documents the next forward pass embeds; passes without gradients stay without noise."""
        self._batch, self._step = batch, step

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        batch = self._batch
        if batch is None or not batch.documents or not torch.is_grad_enabled():
            return output
        return output + self._draw(batch, output.shape[-1], output.device).to(output.dtype)

    def _draw(self, batch: PackedBatch, width: int, device: torch.device) -> Tensor:
        """Noise (T, H), one document after the other; drawn on the device, since copying it there would be waited for."""
        seen: Counter[tuple[int, str]] = Counter()
        rows = []
        for document, length in zip(batch.documents, batch.segments.lengths, strict=True):
            place = (document.pack, document.key)
            text = f"{self.seed}/{self._step}/{document.pack}/{document.key}/{seen[place]}"
            seen[place] += 1
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
            noise = torch.rand(length, width, generator=generator, device=device).mul_(2.0).sub_(1.0)
            rows.append(noise.mul_(self.alpha / (length * width) ** 0.5))
        return torch.cat(rows)


def _embedding(model: TrainableModel) -> nn.Module:
    """The module of the part `embeddings`. Raises ConfigError if the model has none."""
    for prefix in model.parts().get(EMBEDDINGS, ()):
        try:
            return model.get_submodule(prefix.rstrip("."))
        except AttributeError:
            continue
    raise ConfigError("trainer.neftune_alpha is set, but this model names no module of its part `embeddings`.")
