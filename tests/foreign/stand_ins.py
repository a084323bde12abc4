"""A folder of what the test modules would fetch: processors under the names of their hub repositories, and pictures.

The modules find them because they run in that folder: a repository's name is then a path, and transformers' tests look for
a picture's file name before they ask for its address. Whoever has the real files gives a folder of them instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.helpers.processing import picture

PROCESSORS = {
    "HuggingFaceM4/tiny-random-idefics": "idefics",
    "HuggingFaceM4/idefics-9b": "idefics",
    "HuggingFaceM4/idefics2-8b": "idefics2",
    "HuggingFaceM4/idefics2-8b-base": "idefics2",
    "hf-internal-testing/tiny-processor-idefics2": "idefics2",
    "HuggingFaceM4/Idefics3-8B-Llama3": "idefics3",
    "hf-internal-testing/tiny-processor-idefics3": "idefics3",
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": "smolvlm",
    "hf-internal-testing/tiny-processor-smolvlm": "smolvlm",
}
PICTURES = {  # name: width and height
    "statue_of_liberty_64x64.jpg": (64, 64),
    "chicago_64x64.jpg": (64, 64),
    "golden_gate_64x64.jpg": (64, 64),
    "Statue-of-Liberty-Island-New-York-Bay.jpg": (1000, 667),
    "Skyline-Chicago.jpg": (800, 600),
    "golden-gate-bridge-san-francisco-purple-flowers-california-echium-candicans-36805947.jpg": (800, 533),
    "000000039769.jpg": (640, 480),
    "image1.jpeg": (640, 480),
}


def make(folder: Path, families: Iterable[str]) -> Path:
    """Fills `folder` for these families: the published sizes of images and of expansions, and a tokenizer of bytes with few merges."""
    from m4train.families import FAMILIES
    from m4train.processing.tokenizer import Tokenizer
    from tests.helpers.processing import tokenizer_folder

    for name, model_type in PROCESSORS.items():
        if model_type not in families:
            continue
        family = FAMILIES[model_type]
        images = family.load("ImageProcessor")()
        tokenizer = Tokenizer.from_pretrained(tokenizer_folder())
        family.load("Processor")(images, tokenizer).save_pretrained(folder / name)
    for number, (name, (width, height)) in enumerate(PICTURES.items()):
        picture(width, height, seed=number).save(folder / name, format="JPEG")
    return folder
