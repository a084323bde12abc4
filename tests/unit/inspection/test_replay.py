import json
from pathlib import Path

import pytest

from m4train.data.loading.collate import Collator
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from m4train.errors import ConfigError, DataError
from m4train.inspection.preview import view_pack
from m4train.inspection.replay import (
    logged_hash,
    nearest_state,
    planned_step,
    replayed_samples,
    step_hash,
    stored_config,
)
from tests.helpers.data import FakeProcessor, make_sources, write_with_a_damaged_picture


def checkpoint(run_dir: Path, state: dict) -> None:
    folder = run_dir / "checkpoints" / f"step-{state['step']:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"plan": state}))


def test_the_hash_is_the_one_the_loader_gives_also_with_a_bad_sample(tmp_path: Path) -> None:
    write_with_a_damaged_picture(tmp_path)
    sources, data = make_sources(tmp_path, write=False)
    plan = Plan(sources, data, 0, 3)
    collator = Collator(sources, FakeProcessor(), data, 0)
    dropped = 0
    for batch in Loader(plan, FakeProcessor(), data, seed=0, micro_batch_size=2, stop_step=3):
        packs = [view_pack(collator, pack) for pack in planned_step(plan, batch.step, tmp_path).packs]
        total = sum(micro.data_hash for micro in batch.micro_batches) % 2**64
        assert step_hash(collator, packs) == f"{total:016x}"
        dropped += sum(bool(sample.dropped) for sample in replayed_samples(collator, packs))
    assert dropped


def test_planning_begins_at_the_nearest_cursor_or_checkpoint_and_gives_the_same_step(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 0, 4)
    steps = [step for step, _ in zip(plan.steps(), range(9))]
    for number in (3, 6, 8):
        checkpoint(tmp_path, steps[number - 1].state)
    assert nearest_state(tmp_path, 8)["step"] == 6
    assert nearest_state(tmp_path, 3) is None
    cursors = "".join(json.dumps(steps[number - 1].state) + "\n" for number in (2, 4, 7))
    (tmp_path / "cursors.jsonl").write_text(cursors + '{"plan": "')  # as a kill leaves it
    assert [nearest_state(tmp_path, number)["step"] for number in (3, 5, 7, 8, 9)] == [2, 4, 6, 7, 8]
    for number in (2, 7, 9):
        assert planned_step(plan, number, tmp_path).packs == steps[number - 1].packs


def test_samples_say_where_their_bytes_lie(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    collator = Collator(sources, FakeProcessor(), data, 0)
    packs = [view_pack(collator, pack) for pack in planned_step(Plan(sources, data, 0, 2), 1, tmp_path).packs]
    for sample in replayed_samples(collator, packs):
        offset, size = sample.byte_ranges[0]
        with open(sample.shard, "rb") as shard:
            shard.seek(offset)
            assert json.loads(shard.read(size))["source"]["dataset"] == sample.source
        assert sample.images == len(sample.byte_ranges) - 1
        assert sample.span[1] - sample.span[0] > sample.loss_tokens > 0
        assert sum(end - begin for begin, end in sample.trained) == sample.loss_tokens
        assert sample.span[0] < sample.trained[0][0] < sample.trained[-1][1] <= sample.span[1]


def test_the_last_logged_hash_counts() -> None:
    rows = [{"step": 1, "data_hash": "a"}, {"step": 2, "data_hash": "b"}, {"step": 2, "data_hash": "c"}, {"step": 3}]
    assert [logged_hash(rows, step) for step in (1, 2, 3, 4)] == ["a", "c", None, None]


def test_refusals(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, epochs=1)
    with pytest.raises(ConfigError, match="step=9999 is beyond the end"):
        planned_step(Plan(sources, data, 0, 4), 9999, tmp_path)
    with pytest.raises(DataError, match="holds no config"):
        stored_config(tmp_path / "nowhere", 1)


def test_the_stored_configuration_is_read_back(tmp_path: Path) -> None:
    from m4train.config.compose import load_config, save_config

    config = load_config(["experiment=digits_pretrain", "seed=7", f"run_dir={tmp_path}"])
    save_config(config, tmp_path / "config.yaml")
    assert stored_config(tmp_path, 1) == config


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"plan": null}', '{"plan": {}}', '{"plan": {"step": null}}', "\0" * 9]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_nearest_state(content: str, tmp_path: Path) -> None:
    for step, text in ((4, '{"plan": {"step": 4}}'), (8, content)):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(text)
    assert nearest_state(tmp_path, 9) == {"step": 4}
