"""The bridge to lmms-eval, if it is installed: `m4train evaluate lmms_tasks=[...] model=MODEL`, and `lmms-eval --model m4train`.

It is installed next to m4train with `pip install --no-deps`, see docs/evaluation.md: its own requirements replace those of Hydra.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m4train.commands.benchmark import read
from m4train.config.packages import need

if TYPE_CHECKING:
    _Base: Any = object
else:
    try:
        from lmms_eval.api.model import lmms as _Base
    except ImportError:
        _Base = object

KEYS = {
    "lmms_tasks": "names of lmms-eval's tasks",
    "model": "a folder, hub id, run, checkpoint, or adapter",
    "include": "a folder of tasks of your own",
    "limit": "samples of each task",
    "batch_size": "questions answered together",
    "device": "auto, cpu, cuda",
    "dtype": "auto, fp32, bf16, fp16",
    "out": "a JSON file of all results",
}
_WINDOW = 16  # batches that are sorted by what they ask for together


def evaluate(arguments: Sequence[str]) -> int:
    """Prints the metrics of each task; returns 0."""
    given = read(arguments, KEYS, "evaluate lmms_tasks=...", ("lmms_tasks", "model"))
    need("lmms_eval", "evaluate lmms_tasks=...")
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    names = [name.strip() for name in given["lmms_tasks"].strip("[]").split(",") if name.strip()]
    model = M4Train(given["model"], given.get("batch_size", 1), given.get("device", "auto"), given.get("dtype", "auto"))
    limit = int(given["limit"]) if "limit" in given else None
    manager = TaskManager(include_path=given.get("include"), model_name="m4train")
    found = evaluator.simple_evaluate(model=model, tasks=names, task_manager=manager, batch_size=1, limit=limit)
    for name, metrics in found["results"].items():
        shown = {key: value for key, value in metrics.items() if isinstance(value, float)}
        print(name, ", ".join(f"{key.partition(',')[0]} {value:.4f}" for key, value in shown.items()), flush=True)
    if "out" in given:
        Path(given["out"]).write_text(json.dumps(found["results"], indent=1, default=str), encoding="utf-8")
    return 0


def manifest() -> Any:
    """What lmms-eval's registry asks of the entry point `m4train`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="m4train", simple_class_path=f"{__name__}.M4Train")


class M4Train(_Base):
    """A model of m4train as lmms-eval asks it: `pretrained` is what `m4train generate` takes."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = "auto",
        dtype: str = "auto",
        **others: Any,
    ) -> None:
        super().__init__()
        from m4train.commands.answerer import device_named, dtype_named, load

        self.device_ = device_named("auto" if device in (None, "") else str(device))
        model, self.processor = load(pretrained, dtype_named(dtype, self.device_))
        self.model_ = model.to(self.device_).eval()
        self.batch_size_ = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to the requests, in their order, decoded as each of them asks."""
        from m4train.evaluation.generation import answer_conversations

        said: dict[int, str] = {}
        for settings, window in self._alike(requests):
            until, decoding = settings[0], self._decoding(*settings[1:])
            asked = [self._asked(requests[number], number) for number in window]
            answers = answer_conversations(
                self.model_, self.processor, asked, decoding, self.device_, batch_size=self.batch_size_
            )
            for answer in answers:
                cut = [place for word in until if word and (place := answer.answer.find(word)) >= 0]
                said[answer.number] = answer.answer[: min(cut, default=len(answer.answer))].strip()
        return [said[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The summed loss of each request's target behind its context, as lmms-eval's own models return it: its multiple choice
        takes the smallest. Whether the target is the greedy answer is not known, and False."""
        from m4train.evaluation.generation import answer_ids, inputs_of
        from m4train.evaluation.likelihood import answer_losses

        found = []
        for number, request in enumerate(requests):
            asked, target = self._asked(request, number), request.args[1]
            document = self.task_dict[request.args[4]][request.args[5]][request.args[3]]
            text = target if isinstance(target, str) else str(target(document))
            ids = answer_ids(self.processor, asked, text.strip())
            losses = answer_losses(self.model_, inputs_of(self.processor, [asked], self.device_), [[ids]])
            found.append((losses[0][0], False))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("m4train answers no tasks of several rounds in lmms-eval: choose other tasks.")

    def _alike(self, requests: Sequence[Any]) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
        """Requests that are decoded alike, with how."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            given = dict(request.args[1])
            until = given.get("until") or ()
            until = (until,) if isinstance(until, str) else tuple(until)
            beams, drawn = given.get("num_beams") or 1, bool(given.get("do_sample") and given.get("temperature"))
            settings = (
                until,
                given.get("max_new_tokens", 128),
                beams,
                drawn,
                given.get("temperature") if drawn else 1.0,
            )
            kinds.setdefault((*settings, given.get("top_p") if drawn else 1.0), []).append(number)
        for settings, numbers in kinds.items():
            left = iter(numbers)
            while window := list(islice(left, _WINDOW * self.batch_size_)):
                yield settings, window

    def _decoding(self, most: int, beams: int, drawn: bool, temperature: float, top_p: float | None) -> Any:
        from m4train.config import DecodingConfig
        from m4train.evaluation.decoding import Decoding

        config = DecodingConfig(num_beams=beams, do_sample=drawn, temperature=temperature, top_p=top_p or 1.0)
        return Decoding.of(self.model_, self.processor, config, most)

    def _asked(self, request: Any, number: int) -> Any:
        from m4train.evaluation.generation import Asked
        from m4train.processing.images import to_rgb

        context, _, visual, place, task, split = request.args
        images = [to_rgb(image) for image in visual(self.task_dict[task][split][place]) or []]
        content = [
            *({"type": "image"} for _ in images),
            {"type": "text", "text": context.replace("<image>", "").strip()},
        ]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"text": ""}]}]
        return Asked(number, f"{task} {place}", messages, images)
