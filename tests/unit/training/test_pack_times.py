"""Packs are timed before the first step, leave nothing behind but their costs, and those go with the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m4train.config import Config
from m4train.pack_costs import PackCosts
from m4train.training.callbacks import default_callbacks, pack_times
from m4train.training.callbacks.pack_times import PackTimes
from m4train.training.checkpoints.files import checkpoints_in
from m4train.training.checkpoints.state import open_checkpoint
from m4train.training.trainer import TrainResult
from tests.helpers.training import TinyModel, join, make_config, make_pack, make_trainer, read_metrics

TRUE = PackCosts(0.01, 1e-3, 1e-6, 0.05)


def micro_batches() -> list[tuple[tuple[int, int, int, int], Any]]:
    found = []
    for number in range(12):
        batch = join(make_pack(number))
        shape = (1, batch.tokens, batch.tokens**2, batch.images.count)
        found.append((shape, batch))
    return found


def run(config: Config, used: list, packs: Any = micro_batches) -> TrainResult:
    callbacks = default_callbacks(config)
    callbacks.insert(0, PackTimes(packs, lambda *found: used.append(found)))
    return make_trainer(config, TinyModel(dropout=0.1), callbacks=callbacks).train()


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The clock of the devices stands still but for what TRUE says; how often packs were timed."""
    calls: list[int] = []
    real = pack_times.timed

    def timed(engine: Any, batches: Any, z_loss: float) -> list[float]:
        assert all(seconds > 0 for seconds in real(engine, batches, z_loss))
        calls.append(len(batches))
        return [TRUE.of(batch.tokens, batch.tokens**2, batch.images.count) for batch in batches]

    monkeypatch.setattr(pack_times, "timed", timed)
    return calls


def test_timing_changes_no_step_and_its_costs_stay_with_the_run(
    tmp_path: Path, known_times: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    used: list = []
    run(make_config(tmp_path / "timed", max_steps=6, save_every=3), used)
    assert "packs are shared among ranks by what they cost on cpu" in capsys.readouterr().out
    plain = make_config(tmp_path / "plain", max_steps=6)
    make_trainer(plain, TinyModel(dropout=0.1)).train()
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("timed", "plain")]
    assert losses[0] == losses[1]
    (costs, kinds), *_ = used
    assert kinds == [0]
    assert costs[0] == pytest.approx(TRUE, rel=1e-6)
    run(make_config(tmp_path / "timed", max_steps=8, save_every=3), used)
    assert known_times == [12], "a run that goes on times nothing"
    assert used[1] == used[0]
    _, newest = checkpoints_in(tmp_path / "timed" / "checkpoints")[-1]
    assert open_checkpoint(newest).state["callbacks"]["PackTimes"] == {"cpu": list(costs[0])}


def test_times_that_say_nothing_leave_the_constants_and_a_run_that_goes_on_keeps_them(
    tmp_path: Path, known_times: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    used: list = []
    few = lambda: micro_batches()[:3]
    run(make_config(tmp_path, max_steps=2), used, few)
    said = capsys.readouterr().out
    assert "note: what packs cost on cpu was not found by timing 3 micro-batches (fewer than 6" in said
    assert "data.cost.squared and data.cost.frame" in said
    run(make_config(tmp_path, max_steps=4), used)
    assert not used
    assert known_times == [3]


def test_another_kind_of_device_is_timed_anew(tmp_path: Path, known_times: list[int]) -> None:
    used: list = []
    config = make_config(tmp_path, max_steps=1)
    callback = PackTimes(micro_batches, lambda *found: used.append(found))
    callback.load({"NVIDIA H100": [0.0, 1.0, 0.0, 0.0]})
    trainer = make_trainer(config, TinyModel(), callbacks=[callback])
    trainer.engine.prepare(trainer.model)
    callback.on_start(trainer)
    assert known_times == [12]
    assert callback.state().keys() == {"NVIDIA H100", "cpu"}


def test_processor_time_is_what_a_cpu_is_timed_by() -> None:
    begun = pack_times._mark(torch.device("cpu"))
    torch.randn(200, 200) @ torch.randn(200, 200)
    assert pack_times._mark(torch.device("cpu")) >= begun
