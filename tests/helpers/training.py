"""A tiny model that answers the training protocol, batches for it, and runs of the trainer on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from m4train.batch import CrossSegments, DocumentRecord, PackedBatch, PackedImages, PackedOutput, Segments
from m4train.config import BatchRampConfig, Config, SourceConfig
from m4train.data.plan.plan import packs_at
from m4train.positions import patch_position_ids
from m4train.training.callbacks import default_callbacks
from m4train.training.checkpoints.find import agreed_checkpoint
from m4train.training.engines import make_engine
from m4train.training.engines.base import Engine
from m4train.training.tensors import PARAMETER
from m4train.training.trainer import Trainer

VOCABULARY, HIDDEN, SIZE, IMAGE_TOKENS = 64, 16, 4, 2
SOURCES = ("web", "chat")


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight)


class Block(nn.Module):
    """Mixes each token with the mean of its segment so far, then a small MLP."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
        normed = self.norm(hidden)
        mixed = [
            part.cumsum(0) / torch.arange(1, len(part) + 1, device=part.device, dtype=part.dtype).unsqueeze(1)
            for part in self.q_proj(normed).split(list(lengths))
        ]
        return hidden + self.dropout(self.down_proj(F.gelu(self.up_proj(normed + torch.cat(mixed)))))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * SIZE * SIZE, HIDDEN)
        self.layers = nn.ModuleList([Block(HIDDEN, 0.0) for _ in range(2)])

    def forward(self, frames: Tensor) -> Tensor:
        hidden = self.patch(frames.flatten(1))
        for layer in self.layers:
            hidden = layer(hidden, (1,) * len(frames))
        return hidden


class TinyModel(nn.Module):
    """Embedding, two blocks of a vision tower, a connector, two blocks of text, a head (tied if asked)."""

    def __init__(self, tied: bool = False, dropout: float = 0.0, unused: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vision = Vision()
        self.connector = nn.Linear(HIDDEN, IMAGE_TOKENS * HIDDEN)
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Block(HIDDEN, dropout) for _ in range(2)])
        self.norm = RMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        if unused:
            self.connector.forgotten = nn.Parameter(torch.zeros(3))

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {
            "vision": ("vision.",),
            "connector": ("connector.",),
            "text": ("layers.", "norm."),
            "embeddings": ("embed_tokens.",),
            "lm_head": ("lm_head.",),
        }

    def blocks(self) -> dict[str, list[nn.Module]]:
        return {"vision": list(self.vision.layers), "text": list(self.layers)}

    def attention_kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, ...]]:
        return {"text": ("mean",)}  # of a segment so far

    def flops(self, batch: PackedBatch) -> dict[str, float]:
        images = batch.images.count if batch.images is not None else 0
        return {"vision": 1e3 * images, "text": 1e3 * batch.tokens}

    def forward(self, batch: PackedBatch, z_loss: float = 0.0, return_logits: bool = False) -> PackedOutput:
        assert batch.images is not None
        assert batch.images.pixel_table is not None
        frames = batch.images.pixel_table[0].to(self.norm.weight.dtype)[batch.images.pixels.int()]
        features = self.connector(self.vision(frames)).reshape(-1, HIDDEN)
        hidden = self.embed_tokens(batch.input_ids)
        used = batch.images.count * IMAGE_TOKENS
        if used:
            hidden = hidden.index_copy(0, batch.image_positions, features[:used].to(hidden.dtype))
        hidden = hidden + 0.0 * features.sum()
        for layer in self.layers:
            hidden = layer(hidden, batch.segments.lengths)
        logits = self.lm_head(self.norm(hidden)[batch.loss_positions])
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        weighted = losses if batch.target_weights is None else losses * batch.target_weights
        loss = weighted.sum() + z_loss * logits.logsumexp(-1).square().sum() + 0.0 * hidden.sum()
        return PackedOutput(loss, losses.detach(), logits if return_logits else None)


@dataclass(frozen=True)
class FakeStep:
    step: int
    micro_batches: list[PackedBatch]
    state: dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """What packs must look like for a model: square frames, packed patches, or frames seen through cross-attention."""

    vocabulary: int = VOCABULARY
    size: int = SIZE
    image_tokens: int = IMAGE_TOKENS
    kind: str = "frames"  # frames, patches, cross


IDEFICS3 = Shape(vocabulary=97, size=16, image_tokens=4)
IDEFICS2 = Shape(vocabulary=97, size=4, image_tokens=6, kind="patches")
IDEFICS = Shape(vocabulary=99, size=16, image_tokens=0, kind="cross")


def _images(count: int, number: int, generator: torch.Generator, shape: Shape) -> PackedImages:
    """`count` images, and one more that nothing uses where there is none."""
    table = torch.linspace(-1, 1, 256).expand(3, 256)
    if shape.kind != "patches":
        size = (max(1, count), 3, shape.size, shape.size)
        return PackedImages(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8), count, table)
    grids = [(1 + (number + k) % 2, 2 + k % 2) for k in range(max(1, count))]
    lengths = [rows * columns for rows, columns in grids]
    size = (sum(lengths), 3, shape.size, shape.size)
    pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    ids = torch.cat([patch_position_ids(rows, columns, 7) for rows, columns in grids])
    return PackedImages(pixels, count, table, Segments.of(lengths), ids)


def make_pack(number: int, seed: int = 0, shape: Shape = Shape()) -> list[PackedBatch]:
    """Documents of one pack: a function of (seed, number). Every third pack is text only, some hold several images."""
    generator = torch.Generator().manual_seed(seed * 100_003 + number)
    images = (0, 1, 3)[number % 3]
    tokens = int(torch.randint(14, 30, (1,), generator=generator))
    if shape.image_tokens * images > tokens - 2:
        tokens = shape.image_tokens * images + 5
    ids = torch.randint(2, shape.vocabulary, (tokens,), generator=generator)
    loss_positions = torch.arange(images * shape.image_tokens, tokens - 1)
    source = number % len(SOURCES)
    key = hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()
    record = DocumentRecord(number, SOURCES[source], key[:8], "shard", tokens, images, len(loss_positions))
    cross = None
    if shape.kind == "cross":  # image k is seen from the k-th equal share of the tokens on
        shares = [len(part) for part in ids.tensor_split(images + 1)]
        cross = CrossSegments.of(shares, [[], *([k] for k in range(images))])
    return [
        PackedBatch(
            input_ids=ids,
            position_ids=torch.arange(tokens),
            segments=Segments.of([tokens]),
            loss_positions=loss_positions,
            targets=ids[loss_positions + 1] // 2,
            images=_images(images, number, generator, shape),
            image_positions=torch.arange(images * shape.image_tokens),
            target_sources=torch.full_like(loss_positions, source),
            source_names=SOURCES,
            cross=cross,
            documents=(record,),
            data_hash=int(key[:16], 16),
            plan_hash=int(key[16:32], 16),
            capacity=32,
        )
    ]


def _join_images(batches: list[PackedBatch]) -> PackedImages:
    used = [b.images for b in batches if b.images is not None and b.images.count]
    if not used:
        return batches[0].images
    count = sum(images.count for images in used)
    pixels = torch.cat([images.pixels for images in used])
    if used[0].patches is None:
        return PackedImages(pixels, count, used[0].pixel_table)
    lengths = [n for images in used for n in images.patches.lengths]
    ids = torch.cat([images.patch_position_ids for images in used])
    return PackedImages(pixels, count, used[0].pixel_table, Segments.of(lengths), ids)


def _join_cross(batches: list[PackedBatch], offsets: list[int]) -> CrossSegments | None:
    if batches[0].cross is None:
        return None
    firsts = torch.tensor([0, *(b.images.count for b in batches)]).cumsum(0)[:-1].tolist()
    crosses = [b.cross for b in batches]
    return CrossSegments(
        torch.cat([c.tokens + o for c, o in zip(crosses, offsets)]),
        Segments.of([n for c in crosses for n in c.queries.lengths]),
        Segments.of([n for c in crosses for n in c.seen.lengths]),
        torch.cat([c.images + f for c, f in zip(crosses, firsts)]),
    )


def join(batches: list[PackedBatch], shape: Shape = Shape()) -> PackedBatch:
    """Several one-document batches as one micro-batch; none at all gives an empty batch of weight zero."""
    empty = not batches
    batches = batches or make_pack(0, 0, shape)
    offsets = torch.tensor([0, *(b.tokens for b in batches)]).cumsum(0)[:-1].tolist()
    keep = slice(0, 0) if empty else slice(None)
    return PackedBatch(
        input_ids=torch.cat([b.input_ids for b in batches]),
        position_ids=torch.cat([b.position_ids for b in batches]),
        segments=Segments.of([b.tokens for b in batches]),
        loss_positions=torch.cat([b.loss_positions + o for b, o in zip(batches, offsets)])[keep],
        targets=torch.cat([b.targets for b in batches])[keep],
        images=_join_images(batches),
        image_positions=torch.cat([b.image_positions + o for b, o in zip(batches, offsets)]),
        target_sources=torch.cat([b.target_sources for b in batches])[keep],
        source_names=SOURCES,
        cross=_join_cross(batches, offsets),
        documents=() if empty else tuple(d for b in batches for d in b.documents),
        data_hash=0 if empty else sum(b.data_hash for b in batches) % 2**64,
        plan_hash=0 if empty else sum(b.plan_hash for b in batches) % 2**64,
        capacity=0 if empty else 32 * len(batches),
    )


class FakeLoader:
    """Steps of `packs` packs, dealt to ranks in turn; short ranks get empty batches. Continues from `state`."""

    def __init__(
        self,
        packs: int = 8,
        micro: int = 4,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
        steps: int | None = None,
        seed: int = 0,
        shape: Shape = Shape(),
        ramp: BatchRampConfig | None = None,
    ) -> None:
        self.shape, self.ramp = shape, ramp or BatchRampConfig()
        self.packs, self.micro, self.rank, self.world_size, self.seed = packs, micro, rank, world_size, seed
        self.done = state["steps"] if state else 0
        self.steps = steps

    def __iter__(self) -> Iterator[FakeStep]:
        while self.steps is None or self.done < self.steps:
            sizes = [packs_at(step, self.packs, self.ramp) for step in range(1, self.done + 2)]
            numbers = range(sum(sizes[:-1]), sum(sizes))
            mine = [make_pack(n, self.seed, self.shape)[0] for n in list(numbers)[self.rank :: self.world_size]]
            most = -(-sizes[-1] // self.world_size)
            chunks = [mine[i : i + self.micro] for i in range(0, most, self.micro)]
            self.done += 1
            yield FakeStep(self.done, [join(chunk, self.shape) for chunk in chunks], {"steps": self.done})


def make_config(run_dir: Path | str, **trainer: Any) -> Config:
    """A configuration of the tiny run: fp32, no console, no W&B. Keywords set fields of `trainer`."""
    config = Config(name="tiny", run_dir=str(run_dir))
    config.data.sources = {name: SourceConfig() for name in SOURCES}
    config.data.validation = {name: SourceConfig() for name in SOURCES}
    config.logging.console, config.logging.trackers = False, []
    config.optimizer.lr = 1e-2
    config.schedule.warmup_steps = 3
    config.data.sequence_length, config.data.images_per_pack = 32, 3
    values = {"max_steps": 12, "precision": "fp32", "log_every": 1, "save_every": 4, **trainer}
    for key, value in values.items():
        assert hasattr(config.trainer, key)
        setattr(config.trainer, key, value)
    return config


def make_trainer(
    config: Config,
    model: nn.Module | None = None,
    engine: Engine | None = None,
    packs: int = 8,
    shape: Shape = Shape(),
    **options: Any,
) -> Trainer:
    """A trainer as `build` would make it: continues from what run_dir holds."""
    engine = engine or make_engine(config)
    point = agreed_checkpoint(config, engine)
    loader = FakeLoader(
        packs=packs,
        micro=config.trainer.micro_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
        state=point.plan if point else None,
        steps=options.pop("steps", None),
        shape=shape,
        ramp=config.trainer.batch_ramp,
    )
    validation = options.pop(
        "validation", lambda: FakeLoader(6, 2, engine.rank, engine.world_size, steps=1, seed=7, shape=shape)
    )
    callbacks = options.pop("callbacks", None) or default_callbacks(config)
    model = model if model is not None else TinyModel()
    return Trainer(config, model, loader, engine, callbacks, validation, resume=point, **options)


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def full_parameters(engine: Engine) -> dict[str, Tensor]:
    """Every parameter unsharded, by canonical name, on the CPU of rank 0; other ranks take part and may get none."""
    held = {key.removeprefix(PARAMETER): t for key, t in engine.tensors().items() if key.startswith(PARAMETER)}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu() for name, t in held.items()}
