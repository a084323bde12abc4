from dataclasses import replace
from pathlib import Path

import pytest

from m4train.data.plan.plan import Plan
from m4train.data.source import Source
from m4train.errors import ConfigError
from m4train.inspection import plan_report as module
from m4train.inspection.plan_report import plan_report, plan_tables
from tests.helpers.data import make_sources


def test_totals_are_those_of_the_planned_packs(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, epochs=1)
    plan = Plan(sources, data, 0, 4)
    steps = list(plan.steps())
    packs = [pack for step in steps for pack in step.packs]
    report = plan_report(plan, 10_000, ranks=2, micro_batch_size=1)
    assert report.steps == len(steps)
    assert report.tokens_per_step * len(steps) == pytest.approx(sum(pack.tokens for pack in packs))
    assert report.padding_fraction == pytest.approx(1 - sum(pack.tokens for pack in packs) / (len(packs) * 256))
    assert report.images_per_step * len(steps) == pytest.approx(sum(source.images for source in report.sources))
    assert report.imbalance_max >= report.imbalance_mean > 0
    assert [source.epochs for source in report.sources] == [1.0, 1.0]


def test_an_epoch_ends_with_the_step_that_trains_the_last_sample(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 0, 4)
    report = plan_report(plan, 60, ranks=1, micro_batch_size=4)
    for number, source in enumerate(report.sources):
        seen = set()
        for step in plan.steps():
            seen |= {unit.sample for pack in step.packs for unit in pack.units if unit.source == number}
            if len(seen) == len(sources[number]):
                break
        assert not source.epoch_estimated
        assert step.step == source.epoch_steps


def test_an_epoch_beyond_the_planned_steps_is_carried_on(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 0, 1)
    whole = plan_report(plan, 200, ranks=1, micro_batch_size=1)
    short = plan_report(plan, whole.epoch_steps // 2, ranks=1, micro_batch_size=1)
    assert short.epoch_estimated
    assert not whole.epoch_estimated
    assert short.epoch_steps == pytest.approx(whole.epoch_steps, rel=0.3)


def test_the_realised_mixture_is_the_one_asked_for(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    by_tokens = replace(data, mixture=replace(data.mixture, by="tokens"))
    report = plan_report(Plan(sources, by_tokens, 0, 4), 30, ranks=1, micro_batch_size=4)
    assert [source.target for source in report.sources] == pytest.approx([2 / 3, 1 / 3])
    assert [source.tokens_share for source in report.sources] == pytest.approx([2 / 3, 1 / 3], abs=0.02)
    report = plan_report(Plan(sources, data, 0, 4), 30, ranks=1, micro_batch_size=4)
    assert [source.samples_share for source in report.sources] == pytest.approx([2 / 3, 1 / 3], abs=0.01)


def test_the_scarcer_budget_is_named(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    for images, key in ((8, "data.images_per_pack"), (200, "data.sequence_length")):
        plan = Plan(sources, replace(data, images_per_pack=images), 0, 4)
        assert plan_report(plan, 10, ranks=1, micro_batch_size=4).binding == key


def test_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, data = make_sources(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("a payload was read")

    monkeypatch.setattr(Source, "read", refuse)
    monkeypatch.setattr(Source, "images", refuse)
    for shard in tmp_path.glob("*/*.tar"):
        shard.unlink()
    plan_report(Plan(sources, data, 0, 4), 10, ranks=1, micro_batch_size=4)


def test_what_is_too_long_is_counted(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, epochs=1)
    plan = Plan(sources, replace(data, sequence_length=100, long_documents="drop"), 0, 4)
    long = sum(int(length) > 100 for shard in sources[0].index.shards for length in shard.lengths)
    report = plan_report(plan, 1000, ranks=1, micro_batch_size=4)
    assert report.sources[0].dropped == {"too_long": long}
    assert long > 0


def test_long_runs_are_planned_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 0, 4)
    whole = plan_report(plan, 60, ranks=1, micro_batch_size=4)
    monkeypatch.setattr(module, "MOST_PLANNED_STEPS", 20)
    part = plan_report(plan, 60, ranks=1, micro_batch_size=4)
    assert (part.steps, part.max_steps) == (20, 60)
    assert part.sources[0].epochs == pytest.approx(whole.sources[0].epochs, rel=0.1)


def test_tables_name_every_source_and_no_rank_is_refused(tmp_path: Path) -> None:
    from rich.console import Console

    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 0, 4)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in plan_tables(plan_report(plan, 5, ranks=3, micro_batch_size=4)):
        console.print(table)
    text = console.export_text()
    assert "pages" in text
    assert "digits" in text
    assert "imbalance over 3 ranks" in text
    with pytest.raises(ConfigError, match="ranks is 0"):
        plan_report(plan, 5, ranks=0, micro_batch_size=4)
