"""What a run says of the memory and time it needs, before and after, and what an estimate makes of that."""

import json

import pytest

from m4train import load_config
from m4train import train as trained
from m4train.cli import main
from m4train.commands.estimate import estimated
from m4train.estimation.calibration import read_calibration
from m4train.estimation.subject import Subject
from m4train.run_files import ESTIMATE
from tests.end_to_end.conftest import small_run

pytestmark = [pytest.mark.slow, pytest.mark.expects]


def _config(digits_root, tmp_path, *overrides):
    return load_config([*small_run(digits_root, tmp_path), "data.num_workers=0", "trainer.max_steps=3", *overrides])


def _lines(capsys, word):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(word)]


def test_a_run_says_what_it_expects_and_how_far_off_it_was(digits_root, tmp_path, capsys):
    config = _config(digits_root, tmp_path)
    result = trained(config)
    printed = capsys.readouterr().out
    assert "of tensors per rank at the peak" in printed.partition("step 2/3")[0].partition("step 1/3")[2]
    (last,) = [line for line in printed.splitlines() if line.startswith("measured: ")]
    assert "of tensors at the peak of the first step, " in last
    assert "s per step after it" in last
    found = read_calibration(str(tmp_path / "run"))
    assert found.measured_bytes == pytest.approx(found.expected_bytes, rel=0.05)
    assert result.series("expected/memory_gib") == [(2, found.expected_bytes / 2**30)]
    assert result.series("measured/memory_gib") == [(2, found.measured_bytes / 2**30)]
    (seconds,) = result.series("measured/seconds_per_step")
    assert seconds[0] == 3
    assert seconds[1] > 0

    config.engine.name = "ddp"
    larger = estimated(config, None, 2, None, str(tmp_path / "run"))
    assert larger.memory.expected == pytest.approx(larger.memory.tensors * found.memory_factor)
    rate = found.operations_per_second
    assert larger.speeds[0].step_seconds == pytest.approx(larger.step_flops / 2 / rate)
    arguments = [*small_run(digits_root, tmp_path), "--json", "--calibration", str(tmp_path / "run")]
    assert main(["estimate", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["speed"][0]["mfu"] is None


def test_a_failed_estimate_is_said_and_ends_no_run(digits_root, tmp_path, capsys, monkeypatch):
    def failing(self):
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(Subject, "memory", failing)
    assert trained(_config(digits_root, tmp_path)).step == 3
    assert _lines(capsys, "expected: ") == [
        "expected: nothing more is said of memory and time, since estimating failed (no such)"
    ]
    assert not (tmp_path / "run" / ESTIMATE).exists()


@pytest.mark.parametrize("override", ["logging.console=false", "trainer.worst_batch_first=false"])
def test_what_was_not_asked_for_or_cannot_be_compared_is_not_said(override, digits_root, tmp_path, capsys):
    trained(_config(digits_root, tmp_path, override))
    printed = capsys.readouterr().out
    assert ("expected: " in printed) == ("console" not in override)
    assert "at the peak of the first step" not in printed


def test_random_numbers_of_the_run_are_as_without(digits_root, tmp_path):
    losses = []
    for console in (True, False):
        config = _config(digits_root, tmp_path, f"run_dir={tmp_path / str(console)}", f"logging.console={console}")
        losses.append(trained(config).series("loss"))
    assert losses[0] == losses[1]


@pytest.mark.full
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_the_first_of_several_ranks_speaks_under_every_engine(engine, m4train, tmp_path):
    done = m4train("train", f"engine={engine}", "launch.processes=2", "trainer.max_steps=3", "threads=1")
    assert (
        done.stdout.count("of tensors per rank at the peak,") + done.stdout.count("of tensors per rank at the peak\n")
        == 1
    )
    assert done.stdout.count("measured: ") == 1
    found = read_calibration(str(tmp_path / "run"))
    assert found.ranks == 2
    assert found.measured_bytes == pytest.approx(found.expected_bytes, rel=0.05)


RUNS = {
    "idefics": ["model=tiny_idefics", "trainer.gradient_checkpointing=true"],
    "idefics2": ["model=tiny_idefics2", "adapter=dora", "trainer.precision=bf16"],
    "muon": ["optimizer=muon", "trainer.global_batch_size=4", "trainer.precision=bf16"],
    "four bits": ["adapter=qlora", "optimizer=adamw_8bit", "trainer.micro_batch_size=2"],
    "averaged": ["optimizer=schedule_free", "schedule=constant"],
}


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_another_kind_measures_what_was_expected(name, digits_root, tmp_path):
    trained(_config(digits_root, tmp_path, *RUNS[name]))
    found = read_calibration(str(tmp_path / "run"))
    assert found.measured_bytes == pytest.approx(found.expected_bytes, rel=0.05)
