"""What transformers makes of an exported folder, asked in a process of its own if it is installed: this library does not need it."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

NEW_TOKENS = 8  # of the greedy answer that is compared
_TURN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does this image show?"}]}
_ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A grey ramp."}]}
_AGAIN = {"role": "user", "content": [{"type": "text", "text": "And this? "}, {"type": "image"}]}
_PLAIN = {"role": "user", "content": [{"type": "text", "text": "Say hello."}]}
CONVERSATIONS: list[list[dict[str, Any]]] = [[_TURN], [_TURN, _ANSWER, _AGAIN], [_PLAIN]]

_HEAD = """
from __future__ import annotations
import json, os, sys, warnings
warnings.simplefilter("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from collections.abc import Iterator
from typing import Any
import numpy as np, torch, transformers
from PIL import Image
task = json.load(sys.stdin)
"""
_TAIL = """
processor = transformers.AutoProcessor.from_pretrained(task["folder"])
image = Image.fromarray(np.load(task["image"]))
said = list(asked(processor, task["template"], task["conversations"], image))
for number, (_, inputs) in enumerate(said):
    if inputs.get("pixel_values") is not None:
        np.save(f"{task['scratch']}/{number}.npy", np.asarray(inputs["pixel_values"]))
kind = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
model = kind.from_pretrained(task["base"], torch_dtype=torch.float32)
if task["base"] != task["folder"]:
    import peft
    model = peft.PeftModel.from_pretrained(model, task["folder"])
with torch.inference_mode():
    ids = model.eval().generate(**said[0][1], max_new_tokens=task["tokens"], do_sample=False, num_beams=1)
start = said[0][1]["input_ids"].shape[1]
print(json.dumps({"version": transformers.__version__, "prompts": [prompt for prompt, _ in said],
    "ids": [inputs["input_ids"][0].tolist() for _, inputs in said], "answer": ids[0, start:].tolist(),
    "torchvision": getattr(processor.image_processor, "backend", "") == "torchvision"
    or type(processor.image_processor).__name__.endswith("Fast")}))
"""


@dataclass(frozen=True)
class Rendered:
    """What transformers made of the folder, against what this library makes of it: whether the ids and the pictures of three
    conversations, and a greedy answer to the first, are equal. `sentences` say what differs, or why nothing could be compared."""

    version: str | None
    ids: bool
    pixels: bool
    answer: bool
    sentences: tuple[str, ...] = ()
    note: str = ""

    def lines(self) -> list[str]:
        said = list(self.sentences) or [f"transformers {self.version} renders and answers the same"]
        return [*said, *([self.note] if self.note else [])]


def inputs_of(processor: Any, prompt: str, image: Any) -> Any:
    """The inputs of a rendered conversation, with one picture in every place; Idefics takes lists of texts and pictures."""
    if type(processor).__name__ == "IdeficsProcessor":
        items: list[Any] = []
        for number, text in enumerate(prompt.split("<image>")):
            items += ([image] if number else []) + ([text] if text else [])
        return processor(text=[items], return_tensors="pt")
    count, bos = prompt.count("<image>"), processor.tokenizer.bos_token
    images = {"images": [[image] * count]} if count else {}
    added = not (bos and prompt.startswith(bos))
    return processor(text=[prompt], add_special_tokens=added, return_tensors="pt", **images)


def asked(processor: Any, template: str, conversations: list, image: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompt and inputs of each conversation; run on both sides, whose processors are called alike."""
    # transformers 4 gives the processor of Idefics no template of its own
    options = {"chat_template": template} if type(processor).__name__ == "IdeficsProcessor" else {}
    for conversation in conversations:
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True, **options)
        yield prompt, dict(inputs_of(processor, prompt, image))


def installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def rendered_by_transformers(folder: Path, base: str, processor: Any, model: Any) -> Rendered:
    """Compares the `processor` and `model` of a run with what transformers reads from `folder`, whose weights are in `base` if it
    holds an adapter alone."""
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch, "image.npy"), np.asarray(image))
        task = {"folder": str(folder), "base": base, "conversations": CONVERSATIONS, "tokens": NEW_TOKENS}
        task["template"] = processor.chat_template
        task |= {"scratch": scratch, "image": f"{scratch}/image.npy"}
        script = _HEAD + inspect.getsource(inputs_of) + inspect.getsource(asked) + _TAIL
        done = subprocess.run([sys.executable, "-c", script], input=json.dumps(task), capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:300]
            return Rendered(None, False, False, False, (f"transformers cannot use the folder ({last})",))
        theirs = json.loads(done.stdout.splitlines()[-1])
        pixels = [_array(Path(scratch, f"{number}.npy")) for number in range(len(CONVERSATIONS))]
    backend = "torch" if theirs["torchvision"] else "pil"
    alike, note = _with_backend(processor, backend)
    ours = list(asked(alike, processor.chat_template, CONVERSATIONS, image))
    ids = [inputs["input_ids"][0].tolist() for _, inputs in ours]
    same = [
        (mine.get("pixel_values") is None) == (other is None)
        and (other is None or np.array_equal(np.asarray(mine["pixel_values"]), other))
        for (_, mine), other in zip(ours, pixels, strict=True)
    ]
    answer = _answer(model, ours[0][1])
    found = Rendered(theirs["version"], ids == theirs["ids"], all(same), answer == theirs["answer"])
    return Rendered(
        found.version, found.ids, found.pixels, found.answer, tuple(_differences(found, ids, theirs, processor)), note
    )


def _with_backend(processor: Any, backend: str) -> tuple[Any, str]:
    """The processor with what transformers resizes pictures by, and what there is to say if that is not what the run did."""
    trained = processor.image_processor.backend or "pil"
    if trained == backend:
        return processor, ""
    alike = copy.copy(processor)
    alike.image_processor = processor.image_processor.replace(backend=backend)
    way = "install torchvision next to it" if trained == "torch" else "give it backend='pil'"
    return alike, (
        f"transformers resizes pictures by {'torchvision' if backend == 'torch' else 'Pillow'} here, the run did by {trained}, "
        f"which differs by a level or two: {way} for the very pixels of the run"
    )


def _array(path: Path) -> np.ndarray | None:
    return np.load(path) if path.is_file() else None


@torch.inference_mode()
def _answer(model: Any, inputs: dict[str, Any]) -> list[int]:
    made = model.eval().generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def _differences(found: Rendered, ids: list[list[int]], theirs: dict[str, Any], processor: Any) -> list[str]:
    name = f"transformers {found.version}"
    said = []
    if not found.ids:
        number = next(i for i, (mine, other) in enumerate(zip(ids, theirs["ids"], strict=True)) if mine != other)
        mine, other = (
            processor.decode([i for i in row if i != processor.image_token_id])
            for row in (ids[number], theirs["ids"][number])
        )
        said.append(
            f"{name} renders another prompt than the one this model trained on: {other[:160]!r} instead of {mine[:160]!r}"
        )
        if hasattr(processor, "space_after_image"):
            said.append(
                "transformers 5 puts a space between an image and a word next to it, earlier ones do not; "
                "model.processor.space_after_image says what a run trains with"
            )
    if not found.pixels:
        said.append(f"{name} makes other pixels of a picture than the ones this model trained on")
    if found.ids and found.pixels and not found.answer:
        said.append(f"{name} answers otherwise, to equal inputs")
    return said
