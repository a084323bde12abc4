"""The schema of the group `data`: the sources, what is made of their samples, and how these become packs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DocumentOptions:
    """What is made of the documents of a source. What these options leave out is counted as `skipped`."""

    end_marker: str | None = None  # text that ends a document within a sample, as in OBELICS; null: none
    max_images: int | None = None  # images of a document that are kept; those after them are left out; null: no limit
    max_images_in_a_row: int | None = None  # documents with more images without text between them are skipped
    # images that no text follows: keep; strip: leave them out; skip: skip documents that end in two images, or in
    # their only image
    ending_images: str = "keep"
    require_image: bool = False  # skip documents without an image


@dataclass
class ConversationOptions:
    """How the conversations of a source vary."""

    shuffle_turns: bool = False  # put the questions, each with its answers, in random order
    newline_probability: float = 0.0  # probability, from 0 to 1, of a line break before the text of a user's message
    system_prompt: str | None = None  # text of a system message for conversations that have none; null: none is added


@dataclass
class ImageOptions:
    """How large the images of a source are made. An image gets fewer tiles, never a part of them, to fit a budget."""

    enlarge: bool = True  # enlarge images as the processor does; false: to no more tiles than their own pixels fill
    max_tokens: int | None = None  # tokens of one image; larger ones get fewer tiles; null: no limit
    max_tokens_per_sample: int | None = None  # tokens of all images of a sample, which get fewer tiles; null: no limit
    upscale_max: float = 1.0  # enlarge by a random factor from 1 up to this one before splitting into tiles; 1: never
    upscale_probability: float = 1.0  # share of the images that upscale_max may enlarge, from 0 to 1
    # tiles along the longest side at most -> share of the images that are drawn to have so many, such as {2: 0.7, 4: 0.3}; idefics2: 1
    # leaves an image whole, 2 cuts it in four; empty: as many as the processor makes
    tiles: dict[int, float] = field(default_factory=dict)
    # decode JPEG at 1/2, 1/4 or 1/8 if that is large enough; faster, pixels differ a little
    scaled_decode: bool = False


@dataclass
class SourceConfig:
    """One dataset of the mixture."""

    path: str = ""  # the shards: a path or a URL, a glob, or a brace pattern such as train-{000..099}.tar
    format: str = "canonical"  # how samples are stored in the shards, a name of m4train/data/sources/registry.py
    # what a field is called in the records of this source, such as {image: photo_file, question: query}
    fields: dict[str, str] = field(default_factory=dict)
    # fields that may stay unread, whatever they hold, such as [thumbnail, "*.mp4"]; * stands for any characters
    ignore_fields: list[str] = field(default_factory=list)
    where: str | None = None  # use only records for which this holds, such as "relevance_ratings >= 3"; null: all
    # what stands for an image in texts: a text such as "<ImageHere>", a /pattern/, or a list of them; literal: nothing, all
    # is text; null: <image> and <image_2> in the turns of conversations
    placeholder: Any = None
    # what a missing image of a document costs: the sample, as a bad one (bad) or by choice (drop_sample), or only itself
    # (drop_image)
    missing_images: str = "bad"
    # read by webdataset without an index, as for `pipe:` commands; order and resume only approximate
    stream: bool = False
    # of data.validation: use what data.holdout takes out of the source of this path, instead of all of it
    held_out: bool = False
    weight: float = 1.0  # relative share of this source in the mixture, in the unit of data.mixture.by
    loss_weight: float = 1.0  # factor of the loss of each token of this source, relative to the other sources
    # tokens with a loss: all (every text token), assistant answers, or last_turn (the last answer); auto: all for
    # documents, assistant answers for conversations
    loss: str = "auto"
    epochs: int | None = None  # passes through the source before it leaves the mixture; null: data.epochs
    documents: DocumentOptions = field(default_factory=DocumentOptions)
    conversations: ConversationOptions = field(default_factory=ConversationOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    # folder or URL at which relative paths of pictures in records begin; null: the records' folder
    image_folder: str | None = None
    # values of black and white in pictures of more than 8 bits: [0, 4095]; empty: by the file
    image_range: list[float] = field(default_factory=list)
    variants: int = 8  # random forms of each sample, to draw from if turns, line breaks or image sizes are random


@dataclass
class AugmentConfig:
    """Random changes of the decoded image, drawn from (seed, epoch, sample)."""

    shift_pixels: int = 0  # move the image by up to this many of its pixels in each direction, edges repeated; 0: never
    rotate_degrees: float = 0.0  # turn the image by up to this angle in degrees either way, edges repeated; 0: never
    crop_scale: list[float] = field(default_factory=list)  # keep a random part with this share of the area: [0.9, 1.0]
    # with crop_scale: smallest and largest width / height of that part
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])


@dataclass
class MixtureConfig:
    """How the samples of several sources are mixed."""

    # unit in which weights are shares: samples, tokens, loss_tokens (those with a loss: of answers) or images
    by: str = "samples"
    # multiply weights by size ** (1 / temperature), size in the unit of `by`; null: do not
    temperature: float | None = None
    # weights that replace those of the sources from an optimizer step on, such as {1000: {a: 2}}
    schedule: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass
class CostConfig:
    """Estimated work of a pack in tokens, by which packs are shared among ranks: tokens + squared x sum of squared segment
    lengths + frame x frames."""

    squared: float = 1e-4  # tokens per squared token of segment length (attention): about 1 / (6 x hidden size)
    frame: float = 128.0  # cost in tokens of one frame (vision tower)
    # time packs on the devices of the run before its first step, and share them by that instead; two runs may then differ by
    # rounding; null: on several GPUs, unless trainer.deterministic
    measured: bool | None = None


@dataclass
class DataConfig:
    """What is trained on, in which order, and how it becomes packs."""

    root: str = "data"  # folder that `prepare` writes to
    # "package.module:function", called as function(root) if its output is missing; null: none
    prepare: str | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # name -> dataset to train on
    # name -> held-out dataset, for trainer.eval_every and `m4train evaluate`
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    # share, from 0 to below 1, of the samples of each source that is held out as data.validation.NAME, by a hash of the key,
    # or of what it says and shows if it has none: samples that join later move none of the others; 0: none
    holdout: float = 0.0
    index_dir: str | None = None  # folder for indexes; null: next to each shard; needed for shards in an object store
    cache_dir: str | None = None  # folder for blocks read from object stores; null: they are read again each time
    cache_size: float = 64.0  # GiB that cache_dir holds at most; the blocks used longest ago are removed
    auto_index_limit: int = 200_000  # samples that are indexed on first use; more need `m4train data index` first
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    sequence_length: int = 1024  # tokens of a pack at most
    images_per_pack: int = 64  # frames (tiles of images) of a pack at most
    packing_pool: int = 128  # documents among which packing chooses (up to twice as many); more: less padding
    long_documents: str = (
        "split"  # above the budget of a pack: split (between items, or in a text longer than it) or drop
    )
    long_conversations: str = "drop"  # above the budget of a pack: drop, or truncate (whole turns off the end)
    max_dropped_fraction: float = 0.1  # stop before training if a source loses more of its samples for their length
    shuffle: bool = True  # random order, another one in each epoch; false: samples in stored order
    shuffle_window: int = 8  # row groups, or shards in an object store, mixed with each other; more: more memory
    epochs: int | None = None  # passes through each source before it ends; null: repeat for as long as the run lasts
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    num_workers: int = 2  # processes per rank that read, decode and encode; 0: the trainer does it itself
    prefetch_steps: int = 2  # optimizer steps of batches held ready in memory; more: fewer waits, more memory
    max_bad_fraction: float = 0.02  # the run stops above this share of dropped (unreadable) samples, from 0 to 1
