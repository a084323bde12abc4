"""The dtype of matrix products, chosen for the hardware unless it is given, and the scale of losses that fp16 needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from m4train.config import Config
from m4train.errors import ConfigError
from m4train.run_files import CHECKPOINTS, STATE
from m4train.training.checkpoints.files import checkpoints_in
from m4train.training.tensors import SCALE

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, ARM: in the flags of /proc/cpuinfo

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000  # accepted updates in a row after which the scale doubles
LARGEST_SCALE = 2.0**24


def half_of(precision: str) -> torch.dtype | None:
    """The dtype of autocast; None for fp32. Raises KeyError for a precision that is not resolved yet."""
    return None if precision == "fp32" else HALF[precision]


def resolve_precision(config: Config) -> None:
    """Sets trainer.precision, if it is auto, to what the run was started with, or else to what suits this machine.

    Raises ConfigError if freeze.frozen_dtype asks for bf16 and the GPU has none.
    """
    if config.trainer.precision != "auto":
        return
    precision = _started_with(config) or machine_precision()
    if config.freeze.frozen_dtype == "bf16":
        if precision == "fp16":
            raise ConfigError("freeze.frozen_dtype is bf16, which this GPU cannot compute in: set it to null.")
        precision = "bf16"
    config.trainer.precision = precision


def machine_precision() -> str:
    """bf16 on GPUs and CPUs with instructions for it, fp16 on other GPUs, fp32 on other CPUs, where bf16 is slower."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if any(flag in _cpu_flags() for flag in _CPU_FLAGS) else "fp32"


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(flags, "").split())


def _started_with(config: Config) -> str | None:
    """The precision of the checkpoint that the run would continue from."""
    if config.resume == "never":
        return None
    found = [path for _, path in checkpoints_in(Path(config.run_dir, CHECKPOINTS))] if config.resume == "auto" else []
    for folder in reversed(found or ([Path(config.resume)] if config.resume != "auto" else [])):
        try:
            stored = json.loads((folder / STATE).read_text(encoding="utf-8"))["config"]["trainer"]["precision"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue  # who continues from it says what is wrong
        if stored != "auto":
            return stored
    return None


class LossScale:
    """What the loss is multiplied by under fp16, so that small gradients do not round to zero; 1 otherwise.

    It halves after an update whose norm is not finite, and doubles after `GROWTH_STEPS` others; all on the device.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.active = precision == "fp16"
        self.value = torch.full((), FIRST_SCALE if self.active else 1.0, device=device)
        self._clean = torch.zeros((), dtype=torch.int64, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """`loss` () times the scale."""
        return loss * self.value if self.active else loss

    def after(self, overflow: Tensor) -> None:
        """Takes note of an update: `overflow` () is whether its norm was not finite."""
        if not self.active:
            return
        overflow = overflow.to(self.value.device).bool()
        self._clean = torch.where(overflow, 0, self._clean + 1)
        grown = self._clean >= GROWTH_STEPS
        factor = torch.where(overflow, 0.5, torch.where(grown & (self.value < LARGEST_SCALE), 2.0, 1.0))
        self._clean = torch.where(grown, 0, self._clean)
        self.value = (self.value * factor).clamp(min=1.0)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {f"{SCALE}value": self.value, f"{SCALE}clean": self._clean} if self.active else {}
