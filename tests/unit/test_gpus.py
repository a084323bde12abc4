"""Which row of the table of GPUs a device's own name means."""

import pytest

from m4train.gpus import GPUS, named

DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA A100-PCIE-40GB": "a100_40gb",
    "NVIDIA A800-SXM4-80GB": "a100",
    "NVIDIA A10G": "a10",
    "NVIDIA A10": "a10",
    "NVIDIA B200": "b200",
    "NVIDIA GH200 480GB": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100_pcie",
    "NVIDIA H200": "h200",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "Tesla T4": "t4",
    "Tesla V100-SXM2-32GB": "v100",
    "NVIDIA RTX A1000": None,
    "NVIDIA T400 4GB": None,
    "AMD Instinct MI300X": None,
}


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_is_known_by_its_name(device: str) -> None:
    assert named(device) == DEVICES[device]


def test_every_row_is_some_device_s() -> None:
    assert set(DEVICES.values()) - {None} == set(GPUS)
