"""A model with its processor, loaded from whatever a person has of it, and asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from m4train import AutoModelForImageTextToText, AutoProcessor
from m4train.commands.export_adapter import BASE
from m4train.config import DecodingConfig
from m4train.config.adapter_start import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from m4train.errors import ConfigError
from m4train.evaluation.decoding import Decoding
from m4train.evaluation.generation import prompts
from m4train.json_files import read_mapping
from m4train.models.quantized import BitsAndBytesConfig, quantize_linears
from m4train.restore import merged_model
from m4train.run_files import CHECKPOINTS, STATE, newest_stage
from m4train.training.checkpoints.files import checkpoints_in
from m4train.training.checkpoints.state import open_checkpoint
from m4train.training.precision import half_of, machine_precision


@dataclass
class Answerer:
    model: Any
    processor: Any
    decoding: Decoding
    seed: int

    @classmethod
    def of(cls, given: SimpleNamespace) -> Answerer:
        """Raises ConfigError for a model, device or setting that there is not."""
        from m4train.commands.generate import decoding_of

        device = device_named(given.device)
        dtype = dtype_named(given.dtype, device)
        model, processor = load(given.model, dtype)
        if given.four_bits:
            quantize_linears(model, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype))
        decoding = Decoding.of(model, processor, DecodingConfig(**decoding_of(given)), given.max_new_tokens)
        return cls(model.to(device).eval(), processor, decoding, given.seed)

    @torch.inference_mode()
    def answers(self, questions: list[Any], number: int, pieces: Callable[[str], None] | None = None) -> list[str]:
        """The answers to `questions`, made together; those to one question also go to `pieces` while they are made."""
        inputs = self._inputs(questions)
        device, start = self.model.device, inputs["input_ids"].shape[1]
        others: dict[str, Any] = {"generator": self.decoding.generator(self.seed, number, device)}
        if pieces is not None:
            others["streamer"] = Pieces(self.processor, pieces)
        ids = self.model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            generation_config=self.decoding.settings(**others),
        )
        return [text.strip() for text in self.processor.batch_decode(ids[:, start:], skip_special_tokens=True)]

    def _inputs(self, questions: list[Any]) -> Any:
        variables = questions[0].variables
        if any(question.variables != variables for question in questions):
            raise ConfigError("The lines of one batch give the chat template different tools: set --batch-size 1.")
        try:
            asked, images = ([getattr(question, part) for question in questions] for part in ("messages", "images"))
            return prompts(self.processor, asked, images, variables)
        except ValueError as error:
            raise ConfigError(str(error)) from error


class Pieces:
    """Hands on the text of an answer while its ids come, as soon as no later id can change it."""

    def __init__(self, processor: Any, hand_on: Callable[[str], None]) -> None:
        self.processor, self.hand_on = processor, hand_on
        self._ids: list[int] = []
        self._said = ""
        self._prompt = True

    def put(self, ids: Any) -> None:
        """Ids (n,) or (1, n) that follow those before; the first call brings the prompt."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += ids.reshape(-1).tolist()
        text = self.processor.decode(self._ids, skip_special_tokens=True).lstrip()
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            self._say(text.rstrip() if text.rstrip() != text else text)

    def end(self) -> None:
        self._say(self.processor.decode(self._ids, skip_special_tokens=True).strip())

    def _say(self, text: str) -> None:
        if text.startswith(self._said):
            self.hand_on(text[len(self._said) :])
            self._said = text


def load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, its adapters merged, and the processor of a folder, hub id, run, checkpoint or adapter folder."""
    folder = newest_stage(Path(name))
    if (folder / CHECKPOINTS).is_dir():
        checkpoints = checkpoints_in(folder / CHECKPOINTS)
        if not checkpoints:
            raise ConfigError(f"{folder} holds no checkpoint: train first, or give another model.")
        folder = checkpoints[-1][1]
    if (folder / STATE).is_file():
        model = merged_model(open_checkpoint(folder))
        return model.to(dtype), AutoProcessor.from_pretrained(folder)
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return _adapted(folder, dtype)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no model, run, checkpoint or adapter: give a folder that does.")
    return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype), AutoProcessor.from_pretrained(name)


def _adapted(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from m4train.config.packages import need

    need("peft", "a folder of an adapter")
    from peft import PeftModel

    base = (
        folder / BASE
        if (folder / BASE).is_dir()
        else read_mapping(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    )
    if not base:
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG_FILE} names no base_model_name_or_path: add the model it belongs to."
        )
    if not (folder / ADAPTER_FILE).is_file():
        raise ConfigError(f"{folder} holds {ADAPTER_CONFIG_FILE} but no {ADAPTER_FILE}: copy the folder again.")
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    try:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:  # peft raises its own types, by version
        raise ConfigError(f"The adapter in {folder} does not fit {base} ({type(error).__name__}: {error}).") from error
    own = (folder / "tokenizer.json").is_file()
    return merged.to(dtype), AutoProcessor.from_pretrained(folder if own else base)


def device_named(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name} is not there ({str(error).splitlines()[0]}): use auto, cpu or cuda."
        ) from error
    return device


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """Of "auto": what a GPU computes fastest in, and fp32 on a CPU."""
    if name == "auto":
        name = machine_precision() if device.type == "cuda" else "fp32"
    return half_of(name) or torch.float32
