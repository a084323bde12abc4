"""How tokenizers of the SentencePiece kind mark the start of a word, and how transformers 5.x changes that."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

MARK = "▁"
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


def rebuilt_as_5x(backend: Backend, config: dict[str, Any]) -> Backend:
    """The tokenizer as transformers 5.x makes it of the same folder: LLaMA's is built again, all others are as stored.

    The word marker then comes from a pre-tokeniser instead of the stored normaliser: before every text between special
    tokens if the configuration says `legacy`, and before the first one alone if it does not.
    """
    if config.get("tokenizer_class") not in _LLAMA:
        return backend
    prefixed = config.get("add_prefix_space") is not False
    scheme = "never" if not prefixed else "always" if config.get("legacy", False) else "first"
    state = json.loads(backend.to_str())
    state["normalizer"] = None
    state["pre_tokenizer"] = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": False}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    replaced = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
    }
    return Backend.from_str(json.dumps(state))


def marks_first_text_only(backend: Backend) -> bool:
    """Whether the tokenizer puts its marker at the start of a string, and not after the special tokens in it."""
    step = backend.pre_tokenizer
    return isinstance(step, pre_tokenizers.Metaspace) and step.prepend_scheme == "first"


def without_first_mark(state: dict[str, Any]) -> dict[str, Any]:
    """The state of such a tokenizer, changed to put no marker at the start."""
    state["pre_tokenizer"]["prepend_scheme"] = "never"
    return state


def default_padding_side(config: dict[str, Any]) -> str:
    """Where transformers pads when the configuration does not say."""
    return "left" if config.get("tokenizer_class") in _LLAMA else "right"
