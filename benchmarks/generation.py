"""Answers per second of processor time, of m4train and of transformers: the same model, questions and greedy answers, each with its
best batch. On a GPU, per second.

python benchmarks/generation.py [tiny|small] [QUESTIONS PER IMAGE ...]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from PIL import Image

from m4train import Idefics3Config, Idefics3ForConditionalGeneration
from tests.helpers.models import perturb
from tests.helpers.processing import tiny_idefics3_processor

BATCHES = {"tiny": (1, 4, 12, 24), "small": (1, 4, 8)}
ROUNDS = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 8  # tokens of an answer at most, as short answers have
# text: size, inner size, layers, heads, key heads; vision: size, inner size, layers, heads; side of an image, of a patch
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 48, 96, 2, 4, 64, 8),
    "small": (512, 1536, 16, 8, 4, 384, 1536, 8, 6, 128, 8),
}


def saved(folder: Path, size: str) -> Any:
    """The model of that size with random weights and its processor, in a folder that both libraries read."""
    width, inner, layers, heads, key_heads, seen, seen_inner, seen_layers, seen_heads, side, patch = SIZES[size]
    processor = tiny_idefics3_processor(image_size=side, image_seq_len=(side // patch // 2) ** 2)
    text = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    text |= {"num_key_value_heads": key_heads, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 4096}
    text |= {"model_type": "llama", "rms_norm_eps": 1e-5, "pad_token_id": processor.pad_id}
    vision = {"hidden_size": seen, "intermediate_size": seen_inner, "num_hidden_layers": seen_layers}
    vision |= {"num_attention_heads": seen_heads, "image_size": side, "patch_size": patch}
    config = {
        "text_config": text,
        "vision_config": vision,
        "scale_factor": 2,
        "image_token_id": processor.image_token_id,
    }
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(config))
    perturb(model)
    model.save_pretrained(folder)
    print(
        f"{size}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {model.config.tokens_per_image} tokens a frame"
    )
    return processor


def questions(count: int, per_image: int) -> list[tuple[Image.Image, str]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        picture = number // per_image
        width, height = (200 + 37 * (picture % 5), 160 + 29 * (picture % 3))
        colour = tuple(int(v) for v in torch.randint(0, 255, (3,), generator=torch.Generator().manual_seed(picture)))
        words = " ".join("what" for _ in range(1 + int(torch.randint(0, 12, (1,), generator=generator))))
        found.append((Image.new("RGB", (width, height), colour), f"{words} is number {number}?"))
    return found


def inputs(processor: Any, asked: list[tuple[Image.Image, str]]) -> dict[str, torch.Tensor]:
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, text in asked]
    given = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "padding": True,
    }
    made = processor.apply_chat_template(messages, images=[[image] for image, _ in asked], padding_side="left", **given)
    return {
        name: made[name].to(DEVICE)
        for name in ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
        if name in made
    }


def clock() -> float:
    if DEVICE == "cpu":
        return time.process_time()  # of one thread: other programs on the machine do not count
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def answered(model: Any, batches: list[dict[str, torch.Tensor]], **more: Any) -> tuple[float, list[list[int]]]:
    """Seconds for all batches, and the new ids of each question."""
    said: list[list[int]] = []
    started = clock()
    for batch in batches:
        ids = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **more)
        said += ids[:, batch["input_ids"].shape[1] :].tolist()
    return clock() - started, said


def measure(size: str, per_image: int, models: dict[str, Any], processor: Any) -> None:
    asked = questions(BATCHES[size][-1], per_image)
    best: dict[str, tuple[float, int]] = {}
    said: dict[str, list[list[int]]] = {}
    for batch in BATCHES[size]:
        parts = [inputs(processor, asked[at : at + batch]) for at in range(0, len(asked), batch)]
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, model in models.items():
                took, ids = answered(model, parts)
                seconds[name].append(took)
                said[name] = ids
        assert said["m4train"] == said["transformers"], "the answers differ"
        for name, times in seconds.items():
            rate = len(asked) / min(times)
            best[name] = max(best.get(name, (0.0, 0)), (rate, batch))
        shown = ", ".join(
            f"{name} {len(asked) / min(times):.2f} ({statistics.median(times):.2f} s)"
            for name, times in seconds.items()
        )
        print(f"  batch {batch:>2}: {shown}", flush=True)
    ours, theirs = best["m4train"], best["transformers"]
    print(
        f"{size}, {per_image} questions an image, {len(asked)} questions: m4train {ours[0]:.2f} answers/s (batch {ours[1]}), transformers "
        f"{theirs[0]:.2f} (batch {theirs[1]}): {ours[0] / theirs[0]:.2f} times as many, ids equal",
        flush=True,
    )


def main(size: str, groups: list[int]) -> None:
    import transformers

    import m4train

    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        processor = saved(Path(folder), size)
        models = {
            "m4train": m4train.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            .eval()
            .to(DEVICE),
            "transformers": transformers.AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float32
            ).eval(),
        }
    for per_image in groups:
        measure(size, per_image, models, processor)


if __name__ == "__main__":
    named = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    main(named, [int(each) for each in sys.argv[2:]] or [1, 4])
