"""Training steps of m4train next to those of transformers' Trainer: the same Idefics3, the same samples, in turns.

    pip install -e '.[peers]'
    PYTHONPATH=. python benchmarks/training.py [--model tiny|20m|68m] [--kinds documents ...] [--pairs 5] [--scale 1.0] [--device auto]

Every pair is one optimizer step of each side on the same samples, made here: "documents" have lengths like those of OBELICS,
"conversations" 1 to 4 images, "equal" all one length, so that nothing is padded. m4train packs them, the Trainer pads batches of
`--batch` as the documented collators do. Pixels and ids are at hand for both; laying them into batches counts. On the CPU the
time is processor time of one thread, which other work on the machine distorts little. Memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from torch import Tensor

from benchmarks import gpu
from m4train import Idefics3Config, Idefics3ForConditionalGeneration
from m4train.batch import PackedBatch, PackedImages
from m4train.config import Config
from m4train.data.plan.packing import Packer, Unit
from m4train.models.products import product
from m4train.training.engines.single import SingleEngine
from m4train.training.metrics import StepSums
from m4train.training.step import run_micro_batches
from m4train.training.throughput import Throughput

# Samples of a kind, and the tokens of a pack for them: half as long a pack holds half of the activations, and takes 3 % more time.
KINDS = {"documents": 2048, "conversations": 1024, "equal": 1024}
IMAGE, PAD = 3, 0
PEERS = ("transformers", "trl")
# options that the processes which measure memory get, too
SHARED = ("model", "scale", "tokens", "batch", "accumulate", "threads", "precision", "peer")
RATE, NORM, BETAS = 1e-4, 1.0, (0.9, 0.999)  # both sides: AdamW without decay, a constant rate, clipped gradients
# ids, text: size, inner size, layers, heads, key heads; vision: size, inner size, layers, heads; side of a frame, of a patch
SIZES = {
    "tiny": (1024, 64, 160, 2, 4, 2, 48, 96, 2, 4, 64, 8),
    "20m": (16384, 256, 768, 12, 8, 4, 256, 1024, 6, 4, 128, 8),
    "68m": (32000, 512, 1536, 12, 8, 4, 384, 1536, 8, 6, 128, 8),
}


@dataclass(frozen=True)
class Sample:
    """`ids` (T,) int64, `frames` (F, 3, S, S) uint8."""

    ids: Tensor
    frames: Tensor

    @property
    def pixels(self) -> Tensor:
        """(F, 3, S, S) float32, normalised as processors do."""
        return self.frames.float() / 127.5 - 1.0


def saved(folder: str, size: str) -> None:
    """The model of that size with random weights, in a folder that both libraries read."""
    ids, width, inner, layers, heads, key_heads, seen, seen_inner, seen_layers, seen_heads, side, patch = SIZES[size]
    text = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    text |= {"num_key_value_heads": key_heads, "vocab_size": ids, "max_position_embeddings": 8192}
    text |= {"model_type": "llama", "rms_norm_eps": 1e-5, "pad_token_id": PAD}
    vision = {"hidden_size": seen, "intermediate_size": seen_inner, "num_hidden_layers": seen_layers}
    vision |= {"num_attention_heads": seen_heads, "image_size": side, "patch_size": patch}
    config = {"text_config": text, "vision_config": vision, "scale_factor": 2, "image_token_id": IMAGE}
    config |= {"tie_word_embeddings": True, "pad_token_id": PAD}
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(config))
    model.init_weights(torch.Generator().manual_seed(0))
    model.save_pretrained(folder)


def make_samples(kind: str, count: int, size: str, scale: float, longest: int) -> list[Sample]:
    """Samples of that kind, of at most `longest` tokens; text is `scale` times as long as it would be."""
    rng = np.random.default_rng(list(KINDS).index(kind))
    side, patch = SIZES[size][-2:]
    per_frame = (side // patch // 2) ** 2
    made = []
    for _ in range(count):
        if kind == "documents":  # 2.5 images and 910 tokens on average, with 64 tokens an image
            frames, text = min(int(rng.geometric(0.4)), 30), int(rng.lognormal(6.2, 0.9) * scale) + 10
        elif kind == "conversations":
            frames, text = int(rng.integers(1, 5)), int(rng.integers(40, 400) * scale) + 10
        else:
            frames, text = 2, int(600 * scale) + 10
        frames = min(frames, (longest - 10) // per_frame)
        ids = torch.from_numpy(rng.integers(10, SIZES[size][0], min(text, longest - frames * per_frame)))
        pieces = ids.tensor_split(frames + 1)
        run = torch.full((per_frame,), IMAGE)
        laid = [part for piece in pieces[:-1] for part in (piece, run)] + [pieces[-1]]
        made.append(
            Sample(torch.cat(laid), torch.from_numpy(rng.integers(0, 256, (frames, 3, side, side), dtype=np.uint8)))
        )
    return made


def packed(samples: list[Sample]) -> PackedBatch:
    """The samples end to end; every token is predicted, except the first of each and image tokens."""
    frames = torch.cat([sample.frames for sample in samples])
    table = (torch.arange(256) / 127.5 - 1.0).expand(3, 256).contiguous()
    return gpu.packed([sample.ids for sample in samples], IMAGE, PackedImages(frames, len(frames), table))


def padded(samples: list[Sample]) -> dict[str, Tensor]:
    """The samples as a batch of transformers, as its processor with padding and the documented collators make it."""
    length, frames = max(len(sample.ids) for sample in samples), max(len(sample.frames) for sample in samples)
    shape = (len(samples), frames, *samples[0].frames.shape[1:])
    batch = {
        "input_ids": torch.full((len(samples), length), PAD),
        "attention_mask": torch.zeros(len(samples), length, dtype=torch.int64),
        "pixel_values": torch.zeros(shape),
        "pixel_attention_mask": torch.zeros((*shape[:2], *shape[3:]), dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        batch["input_ids"][row, : len(sample.ids)] = sample.ids
        batch["attention_mask"][row, : len(sample.ids)] = 1
        batch["pixel_values"][row, : len(sample.frames)] = sample.pixels
        batch["pixel_attention_mask"][row, : len(sample.frames)] = 1
    labels = batch["input_ids"].clone()
    labels[(batch["attention_mask"] == 0) | (labels == IMAGE)] = -100
    return {**batch, "labels": labels}


class Ours:
    """Optimizer steps as the trainer of m4train makes them, in packs of at most `budget` tokens."""

    def __init__(self, folder: str, options: argparse.Namespace, budget: int) -> None:
        config = Config(name="benchmark")
        config.trainer.precision = options.precision
        config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.betas = RATE, 0.0, list(BETAS)
        model = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
        self._engine = SingleEngine(config, options.device)
        self._engine.prepare(model)
        self._budget = budget
        self.throughput = Throughput(model)

    def step(self, samples: list[Sample]) -> float:
        """The loss of a step on `samples`."""
        packer = Packer(self._budget, 10_000, len(samples) + 1)
        for number, sample in enumerate(samples):
            packer.add(Unit(0, number, 0, 0, -1, len(sample.ids), len(sample.frames)))
        batches = [packed([samples[unit.sample] for unit in pack]) for pack in packer.flush()]
        sums = StepSums(["made"], self._engine.device)
        run_micro_batches(self._engine, batches, sum(batch.loss_tokens for batch in batches), 0.0, sums)
        self._engine.update(1.0, NORM)
        for batch in batches:
            self.throughput.add(batch)
        return sums.read(sums.vector().tolist())["loss"]


def clock(options: argparse.Namespace) -> float:
    if options.device == "cpu":
        return time.process_time() if options.threads == 1 else time.perf_counter()
    torch.cuda.synchronize()
    return time.perf_counter()


def plain_trainer(model: Any, settings: dict[str, Any], samples: list[Sample], watch: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    return Trainer(model, TrainingArguments(**settings), padded, samples, callbacks=[watch])


def sft_trainer(model: Any, settings: dict[str, Any], samples: list[Sample], watch: Any) -> Any:
    """TRL's, which refuses packing and batches without padding for pictures; samples go past what it does to texts."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": 1}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False, "max_length": None}
    return SFTTrainer(
        model,
        SFTConfig(**settings, **own),
        data_collator=lambda rows: padded([samples[row["number"]] for row in rows]),
        train_dataset=Dataset.from_dict({"number": list(range(len(samples)))}),
        processing_class=tokenizer,
        callbacks=[watch],
    )


class Theirs:
    """A Trainer of transformers or of TRL; `between(step)` runs after each of its steps, on no account of its time."""

    def __init__(self, folder: str, options: argparse.Namespace, samples: list[Sample], between: Any) -> None:
        from transformers import AutoModelForImageTextToText, TrainerCallback
        from transformers.utils import logging

        logging.disable_progress_bar()

        outer = self
        self.seconds: list[float] = []
        self.losses: list[float] = []

        class Watch(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                outer._started = clock(options)

            def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
                outer.seconds.append(clock(options) - outer._started)
                between(state.global_step - 1)
                outer._started = clock(options)

            def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if "loss" in logs:
                    outer.losses.append(float(logs["loss"]))

        settings: dict[str, Any] = {
            "output_dir": f"{folder}/trainer",
            "per_device_train_batch_size": options.batch,
            "gradient_accumulation_steps": options.accumulate,
            "max_steps": options.pairs + 1,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "max_grad_norm": NORM,
            "bf16": options.precision == "bf16",
            "use_cpu": options.device == "cpu",
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        make = sft_trainer if options.peer == "trl" else plain_trainer
        self._trainer = make(model, settings, samples, Watch())
        from transformers.trainer_callback import PrinterCallback

        self._trainer.remove_callback(PrinterCallback)

    def train(self) -> None:
        self._trainer.train()


def pack_of(kind: str, options: argparse.Namespace) -> int:
    return options.tokens or KINDS[kind]


def steps_of(kind: str, options: argparse.Namespace) -> list[list[Sample]]:
    """The samples of each step, one more than pairs are counted; sorted by length within a step with --grouped."""
    each = options.batch * options.accumulate
    made = make_samples(kind, each * (options.pairs + 1), options.model, options.scale, pack_of(kind, options))
    steps = [made[start : start + each] for start in range(0, len(made), each)]
    return [sorted(step, key=lambda sample: len(sample.ids)) for step in steps] if options.grouped else steps


def product_rate(options: argparse.Namespace, multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Operations a second of one matrix product: best of seven."""
    size = 1024 if options.device == "cpu" else 8192
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    left, right = (torch.randn(size, size, device=options.device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(7):
        started = clock(options)
        multiply(left, right)
        taken.append(clock(options) - started)
    return 2.0 * size**3 / min(taken)


def held(options: argparse.Namespace, fresh: bool = False) -> int:
    """The most bytes this process has held at once; `fresh`: what it holds now, from where the most is counted again."""
    if options.device != "cpu":
        return torch.cuda.max_memory_allocated()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():  # no Linux: the most since the process began, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if fresh:
        reset.write_text("5")  # ru_maxrss could not be set back, and begins with that of the process it was forked from
    [found] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(found.split()[1]) * 1024


def alone(options: argparse.Namespace) -> None:
    """Prints the peak memory of one side, in bytes above what it held before it had a model."""
    steps = steps_of(options.kinds[0], options)
    if options.alone != "m4train":
        from transformers import Idefics3ForConditionalGeneration as _  # noqa: F401
        from transformers import Trainer as __  # noqa: F401
    before = held(options, fresh=True)
    if options.alone == "m4train":
        ours = Ours(options.folder, options, pack_of(options.kinds[0], options))
        for samples in steps:
            ours.step(samples)
    else:
        Theirs(options.folder, options, [sample for step in steps for sample in step], lambda step: None).train()
    print(json.dumps(held(options) - before))


def peak(side: str, kind: str, folder: str, options: argparse.Namespace) -> float:
    """Peak memory of one side on a few steps of that kind, in a process of its own."""
    given = {name: getattr(options, name) for name in SHARED}
    given |= {"device": options.device, "kinds": kind, "pairs": min(1, options.pairs), "folder": folder, "alone": side}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    words += ["--grouped"] * options.grouped
    done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def measure(kind: str, folder: str, options: argparse.Namespace, limit: float) -> None:
    steps = steps_of(kind, options)
    ours = Ours(folder, options, pack_of(kind, options))
    seconds, losses, counts = [], [], []

    def between(step: int) -> None:
        started = clock(options)
        losses.append(ours.step(steps[step]))
        seconds.append(clock(options) - started)
        counts.append(ours.throughput.rates(1.0, torch.device("cpu"))["tflops"] * 1e12)

    theirs = Theirs(folder, options, [sample for step in steps for sample in step], between)
    theirs.train()
    tokens = [sum(len(sample.ids) for sample in step) for step in steps[1:]]  # the first pair warms up
    mine = [count / taken for count, taken in zip(tokens, seconds[1:])]
    peers = [count / taken for count, taken in zip(tokens, theirs.seconds[1:])]
    ratios = sorted(one / other for one, other in zip(mine, peers))
    full = [sum(options.batch * max(lengths) for lengths in batches_of(step, options.batch)) for step in steps[1:]]
    useful = [statistics.median(c / s for c, s in zip(counts[1:], each[1:])) for each in (seconds, theirs.seconds)]
    print(f"{kind}: {statistics.median(mine):.0f} tokens/s, {options.peer} {statistics.median(peers):.0f}: ", end="")
    print(f"{statistics.median(mine) / statistics.median(peers):.2f} times as many", end="")
    print(
        f" (pairs {ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} of them; {1 - sum(tokens) / sum(full):.0%} padding)"
    )
    apart = max(abs(one - other) for one, other in zip(losses, theirs.losses))
    shown = ", ".join(f"{one:.4f}/{other:.4f}" for one, other in zip(losses, theirs.losses))
    print(f"  losses m4train/{options.peer}: {shown} (at most {apart:.1e} apart)")
    print(f"  {sum(counts[1:]) / 1e12:.2f} TFLOPs counted, share of a plain product's rate: ", end="")
    print(f"m4train {useful[0] / limit:.0%}, {options.peer} {useful[1] / limit:.0%}", flush=True)


def memory(kind: str, folder: str, options: argparse.Namespace) -> None:
    if options.memory:
        mine_held, theirs_held = (peak(side, kind, folder, options) for side in ("m4train", options.peer))
        print(f"  memory {mine_held / 2**20:.0f} MiB, {options.peer} {theirs_held / 2**20:.0f} MiB: ", end="")
        print(f"{mine_held / theirs_held:.2f} of it", flush=True)


def batches_of(step: list[Sample], batch: int) -> list[list[int]]:
    lengths = [len(sample.ids) for sample in step]
    return [lengths[start : start + batch] for start in range(0, len(lengths), batch)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="68m")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--pairs", type=int, default=5, help="steps of each side, after one that warms up")
    parser.add_argument("--scale", type=float, default=1.0, help="how long the texts are, relative to those described")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of a pack, and of a sample at most; 0: by kind")
    parser.add_argument("--batch", type=int, default=4, help="samples of a batch of the Trainer")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an optimizer step")
    parser.add_argument("--grouped", action="store_true", help="batches of samples of like length within a step")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads; with more than one, seconds are those of a clock"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of both sides; by default fp32 on the CPU")
    parser.add_argument("--peer", choices=PEERS, default="transformers", help="whose Trainer; trl: pip install trl")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--alone", choices=("m4train", *PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.precision = options.precision or ("fp32" if options.device == "cpu" else "bf16")
    torch.set_num_threads(options.threads)
    if options.alone:
        alone(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        saved(folder, options.model)
        count = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 4e6
        print(
            f"{count:.0f} M parameters, {options.precision} on {options.device}, {options.threads} threads, torch {torch.__version__}"
        )
        plain, limit = (product_rate(options, multiply) for multiply in (torch.mm, product))
        print(f"products reach {limit / 1e9:.0f} GFLOP/s, torch's own {plain / 1e9:.0f}")
        limit = max(plain, limit)
        for kind in options.kinds:
            measure(kind, folder, options, limit)
            memory(kind, folder, options)


if __name__ == "__main__":
    main()
