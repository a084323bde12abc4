"""Training of published architectures on one GPU: speed, share of the peak, memory, data wait and kernels, next to transformers.

    pip install -e '.[peers,digits]'
    PYTHONPATH=. python benchmarks/gpu.py [--minutes 8] [--cases idefics3_8b_lora ...] [--out results.json]
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --scale tiny        # the same at sizes that a CPU computes

It downloads nothing: weights are random and made on the device, samples (conversations of 1 to 4 images) are made here. What no
longer fits into its minutes is left out and named; results are written after each measurement. Per case and length of a pack:
compiled and not, tokens and images a second, the share of the peak by exact operations, the most memory that was held against
`m4train estimate`; the same samples through transformers, padded, with its kernels sdpa and flash_attention_2; how long a run of
`m4train train` waits for data; and the ten kernels that take longest.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor

from m4train.batch import PackedBatch, PackedImages, Segments
from m4train.commands.estimate import architecture_of
from m4train.config import Config
from m4train.config.compose import load_config
from m4train.estimation.needs import Subject
from m4train.families import FAMILIES
from m4train.positions import patch_position_ids
from m4train.training.compiling import compile_blocks
from m4train.training.engines.single import SingleEngine
from m4train.training.equip import equip
from m4train.training.metrics import StepSums
from m4train.training.step import run_micro_batches
from m4train.training.throughput import Throughput, peak_flops

# name -> (model, adapter), in the order they are measured: what an interrupted run has is what matters most
CASES = {
    "idefics3_8b_lora": ("idefics3_8b", "lora"),
    "smolvlm_256m_full": ("smolvlm_256m", "none"),
    "smolvlm_2b_full": ("smolvlm_2b", "none"),
    "idefics2_8b_lora": ("idefics2_8b", "lora"),
    "idefics3_8b_qlora": ("idefics3_8b", "qlora"),
}
LENGTHS = {"full": (4096, 8192), "tiny": (128, 256)}
KERNELS = ("sdpa", "flash_attention_2")
BATCH = 4  # samples of a padded batch of transformers
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Sample:
    """`ids` (T,) with image tokens, and the grid of patches (rows, columns) of each image."""

    def __init__(self, ids: Tensor, grids: list[tuple[int, int]]) -> None:
        self.ids, self.grids = ids, grids


class Case:
    """A configuration, and batches for it."""

    def __init__(self, name: str, length: int, options: argparse.Namespace) -> None:
        self.name, self.length, self.device = name, length, torch.device(options.device)
        self.config = configuration(name, length, options)
        self.architecture, _ = architecture_of(self.config)
        if options.scale == "tiny":
            self.architecture = tiny(self.architecture)
        self.packed_patches = self.config.model.family == "idefics2"
        self.samples = self._samples()

    @property
    def image_id(self) -> int:
        return self.architecture.image_token_id

    def _samples(self) -> list[Sample]:
        """As many as fill a pack: 1 to 4 images and some text each."""
        draw, vision = torch.Generator().manual_seed(0), self.architecture.vision_config
        number = lambda low, high: int(torch.randint(low, high, (), generator=draw))
        per_image, side, made, used = self.architecture.tokens_per_image, vision.grid, [], 0
        while used < self.length:
            count = max(1, min(number(1, 5), (self.length - used) // (per_image + 1)))
            text = number(self.length // 32, self.length // 8)
            rows = lambda: number(max(1, side // 3), side + 1) if self.packed_patches else side
            ids = torch.randint(3, min(self.image_id, 30000), (text,), generator=draw)
            run = torch.full((per_image,), self.image_id)
            pieces = ids.tensor_split(count + 1)
            laid = torch.cat([part for piece in pieces for part in (piece, run)][:-1])[: self.length - used]
            whole = int((laid == self.image_id).sum()) // per_image
            if whole * per_image < int((laid == self.image_id).sum()):  # an image that was cut off is text
                places = torch.nonzero(laid == self.image_id)[whole * per_image :, 0]
                laid[places] = 3
            made.append(Sample(laid, [(rows(), rows()) for _ in range(whole)]))
            used += len(laid)
        return made

    def packed(self) -> PackedBatch:
        """All samples end to end; every token that is not of an image is predicted, but the first of a sample."""
        lengths = [len(sample.ids) for sample in self.samples]
        ids = torch.cat([sample.ids for sample in self.samples])
        positions = torch.cat([torch.arange(length) for length in lengths])
        targets = torch.nonzero((positions > 0) & (ids != self.image_id))[:, 0]
        return PackedBatch(
            input_ids=ids,
            position_ids=positions,
            segments=Segments.of(lengths),
            loss_positions=targets - 1,
            targets=ids[targets],
            target_sources=torch.zeros_like(targets),
            source_names=("made",),
            images=self._images([grid for sample in self.samples for grid in sample.grids]),
            image_positions=torch.nonzero(ids == self.image_id)[:, 0],
        )

    def _images(self, grids: list[tuple[int, int]]) -> PackedImages:
        vision, table = self.architecture.vision_config, (torch.arange(256) / 127.5 - 1.0).expand(3, 256).contiguous()
        draw = lambda *shape: torch.randint(0, 256, shape, dtype=torch.uint8)
        if not self.packed_patches:
            count = max(1, len(grids))
            return PackedImages(draw(count, 3, vision.image_size, vision.image_size), len(grids), table)
        shapes = grids or [(1, 1)]
        lengths, size = [rows * columns for rows, columns in shapes], vision.patch_size
        ids = torch.cat([patch_position_ids(rows, columns, vision.grid) for rows, columns in shapes])
        return PackedImages(draw(sum(lengths), 3, size, size), len(grids), table, Segments.of(lengths), ids)

    def padded(self) -> Iterator[dict[str, Tensor]]:
        """The same samples in batches of transformers, padded to the longest and to the most and largest images."""
        size = self.architecture.vision_config.patch_size
        for start in range(0, len(self.samples), BATCH):
            samples = self.samples[start : start + BATCH]
            length, count = max(len(s.ids) for s in samples), max(1, *(len(s.grids) for s in samples), 1)
            rows = max((rows for s in samples for rows, _ in s.grids), default=1) * size
            columns = max((columns for s in samples for _, columns in s.grids), default=1) * size
            ids, mask = torch.zeros(len(samples), length, dtype=torch.int64), torch.zeros(len(samples), length).long()
            pixels = torch.zeros(len(samples), count, 3, rows, columns)
            real = torch.zeros(len(samples), count, rows, columns, dtype=torch.int64)
            for row, sample in enumerate(samples):
                ids[row, : len(sample.ids)], mask[row, : len(sample.ids)] = sample.ids, 1
                for place, (down, across) in enumerate(sample.grids):
                    pixels[row, place, :, : down * size, : across * size] = torch.rand(3, down * size, across * size)
                    real[row, place, : down * size, : across * size] = 1
            labels = ids.masked_fill((mask == 0) | (ids == self.image_id), -100)
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels} | {
                "pixel_attention_mask": real
            }

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def images(self) -> int:
        return sum(len(sample.grids) for sample in self.samples)


def configuration(name: str, length: int, options: argparse.Namespace) -> Config:
    model, adapter = CASES[name]
    precision = "bf16" if options.device == "cuda" else "fp32"
    overrides = ["data=own", "data.sources={mine: {path: mine.json}}", f"model={model}", f"adapter={adapter}"]
    overrides += [f"freeze={'full' if adapter == 'none' else 'adapted_text'}", f"trainer.precision={precision}"]
    overrides += [f"data.sequence_length={length}", "data.images_per_pack=64", "trainer.micro_batch_size=1"]
    overrides += ["trainer.gradient_checkpointing=true"] * model.endswith(("8b", "2b"))
    overrides += ["freeze.frozen_dtype=bf16"] * (adapter != "none" and precision == "bf16")
    return load_config(overrides)


def tiny(architecture: Any) -> Any:
    """The same architecture with two narrow layers of each kind."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    whole = architecture.to_dict()
    text = {
        **whole["text_config"],
        **small,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "head_dim": 16,
        "pad_token_id": 0,
    }
    factor = whole.get("scale_factor") or 1
    vision = {**whole["vision_config"], **small, "image_size": 16 * factor, "patch_size": 8}
    changed = {**whole, "text_config": text, "vision_config": vision, "image_token_id": 500, "pad_token_id": 0}
    if "perceiver_config" in whole:
        perceiver = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
        changed["perceiver_config"] = {**perceiver, "resampler_head_dim": 16, "num_key_value_heads": 2}
    return type(architecture).from_dict(changed)


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of `dtype`, on `device`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def half(case: Case) -> torch.dtype:
    return torch.bfloat16 if case.device.type == "cuda" else torch.float32


def ours(case: Case, compiled: bool) -> tuple[Callable[[], Any], Any]:
    """A step of m4train, and its model."""
    with made_on(case.device, half(case)):
        model = FAMILIES[case.config.model.family].model_class(case.architecture)
        model.loss_kind = case.config.model.loss
        equip(model, case.config)
    if compiled:
        compile_blocks(model.blocks())
    engine = SingleEngine(case.config, case.device)
    engine.prepare(model.train())
    batch = case.packed()

    def step() -> Tensor:
        sums = StepSums(["made"], engine.device)
        run_micro_batches(engine, [batch], batch.loss_tokens, 0.0, sums)
        return engine.update(1.0, 1.0).total

    return step, model


def theirs(case: Case, kernels: str) -> tuple[Callable[[], Any], Any]:
    """A step of transformers as its Trainer makes it, on the same samples, padded."""
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText

    if kernels == "flash_attention_2" and not (case.device.type == "cuda" and importlib.util.find_spec("flash_attn")):
        raise LookupError("the package flash-attn is not installed, or this is not a GPU")
    transformers.logging.set_verbosity_error()
    adapter = case.config.adapter.kind
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(case.architecture.to_dict()), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder)
    with made_on(case.device, half(case) if adapter != "none" else torch.float32):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=kernels)
    if adapter == "qlora":
        raise LookupError("transformers quantises only what it reads from a file")
    if adapter == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules=rf".*text_model.*({'|'.join(TARGETS)})")
        )
    if case.config.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapter != "none":
            model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=case.device.type == "cuda")
    batches = list(case.padded())

    def step() -> Tensor:
        for batch in batches:
            given = {name: value.to(case.device, non_blocking=True) for name, value in batch.items()}
            with torch.autocast(case.device.type, torch.bfloat16, enabled=case.device.type == "cuda"):
                loss = model(**given, use_cache=False).loss
            (loss / len(batches)).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    return step, model


def measured(case: Case, make: Callable[[], tuple[Callable[[], Any], Any]], seconds: float) -> dict[str, Any]:
    """Rates and memory of a side, timed for about `seconds` after two steps that warm up."""
    cuda = case.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step, model = make()
    started = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - started
    step()
    wait()
    taken: list[float] = []
    while not taken or (sum(taken) < seconds and len(taken) < 50):
        started = time.perf_counter()
        norm = step()
        wait()
        taken.append(time.perf_counter() - started)
    assert bool(torch.isfinite(norm)), "the gradient is not finite"
    each = statistics.median(taken)
    found = {"step_seconds": each, "first_step_seconds": first, "steps": len(taken)}
    found |= {"tokens_per_second": case.tokens / each, "images_per_second": case.images / each}
    found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    if hasattr(model, "blocks"):
        counter = Throughput(model)
        counter.add(case.packed())
        found["tflops"] = counter.rates(each, torch.device("cpu"))["tflops"]
        peak = peak_flops(case.device)
        found["mfu"] = found["tflops"] * 1e12 / peak if peak else None
    return found


def estimated(case: Case) -> float:
    """GiB of tensors that `m4train estimate` expects."""
    stored = torch.bfloat16 if case.device.type == "cuda" else None
    subject = Subject(case.config, case.architecture, stored, 1, "h100" if case.device.type == "cuda" else None)
    return subject.memory().tensors / 2**30


def top_kernels(case: Case, step: Callable[[], Any]) -> list[tuple[str, float]]:
    """The ten kernels (on a CPU: operators) that take longest in two steps, with their share of all."""
    from torch.profiler import ProfilerActivity, profile

    cuda = case.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(2):
            step()
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(((row.key, float(getattr(row, name))) for row in seen.key_averages()), key=lambda row: -row[1])
    whole = sum(time for _, time in rows) or 1.0
    return [(kernel, time / whole) for kernel, time in rows[:10]]


def data_wait(options: argparse.Namespace) -> dict[str, float]:
    """What a run of `m4train train` on photos that it reads, decodes and tiles says of its speed and its wait for them."""
    from benchmarks.data import write_samples
    from data_pipelines import digits
    from m4train import api

    with tempfile.TemporaryDirectory() as folder:
        digits.prepare(f"{folder}/digits")
        write_samples(Path(folder, "photos"), 64 if options.scale == "tiny" else 400)
        overrides = [
            "experiment=digits_pretrain",
            f"data.root={folder}/digits",
            f"run_dir={folder}/run",
            "adapter=none",
        ]
        overrides += [f"data.sources={{photos: {{path: {folder}/photos}}}}", "data.validation={}", "freeze=full"]
        overrides += [
            "schedule.warmup_steps=0",
            "trainer.max_steps=12",
            "trainer.log_every=4",
            "trainer.save_every=100",
            "trainer.eval_every=0",
        ]
        overrides += ["trainer.global_batch_size=1", "trainer.micro_batch_size=1", "logging.wandb.mode=disabled"]
        if options.scale != "tiny":
            small = architecture_of(configuration("smolvlm_256m_full", 4096, options))[0].to_dict()
            own = {key: small["text_config"][key] for key in TEXT_KEYS}
            seen = {key: small["vision_config"][key] for key in VISION_KEYS}
            overrides += [
                f"model.architecture={{scale_factor: 4, text_config: {flow(own)}, vision_config: {flow(seen)}}}"
            ]
            overrides += ["model.processor={size: {longest_edge: 1024}, max_image_size: {longest_edge: 512}}"]
            overrides += ["data.sequence_length=4096", "data.images_per_pack=64", "trainer.gradient_checkpointing=true"]
        lines = api.train(load_config(overrides)).metrics[1:]
    return {
        name: statistics.median(line[name] for line in lines) for name in ("data_wait_fraction", "tokens_per_second")
    }


TEXT_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
VISION_KEYS = (*TEXT_KEYS[:4], "image_size", "patch_size")


def flow(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


class Results:
    """What was found, and what was left out; written to a file after each measurement."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.ends = time.monotonic() + 60 * options.minutes
        self.path, self.rows, self.left_out = Path(options.out), [], {}
        device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        self.whole = {"device": device, "torch": torch.__version__, "scale": options.scale}
        self._lock = threading.Lock()
        self._longest: dict[str, float] = {}  # seconds of a measurement so far, by its kind
        self._first = 25.0 if options.device == "cuda" else 1.0
        self.current = "start"
        self._guard = threading.Timer(60 * options.minutes, self._out_of_time)
        self._guard.daemon = True

    def watch(self) -> None:
        """From now on time is up even for a measurement that hangs: the process then ends."""
        self._guard.start()

    def try_to(self, name: str, measure: Callable[[], Any], kind: str) -> None:
        """Notes what `measure` finds under `name`, unless others of its kind took longer than there is or it cannot be done."""
        needed = 1.2 * self._longest.get(kind, self._first)
        if time.monotonic() + needed > self.ends:
            self.left_out[name] = f"needs about {needed:.0f} s, more than is left"
            return
        started, self.current = time.monotonic(), name
        try:
            found = measure()
        except LookupError as error:
            self.left_out[name] = str(error)
        except torch.OutOfMemoryError as error:
            self.left_out[name] = str(error).splitlines()[0]
        else:
            self.rows.append({"name": name, **found})
            print(line(self.rows[-1]), flush=True)
        self._longest[kind] = max(self._longest.get(kind, 0.0), time.monotonic() - started)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        with self._lock:
            whole = {**self.whole, "rows": self.rows, "left_out": self.left_out}
            self.path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def _out_of_time(self) -> None:
        self.left_out[self.current] = "was not done when time was up"
        self.write()
        self.tell()
        os._exit(0)

    def close(self) -> None:
        self._guard.cancel()
        self.write()
        self.tell()

    def tell(self) -> None:
        for name, reason in self.left_out.items():
            print(f"left out: {name}: {reason}", flush=True)
        print(f"written: {self.path}", flush=True)


def line(row: dict[str, Any]) -> str:
    if "kernels" in row:
        return "\n".join([row["name"], *(f"  {share:6.1%}  {kernel[:100]}" for kernel, share in row["kernels"])])
    values = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    return f"{row['name']}: {', '.join(values)}"


def measure_case(name: str, length: int, options: argparse.Namespace, results: Results) -> None:
    made: list[Case] = []

    def case() -> Case:
        if not made:
            made.append(Case(name, length, options))
        return made[0]

    def mine(compiled: bool) -> dict[str, Any]:
        found = measured(case(), lambda: ours(case(), compiled), options.seconds)
        return found | ({} if compiled else {"estimated_gib": estimated(case())})

    title = f"{name} {length}"
    results.try_to(f"{title} m4train", lambda: mine(False), "m4train")
    if options.compile:
        results.try_to(f"{title} m4train compiled", lambda: mine(True), "compiled")
    if options.peers:
        for kernels in KERNELS:
            side = f"{title} transformers {kernels}"
            other = lambda kernels=kernels: measured(case(), lambda: theirs(case(), kernels), options.seconds)
            results.try_to(side, other, kernels)
    if length == LENGTHS[options.scale][0]:
        profiled = lambda: {"kernels": top_kernels(case(), warm(ours(case(), False)[0]))}
        results.try_to(f"{title} m4train kernels", profiled, "kernels")


def warm(step: Callable[[], Any]) -> Callable[[], Any]:
    step()
    return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scale", default="full", choices=tuple(LENGTHS))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=tuple(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a pack")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it has ended")
    parser.add_argument("--seconds", type=float, default=6.0, help="for which a side is timed")
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-data", dest="data", action="store_false")
    options = parser.parse_args(arguments)
    results = Results(options)
    if arguments is None:
        results.watch()
    print(" ".join(str(value) for value in results.whole.values()), flush=True)
    for number, length in enumerate(options.lengths or LENGTHS[options.scale]):
        for name in options.cases:
            measure_case(name, length, options, results)
        if options.data and number == 0:
            results.try_to("data of a run", lambda: data_wait(options), "data")
    results.close()


if __name__ == "__main__":
    sys.exit(main())
