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
from m4train.config.packages import need
from m4train.data.shards import ShardWriter
from m4train.processing.tokenizer_training import train_bpe_tokenizer

RECIPE: dict[str, Any] = {"recipe": "digits", "version": 1, "seed": 20}
HELD_OUT = 0.2
MARGIN = 2  # black pixels around the scan: a small shift cuts next to nothing
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
        ("documents", "train", documents(train, 6000, rng)),
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
    need("sklearn", "the digits dataset")
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

CAPTIONS = ("This is a {digit}.", "A {digit}.", "{digit}.", "{word}.")
TITLES = ("A sheet of the sorting office.", "Scans from a form.", "Practice page.", "Numbers copied by hand.")
ORDINALS = ("first", "second", "third", "fourth")


def documents(scans: list[Scan], count: int, rng: random.Random) -> Iterator[Sample]:
    """Interleaved documents: each scan followed by its reading; or all of them, then their reading or remarks on them."""
    for scan_group in _draws(scans, count, 2, 4, rng):
        items: list[dict[str, Any]] = [{"text": rng.choice(TITLES) + "\n"}] if rng.random() < 0.2 else []
        images = [_image_item(number, scan) for number, scan in enumerate(scan_group)]
        kind = rng.random()
        if kind < 0.65:
            caption = rng.choice(CAPTIONS)
            for image, (digit, _, _) in zip(images, scan_group):
                items += [image, {"text": " " + caption.format(digit=digit, word=WORDS[digit]) + "\n"}]
        elif kind < 0.75:
            items += [*images, {"text": f" In order: {_listed(scan_group)}."}]
        else:
            items += [*images, {"text": "".join(f" {_remark(scan_group, rng)}" for _ in range(2))}]
        yield {"items": items, "source": _source(scan_group)}, [scan[2] for scan in scan_group]


def _remark(scans: list[Scan], rng: random.Random) -> str:
    if rng.random() < 0.4:
        place = rng.randrange(len(scans))
        return f"The {ORDINALS[place]} digit is {scans[place][0]}."
    return f"The larger of the first two: {_compared(scans)}"


def _compared(scans: list[Scan]) -> str:
    """The first two digits and which is larger: read first, then decided, as the words come in that order."""
    first, second = scans[0][0], scans[1][0]
    verdict = "neither" if first == second else f"the {ORDINALS[first < second]}"
    return f"{first} and {second}, so {verdict}."


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
    return "Which is larger, the first or the second?", _compared(scans)


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
