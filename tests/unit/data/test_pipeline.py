import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from m4train.config import SourceConfig
from m4train.data.pipeline import planned_pipeline
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from tests.helpers.data import (
    FakeProcessor,
    conversations,
    data_config,
    document,
    documents,
    make_sources,
    write_shards,
)


def test_the_pipeline_gives_what_the_plan_says_on_any_number_of_ranks(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 0, 4)
    steps = list(itertools.islice(plan.steps(), 3))
    said = {
        (step.step, pack.number): [sources[unit.source].key(unit.sample) for unit in pack.units]
        for step in steps
        for pack in step.packs
    }
    for world_size in (1, 2):
        found: dict[tuple[int, int], list[str]] = {}
        for rank in range(world_size):
            for sample in planned_pipeline(plan, rank, world_size, micro_batch_size=2, stop_step=3):
                found.setdefault((sample["__step__"], sample["__pack__"]), []).append(sample["__key__"])
        assert found == said
    alone = [(sample["__step__"], sample["__key__"]) for sample in planned_pipeline(plan, stop_step=3)]
    rest = planned_pipeline(plan, state=steps[0].state, stop_step=3)
    assert [(sample["__step__"], sample["__key__"]) for sample in rest] == [one for one in alone if one[0] > 1]


def test_samples_are_webdataset_s_own_and_go_through_its_stages(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    sample = next(s for s in planned_pipeline(Plan(sources, data, 0, 4)) if s["__source__"] == "pages")
    _, content, images = document(int(sample["__key__"].removeprefix("doc")))
    assert {name: sample[name] for name in images} == images
    stored = json.loads(sample["json"])["items"]
    assert [item.get("text") for item in stored] == [item.get("text") for item in content["items"]]
    assert set(sample["__state__"]) >= {"plan", "step"}
    decoded = planned_pipeline(Plan(sources, data, 0, 4)).compose(
        webdataset.decode("rgb8"), webdataset.to_tuple("0.png", "json")
    )
    picture, read = next(iter(decoded))
    assert picture.dtype == np.uint8
    assert isinstance(read, dict)


def test_the_answers_that_count_as_right_are_passed_on(tmp_path: Path) -> None:
    write_shards(
        tmp_path, [(key, content | {"references": ["7"]}, images) for key, content, images in conversations(3)]
    )
    data = data_config(epochs=1)
    sources = build_sources({"digits": SourceConfig(path=str(tmp_path / "*.tar"))}, data, FakeProcessor())
    found = [json.loads(sample["json"]) for sample in planned_pipeline(Plan(sources, data, 0, 1))]
    assert [content["references"] for content in found] == [["7"]] * 3


def test_an_unreadable_sample_is_named_and_left_out(tmp_path: Path, caplog) -> None:
    [path] = write_shards(tmp_path, documents(6))
    data = data_config(epochs=1)
    sources = build_sources({"pages": SourceConfig(path=str(path))}, data, FakeProcessor())
    member = sources[0].index.locate(2)[0].members(2)[0]
    with open(path, "r+b") as file:
        file.seek(member.offset + 5)
        file.write(b"??")
    found = [sample["__key__"] for sample in planned_pipeline(Plan(sources, data, 0, 1))]
    assert sorted(found) == [f"doc{number:05d}" for number in (0, 1, 3, 4, 5)]
    assert "doc00002" in caplog.text


@pytest.mark.slow
def test_workers_of_a_data_loader_share_the_packs(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    pipeline = planned_pipeline(Plan(sources, data, 0, 4), stop_step=2)
    alone = sorted((sample["__pack__"], sample["__key__"]) for sample in pipeline)
    loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted((sample["__pack__"], sample["__key__"]) for sample in loader) == alone
