"""What is refused before processes are started, or in each of them."""

import os
import subprocess
import sys

import pytest
import torch

from m4train import launching
from m4train.cli import main
from m4train.config.compose import load_config, load_run_config, save_config
from m4train.errors import ConfigError
from m4train.launching import check_devices, check_launched, starts_processes

DIGITS = "experiment=digits_pretrain"


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_several_processes_need_an_engine_for_them():
    with pytest.raises(ConfigError, match=r"launch\.processes is 2, but engine\.name is single.*engine=ddp"):
        load_config([DIGITS, "launch.processes=2"])
    with pytest.raises(ConfigError, match=r"launch\.processes is 0"):
        load_config([DIGITS, "engine=ddp", "launch.processes=0"])
    assert starts_processes(load_config([DIGITS, "engine=ddp", "launch.processes=2"]))
    assert not starts_processes(load_config([DIGITS, "launch.processes=1"]))


def test_processes_started_from_outside_must_fit_the_configuration(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"engine\.name is single, but 4 processes were started"):
        check_launched(load_config([DIGITS]))
    with pytest.raises(ConfigError, match=r"launch\.processes is 4, but 2 processes were started on this machine"):
        check_launched(load_config([DIGITS, "engine=ddp", "launch.processes=4"]))
    here = load_config([DIGITS, "engine=ddp", "launch.processes=2"])
    check_launched(here)
    assert not starts_processes(here)


def test_every_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_devices(1)
    with pytest.raises(ConfigError, match=r"2 processes on this machine, but it has 1 GPUs.*launch\.processes"):
        check_devices(2)


@pytest.mark.parametrize("command", [["train"], ["evaluate"], ["launch", "check"]])
def test_commands_that_use_an_engine_start_its_processes_or_fit_those_that_were(command, monkeypatch):
    started = []
    monkeypatch.setattr(
        launching, "launch", lambda arguments, processes, run_dir: started.append((arguments, processes)) or 0
    )
    two = [DIGITS, "engine=ddp", "launch.processes=2"]
    assert main([*command, *two]) == 0
    assert started == [([*command, *two], 2)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, DIGITS]) == 2  # two processes under engine=single


def test_a_run_does_not_say_how_the_processes_of_another_command_are_started(tmp_path):
    trained = load_config([DIGITS, "engine=ddp", "launch.processes=2", f"run_dir={tmp_path}"])
    save_config(trained, tmp_path / "config.yaml")
    config = load_run_config([f"run_dir={tmp_path}"])
    assert (config.engine.name, config.launch.processes) == ("ddp", None)
    assert load_run_config([f"run_dir={tmp_path}", "launch.processes=4"]).launch.processes == 4
    load_run_config([f"run_dir={tmp_path}", "engine=single"])  # launch.processes=2 would refuse it


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "GOMP_SPINCOUNT = '2000'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        ({"OMP_WAIT_POLICY": "passive"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_threads_that_wait_soon_sleep_unless_told_otherwise(given, said):
    code = "from m4train.cli import main; main(['--help']); import torch"
    mine = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = {**mine, "OMP_DISPLAY_ENV": "verbose", **given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch was not built with GNU OpenMP")
    assert said in done.stderr
