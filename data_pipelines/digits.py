"""Scikit-learn's 1,797 scans of handwritten digits, as interleaved documents and conversations in canonical shards.

The last 20 % of the scans are held out: they appear in no training sample. The others appear as they are and bent, as other
hands might have written them. Written under `root`:

    documents/{train,heldout}-NNNNN.tar   interleaved documents of two to four scans, a few of none
    single/..., multi/...                 conversations over one scan, and over two to four
    tokenizer/                            byte-level BPE trained on the training texts
"""

from __future__ import annotations

import io
import itertools
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

RECIPE: dict[str, Any] = {"recipe": "digits", "version": 2, "seed": 20}
HELD_OUT = 0.2
MARGIN = 2  # black pixels around the scan: a small shift cuts next to nothing
SIDE = 32
FORMS = 15  # of each training scan, bent at random: 1,437 scans are too few hands
CELLS = 3  # a side of the net by which scans are bent
BENT = 1.5  # standard deviation, in pixels, of how far a knot of that net moves each way
TIES = 0.35  # of the training comparisons that are made equal; a tenth are so by chance, too few to learn from
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Scan = tuple[int, str, bytes]  # label, name of the scan, PNG bytes
Sample = tuple[dict[str, Any], list[bytes]]  # canonical JSON without keys of images, and their bytes


def prepare(root: str | Path) -> bool:
    """Builds shards and tokenizer under `root` if they are not there yet; returns whether it built them."""
    return build_once(Path(root), RECIPE, _build)


def _build(folder: Path) -> None:
    train, heldout = load_scans()
    rng, asking = random.Random(RECIPE["seed"]), random.Random(RECIPE["seed"] + 1)
    forms = bent(train, FORMS, rng)
    texts: list[str] = []
    plan: list[tuple[str, str, Iterable[Sample]]] = [
        ("documents", "train", documents(forms, 12000, rng, TIES)),
        ("documents", "heldout", documents(heldout, 120, asking)),
        ("single", "train", single_questions(forms[: 2 * len(train)], rng)),
        ("single", "heldout", single_questions(heldout, asking)),
        ("multi", "train", multi_questions(forms, 5000, rng, TIES)),
        ("multi", "heldout", multi_questions(heldout, 360, asking)),
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
    return _stored(page)


def _stored(page: Image.Image) -> bytes:
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def bent(scans: list[Scan], times: int, rng: random.Random) -> list[Scan]:
    """The scans, and `times` forms of each as another hand might have written it, in rounds of all scans."""
    return scans + [(label, name, _bent(png, rng)) for _ in range(times) for label, name, png in scans]


def _bent(png: bytes, rng: random.Random) -> bytes:
    """A picture (SIDE, SIDE) pulled along by a net whose knots have moved; what comes in from outside is black."""
    ends = [round(SIDE * number / CELLS) for number in range(CELLS + 1)]
    knots = {(x, y): (x + rng.gauss(0, BENT), y + rng.gauss(0, BENT)) for x in ends for y in ends}
    mesh = []
    for left, right in itertools.pairwise(ends):
        for upper, lower in itertools.pairwise(ends):
            corners = ((left, upper), (left, lower), (right, lower), (right, upper))
            mesh.append(((left, upper, right, lower), tuple(itertools.chain(*(knots[corner] for corner in corners)))))
    page = Image.open(io.BytesIO(png))
    return _stored(page.transform(page.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR))


def _image_item(number: int, scan: Scan) -> dict[str, Any]:
    return {"image": f"{number}.png", "width": SIDE, "height": SIDE, "alt": scan[1]}


def _source(scans: list[Scan]) -> dict[str, Any]:
    return {"dataset": "sklearn-digits", "license": "CC BY 4.0", "scans": [scan[1] for scan in scans]}


# Documents ----------------------------------------------------------------------------------------------------------

CAPTIONS = ("This is a {digit}.", "A {digit}.", "{digit}.", "{word}.")
TITLES = ("A sheet of the sorting office.", "Scans from a form.", "Practice page.", "Numbers copied by hand.")
ORDINALS = ("first", "second", "third", "fourth")
LARGER = "Which is larger, the first or the second?"


def documents(scans: list[Scan], count: int, rng: random.Random, ties: float = 0.0) -> Iterator[Sample]:
    """Interleaved documents: each scan followed by its reading; or all of them, then their reading, or the digit at each
    place, or which of the first two is larger; and pages of such comparisons without scans. A share `ties` of the comparisons
    is made equal.
    """
    for scan_group in _draws(scans, count, 2, 4, rng):
        items: list[dict[str, Any]] = [{"text": rng.choice(TITLES) + "\n"}] if rng.random() < 0.2 else []
        kind = rng.random()
        if 0.6 <= kind < 0.94 and rng.random() < ties:
            _tie(scan_group, scans, rng)
        if kind >= 0.94:
            yield {"items": [{"text": _practice(rng, ties)}], "source": _source([])}, []
            continue
        images = [_image_item(number, scan) for number, scan in enumerate(scan_group)]
        if kind < 0.24:
            caption = rng.choice(CAPTIONS)
            for image, (digit, _, _) in zip(images, scan_group):
                items += [image, {"text": " " + caption.format(digit=digit, word=WORDS[digit]) + "\n"}]
        elif kind < 0.3:
            items += [*images, {"text": f" In order: {_listed(scan_group)}."}]
        elif kind < 0.6:
            items += [*images, {"text": _placed(scan_group, rng)}]
        else:
            items += [*images, {"text": f" {LARGER} {_compared(scan_group[0][0], scan_group[1][0])}"}]
        yield {"items": items, "source": _source(scan_group)}, [scan[2] for scan in scan_group]


def _placed(scans: list[Scan], rng: random.Random) -> str:
    """Which digit is at each place, asked in random order, so that no place follows from the one before."""
    places = rng.sample(range(len(scans)), len(scans))
    return "".join(f" {_place(place)} {scans[place][0]}." for place in places)


def _place(place: int) -> str:
    return f"What is the {ORDINALS[place]} digit?"


def _practice(rng: random.Random, ties: float) -> str:
    """Six comparisons of digits as text alone, from which the verdict is learned sooner than from scans."""
    pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(6)]
    return "".join(f" {_compared(first, first if rng.random() < ties else second)}" for first, second in pairs)


def _compared(first: int, second: int) -> str:
    """Two digits and which is larger: read first, then decided, as the words come in that order."""
    verdict = "neither" if first == second else f"the {ORDINALS[first < second]}"
    return f"{first} and {second}, so {verdict}."


def _tie(group: list[Scan], scans: list[Scan], rng: random.Random) -> None:
    """Replaces the second scan of a group by one of `scans` that shows the same digit as the first, and is another."""
    while group[1][0] != group[0][0] or group[1][1] == group[0][1]:
        group[1] = rng.choice(scans)


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


def multi_questions(scans: list[Scan], count: int, rng: random.Random, ties: float = 0.0) -> Iterator[Sample]:
    """Questions over two to four scans: reading all, comparing two, picking one by its place.

    A share `ties` of the groups to compare is made equal in its first two.
    """
    kinds: tuple[Callable[[list[Scan], random.Random], tuple[str, str]], ...] = (_read_all, _larger, _pick)
    for number, scan_group in enumerate(_draws(scans, count, 2, 4, rng)):
        ask = kinds[number % len(kinds)]
        if ask is _larger and rng.random() < ties:
            _tie(scan_group, scans, rng)
        question, answer = ask(scan_group, rng)
        yield _conversation(scan_group, question, answer)


def _read_all(scans: list[Scan], rng: random.Random) -> tuple[str, str]:
    return rng.choice(ALL), _listed(scans)


def _larger(scans: list[Scan], rng: random.Random) -> tuple[str, str]:
    return LARGER, _compared(scans[0][0], scans[1][0])


def _pick(scans: list[Scan], rng: random.Random) -> tuple[str, str]:
    place = rng.randrange(len(scans))
    return _place(place), f"{scans[place][0]}"


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
