"""Tiny datasets of real pictures, and a processor small enough to reason about."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m4train.config import DataConfig, SourceConfig
from m4train.data.index.shard_index import VERSION, ShardIndex, index_path, tokens_path
from m4train.data.index.source_index import SourceIndex
from m4train.data.shards import ShardWriter
from m4train.data.source import Source, build_sources
from m4train.data.sources.tar import CanonicalTar
from m4train.data.storage.arrays import smallest, write_arrays
from m4train.data.storage.files import FileReader
from m4train.processing.pieces import EncodedImage, ImagePiece, Piece, TextPiece

SIDE = 16


class FakeProcessor:
    """Bytes as tokens (id = byte + 10); an image is its frames of 16 x 16, two tokens each, between two marks."""

    bos_id, eos_id, pad_id, end_of_utterance_id, image_token_id = 0, 1, 2, 3, 4
    _mark, _role = 5, 6

    def __init__(self, name: str = "fake", side: int = SIDE) -> None:
        self.name = name
        self.side = side

    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self.name} {self.side}".encode()).hexdigest()

    def frames_for(self, width: int, height: int) -> int:
        tiles = -(-width // self.side) * -(-height // self.side)
        return 1 if tiles == 1 else min(tiles, 6) + 1

    def tokens_for(self, width: int, height: int) -> int:
        return 2 * self.frames_for(width, height) + 2

    def encode_image(self, image: Image.Image) -> EncodedImage:
        count = self.frames_for(*image.size)
        small = np.asarray(image.convert("RGB").resize((self.side, self.side))).transpose(2, 0, 1)
        inner = [self.image_token_id, self.image_token_id] * count
        ids = np.array([self._mark, *inner, self._mark], np.int64)
        frames = np.stack([np.roll(small, tile, axis=2) for tile in range(count)])
        return EncodedImage(frames, ids, ids == self.image_token_id)

    def pixel_table(self) -> np.ndarray:
        return np.tile((np.arange(256, dtype=np.float32) / 255 - 0.5) / 0.5, (3, 1))

    def _text(self, text: str, *closing: int) -> np.ndarray:
        return np.array([byte + 10 for byte in text.encode()] + list(closing), np.int64)

    def encode_document(self, items: list[dict[str, Any]]) -> list[Piece]:
        pieces: list[Piece] = [TextPiece(np.array([self.bos_id]), "template")]
        images = 0
        for number, item in enumerate(items):
            if "image" in item:
                pieces.append(ImagePiece(images))
                images += 1
            else:
                pieces.append(TextPiece(self._text(item["text"]), "document", number))
        return [*pieces, TextPiece(np.array([self.eos_id]), "document", len(items))]

    def encode_messages(self, messages: list[dict[str, Any]]) -> list[Piece]:
        pieces: list[Piece] = [TextPiece(np.array([self.bos_id]), "template")]
        images = 0
        for turn, message in enumerate(messages):
            pieces.append(TextPiece(np.array([self._role]), "template", turn))
            for item in message["content"]:
                if "image" in item:
                    pieces.append(ImagePiece(images))
                    images += 1
                else:
                    said_by = message["role"] if message["role"] in ("user", "assistant") else "system"
                    pieces.append(TextPiece(self._text(item["text"]), said_by, turn))
            origin = "assistant" if message["role"] == "assistant" else "template"
            pieces.append(TextPiece(np.array([self.end_of_utterance_id]), origin, turn))
        return pieces

    def decode(self, ids: np.ndarray) -> str:
        return bytes(int(i) - 10 for i in ids if i >= 10).decode()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def digit_pictures() -> tuple[list[Image.Image], list[int]]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 grey levels, as 16 x 16 pictures, and what they show."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = [Image.fromarray((d * 15).astype(np.uint8), "L").resize((16, 16)) for d in digits.images]
    return pictures, digits.target.tolist()


def page_picture(text: str, width: int = 120, height: int = 40) -> Image.Image:
    """A page with a line of text, drawn with Pillow's own font."""
    page = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(page).text((4, 4), text, fill="black", font=ImageFont.load_default(12))
    return page


def document(number: int) -> tuple[str, dict[str, Any], dict[str, bytes]]:
    """An interleaved document of up to three drawn pages; lengths vary with the number."""
    rng = np.random.default_rng(number)
    items: list[dict[str, Any]] = []
    images = {}
    for part in range(int(rng.integers(1, 4))):
        items.append({"text": f"Page {part} of document {number}. " * int(rng.integers(1, 3))})
        width, height = int(rng.integers(10, 60)), int(rng.integers(10, 40))
        images[f"{part}.png"] = png(page_picture(f"{number}", width, height))
        items.append({"image": f"{part}.png", "width": width, "height": height})
    items.append({"text": "The end."})
    return f"doc{number:05d}", {"items": items, "source": {"dataset": "pages"}}, images


def conversation(number: int, picture: Image.Image, digit: int) -> tuple[str, dict[str, Any], dict[str, bytes]]:
    messages = [
        {"role": "user", "content": [{"image": "0.png"}, {"text": "Which digit is this?"}]},
        {"role": "assistant", "content": [{"text": f"It is {digit}."}]},
    ]
    return f"chat{number:05d}", {"messages": messages, "source": {"dataset": "digits"}}, {"0.png": png(picture)}


def documents(count: int) -> Iterator[tuple[str, dict[str, Any], dict[str, bytes]]]:
    return (document(number) for number in range(count))


def conversations(count: int) -> Iterator[tuple[str, dict[str, Any], dict[str, bytes]]]:
    pictures, digits = digit_pictures()
    return (conversation(number, pictures[number], digits[number]) for number in range(count))


def write_shards(folder: Path, samples: Any, prefix: str = "shard", **limits: int) -> list[Path]:
    with ShardWriter(folder, prefix, **limits) as writer:
        for sample in samples:
            writer.write(*sample)
    return writer.paths


def undecodable(image: bytes) -> bytes:
    """A PNG whose chunks are all whole, but hold too few pixels: only decoding finds it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = image[:33]  # the signature, and the chunk IHDR of 25 bytes
    return header + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def write_with_a_damaged_picture(folder: Path) -> str:
    """Shards of pages and digits where one picture cannot be decoded; the key of its sample."""
    key, sample, images = document(3)
    damaged = undecodable(images["0.png"])
    write_shards(folder / "pages", [(key, sample, images | {"0.png": damaged}), *map(document, range(4, 9))])
    write_shards(folder / "digits", [document(20)])
    return key


def data_config(**changes: Any) -> DataConfig:
    return DataConfig(**{"sequence_length": 256, "images_per_pack": 24, "packing_pool": 12, "num_workers": 0} | changes)


def make_sources(
    folder: Path, pages: int = 60, chats: int = 40, write: bool = True, **changes: Any
) -> tuple[list[Source], DataConfig]:
    """Two sources, documents and conversations, in several shards each; `write` False: those written before."""
    if write:
        write_shards(folder / "pages", documents(pages), max_samples=25)
        write_shards(folder / "digits", conversations(chats), max_samples=25)
    sources = {
        "pages": SourceConfig(path=str(folder / "pages" / "*.tar"), weight=2.0),
        "digits": SourceConfig(path=str(folder / "digits" / "*.tar"), weight=1.0),
    }
    data = data_config(sources=sources, **changes)
    return build_sources(sources, data, FakeProcessor()), data


def synthetic_source(folder: Path, samples: int, shards: int, name: str = "web") -> Source:
    """A source whose index describes `samples` documents of OBELICS-like lengths; its shards do not exist."""
    per_shard = samples // shards
    rng = np.random.default_rng(0)
    processor = FakeProcessor()
    for shard in range(shards):
        _synthetic_index(folder / f"{shard:05d}.tar", per_shard, rng, processor.fingerprint())
    opened = [ShardIndex(str(folder / f"{shard:05d}.tar"), None, processor.fingerprint()) for shard in range(shards)]
    return Source(name, SourceConfig(path=str(folder / "*.tar")), SourceIndex(opened), CanonicalTar(), FileReader())


def _synthetic_index(shard: Path, samples: int, rng: np.random.Generator, fingerprint: str) -> None:
    images = np.minimum(rng.geometric(0.4, samples), 30)
    text = rng.lognormal(6.2, 0.9, samples).astype(np.int32) + 10
    member_ends, piece_ends = np.cumsum(images + 1), np.cumsum(images + 2)
    count, pieces = int(member_ends[-1]), int(piece_ends[-1])
    kinds = np.full(pieces, 5, np.uint8)
    tokens, frames = np.full(pieces, 64, np.int32), np.ones(pieces, np.int32)
    for place, kind, amount in ((piece_ends - images - 2, 0, np.ones(samples)), (piece_ends - 1, 1, text)):
        kinds[place], tokens[place], frames[place] = kind, amount, 0
    keys = np.char.mod("%09d", np.arange(samples)).astype("S9").view(np.uint8)
    structure = {
        "offsets": (np.arange(count) - np.repeat(member_ends - images - 1, images + 1)) * 100_000 + 512,
        "starts": np.arange(samples) * 300_000,
        "sizes": np.full(count, 90_000, np.int64),
        "hashes": rng.integers(0, 2**32, count),
        "widths": np.full(count, 640, np.int32),
        "heights": np.full(count, 480, np.int32),
        "parts": np.zeros(count, np.int32),
        "keys": keys,
        "key_ends": np.arange(1, samples + 1, dtype=np.int64) * 9,
        "member_ends": member_ends.astype(np.int64),
    }
    meta = {"version": VERSION, "format": "tar", "stamp": [0, 0], "bad": {}, "digest": shard.name, "blocks": None}
    write_arrays(index_path(str(shard), None), meta, smallest(structure))
    counts = {
        "piece_tokens": tokens,
        "piece_kinds": kinds,
        "piece_frames": frames,
        "lengths": (text + 64 * images + 1).astype(np.int32),
        "frames": images.astype(np.int32),
        "piece_ends": piece_ends.astype(np.int64),
    }
    token_meta = {"version": VERSION, "fingerprint": fingerprint, "digest": shard.name, "bad": {}}
    write_arrays(tokens_path(str(shard), None, fingerprint), token_meta, smallest(counts))
