"""What `images.scaled_decode` saves: images per second of one core, decoded and cut into frames, and how far pixels are off.

python benchmarks/scaled_decode.py
"""

from __future__ import annotations

import io
import time

import numpy as np
from PIL import Image

from m4train.processing.images import decode_scaled
from tests.helpers.processing import tiny_idefics3_processor, tiny_idefics_processor

SIZES = ((640, 480), (1280, 960), (2400, 1800))
ROUNDS, SECONDS = 3, 1.0


def photo(width: int, height: int) -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.clip(np.asarray(coarse, np.int16) + rng.integers(-8, 9, (height, width, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def frames(processor, data: bytes, scaled: bool) -> np.ndarray:
    least = processor.needed_size(*Image.open(io.BytesIO(data)).size) if scaled else None
    image, size = decode_scaled(data, least)
    return processor.encode_image(image, size).frames


def rate(processor, data: bytes, scaled: bool) -> float:
    done, begun = 0, time.process_time()
    while time.process_time() - begun < SECONDS:
        frames(processor, data, scaled)
        done += 1
    return done / (time.process_time() - begun)


def main() -> None:
    processors = {
        "Idefics, 224": tiny_idefics_processor(image_size=224),
        "Idefics3, longest edge 728": tiny_idefics3_processor(image_size=364, split=True, tiles=2),
        "Idefics3, longest edge 1456": tiny_idefics3_processor(image_size=364, split=True, tiles=4),
    }
    print("| | " + " | ".join(f"{w} x {h}" for w, h in SIZES) + " |\n" + "| --- " * (len(SIZES) + 1) + "|")
    for name, processor in processors.items():
        cells = []
        for size in SIZES:
            data = photo(*size)
            pairs = [(rate(processor, data, True), rate(processor, data, False)) for _ in range(ROUNDS)]
            off = np.abs(frames(processor, data, True).astype(int) - frames(processor, data, False)).mean()
            cells.append(f"{np.median([fast / whole for fast, whole in pairs]):.2f}x ({off:.1f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
