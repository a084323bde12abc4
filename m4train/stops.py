"""What ends an answer: the one rule for `generate`, evaluation, samples while training, and exported folders.

An answer ends with an id that the model's generation_config.json (or config.json) states, with the end of a text of its
tokenizer, and with the token by which the chat template in use closes a turn.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from m4train.errors import BadSample, ConfigError
from m4train.processing.files import read_json
from m4train.processing.pieces import TextPiece
from m4train.processing.protocol import SampleProcessor

_TEMPLATES = ("chat_template.jinja", "chat_template.json")  # files of a template alone; and files that may hold one
_CONFIGS = ("processor_config.json", "tokenizer_config.json")
_TURNS = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


def stop_ids(processor: SampleProcessor, stated: Iterable[int]) -> list[int]:
    """The ids that end an answer, in the order in which they are `stated`, then those of tokenizer and template."""
    own = [id_ for id_ in (processor.eos_id, turn_end(processor)) if id_ is not None]
    return list(dict.fromkeys([*stated, *own]))


def turn_end(processor: SampleProcessor) -> int | None:
    """The id of the last special token with which the chat template closes what the assistant says.

    None if the template closes a turn with none, or renders no plain question and answer.
    """
    template = processor.chat_template
    kept: tuple[str, int | None] | None = processor.__dict__.get("_turn_end")
    if kept is None or kept[0] != template:
        try:
            pieces = processor.encode_messages(_TURNS)
            said = [piece.ids for piece in pieces if isinstance(piece, TextPiece) and piece.origin == "assistant"]
            kept = template, int(said[-1][-1])
        except (BadSample, ConfigError, IndexError):
            kept = template, None
        processor.__dict__["_turn_end"] = kept
    return kept[1]


def folder_turn_end(folder: Path) -> int | None:
    """The `turn_end` of the processor that a model folder holds; None if it holds no chat template of its own."""
    held = [(folder / name).is_file() for name in _TEMPLATES]
    if not any(held) and not any((read_json(folder / name) or {}).get("chat_template") for name in _CONFIGS):
        return None
    from m4train.processing.auto import AutoProcessor

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings without effect: those who use the processor are told
            return turn_end(AutoProcessor.from_pretrained(folder))
    except ConfigError:  # a template without the files it belongs to
        return None


def with_turn_end(folder: Path, stated: list[int], generation_config: dict[str, Any]) -> dict[str, Any]:
    """`generation_config` of a model folder, ended by its chat template's end of a turn as well as by the `stated` ids.

    Warns if that adds an id, because other libraries go on past it.
    """
    end = folder_turn_end(folder)
    if end is None or end in stated:
        return generation_config
    warnings.warn(
        f"the chat template of {folder} closes a turn with the id {end}, which its generation_config.json does not name as "
        "eos_token_id: answers end there all the same, unless generate is given other ids",
        stacklevel=3,
    )
    return {**generation_config, "eos_token_id": [*stated, end]}
