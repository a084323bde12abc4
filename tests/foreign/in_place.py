"""The pytest plugin of tests/foreign: puts m4train's classes in the place of transformers', and writes down what came of each test.

It is loaded by name in a process of its own, in which `tests` is the package of transformers, so it imports nothing of ours.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import pytest

OUTCOMES = "M4TRAIN_FOREIGN_OUTCOMES"  # the file that gets a line of JSON a test
CLASSES = "M4TRAIN_FOREIGN_CLASSES"  # ours or theirs
WANTED = "M4TRAIN_FOREIGN_FAMILIES"  # whose classes to put in place
# What the frame of their tests reads of every class, private as it is; a test that then needs more is listed with its reason.
OF_MODELS: dict[str, Any] = {
    "_can_compile_fullgraph": False,
    "_can_set_attn_implementation": classmethod(lambda cls: False),
    "_can_set_experts_implementation": classmethod(lambda cls: False),
    "_from_config": classmethod(lambda cls, config, **options: cls(config)),
    "_is_stateful": False,
    "_keep_in_fp32_modules": (),
    "_keep_in_fp32_modules_strict": (),
    "_keys_to_ignore_on_load_missing": None,
    "_keys_to_ignore_on_load_unexpected": None,
    "_no_split_modules": None,
    "_supports_attention_backend": False,
    "_supports_flash_attn": False,
    "_supports_flex_attn": False,
    "_supports_sdpa": False,
    "_tied_weights_keys": None,
    "prepare_inputs_for_generation": lambda self, input_ids, inputs_embeds=None, **options: None,  # its arguments alone
}


def put_ours_in_place() -> dict[str, Any]:
    """Every public class of a family, where `from transformers import` finds it and in the module that defines it."""
    import transformers

    from m4train.families import FAMILIES

    placed: dict[str, Any] = {}
    for family in (FAMILIES[name] for name in os.environ[WANTED].split()):
        for name, home in family.homes().items():
            ours = getattr(importlib.import_module(home), name)
            for spelling in (name, f"{name}Pil"):  # transformers 5 has its processors of Pillow apart
                theirs = getattr(transformers, spelling, None)
                if theirs is not None:
                    placed[spelling] = ours
                    setattr(transformers, spelling, ours)
                    if home_of_theirs := sys.modules.get(theirs.__module__):
                        setattr(home_of_theirs, spelling, ours)
    for name, ours in placed.items():
        if hasattr(ours, "forward"):
            for attribute, value in OF_MODELS.items():
                setattr(ours, attribute, value)
        elif name.endswith("Processor") and not name.endswith("ImageProcessor"):
            ours.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
    return placed


def pytest_configure(config: pytest.Config) -> None:
    if os.environ[CLASSES] == "ours":
        put_ours_in_place()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        said = "" if report.outcome == "passed" else _said(report)
        _write({"test": report.nodeid, "outcome": report.outcome, "said": said})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write({"test": report.nodeid, "outcome": "failed", "said": str(report.longrepr)[-2000:]})


def _said(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # a test that was skipped: file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr)[:2000]


def _write(found: dict[str, str]) -> None:
    with open(os.environ[OUTCOMES], "a") as file:
        file.write(json.dumps(found) + "\n")
