"""GPUs as their vendors' data sheets describe them."""

from __future__ import annotations

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """`flops`: dense bf16 (fp16, where there is no bf16) products a second; `memory` and `bandwidth` in bytes (a second)."""

    flops: float
    memory: float
    bandwidth: float


_GIB = 2.0**30

GPUS = {
    "a10": Gpu(125e12, 22.5 * _GIB, 600e9),
    "a100": Gpu(312e12, 79.2 * _GIB, 2039e9),
    "a100_40gb": Gpu(312e12, 39.4 * _GIB, 1555e9),
    "b200": Gpu(2250e12, 178 * _GIB, 8000e9),
    "h100": Gpu(989e12, 79.2 * _GIB, 3350e9),
    "h100_pcie": Gpu(756e12, 79.2 * _GIB, 2000e9),
    "h200": Gpu(989e12, 139.8 * _GIB, 4800e9),
    "l4": Gpu(121e12, 22.5 * _GIB, 300e9),
    "l40s": Gpu(362e12, 44.4 * _GIB, 864e9),
    "rtx3090": Gpu(71e12, 23.6 * _GIB, 936e9),
    "rtx4090": Gpu(165e12, 23.6 * _GIB, 1008e9),
    "t4": Gpu(65e12, 14.6 * _GIB, 320e9),
    "v100": Gpu(125e12, 31.7 * _GIB, 900e9),
}
_ALIKE = {"a10g": "a10", "a800": "a100", "gh200": "h200", "h800": "h100"}


def named(device: str) -> str | None:
    """The row of the table for a device's own name, such as `NVIDIA A100-SXM4-40GB`; None if it is not known."""
    words = re.sub(r"rtx\W+", "rtx", device.lower())
    said = {_ALIKE.get(word, word) for word in re.findall(r"[a-z0-9]+", words)}
    fitting = [name for name in GPUS if said.issuperset(name.split("_"))]
    return max(fitting, key=len, default=None)
