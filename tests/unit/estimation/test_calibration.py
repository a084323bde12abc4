"""Figures of a run, applied to the estimate of another."""

import json

import pytest

from m4train.errors import ConfigError
from m4train.estimation.calibration import Calibration, check_kind, read_calibration
from m4train.estimation.needs import estimate
from m4train.gpus import GPUS, named
from m4train.run_files import ESTIMATE
from tests.unit.estimation.test_needs import _subject

FOUND = Calibration("h100", "NVIDIA H100 80GB HBM3", "idefics3", "bf16", "single", 1, 1e9, 1.1e9, 1.2e9, 1.0, 1.5, 3e14)


def _written(folder, **changed):
    path = folder / ESTIMATE
    path.write_text(json.dumps({**FOUND.as_dict(), **changed}))
    return path


def test_what_is_written_is_read_from_the_file_and_the_run(tmp_path):
    path = _written(tmp_path)
    assert read_calibration(str(path)) == read_calibration(str(tmp_path)) == FOUND


def test_a_larger_run_is_estimated_by_what_a_small_one_measured():
    plain, measured = _subject(gpu="h100", layers=4), _subject(gpu="h100", layers=4, calibration=FOUND)
    memory = measured.memory()
    assert memory.tensors == plain.memory().tensors
    assert memory.expected == pytest.approx(1.2 * memory.tensors + 2**29)
    assert memory.low <= memory.expected <= memory.high
    (speed,) = estimate(measured).speeds
    work = estimate(plain)
    assert speed.step_seconds == pytest.approx(work.step_flops / 3e14)
    assert speed.mfu == pytest.approx(3e14 / GPUS["h100"].flops)


def test_a_cpu_has_a_speed_as_soon_as_one_run_was_measured():
    assert estimate(_subject()).speeds == []
    (speed,) = estimate(_subject(calibration=FOUND)).speeds
    assert speed.mfu is None
    assert speed.days == pytest.approx(speed.step_seconds * 1000 / 86400)


@pytest.mark.parametrize("given", ["", "no_such_run", "other.json"])
def test_a_file_that_is_not_there_is_named_with_what_to_give(given, tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist: give the estimate\.json of a run .*, or its folder\.$"):
        read_calibration(str(tmp_path / given))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"measured_bytes": None}, "lacks measured_bytes"),
        ({"reserved_bytes": -1}, "gives reserved_bytes as -1"),
        ({"expected_bytes": "much"}, "gives expected_bytes as 'much'"),
        ({"expected_bytes": 0}, "gives expected_bytes as 0"),
        ({"operations_per_second": float("nan")}, "gives operations_per_second as nan"),
        ({"operations_per_second": True}, "gives operations_per_second as True"),
        ({"family": None}, "lacks family"),
        ({"more": 1}, "has other keys"),
    ],
)
def test_a_damaged_file_is_one_sentence(changed, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as error:
        read_calibration(str(_written(tmp_path, **changed)))
    assert str(tmp_path / ESTIMATE) in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_what_is_not_a_mapping_is_one_sentence(text, tmp_path):
    (tmp_path / ESTIMATE).write_text(text)
    with pytest.raises(ConfigError, match="--calibration"):
        read_calibration(str(tmp_path))


@pytest.mark.parametrize(
    ("gpu", "values", "said"),
    [
        ("a100", {}, "GPU h100, but this is about GPU a100"),
        (None, {}, "GPU h100, but this is about GPU cpu"),
        ("h100", {"family": "idefics"}, r"model\.family idefics3, but this is about model\.family idefics"),
        ("h100", {"precision": "fp16"}, r"trainer\.precision bf16, but this is about trainer\.precision fp16"),
    ],
)
def test_another_kind_is_refused(gpu, values, said):
    config = _subject().config
    config.model.family = values.get("family", "idefics3")
    config.trainer.precision = values.get("precision", "bf16")
    with pytest.raises(ConfigError, match=said):
        check_kind(FOUND, config, gpu)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100_40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_gpus_are_known_by_the_name_that_they_give_themselves(device, name):
    assert named(device) == name
