"""Images per second of the image processors, side by side with the Pillow processors of transformers.

    python benchmarks/images.py [--seconds 3] [--threads] [--torchvision] [--sizes photo ...] [--processors Idefics3 ...]

Both sides get the same decoded images, one after the other in turns, and their pixels are compared first. "uint8" is what
training uses: frames whose values are looked up on the device. "float32" is what the reference returns. Times are processor
time of one thread, so that other work on the machine does not count; times of batches in threads are the best of all turns.
`--torchvision` compares the backend "torch" with transformers' torchvision backend instead, where that is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from m4train.processing import (
    Idefics2ImageProcessor,
    Idefics2ImageProcessorFast,
    Idefics3ImageProcessor,
    IdeficsImageProcessor,
)

SIZES = {"thumbnail": (320, 240), "photo": (1024, 768), "page": (1240, 1754)}
PAIRS = {
    "Idefics": (IdeficsImageProcessor(), IdeficsImageProcessorPil()),
    "Idefics2": (Idefics2ImageProcessor(), Idefics2ImageProcessorPil()),
    "Idefics2 split": (
        Idefics2ImageProcessor(do_image_splitting=True),
        Idefics2ImageProcessorPil(do_image_splitting=True),
    ),
    "Idefics3": (Idefics3ImageProcessor(), Idefics3ImageProcessorPil()),
    "Idefics3 whole": (
        Idefics3ImageProcessor(do_image_splitting=False),
        Idefics3ImageProcessorPil(do_image_splitting=False),
    ),
    "SmolVLM 512": (
        Idefics3ImageProcessor(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}),
        Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}),
    ),
}


TORCHVISION = {"Idefics": "Idefics", "Idefics2": "Idefics2", "Idefics3": "Idefics3", "SmolVLM": "Idefics3"}


def torchvision_pairs() -> dict[str, tuple]:
    """The same processors with backend="torch", and those of transformers' torchvision backend with the same settings."""
    import transformers

    pairs = {}
    for name, (ours, theirs) in PAIRS.items():
        kind = getattr(transformers, f"{TORCHVISION[name.split()[0]]}ImageProcessor")
        settings = {key: getattr(theirs, key, None) for key in ("size", "max_image_size", "do_image_splitting")}
        settings |= {"image_mean": ours.image_mean, "image_std": ours.image_std}
        given = {
            key: dict(value) if hasattr(value, "keys") else value
            for key, value in settings.items()
            if value is not None
        }
        pairs[name] = ours.replace(backend="torch"), kind(**given)
        assert pairs[name][1].backend == "torchvision", "torchvision is not installed"
    return pairs


def photo(width: int, height: int) -> Image.Image:
    """A smooth picture with some noise, as photographs are."""
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-8, 9, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, np.int16) + noise, 0, 255).astype(np.uint8))


def pixels(values: object) -> np.ndarray:
    return np.asarray(values["pixel_values"] if isinstance(values, dict) or hasattr(values, "keys") else values)


def times_of(
    calls: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """The times of each call, taken in turns so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return times


def compare(pair: tuple, name: str, kind: str, size: tuple[int, int], seconds: float) -> None:
    ours, theirs = pair
    image = photo(*size)
    tensors = "pt" if getattr(theirs, "backend", "") == "torchvision" else "np"
    expected = theirs(image, return_tensors=tensors)
    assert np.array_equal(pixels(ours(image, return_tensors="np")), pixels(expected)), "pixels differ"
    calls = {
        "theirs": lambda: theirs(image, return_tensors=tensors),
        "uint8": lambda: ours.frames(image),
        "float32": lambda: ours(image, return_tensors="np"),
    }
    taken = {name: float(np.median(times)) for name, times in times_of(calls, seconds).items()}
    rates = "".join(f"{1 / taken[which]:10.1f}" for which in ("theirs", "float32", "uint8"))
    ratios = "".join(f"{taken['theirs'] / taken[which]:10.2f}x" for which in ("float32", "uint8"))
    print(f"{name:16}{kind:10}{size[0]:>5}x{size[1]:<5}{rates}{ratios}")


def compare_threads(size: tuple[int, int], seconds: float, count: int = 16) -> None:
    """A batch of `count` images through Idefics2ImageProcessorFast."""
    images = [[photo(size[0] + i, size[1])] for i in range(count)]
    fast, plain, theirs = Idefics2ImageProcessorFast(), Idefics2ImageProcessor(), Idefics2ImageProcessorPil()
    calls = {
        "theirs": lambda: theirs(images, return_tensors="np"),
        "plain": lambda: plain(images, return_tensors="np"),
        "fast": lambda: fast(images, return_tensors="np"),
    }
    taken = {name: count / min(times) for name, times in times_of(calls, seconds, time.perf_counter).items()}
    print(
        f"batch of {count} at {size[0]}x{size[1]}, images per second: "
        + str({k: round(v, 1) for k, v in taken.items()})
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="time per line")
    parser.add_argument("--threads", action="store_true", help="also measure batches in threads")
    parser.add_argument("--torchvision", action="store_true", help="compare the backend torch with torchvision's")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="which images")
    parser.add_argument("--processors", nargs="+", choices=PAIRS, default=list(PAIRS), help="whose processors")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pairs = torchvision_pairs() if options.torchvision else PAIRS
    print(
        f"{'processor':16}{'image':10}{'size':>11}{'theirs/s':>10}{'float32/s':>10}{'uint8/s':>10}{'float32':>11}{'uint8':>11}"
    )
    for name in options.processors:
        for kind in options.sizes:
            compare(pairs[name], name, kind, SIZES[kind], options.seconds)
    if options.threads:
        compare_threads(SIZES["photo"], options.seconds)


if __name__ == "__main__":
    main()
