"""Writes tests/parity/fixtures/torchvision_pixels.json: what the torchvision backend of transformers 5 makes of pictures.

    python tests/parity/make_fixtures_torchvision.py

Run it where transformers 5 and a torchvision that fits the installed torch can be imported; the tests need neither.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = [(320, 240), (640, 480), (124, 175), (133, 401), (40, 7), (64, 64)]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SMALL = {"size": {"longest_edge": 224}, "max_image_size": {"longest_edge": 56}, **HALF}
NARROW = {"size": {"shortest_edge": 70, "longest_edge": 210}, **HALF}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "idefics": ("Idefics", {"image_mean": MEAN, "image_std": STD}),
    "idefics2": ("Idefics2", NARROW),
    "idefics2 split": ("Idefics2", {**NARROW, "do_image_splitting": True}),
    "idefics2 bicubic, raw": ("Idefics2", {**NARROW, "resample": 3, "do_normalize": False}),
    "idefics3": ("Idefics3", SMALL),
    "idefics3 whole": ("Idefics3", {**SMALL, "do_image_splitting": False}),
    "idefics3 bilinear": ("Idefics3", {**SMALL, "resample": 2, "image_mean": MEAN, "image_std": STD}),
    "idefics3 nearest": ("Idefics3", {**SMALL, "resample": 0}),
    "smolvlm": ("SmolVLM", {**SMALL, "max_image_size": {"longest_edge": 64}}),
    "smolvlm 1/256": ("SmolVLM", {**SMALL, "rescale_factor": 1 / 256}),
}
FILE = Path(__file__).parent / "fixtures" / "torchvision_pixels.json"


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture with some noise, as photographs are."""
    rng = np.random.default_rng(width)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([127 + 120 * np.sin(x / (9 + c) + y / (17 - c)) for c in range(3)], -1)
    return Image.fromarray(np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8))


def digest(values: Any) -> str:
    """Shape and hash of an array of pixels."""
    found = np.ascontiguousarray(values, np.float32)
    return f"{'x'.join(map(str, found.shape))} {hashlib.sha256(found.tobytes()).hexdigest()[:32]}"


def main() -> None:
    import transformers

    made = {}
    for name, (family, settings) in CASES.items():
        processor = getattr(transformers, f"{family}ImageProcessor")(**settings)
        assert processor.backend == "torchvision"
        for size in SIZES:
            values = processor(picture(*size), return_tensors="pt")
            made[f"{name} {size[0]}x{size[1]}"] = digest(values["pixel_values"] if family != "Idefics" else values)
    FILE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
