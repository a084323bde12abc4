import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from m4train.data.loading.loader import Loader, StepBatch, validation_steps
from m4train.data.plan.plan import Plan
from m4train.data.source import conversations
from m4train.errors import DataError, StaleIndexError
from tests.helpers.data import FakeProcessor, make_sources

PROCESSOR = FakeProcessor()


def load(sources, data, stop: int | None = 6, **options) -> list[StepBatch]:
    settings = {"seed": 1, "micro_batch_size": 2, "stop_step": stop} | options
    return list(Loader(Plan(sources, data, 1, 8), PROCESSOR, data, **settings))


def test_steps_count_from_one_and_carry_their_own_state(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    steps = load(sources, data)
    assert [step.step for step in steps] == [step.state["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(len(step.micro_batches) == 4 for step in steps)
    assert steps[0].counts()["pages"]["documents"] + steps[0].counts()["digits"]["documents"] == steps[0].documents
    assert steps[0].loss_tokens == sum(c["loss_tokens"] for c in steps[0].counts().values())


def test_every_rank_has_the_same_number_of_micro_batches(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, epochs=1)
    ranks = [load(sources, data, None, micro_batch_size=1, rank=rank, world_size=5) for rank in range(5)]
    whole = load(sources, data, None, micro_batch_size=1)
    for steps, one in zip(zip(*ranks), whole):
        assert len({len(step.micro_batches) for step in steps}) == 1
        assert sum(step.documents for step in steps) == one.documents
    assert sum(not batch.documents for rank in ranks for step in rank for batch in step.micro_batches) > 0


def test_workers_give_the_batches_of_no_workers(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    for inline, worked in zip(load(sources, data), load(sources, replace(data, num_workers=2))):
        assert inline.state == worked.state
        for one, other in zip(inline.micro_batches, worked.micro_batches):
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.images.pixels, other.images.pixels)
            assert (one.data_hash, one.documents) == (other.data_hash, other.documents)


def test_the_plan_runs_ahead_by_no_more_than_what_is_prefetched(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, num_workers=2, prefetch_steps=2)
    loader = Loader(Plan(sources, data, 1, 8), PROCESSOR, data, seed=1, micro_batch_size=2)
    for step in loader:
        assert len(loader._planned) <= 3
        if step.step == 5:
            break


def test_a_dead_worker_ends_the_run_naming_step_and_samples(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, num_workers=1)
    batches = iter(Loader(Plan(sources, data, 1, 8), PROCESSOR, data, seed=1, micro_batch_size=2))
    next(batches)
    for process in multiprocessing.active_children():
        if process.name != "m4train-plan":
            process.kill()
    with pytest.raises(DataError, match=r"(?s)worker died while building step \d+ to \d+ .*(pages|digits):\w+"):
        list(batches)


class _Deadly(FakeProcessor):
    """Ends the process that renders document 7."""

    def encode_document(self, items):
        if "of document 7." in items[0].get("text", "") and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_document(items)


def test_a_sample_that_kills_its_worker_is_named(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, num_workers=2)
    loader = Loader(Plan(sources, data, 1, 8), _Deadly(), data, seed=1, micro_batch_size=2)
    with pytest.raises(DataError, match="it was at sample pages:doc00007: "):
        list(loader)


def test_errors_of_workers_come_back_as_they_are(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, num_workers=1)
    loader = Loader(Plan(sources, data, 1, 8), _Longer(), data, seed=1, micro_batch_size=2)
    with pytest.raises(StaleIndexError, match="data index"):
        next(iter(loader))


class _Longer(FakeProcessor):
    def encode_image(self, image):
        return super().encode_image(image.resize((64, 64)))


def test_validation_is_one_pass_that_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    seen = {}
    for world in (1, 3):
        ranks = [
            list(validation_steps(sources, PROCESSOR, data, micro_batch_size=2, rank=r, world_size=world))
            for r in range(world)
        ]
        assert len({len(steps) for steps in ranks}) == 1
        batches = [batch for steps in ranks for step in steps for batch in step.micro_batches]
        seen[world] = sorted((d.source, d.key, d.tokens) for batch in batches for d in batch.documents)
    assert seen[1] == seen[3]
    assert len({(source, key) for source, key, _ in seen[1]}) == 100


def test_conversations_for_generation(tmp_path: Path) -> None:
    sources, _ = make_sources(tmp_path, pages=3, chats=4)
    unreadable: list[str] = []
    found = [talk for source in sources for talk in conversations(source, unreadable)]
    assert unreadable == []
    assert [key for _, key, _, _ in found] == [f"chat{n:05d}" for n in range(4)]
    assert found[0][2].messages[1]["role"] == "assistant"
    assert found[0][3][0].size == (16, 16)
    assert [n for source in sources for n, *_ in conversations(source, unreadable, range(1, len(source), 2))] == [1, 3]


@pytest.mark.full
@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    """Of the trainer, its workers and the planning process, over twenty epochs, while the trainer is the slowest."""
    sources, data = make_sources(tmp_path, num_workers=1)
    held = {}
    for step in Loader(Plan(sources, data, 1, 8), PROCESSOR, data, seed=1, micro_batch_size=4, stop_step=240):
        if step.step in (40, 240):
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            held[step.step] = sum(process.memory_full_info().uss for process in family) / 2**20
    assert min(stream["epoch"] for stream in step.state["streams"].values()) >= 20
    assert held[240] - held[40] < 24


def test_the_state_of_other_data_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    """One that had just begun when the run ends would print its own death after the sentence."""
    sources, data = make_sources(tmp_path)
    state = next(Plan(sources, data, 2, 8).steps()).state
    with pytest.raises(DataError, match="not what the checkpoint was made with"):
        Loader(
            Plan(sources, data, 1, 8), PROCESSOR, replace(data, num_workers=2), seed=1, micro_batch_size=2, state=state
        )
