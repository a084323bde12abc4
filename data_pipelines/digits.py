"""Scikit-learn's 1,797 scans of handwritten digits, as interleaved documents and conversations in canonical shards.

The last 20 % of the scans are held out: they appear in no training sample. Written under `root`:

    documents/{train,heldout}-NNNNN.tar   interleaved documents of two to six scans
    single/..., multi/...                 conversations over one scan, and over two to four
    tokenizer/                            byte-level BPE trained on the training texts
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.once import build_once
from m4train.data.shards import ShardWriter
from m4train.processing.tokenizer_training import train_bpe_tokenizer

RECIPE = {"recipe": "digits", "version": 1, "seed": 20}
HELD_OUT = 0.2
MARGIN = 4  # black pixels around the scan, so that a shift of up to this many cuts nothing
SIDE = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Scan = tuple[int, str, bytes]  # label, name of the scan, PNG bytes
Sample = tuple[dict[str, Any], list[bytes]]  # canonical JSON without keys of images, and their bytes


def prepare(root: str | Path) -> bool:
    """Builds shards and tokenizer under `root` if they are not there yet; returns whether it built them."""
    return build_once(Path(root), RECIPE, _build)


def _build(folder: Path) -> None:
    train, heldout = load_scans()
    rng = random.Random(RECIPE["seed"])
    texts: list[str] = []
    plan: list[tuple[str, str, Iterable[Sample]]] = [
        ("documents", "train", documents(train, 2400, rng)),
        ("documents", "heldout", documents(heldout, 120, rng)),
        ("single", "train", single_questions(train * 2, rng)),
        ("single", "heldout", single_questions(heldout, rng)),
        ("multi", "train", multi_questions(train, 5000, rng)),
        ("multi", "heldout", multi_questions(heldout, 360, rng)),
    ]
    for name, split, samples in plan:
        with ShardWriter(folder / name, prefix=split, max_samples=1000) as writer:
            for number, (sample, images) in enumerate(samples):
                writer.write(
                    f"{split}-{name}-{number:06d}", sample, {f"{i}.png": image for i, image in enumerate(images)}
                )
                if split == "train":
                    texts.extend(_texts(sample))
    train_bpe_tokenizer(texts, vocab_size=512, folder=folder / "tokenizer")


def load_scans() -> tuple[list[Scan], list[Scan]]:
    """The training scans and the held-out ones: the last 20 %, in the order of the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans = [
        (int(label), f"scan-{number:04d}", _png(image))
        for number, (image, label) in enumerate(zip(digits.images, digits.target))
    ]
    border = int(len(scans) * (1 - HELD_OUT))
    return scans[:border], scans[border:]


def _png(scan: np.ndarray) -> bytes:
    """A scan (8, 8) with levels 0 to 16 as a 32 x 32 PNG with a black margin."""
    inner = SIDE - 2 * MARGIN
    picture = Image.fromarray((scan * (255 / 16)).round().astype(np.uint8)).resize(
        (inner, inner), Image.Resampling.BICUBIC
    )
    page = Image.new("L", (SIDE, SIDE))
    page.paste(picture, (MARGIN, MARGIN))
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _image_item(number: int, scan: Scan) -> dict[str, Any]:
    return {"image": f"{number}.png", "width": SIDE, "height": SIDE, "alt": scan[1]}


def _source(scans: list[Scan]) -> dict[str, Any]:
    return {"dataset": "sklearn-digits", "license": "CC BY 4.0", "scans": [scan[1] for scan in scans]}


# Documents ----------------------------------------------------------------------------------------------------------

CAPTIONS = (
    "This is a {digit}.",
    "It reads {digit}.",
    "A handwritten {digit}.",
    "The digit {digit}.",
    "{digit}.",
    "That is {word}.",
)
TITLES = (
    "Sheet {n} of the sorting office.",
    "Scans from form {n}.",
    "Practice page {n}.",
    "Numbers copied by hand, page {n}.",
)


def documents(scans: list[Scan], count: int, rng: random.Random) -> Iterator[Sample]:
    """Interleaved documents: either each scan is followed by its reading, or all of them by their reading in order."""
    for scan_group in _draws(scans, count, 2, 6, rng):
        items: list[dict[str, Any]] = []
        if rng.random() < 0.5:
            items.append({"text": rng.choice(TITLES).format(n=rng.randint(1, 400)) + "\n"})
        captioned = rng.random() < 0.6
        caption = rng.choice(CAPTIONS)
        for number, scan in enumerate(scan_group):
            items.append(_image_item(number, scan))
            if captioned:
                items.append({"text": " " + caption.format(digit=scan[0], word=WORDS[scan[0]]) + "\n"})
        if not captioned:
            items.append({"text": f" In order: {_listed(scan_group)}."})
        yield {"items": items, "source": _source(scan_group)}, [scan[2] for scan in scan_group]


def _listed(scans: list[Scan]) -> str:
    return ", ".join(str(scan[0]) for scan in scans)


def _draws(scans: list[Scan], count: int, least: int, most: int, rng: random.Random) -> Iterator[list[Scan]]:
    """`count` groups of scans; every scan is used about equally often."""
    deck: list[Scan] = []
    for _ in range(count):
        size = rng.randint(least, most)
        if len(deck) < size:
            deck = rng.sample(scans, len(scans))
        yield [deck.pop() for _ in range(size)]


# Conversations ------------------------------------------------------------------------------------------------------

SINGLE = ("Which digit is this?", "What digit do you see?", "Read the digit.", "What number is written here?")
ALL = ("Which digits are these?", "Read the digits in order.", "What numbers are written here?")
ORDINALS = ("first", "second", "third", "fourth")


def single_questions(scans: list[Scan], rng: random.Random) -> Iterator[Sample]:
    for scan in scans:
        yield _conversation([scan], rng.choice(SINGLE), f"{scan[0]}")


def multi_questions(scans: list[Scan], count: int, rng: random.Random) -> Iterator[Sample]:
    """Questions over two to four scans: reading all, comparing two, picking one by its place."""
    kinds: tuple[Callable[[list[Scan], random.Random], tuple[str, str]], ...] = (_read_all, _larger, _pick)
    for number, scan_group in enumerate(_draws(scans, count, 2, 4, rng)):
        question, answer = kinds[number % len(kinds)](scan_group, rng)
        yield _conversation(scan_group, question, answer)


def _read_all(scans: list[Scan], rng: random.Random) -> tuple[str, str]:
    return rng.choice(ALL), _listed(scans)


def _larger(scans: list[Scan], rng: random.Random) -> tuple[str, str]:
    first, second = sorted(rng.sample(range(len(scans)), 2))
    question = f"Which is larger, the {ORDINALS[first]} or the {ORDINALS[second]}?"
    if scans[first][0] == scans[second][0]:
        return question, "Neither."
    return question, f"The {ORDINALS[first if scans[first][0] > scans[second][0] else second]}."


def _pick(scans: list[Scan], rng: random.Random) -> tuple[str, str]:
    place = rng.randrange(len(scans))
    return f"What is the {ORDINALS[place]} digit?", f"{scans[place][0]}"


def _conversation(scans: list[Scan], question: str, answer: str) -> Sample:
    content: list[dict[str, Any]] = [_image_item(number, scan) for number, scan in enumerate(scans)]
    messages = [
        {"role": "user", "content": [*content, {"text": question}]},
        {"role": "assistant", "content": [{"text": answer}]},
    ]
    return {"messages": messages, "source": _source(scans)}, [scan[2] for scan in scans]


def _texts(sample: dict[str, Any]) -> list[str]:
    items = sample.get("items") or [item for message in sample["messages"] for item in message["content"]]
    texts = [item["text"] for item in items if "text" in item]
    return texts if "items" in sample else [*(f" {text}" for text in texts), "User:", "Assistant:", "\n"]
