"""Training of published architectures on one GPU: speed, share of the peak, memory, data wait and kernels, next to transformers.

    pip install 'm4train[peers,digits]'        # or -e '.[peers,digits]' in a checkout
    python gpu.py [--minutes 8] [--cases idefics3_8b_lora ...] [--out results.json]
    python gpu.py --device cpu --scale tiny        # the same at sizes that a CPU computes

This file alone is enough next to an installed m4train. It downloads nothing: weights are random and made on the device, samples
(conversations of 1 to 4 images) are made here. Each model is measured in a process of its own, which has a share of the minutes:
one that fails, runs out of memory or hangs takes nothing from the others. What there is no time for is left out and named; results
are written after each measurement. Per model and length of a pack: compiled and not, tokens and images a second, the share of the
peak by exact operations, the most memory that was held against `m4train estimate`; the same samples through transformers, padded,
with its kernels sdpa and flash_attention_2; how long a run of `m4train train` waits for data; and the ten kernels that take longest.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m4train.batch import PackedBatch, PackedImages, Segments
from m4train.commands.estimate import architecture_of
from m4train.config import Config
from m4train.config.compose import load_config
from m4train.data.shards import ShardWriter
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
DATA, ESTIMATES = "data", "estimates"  # the parts that are not a model
TEXT = "river hill cloud stone path tree light water house window people walking under green sky"
WORDS = TEXT.split()
GRACE = 5.0  # seconds before the end of its share at which a process ends by itself


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
        self.config.data.images_per_pack = max(1, self.images)  # the most that an estimate expects

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
        """All samples end to end."""
        images = self._images([grid for sample in self.samples for grid in sample.grids])
        return packed([sample.ids for sample in self.samples], self.image_id, images)

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
        batches = [self.samples[start : start + BATCH] for start in range(0, len(self.samples), BATCH)]
        if len(batches) > 1 and not any(sample.grids for sample in batches[-1]):
            batches[-2:] = [batches[-2] + batches[-1]]  # its Idefics2 takes no batch without images
        for samples in batches:
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


def packed(samples: list[Tensor], image_id: int, images: PackedImages) -> PackedBatch:
    """Ids (T,) of each sample end to end; every token that is not of an image is predicted, but the first of a sample."""
    lengths = [len(ids) for ids in samples]
    ids, positions = torch.cat(samples), torch.cat([torch.arange(length) for length in lengths])
    targets = torch.nonzero((positions > 0) & (ids != image_id))[:, 0]
    return PackedBatch(
        input_ids=ids,
        position_ids=positions,
        segments=Segments.of(lengths),
        loss_positions=targets - 1,
        targets=ids[targets],
        target_sources=torch.zeros_like(targets),
        source_names=("made",),
        images=images,
        image_positions=torch.nonzero(ids == image_id)[:, 0],
    )


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


class Ours:
    """A model and its optimizer as the trainer of m4train has them."""

    def __init__(self, case: Case) -> None:
        with made_on(case.device, half(case)):
            self.model: Any = FAMILIES[case.config.model.family].model_class(case.architecture)
            self.model.loss_kind = case.config.model.loss
            equip(self.model, case.config)
        self._engine = SingleEngine(case.config, case.device)
        self._engine.prepare(self.model.train())

    def compiled(self) -> Ours:
        compile_blocks(self.model.blocks())
        return self

    def step(self, case: Case) -> Callable[[], Tensor]:
        """One optimizer step on the pack of a case; it gives the norm of the gradient ()."""
        batch, engine = case.packed(), self._engine

        def run() -> Tensor:
            sums = StepSums(["made"], engine.device)
            run_micro_batches(engine, [batch], batch.loss_tokens, 0.0, sums)
            return engine.update(1.0, 1.0).total

        return run

    def described(self, case: Case, seconds: float) -> dict[str, Any]:
        """What a step that takes so many seconds computes."""
        counter, peak = Throughput(self.model), peak_flops(case.device)
        counter.add(case.packed())
        tflops = counter.rates(seconds, torch.device("cpu"))["tflops"]
        return {"tflops": tflops, "mfu": tflops * 1e12 / peak if peak else None}


class Theirs:
    """The same model of transformers, with its optimizer as its Trainer has it."""

    def __init__(self, case: Case, kernels: str) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForImageTextToText

        if kernels == "flash_attention_2" and not (
            case.device.type == "cuda" and importlib.util.find_spec("flash_attn")
        ):
            raise LookupError("the package flash-attn is not installed, or this is not a GPU")
        transformers.logging.set_verbosity_error()
        adapter = case.config.adapter.kind
        if adapter == "qlora":
            raise LookupError("transformers quantises only what it reads from a file")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(case.architecture.to_dict()), encoding="utf-8")
            config = AutoConfig.from_pretrained(folder)
        with made_on(case.device, half(case) if adapter != "none" else torch.float32):
            model = AutoModelForImageTextToText.from_config(config, attn_implementation=kernels)
        if adapter == "lora":
            from peft import LoraConfig, get_peft_model

            adapted = LoraConfig(r=16, lora_alpha=32, target_modules=rf".*text_model.*({'|'.join(TARGETS)})")
            model = get_peft_model(model, adapted)
        if case.config.trainer.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if adapter != "none":
                model.enable_input_require_grads()
        self._model = model.train()
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-5, fused=case.device.type == "cuda")

    def step(self, case: Case) -> Callable[[], Tensor]:
        """One optimizer step on the padded batches of a case; it gives the norm of the gradient ()."""
        batches, device, half_precision = list(case.padded()), case.device, case.device.type == "cuda"

        def run() -> Tensor:
            for batch in batches:
                given = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=half_precision):
                    loss = self._model(**given, use_cache=False).loss
                (loss / len(batches)).backward()
            norm = torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            return norm

        return run

    def described(self, case: Case, seconds: float) -> dict[str, Any]:
        return {}


def measured(case: Case, side: Ours | Theirs, seconds: float) -> dict[str, Any]:
    """Rates and memory of a side, timed for about `seconds` after two steps that warm up."""
    cuda = case.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step, taken = side.step(case), []
    while len(taken) < 3 or (sum(taken[2:]) < seconds and len(taken) < 52):
        started = time.perf_counter()
        norm = step()
        wait()
        taken.append(time.perf_counter() - started)
    if not bool(torch.isfinite(norm)):
        raise FloatingPointError("the gradient is not finite")
    each = statistics.median(taken[2:])
    found = {"step_seconds": each, "first_step_seconds": taken[0], "steps": len(taken) - 2}
    found |= {"tokens_per_second": case.tokens / each, "images_per_second": case.images / each}
    found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return found | side.described(case, each)


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


def photo(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of patches of colour with some noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.clip(np.asarray(coarse, np.int16) + rng.integers(-8, 9, (height, width, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def write_samples(folder: Path, samples: int) -> None:
    """Documents of about 300 words and two photos, in shards of a hundred."""
    rng = np.random.default_rng(0)
    photos = [photo(rng, 640, 480) for _ in range(16)]
    with ShardWriter(folder, max_samples=100) as writer:
        for number in range(samples):
            texts = [" ".join(rng.choice(WORDS, rng.integers(40, 160))) for _ in range(3)]
            items = [{"text": texts[0]}, {"image": "0.jpg"}, {"text": texts[1]}, {"image": "1.jpg"}, {"text": texts[2]}]
            images = {f"{place}.jpg": photos[int(rng.integers(16))] for place in range(2)}
            writer.write(f"{number:06d}", {"items": items}, images)


def data_overrides(folder: str, options: argparse.Namespace) -> list[str]:
    """A run on photos, of a model of the size of SmolVLM-256M."""
    overrides = ["experiment=digits_pretrain", f"data.root={folder}/digits", f"run_dir={folder}/run"]
    overrides += [f"data.sources={{photos: {{path: {folder}/photos}}}}", "data.validation={}"]
    overrides += [
        "adapter=none",
        "freeze=full",
        "schedule.warmup_steps=0",
        "trainer.max_steps=12",
        "trainer.log_every=4",
    ]
    overrides += ["trainer.save_every=100", "trainer.eval_every=0", "logging.wandb.mode=disabled"]
    overrides += ["trainer.global_batch_size=1", "trainer.micro_batch_size=1"]
    if options.scale == "tiny":
        return overrides
    whole = architecture_of(configuration("smolvlm_256m_full", 4096, options))[0].to_dict()
    own = {key: whole["text_config"][key] for key in TEXT_KEYS}
    seen = {key: whole["vision_config"][key] for key in VISION_KEYS}
    overrides += [f"model.architecture={{scale_factor: 4, text_config: {flow(own)}, vision_config: {flow(seen)}}}"]
    overrides += ["model.processor={size: {longest_edge: 1024}, max_image_size: {longest_edge: 512}}"]
    precision = "bf16" if options.device == "cuda" else "fp32"
    overrides += ["data.sequence_length=4096", "data.images_per_pack=64", f"trainer.precision={precision}"]
    return [*overrides, "trainer.gradient_checkpointing=true"]


def data_wait(options: argparse.Namespace) -> dict[str, float]:
    """What a run of `m4train train` on photos that it reads, decodes and tiles says of its speed and its wait for them."""
    from data_pipelines import digits
    from m4train import api

    with tempfile.TemporaryDirectory() as folder:
        digits.prepare(f"{folder}/digits")  # for its tokenizer
        write_samples(Path(folder, "photos"), 64 if options.scale == "tiny" else 400)
        lines = api.train(load_config(data_overrides(folder, options))).metrics[1:]
    names = ("data_wait_fraction", "tokens_per_second")
    return {name: statistics.median(line[name] for line in lines) for name in names}


TEXT_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
VISION_KEYS = (*TEXT_KEYS[:4], "image_size", "patch_size")


def flow(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


class Results:
    """What was found, and what was left out; written to a file after each measurement."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.ends = options.until or time.time() + 60 * options.minutes
        self.path, self.rows, self.left_out = Path(options.out), [], {}
        self.whole: dict[str, Any] = {"torch": torch.__version__, "scale": options.scale}
        self._lock = threading.Lock()
        self._longest: dict[str, float] = {}  # seconds of a measurement so far, by its kind
        self._first = 15.0 if options.device == "cuda" else 1.0
        self.current = "start"

    def left(self) -> float:
        return self.ends - time.time()

    def watch(self) -> None:
        """From now on time is up even for a measurement that hangs: the process then ends."""
        guard = threading.Timer(max(0.0, self.left()), self._out_of_time)
        guard.daemon = True
        guard.start()

    def try_to(self, name: str, measure: Callable[[], Any], kind: str) -> None:
        """Notes what `measure` finds under `name`, or why it finds nothing: others of its kind took longer than there is, or it
        fails, if only for memory."""
        needed = 1.2 * self._longest.get(kind, self._first)
        if needed > self.left():
            self.left_out[name] = f"needs about {needed:.0f} s, more than is left"
            return
        started, self.current = time.time(), name
        try:
            found = measure()
        except LookupError as error:
            self.left_out[name] = str(error.args[0])
        except Exception as error:  # whatever it is, the other measurements have nothing to do with it
            self.left_out[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            self.rows.append({"name": name, **found})
            print(line(self.rows[-1]), flush=True)
        self._longest[kind] = max(self._longest.get(kind, 0.0), time.time() - started)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.write()

    def add(self, part: str, found: dict[str, Any], failed: str | None) -> None:
        """What the process of a part has written, and how it failed if it did."""
        self.rows += found.pop("rows", [])
        self.left_out |= found.pop("left_out", {})
        self.whole |= found
        if failed is not None:
            self.left_out[part] = failed
        self.write()

    def write(self) -> None:
        with self._lock:
            whole = {**self.whole, "rows": self.rows, "left_out": self.left_out}
            self.path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def _out_of_time(self) -> None:
        self.left_out[self.current] = "was not done when time was up"
        self.write()
        os._exit(0)

    def tell(self) -> None:
        rows = {row["name"]: row for row in self.rows}
        for name, row in rows.items():
            mine = rows.get(name.replace("estimate", "m4train"), {}).get("memory_gib")
            if "estimated_gib" in row and mine is not None:
                print(f"{name}: {row['estimated_gib']:.2f} GiB, held {mine:.2f}", flush=True)
        for name, reason in self.left_out.items():
            print(f"left out: {name}: {reason}", flush=True)
        print(f"written: {self.path}", flush=True)


def line(row: dict[str, Any]) -> str:
    if "kernels" in row:
        return "\n".join([row["name"], *(f"  {share:6.1%}  {kernel[:100]}" for kernel, share in row["kernels"])])
    values = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    return f"{row['name']}: {', '.join(values)}"


def measure_model(name: str, options: argparse.Namespace, results: Results) -> None:
    """All measurements of one model, what matters most first."""
    lengths = options.lengths or LENGTHS[options.scale]
    cases = {length: Case(name, length, options) for length in lengths}

    def both(
        title: str, make: Callable[[], Ours | Theirs], kind: str, then: Callable[[Any], Any] | None = None
    ) -> None:
        made: list[Ours | Theirs] = []  # one for all lengths, gone when they are measured

        def measure(case: Case) -> dict[str, Any]:
            if not made:
                made.append(make())
            return measured(case, made[0], options.seconds)

        for length, case in cases.items():
            results.try_to(f"{name} {length} {title}", lambda case=case: measure(case), kind)
        if then is not None and made:
            then(made[0])

    def kernels(side: Ours) -> None:
        case = cases[lengths[0]]
        profiled = lambda: {"kernels": top_kernels(case, side.step(case))}
        results.try_to(f"{name} {lengths[0]} m4train kernels", profiled, "kernels")

    first = cases[lengths[0]]
    both("m4train", lambda: Ours(first), "m4train", kernels)
    if options.peers:
        both("transformers sdpa", lambda: Theirs(first, "sdpa"), "sdpa")
    if options.compile:
        both("m4train compiled", lambda: Ours(first).compiled(), "compiled")
    if options.peers:
        both("transformers flash_attention_2", lambda: Theirs(first, "flash_attention_2"), "flash")


def measure_part(options: argparse.Namespace, watched: bool) -> None:
    """One model, or the data of a run, in this process."""
    results = Results(options)
    results.whole["device"] = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    if watched:
        results.watch()
    if options.part == DATA:
        results.try_to("data of a run", lambda: data_wait(options), DATA)
    elif options.part == ESTIMATES:
        for name in options.cases:
            for length in options.lengths or LENGTHS[options.scale]:
                found = lambda name=name, length=length: {"estimated_gib": estimated(Case(name, length, options))}
                results.try_to(f"{name} {length} estimate", found, ESTIMATES)
    else:
        measure_model(options.part, options, results)
    results.write()


def command(part: str, until: float, out: str, given: list[str]) -> list[str]:
    """The command that measures a part until `until` (seconds since the epoch)."""
    return [sys.executable, __file__, *given, "--part", part, "--until", str(until), "--out", out]


class Part:
    """The process that measures a part, which ends within so many seconds."""

    def __init__(self, part: str, seconds: float, given: list[str]) -> None:
        self.part, self._seconds, self._ends = part, seconds, time.time() + seconds
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._said = Path(self._folder.name, "found.json"), Path(self._folder.name, "stderr")
        words = command(part, self._ends - GRACE, str(self._out), given)
        with self._said.open("wb") as stderr:
            self._process = subprocess.Popen(words, stderr=stderr, start_new_session=True)

    def found(self) -> tuple[dict[str, Any], str | None]:
        """What it has written when it has ended, and how it failed, if it did."""
        failed = None
        try:
            ended = self._process.wait(timeout=max(0.0, self._ends - time.time()))
            if ended != 0:
                last = self._said.read_text(errors="replace").strip().splitlines()[-1:]
                failed = f"its process ended with status {ended}" + "".join(f" ({words})" for words in last)
        except subprocess.TimeoutExpired:
            failed = f"hung, and was killed after its {self._seconds:.0f} s"
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        with self._folder:
            return (json.loads(self._out.read_text(encoding="utf-8")) if self._out.exists() else {}), failed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scale", default="full", choices=tuple(LENGTHS))
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=tuple(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a pack")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it has ended")
    parser.add_argument("--seconds", type=float, default=2.0, help="for which a side is timed")
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-data", dest="data", action="store_false")
    parser.add_argument("--part", choices=(*CASES, DATA, ESTIMATES), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if options.part is not None:
        measure_part(options, watched=arguments is None)
        return
    results = Results(options)
    parts = [*options.cases, *[DATA] * options.data]
    estimates = Part(ESTIMATES, results.left(), given)  # on the CPU, next to the others
    for number, part in enumerate(parts):
        # A part may take half as much again as its share, since others take less.
        share = min(1.0, 1.5 / (len(parts) - number)) * results.left()
        results.add(part, *Part(part, share, given).found())
    results.add(ESTIMATES, *estimates.found())
    results.tell()


if __name__ == "__main__":
    sys.exit(main())
