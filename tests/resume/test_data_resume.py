"""The sequence of steps is the same wherever it is stopped, and on whatever it continues."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from m4train.config import AugmentConfig, ConversationOptions, DocumentOptions, MixtureConfig
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from m4train.errors import DataError
from tests.helpers import warm
from tests.helpers.data import FakeProcessor, make_sources

STEPS, BATCH = 24, 10
SHARED = Path("/dev/shm")


def hashes(sources, data, world: int, state=None, stop: int = STEPS) -> tuple[dict[int, tuple], dict]:
    """Per step, over all ranks: data_hash, plan_hash, loss tokens, documents, bad samples; and the state after the last."""
    found: dict[int, list[int]] = {}
    for rank in range(world):
        place = {"rank": rank, "world_size": world, "micro_batch_size": 2}
        loader = Loader(
            Plan(sources, data, 5, BATCH), FakeProcessor(), data, seed=5, state=state, stop_step=stop, **place
        )
        for step in loader:
            entry = found.setdefault(step.step, [0, 0, 0, 0, 0])
            for batch in step.micro_batches:
                entry[0] = (entry[0] + batch.data_hash) % 2**64
                entry[1] = (entry[1] + batch.plan_hash) % 2**64
            entry[2] += step.loss_tokens
            entry[3] += step.documents
            entry[4] += len(step.bad)
            last = json.loads(json.dumps(step.state))
    return {step: tuple(entry) for step, entry in found.items()}, last


def damaged(folder: Path) -> None:
    """Flips a byte in an image of the middle of a shard, after it was indexed."""
    path = sorted((folder / "pages").glob("*.tar"))[1]
    status = path.stat()
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT", len(data) // 2) + 10
    data[place] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(("stop", "first", "second"), [(1, 1, 3), (7, 3, 8), (13, 8, 2), (14, 5, 1), (23, 2, 5)])
def test_any_stop_continues_on_any_number_of_ranks(tmp_path: Path, stop: int, first: int, second: int) -> None:
    mixture = MixtureConfig(by="tokens", schedule={8: {"pages": 0.5}})
    sources, data = make_sources(tmp_path, mixture=mixture)
    damaged(tmp_path)
    whole, final = hashes(sources, data, 1)
    assert min(stream["epoch"] for stream in final["streams"].values()) >= 1, "no epoch changes in these steps"
    assert sum(entry[4] for entry in whole.values()) > 0, "no bad sample in these steps"
    begun, state = hashes(sources, data, first, stop=stop)
    between, state = hashes(sources, data, 3, state, stop=stop + 1)
    rest, _ = hashes(sources, data, second, state) if stop + 1 < STEPS else ({}, None)
    assert begun | between | rest == whole
    assert set(rest) == set(range(stop + 2, STEPS + 1))
    assert len(json.dumps(state)) < 100_000


def varied_sources(folder: Path, **changes):
    """Sources whose every option draws something, one of which leaves the mixture after two epochs."""
    _, data = make_sources(
        folder,
        augment=AugmentConfig(shift_pixels=2, crop_scale=[0.6, 1.0]),
        mixture=MixtureConfig(by="images"),
        **changes,
    )
    pages, digits = data.sources["pages"], data.sources["digits"]
    pages.documents = DocumentOptions(end_marker="document", max_images=2)
    digits.conversations = ConversationOptions(shuffle_turns=True, newline_probability=0.5, system_prompt="Look.")
    digits.epochs = 2
    return build_sources(data.sources, data, FakeProcessor()), data


def test_variants_and_augmentations_are_the_same_after_a_stop(tmp_path: Path) -> None:
    sources, data = varied_sources(tmp_path)
    whole, final = hashes(sources, data, 1)
    assert final["active"] == ["pages"]
    begun, state = hashes(sources, data, 2, stop=7)
    rest, _ = hashes(sources, data, 3, state)
    assert begun | rest == whole
    plain, _ = hashes(sources, replace(data, augment=AugmentConfig()), 1, stop=1)
    assert plain[1][0] != whole[1][0]


@pytest.mark.full
@pytest.mark.slow
def test_every_stop_continues_on_every_number_of_ranks_and_workers(tmp_path: Path) -> None:
    """Every stop of a run with changes of epoch and of schedule, a damaged sample and every option that draws."""
    sources, data = varied_sources(tmp_path)
    data = replace(data, mixture=MixtureConfig(by="tokens", schedule={8: {"pages": 0.5}}))
    damaged(tmp_path)
    whole, _ = hashes(sources, data, 1)
    states = [step.state for step, _ in zip(Plan(sources, data, 5, BATCH).steps(), range(STEPS))]
    for stop in range(1, STEPS):
        for world in (1, 2, 3, 5, 8):
            rest, _ = hashes(sources, data, world, states[stop - 1])
            assert rest == {step: entry for step, entry in whole.items() if step > stop}
    for stop, world, workers in ((3, 2, 1), (8, 1, 3), (15, 3, 1), (20, 5, 3)):
        rest, _ = hashes(sources, replace(data, num_workers=workers), world, states[stop - 1])
        assert rest == {step: entry for step, entry in whole.items() if step > stop}


def test_every_cut_of_the_run_gives_the_same_rest(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 5, BATCH)
    whole = [step for step, _ in zip(plan.steps(), range(STEPS))]
    for stop in range(1, STEPS):
        state = json.loads(json.dumps(whole[stop - 1].state))
        assert [step for step, _ in zip(plan.steps(state), range(STEPS - stop))] == whole[stop:]


@pytest.mark.slow
def test_any_stop_continues_on_any_number_of_workers(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    whole, _ = hashes(sources, data, 1)
    begun, state = hashes(sources, replace(data, num_workers=3), 1, stop=6)
    middle, state = hashes(sources, replace(data, num_workers=1), 2, state, stop=11)
    rest, _ = hashes(sources, data, 3, state)
    assert begun | middle | rest == whole


@pytest.mark.slow
def test_kill_9_leaves_nothing_behind_and_the_rest_is_the_same(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    whole, _ = hashes(sources, data, 1)
    state, reached, seen = None, 0, {}
    for workers, more in ((3, 5), (1, 4)):
        family, shared, lines = run_until_killed(tmp_path, workers, state, more)
        assert wait_until_gone(family), "processes outlive the killed trainer"
        assert shared, "no shared memory was seen"
        left = [path for path in shared | tensors_of(family) if path.exists()]
        assert not left, "shared memory outlives the killed trainer"
        seen |= {line["step"]: line["hash"] for line in lines}
        state, reached = lines[-1]["state"], lines[-1]["step"]
    assert list(seen) == list(range(1, reached + 1))
    assert seen == {step: whole[step][0] for step in seen}
    rest, _ = hashes(sources, data, 2, state)
    assert rest == {step: entry for step, entry in whole.items() if step > reached}


def run_until_killed(
    folder: Path, workers: int, state, lines: int
) -> tuple[list[psutil.Process], set[Path], list[dict]]:
    """Runs `main` until it has written so many steps, then kills it; its processes, what they shared, the steps."""
    output, errors = folder / "steps.jsonl", folder / "errors.txt"
    output.write_text("")
    running = warm.start(main, folder, workers, state, output=output, errors=errors, ready=1)
    deadline = time.monotonic() + 120
    while output.read_text().count("\n") < lines:
        assert running.poll() is None, running.said()
        assert time.monotonic() < deadline, running.said()
        time.sleep(0.01)
    trainer = psutil.Process(running.pid)
    family = [trainer, *trainer.children(recursive=True)]
    assert len(family) >= workers + 3, "no planning process, or workers missing"
    shared = shared_by(family)
    running.kill()
    running.wait(timeout=60)
    return (
        family,
        shared,
        [json.loads(line) for line in output.read_text().splitlines(keepends=True) if line[-1] == "\n"],
    )


def wait_until_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=30)[1]


def shared_by(family: list[psutil.Process]) -> set[Path]:
    """The files of shared memory that these processes hold, semaphores too; those of other programs are in the same place."""
    held = (Path(memory.path) for process in family for memory in process.memory_maps())
    return tensors_of(family) | {path for path in held if path.parent == SHARED}


def tensors_of(family: list[psutil.Process]) -> set[Path]:
    return {path for process in family for path in SHARED.glob(f"torch_{process.pid}_*")}


def main(folder: Path, workers: int, state) -> None:
    """The program that is killed: one step a line, slowly."""
    sources, data = make_sources(folder, write=False, num_workers=workers)
    for step in Loader(Plan(sources, data, 5, BATCH), FakeProcessor(), data, seed=5, micro_batch_size=2, state=state):
        total = sum(batch.data_hash for batch in step.micro_batches) % 2**64
        print(json.dumps({"step": step.step, "hash": total, "state": step.state}), flush=True)
        time.sleep(0.05)


def test_a_dead_planning_process_ends_the_run(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, num_workers=1)
    batches = iter(Loader(Plan(sources, data, 5, BATCH), FakeProcessor(), data, seed=5, micro_batch_size=2))
    next(batches)
    [planner] = [p for p in psutil.Process().children(recursive=True) if "m4train-plan" in names_of(p)]
    os.kill(planner.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="planning process died"):
        list(batches)


def names_of(process: psutil.Process) -> str:
    from multiprocessing import active_children

    return " ".join(child.name for child in active_children() if child.pid == process.pid)
