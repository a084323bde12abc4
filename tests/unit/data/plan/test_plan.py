import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m4train.config import DocumentOptions, MixtureConfig, SourceConfig
from m4train.data.documents.pieces import Pieces
from m4train.data.documents.splitting import split_pieces
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from m4train.errors import ConfigError, DataError
from tests.helpers.data import FakeProcessor, data_config, document, make_sources, write_shards


def drawn(plan: Plan, **options) -> list:
    return [unit for step in plan.steps(**options) for pack in step.packs for unit in pack.units]


def test_every_sample_once_per_epoch_in_another_order_each(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, epochs=2)
    units = drawn(Plan(sources, data, 0, 8))
    for number, source in enumerate(sources):
        orders = []
        for epoch in range(2):
            order = list(dict.fromkeys(u.sample for u in units if u.source == number and u.epoch == epoch))
            assert sorted(order) == list(range(len(source)))
            orders.append(order)
        assert orders[0] != orders[1]
    assert max(Counter(unit[:5] for unit in units).values()) == 1


def test_budgets_hold_and_steps_are_full_until_the_end(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, epochs=1, images_per_pack=10)
    steps = list(Plan(sources, data, 0, 8).steps())
    assert all(len(step.packs) == 8 for step in steps[:-1])
    assert [pack.number for step in steps for pack in step.packs] == list(range(sum(len(s.packs) for s in steps)))
    for step in steps:
        for pack in step.packs:
            assert pack.tokens <= 256
            assert pack.frames <= 10


def test_any_step_continues_with_the_same_steps(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 3, 8)
    whole = [step for step, _ in zip(plan.steps(), range(40))]
    assert max(unit.epoch for unit in drawn_units(whole)) >= 1
    for stop in (1, 2, 9, 20):
        state = json.loads(json.dumps(whole[stop - 1].state))
        rest = [step for step, _ in zip(Plan(sources, data, 3, 8).steps(state), range(40 - stop))]
        assert rest == whole[stop:]


def drawn_units(steps) -> list:
    return [unit for step in steps for pack in step.packs for unit in pack.units]


def test_a_state_is_refused_by_another_plan(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    state = next(Plan(sources, data, 3, 8).steps()).state
    for other in (Plan(sources, data, 4, 8), Plan(sources, replace(data, sequence_length=300), 3, 8)):
        with pytest.raises(DataError, match="not what the checkpoint was made with"):
            next(other.steps(state))


def test_what_a_run_may_change_holds_from_where_it_goes_on(tmp_path: Path) -> None:
    """Weights, epochs and the batch size: samples go on in their order, and none is seen twice in an epoch."""
    sources, data = make_sources(tmp_path, epochs=1)
    whole = list(Plan(sources, data, 3, 8).steps())
    weighed = [replace(source, config=replace(source.config, weight=5.0)) for source in sources[1:]]
    for other in (
        Plan([sources[0], *weighed], data, 3, 8),
        Plan(sources, replace(data, mixture=MixtureConfig(by="tokens")), 3, 8),
        Plan(sources, data, 3, 5),
    ):
        rest = list(other.steps(json.loads(json.dumps(whole[1].state))))
        assert [step.step for step in rest] == list(range(3, 3 + len(rest)))
        assert rest != whole[2:]
        seen = Counter(unit[:5] for unit in drawn_units([*whole[:2], *rest]))
        assert seen == Counter(unit[:5] for unit in drawn_units(whole))
        again = list(other.steps(rest[0].state))
        assert again == rest[1:]


def test_a_run_whose_data_had_ended_goes_on_into_another_epoch(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, epochs=1)
    whole = list(Plan(sources, data, 3, 8).steps())
    assert list(Plan(sources, data, 3, 8).steps(whole[-1].state)) == []
    rest = list(Plan(sources, replace(data, epochs=2), 3, 8).steps(whole[-1].state))
    assert {unit.epoch for unit in drawn_units(rest)} == {1}
    assert len(drawn_units(rest)) == len(drawn_units(whole))


def test_moved_data_is_the_same_and_replaced_data_is_not(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path / "here")
    state = next(Plan(sources, data, 3, 8).steps()).state
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved, data = make_sources(tmp_path / "there", write=False)
    assert next(Plan(moved, data, 3, 8).steps(state)).step == 2
    other, data = make_sources(tmp_path / "other", pages=61)
    with pytest.raises(DataError, match="the content of the shards"):
        next(Plan(other, data, 3, 8).steps(state))


def test_the_state_of_an_earlier_version_is_good_for_its_own_plan_alone(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 3, 8)
    state = next(plan.steps()).state
    del state["content"]
    assert next(plan.steps(state)).step == 2
    with pytest.raises(DataError, match="not what the checkpoint was made with"):
        next(Plan(sources, data, 3, 5).steps(state))


def test_bad_and_long_samples_are_dropped_and_counted(tmp_path: Path) -> None:
    key, content, images = document(1)
    content["items"][0]["text"] = "x" * 300
    write_shards(tmp_path, [document(0), (key, content, images), document(2)])
    data = data_config(epochs=1, long_documents="drop")
    sources = build_sources({"pages": SourceConfig(path=str(tmp_path / "*.tar"))}, data, FakeProcessor())
    steps = list(Plan(sources, data, 0, 8).steps())
    assert [(d.sample, d.reason) for step in steps for d in step.dropped] == [(1, "too_long")]
    tiny = replace(data, sequence_length=10, epochs=None)
    with pytest.raises(DataError, match="can be packed"):
        next(Plan(sources, tiny, 0, 8).steps())


def test_a_document_of_many_parts_that_are_too_long_is_one_sample(tmp_path: Path) -> None:
    long = ("0long", {"items": [{"text": "|".join(["x" * 300] * 6)}]}, {})
    write_shards(tmp_path, [long, document(0), document(1)])
    data = data_config(long_documents="drop", shuffle=False)
    config = SourceConfig(path=str(tmp_path / "*.tar"), documents=DocumentOptions(end_marker="|"))
    step = next(Plan(build_sources({"pages": config}, data, FakeProcessor()), data, 0, 1).steps())
    assert {unit.sample for pack in step.packs for unit in pack.units} <= {1, 2}
    assert {(d.sample, d.reason) for d in step.dropped} == {(0, "too_long")}


def test_weights_must_be_positive(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, pages=3, chats=3)
    sources[0].config.weight = 0.0
    with pytest.raises(ConfigError, match=r"data\.sources\.pages\.weight"):
        Plan(sources, data, 0, 8)


pieces = st.lists(st.tuples(st.integers(0, 60), st.sampled_from([0, 1, 1, 5])), min_size=1, max_size=20)


@given(pieces)
def test_long_documents_are_cut_between_items_only(values: list[tuple[int, int]]) -> None:
    import numpy as np

    tokens, kinds = (np.array(column) for column in zip(*values))
    frames = (kinds == 5).astype(int)
    ranges = split_pieces(Pieces(tokens, kinds, frames), 60, 3)
    end = 0
    for first, last in ranges:
        assert end <= first < last
        assert tokens[first:last].sum() <= 60
        assert frames[first:last].sum() <= 3
        end = last
    kept = sum(tokens[first:last][kinds[first:last] == 1].sum() for first, last in ranges)
    assert kept >= tokens[kinds == 1].sum() - len(tokens)  # only ranges of at most one text token may be left out


@pytest.mark.parametrize("seed", range(4))
def test_one_good_sample_among_many_bad_ones_is_found_in_every_epoch(tmp_path: Path, seed: int) -> None:
    """Those left out at the end of an epoch and at the beginning of the next are more in a row than the source holds."""
    key, content, images = document(0)
    broken = [(f"bad{number}", content, {name: data[:-60] for name, data in images.items()}) for number in range(19)]
    write_shards(tmp_path, [*broken, (key, content, images)])
    data = data_config(max_bad_fraction=1.0, packing_pool=1)
    plan = Plan(build_sources({"s": SourceConfig(path=str(tmp_path / "*.tar"))}, data, FakeProcessor()), data, seed, 1)
    steps = [step for step, _ in zip(plan.steps(), range(8))]
    assert [len(step.packs) for step in steps] == [1] * 8
    assert {plan.sources[0].key(unit.sample) for step in steps for pack in step.packs for unit in pack.units} == {key}
