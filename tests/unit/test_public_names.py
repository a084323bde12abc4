"""The public names of the package, and that importing it is light."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import m4train

ROOT = Path(m4train.__file__).parents[1]

MODELS = {
    "Idefics": "IdeficsForVisionText2Text",
    "Idefics2": "Idefics2ForConditionalGeneration",
    "Idefics3": "Idefics3ForConditionalGeneration",
    "SmolVLM": "SmolVLMForConditionalGeneration",
}
EACH = ("Config", "Model", "ImageProcessor", "Processor")
NAMES = [
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "AutoTokenizer",
    "Idefics2ImageProcessorFast",
    *MODELS.values(),
    *(family + kind for family in MODELS for kind in EACH),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_documented_name_can_be_imported(name: str) -> None:
    assert getattr(m4train, name).__name__ == name
    assert name in m4train.__all__
    assert name in dir(m4train)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"AutoTokenizer"}))
def test_what_loads_can_be_loaded_from_a_folder(name: str) -> None:
    assert callable(getattr(m4train, name).from_pretrained)
    assert name.startswith("Auto") or callable(getattr(m4train, name).save_pretrained)


def test_every_name_that_is_listed_is_there() -> None:
    assert all(getattr(m4train, name) is not None for name in m4train.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Idefics9'"):
        _ = m4train.Idefics9


@pytest.mark.parametrize("heavy", ["torch", "transformers", "peft", "numpy", "hydra"])
def test_importing_the_package_loads_nothing_heavy(heavy: str) -> None:
    code = f"import sys, m4train; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_is_quick() -> None:
    """`m4train --help` loads nothing that takes longer than to print it."""
    code = "import sys, m4train.cli; m4train.cli.main(['--help']); print(*sys.modules, file=sys.stderr)"
    bare = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])}
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=bare)
    assert done.returncode == 0, done.stderr
    slow = {
        "dataclasses",
        "pathlib",
        "hashlib",
        "json",
        "hydra",
        "omegaconf",
        "yaml",
        "numpy",
        "torch",
        "PIL",
    }
    assert not slow & set(done.stderr.split())
