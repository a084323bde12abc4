import json
from dataclasses import asdict
from pathlib import Path

import pytest

from m4train.commands import inspect as inspect_run
from m4train.config import Config
from m4train.data.documents.image_layout import FRAMES
from m4train.data.plan.plan import Plan
from m4train.inspection.bench import STAGES, _Clock, bench, bench_tables
from tests.helpers.data import FakeProcessor, make_sources


def test_what_is_measured_is_what_the_packs_hold(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 0, 4)
    report = bench(plan, FakeProcessor(), data, 0, 2, FRAMES, packs=8)
    packs = [pack for step, _ in zip(plan.steps(), range(2)) for pack in step.packs]
    assert report.packs == 8
    assert report.samples == sum(len(pack.units) for pack in packs)
    assert report.tokens == sum(pack.tokens for pack in packs)
    assert report.frames == sum(pack.frames for pack in packs)
    assert report.fill == pytest.approx(report.tokens / (8 * data.sequence_length))
    assert [stage.name for stage in report.stages] == list(STAGES)
    assert all(stage.seconds > 0 for stage in report.stages)
    for stage in report.stages:
        assert stage.tokens_per_second == pytest.approx(report.tokens / stage.seconds)
    assert report.whole.samples_per_second > 0
    assert report.step_seconds > 0
    assert report.megabytes > 0
    json.dumps(asdict(report))
    assert len(bench_tables(report)) == 2


def test_inner_stages_stop_the_clock_of_outer_ones(monkeypatch) -> None:
    times = iter([0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr("m4train.inspection.bench.time.perf_counter", lambda: next(times))
    clock = _Clock()
    with clock("collate"), clock("read"):
        pass
    assert clock.seconds["collate"] == 1 + 5
    assert clock.seconds["read"] == 3


def test_the_command_prints_json(tmp_path: Path, monkeypatch, capsys) -> None:
    _, data = make_sources(tmp_path)
    monkeypatch.setattr(inspect_run.build, "prepared_processor", lambda config: FakeProcessor())
    monkeypatch.setattr(inspect_run.build, "build_layout", lambda config, processor: FRAMES)
    assert inspect_run.bench(Config(data=data), 4, True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packs"] == 4
    assert {stage["name"] for stage in report["stages"]} == set(STAGES)
