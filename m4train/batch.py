"""The packed batch: the one type that data, models and training share.

Documents are laid end to end on one flat token axis. Nothing in a batch is padding: a document is a *segment*, segments
never see each other, and everything a forward pass would otherwise have to search for (where the image tokens are,
which positions carry a loss, how long each segment is) is computed once, on the CPU, by whoever builds the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Segments:
    """Lengths of the consecutive segments of a flat axis.

    `lengths` are Python integers, so that asking for a length never waits for the device; `cu_seqlens` (N+1,) int32 holds
    their running sum on the device of the batch, as variable-length attention kernels want it.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        sums = [0]
        for length in lengths:
            sums.append(sums[-1] + int(length))
        return cls(tuple(int(n) for n in lengths), torch.tensor(sums, dtype=torch.int32, device=device))

    @classmethod
    def uniform(cls, count: int, length: int, device: torch.device) -> Segments:
        """`count` segments of `length`, made on the device: no copy from the host."""
        sums = torch.arange(0, (count + 1) * length, max(1, length), dtype=torch.int32, device=device)
        return cls((length,) * count, sums)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        return Segments(self.lengths, self.cu_seqlens.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class PackedImages:
    """The images of a batch, as the vision tower takes them.

    Square frames (Idefics, Idefics3, SmolVLM): `pixels` is (F, 3, S, S); `patches` stays None.
    Packed patches (Idefics2): `pixels` is (P, 3, p, p), the patches of all images end to end; `patches` holds their number
    per image and `patch_position_ids` (P,) the position of each in the table of the tower.

    `pixels` is uint8, with `pixel_table` (3, 256) float32 giving the normalised value of each level of each channel; or
    it is floating point and already normalised, with `pixel_table` None.

    `count` is the number of frames (or images) whose features the text uses. A batch that uses none still carries one
    frame, so that the vision modules run on every rank: features beyond `count` are computed and multiplied into nothing.
    """

    pixels: Tensor
    count: int
    pixel_table: Tensor | None = None
    patches: Segments | None = None
    patch_position_ids: Tensor | None = None
    patch_mask: Tensor | None = None  # (F, P) bool, True where a patch is real; None: every patch is


@dataclass(frozen=True)
class CrossSegments:
    """Which images each token attends to, for models with cross-attention (Idefics).

    Consecutive tokens that see the same images make a segment; tokens that see none are left out. `tokens` (Q,) int64 are the
    positions of the tokens of all segments, one after the other; `queries` how many tokens each has; `seen` how many images
    each sees; `images` (K,) int64 which ones.
    """

    tokens: Tensor
    queries: Segments
    seen: Segments
    images: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], images: Sequence[Sequence[int]]) -> CrossSegments:
        """From consecutive stretches of the token axis: the length of each, and the images it sees (none: left out)."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        kept = [i for i, seen in enumerate(images) if seen and lengths[i]]
        tokens = [torch.arange(starts[i], starts[i + 1]) for i in kept]
        return cls(
            torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64),
            Segments.of([lengths[i] for i in kept]),
            Segments.of([len(images[i]) for i in kept]),
            torch.tensor([image for i in kept for image in images[i]], dtype=torch.int64),
        )

    @classmethod
    def none(cls, device: torch.device) -> CrossSegments:
        """No token sees an image; made on the device."""
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        empty = Segments((), torch.zeros(1, dtype=torch.int32, device=device))
        return cls(nothing, empty, empty, nothing)

    def to(self, device: torch.device | str) -> CrossSegments:
        return _map(self, lambda t: t.to(device))


@dataclass(frozen=True)
class DocumentRecord:
    """Where one segment of a batch came from: what error messages, `data_hash` and metrics per source need."""

    pack: int  # number of the pack in the whole run
    source: str
    key: str
    shard: str
    tokens: int
    images: int
    loss_tokens: int
    loss_weight: float | None = None  # sum of the weights of its loss tokens, if their turns have any other than 1


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: T tokens of D documents, with F frames.

    Tensors (all int64 unless said): `input_ids` (T,), `position_ids` (T,) counted from 0 in each document,
    `loss_positions` (L,) the positions that predict something, `targets` (L,) the token each of them must predict (already
    shifted: `targets[i]` is the token after `loss_positions[i]` in its document), `target_weights` (L,) float32 or None
    for all ones, `target_sources` (L,) the index in `source_names` of each target's dataset, `image_positions` (I,) the
    positions that take image features, in the order the vision tower gives them.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    loss_positions: Tensor
    targets: Tensor
    images: PackedImages | None = None
    image_positions: Tensor | None = None
    target_weights: Tensor | None = None
    target_sources: Tensor | None = None
    source_names: tuple[str, ...] = ()
    cross: CrossSegments | None = None
    documents: tuple[DocumentRecord, ...] = ()
    data_hash: int = 0  # partial sum, modulo 2**64, over the documents of this batch
    plan_hash: int = 0
    capacity: int = 0  # token budget of the packs in this batch; capacity - tokens is what packing could not fill

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def loss_tokens(self) -> int:
        return self.targets.shape[0]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return _map(self, lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, for copies during compute."""
        return _map(self, lambda t: t.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Says that `stream` computes with tensors made on another: their memory is not given away while it does."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        _map(self, record)


def _map(value: Any, move: Any) -> Any:
    """Applies `move` to every tensor of a (nested) frozen dataclass."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, (PackedBatch, PackedImages, Segments, CrossSegments)):
        changed = {f.name: _map(getattr(value, f.name), move) for f in fields(value)}
        return replace(value, **changed)
    return value


@dataclass(frozen=True)
class PackedOutput:
    """What a model returns for a PackedBatch.

    `loss` (): sum over loss tokens of weight x (cross-entropy + z-loss), fp32; divide it by the global number of loss
    tokens of the optimizer step. `token_losses` (L,): cross-entropy of each loss token, fp32, detached, unweighted.
    `logits` (T, V): only if asked for.
    """

    loss: Tensor
    token_losses: Tensor
    logits: Tensor | None = None
