"""How time and memory grow with what a run is given.

    PYTHONPATH=. python benchmarks/growth.py memory [--steps 10000]    # of a real run, over its steps
    PYTHONPATH=. python benchmarks/growth.py steps                     # time of a step, against tokens, frames, documents
    PYTHONPATH=. python benchmarks/growth.py data [--samples 1000000]  # index and plan, against samples
    PYTHONPATH=. python benchmarks/growth.py files                     # checkpoint and export, against parameters
    PYTHONPATH=. python benchmarks/growth.py evaluation                # held-out loss and answers, against the batch

Times are of the processor, one thread, the least of some turns. An exponent is that of a power of the size that fits best, in
logarithms: 1 is linear, less is a part that does not grow.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from m4train.config import Config, DataConfig
from m4train.training.callbacks.base import Callback

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Memory(Callback):
    """Notes every `every` steps the MiB that belong to the trainer alone, and those of all processes that it started."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.begun = time.perf_counter()
        self.rows: list[tuple[int, float, float, float]] = []  # step, trainer, others, seconds

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step % self.every == 0:
            process = psutil.Process()
            own, others = _own(process), sum(map(_own, process.children(recursive=True)))
            self.rows.append((trainer.step, own, others, time.perf_counter() - self.begun))
            print(f"memory after {trainer.step} steps: {own:.1f} MiB", flush=True)

    def slope(self, column: int) -> tuple[float, float]:
        """MiB more for each 1,000 steps in the last three quarters of the run, and the standard error of that."""
        rows = np.array(self.rows[len(self.rows) // 4 :])
        (slope, _), covariance = np.polyfit(rows[:, 0] / 1000, rows[:, column], 1, cov=True)
        return float(slope), float(np.sqrt(covariance[0, 0]))


def _own(process: psutil.Process) -> float:
    try:
        held = process.memory_full_info()
        return (held.uss + held.swap) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def tiny_run(run_dir: Path, data: Path, steps: int, *overrides: str) -> list[str]:
    """A real run of a very small Idefics3 on digits, with held-out losses and checkpoints twenty times."""
    architecture = [
        f"model.architecture.{part}.{key}={value}"
        for part in ("text_config", "vision_config")
        for key, value in TINY.items()
    ]
    return [
        "experiment=digits_pretrain",
        f"run_dir={run_dir}",
        f"data.root={data}",
        *architecture,
        "model.architecture.text_config.num_key_value_heads=1",
        f"trainer.max_steps={steps}",
        f"trainer.save_every={steps // 20}",
        f"trainer.eval_every={steps // 20}",
        "trainer.global_batch_size=2",
        "trainer.micro_batch_size=1",
        "data.sequence_length=96",
        "data.images_per_pack=8",
        "threads=1",
        *overrides,
    ]  # fmt: skip


def memory(steps: int, *overrides: str) -> Memory:
    """Trains `steps` steps and watches."""
    from m4train import load_config, train

    watch = Memory(max(1, steps // 20))
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        done = train(load_config(tiny_run(run_dir, Path(folder) / "data", steps, *overrides)), callbacks=[watch])
        assert done.step == steps, done
    return watch


def show_memory(steps: int) -> None:
    watch = memory(steps)
    print("| step | trainer, MiB | its other processes, MiB | seconds |\n| --- | --- | --- | --- |")
    for step, own, others, seconds in watch.rows:
        print(f"| {step:,} | {own:.1f} | {others:.1f} | {seconds:.0f} |")
    for name, column in (("trainer", 1), ("other processes", 2)):
        slope, error = watch.slope(column)
        print(f"{name}: {slope:+.3f} MiB for each 1,000 steps (standard error {error:.3f})")


def least(work: Callable[[], Any], turns: int = 3) -> float:
    """Processor seconds of `work`, the least of some turns after one for a warm-up."""
    work()
    taken = []
    for _ in range(turns):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken)


def show(title: str, sizes: Sequence[float], seconds: Sequence[float]) -> None:
    """A row a size, and the exponent over all of them."""
    exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    cells = ", ".join(f"{size:,.0f}: {1000 * taken:,.1f} ms" for size, taken in zip(sizes, seconds, strict=True))
    print(f"{title}: {cells}; exponent {exponent:.2f}", flush=True)


def show_steps() -> None:
    """Forward, backward and update of one micro-batch."""
    from benchmarks.training import SIZES, Sample, packed, saved
    from m4train import Idefics3ForConditionalGeneration
    from m4train.training.engines.single import SingleEngine
    from m4train.training.step import run_micro_batches

    config, rng = Config(name="benchmark"), np.random.default_rng(0)
    config.trainer.precision = "fp32"
    with tempfile.TemporaryDirectory() as folder:
        saved(folder, "tiny")
        engine = SingleEngine(config, "cpu")
        engine.prepare(Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train())
    ids, side, patch = SIZES["tiny"][0], *SIZES["tiny"][-2:]
    per_frame = (side // patch // 2) ** 2

    def seconds(documents: int, tokens: int, frames: int) -> float:
        """Of a pack of `documents` that share tokens and frames evenly."""
        samples = []
        for _ in range(documents):
            text = torch.from_numpy(rng.integers(10, ids, tokens // documents))
            text[: frames // documents * per_frame] = 3
            shape = (frames // documents, 3, side, side)
            samples.append(Sample(text, torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))))
        batch = packed(samples)

        def step() -> None:
            run_micro_batches(engine, [batch], batch.loss_tokens, 0.0, None)
            engine.update(1.0, 1.0)

        return least(step)

    for title, shapes in {
        "tokens, in documents of 256": [(n // 256, n, n // 256) for n in (1024, 2048, 4096, 8192)],
        "tokens, in one document": [(1, n, 1) for n in (1024, 2048, 4096, 8192)],
        "frames, of 2,048 tokens": [(1, 2048, n) for n in (16, 32, 64, 128)],
        "documents, of 4,096 tokens": [(n, 4096, 64) for n in (1, 4, 16, 64)],
    }.items():
        place = {"documents": 0, "tokens": 1, "frames": 2}[title.partition(",")[0]]
        show(title, [shape[place] for shape in shapes], [seconds(*shape) for shape in shapes])


def show_data(most: int) -> None:
    """An index is built of real shards of short texts; plans are made from indexes alone, which describe documents of OBELICS."""
    from m4train.config import SourceConfig
    from m4train.data.plan.plan import Plan
    from m4train.data.source import build_sources
    from tests.helpers.data import FakeProcessor, data_config, synthetic_source, write_shards

    sizes = [10**n for n in range(3, 8) if 10**n <= most]
    taken = []
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # else shards are indexed side by side, by other processes
    for count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            texts = ((f"{n:07d}", {"items": [{"text": f"Text {n} of many."}]}, {}) for n in range(count))
            write_shards(Path(folder), texts, max_samples=10_000)
            begun = time.process_time()
            data = data_config(auto_index_limit=most)
            build_sources({"s": SourceConfig(path=f"{folder}/*.tar")}, data, FakeProcessor())
            taken.append(time.process_time() - begun)
    show("index, samples", sizes, taken)

    sizes = [10**n for n in range(3, 8) if 10**n <= most]
    first, each, memory, late = [], [], [], []
    for count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            stored = pickle.dumps(synthetic_source(Path(folder), count, max(1, count // 10_000)))
            before = psutil.Process().memory_full_info().uss
            begun = time.process_time()
            source = pickle.loads(stored)
            steps = Plan([source], DataConfig(sequence_length=8192), 0, 16).steps()
            next(steps)
            first.append(time.process_time() - begun)
            begun = time.process_time()
            for _ in range(10):
                state = next(steps).state
            each.append((time.process_time() - begun) / 10)
            state["streams"]["web"]["position"] = count // 2
            begun = time.process_time()
            next(Plan([source], DataConfig(sequence_length=8192), 0, 16).steps(state))
            late.append(time.process_time() - begun)
            memory.append((psutil.Process().memory_full_info().uss - before) / 2**20)
    show("plan, from opening the index to the first step, samples", sizes, first)
    show("plan, each step of 16 packs, samples", sizes, each)
    show("plan, the first step after a stop in the middle, samples", sizes, late)
    print("plan, memory: " + ", ".join(f"{n:,}: {m:.1f} MiB" for n, m in zip(sizes, memory, strict=True)))


def show_files() -> None:
    """One save within the loop, and an export that is not verified."""
    from m4train import build
    from m4train.cli import main as m4train
    from tests.helpers.checkpoints import save, saved_run

    sizes, saves, exports = [], [], []
    for layers in (2, 8, 24):
        with tempfile.TemporaryDirectory() as folder:
            text = f"model.architecture.text_config={{hidden_size: 256, intermediate_size: 1024, num_hidden_layers: {layers}}}"
            config, model = saved_run(Path(folder) / "run", text)
            processor = build.build_processor(config)
            started = time.process_time()
            save(replace(config, run_dir=str(Path(folder) / "again")), model, processor)
            saves.append(time.process_time() - started)
            sizes.append(sum(parameter.numel() for parameter in model.parameters()))
            started = time.process_time()
            assert m4train(["export", f"run_dir={folder}/run", "export.verify=false"]) == 0
            exports.append(time.process_time() - started)
    show("checkpoint, parameters", sizes, saves)
    show("export, parameters", sizes, exports)


def show_evaluation() -> None:
    """Held-out loss of 64 packs of 512 tokens against the packs of a batch, and 24 answers against the questions of one."""
    from benchmarks.generation import answered, inputs, questions
    from benchmarks.generation import saved as saved_model
    from m4train import Idefics3ForConditionalGeneration
    from tests.unit.models.test_packing import documents_of, make

    model, build, per_image = make("idefics3", torch.float32)
    documents = [(ids, [image.float() for image in own]) for ids, own in documents_of([(400, 3)] * 64, per_image)]
    sizes = (1, 2, 4, 8, 16)

    def loss(size: int) -> float:
        batches = [build(documents[start : start + size]) for start in range(0, len(documents), size)]
        with torch.inference_mode():
            return least(lambda: [model(batch) for batch in batches])

    show("held-out loss, packs a batch, time for all", sizes, [loss(size) for size in sizes])
    with tempfile.TemporaryDirectory() as folder:
        processor = saved_model(Path(folder), "tiny")
        model = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        asked = questions(24, 1)
        taken = []
        for size in (1, 2, 4, 8, 24):
            parts = [inputs(processor, asked[at : at + size]) for at in range(0, len(asked), size)]
            taken.append(min(answered(model, parts)[0] for _ in range(2)))
    show("answers, questions a batch, time for all", (1, 2, 4, 8, 24), taken)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "steps", "data", "files", "evaluation"])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.what == "memory":
        show_memory(options.steps)
    elif options.what == "data":
        show_data(options.samples)
    else:
        {"steps": show_steps, "files": show_files, "evaluation": show_evaluation}[options.what]()


if __name__ == "__main__":
    main()
