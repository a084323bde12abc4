"""Tokens that a pretrained model does not know: ids in its tokenizer, and rows in its embeddings and head."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m4train.errors import ConfigError

_KEY = "model.add_tokens"


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Gives each of `tokens` an id of its own. Raises ConfigError for one that the tokenizer has already."""
    for token in tokens:
        id_ = tokenizer.backend.token_to_id(token)
        if id_ is not None:
            raise ConfigError(
                f"{_KEY} names {token!r}, which the tokenizer has already, with the id {id_}: leave it out."
            )
    if tokens:
        tokenizer.add_tokens(tokens)


def give_rows(model: Any, tokenizer: Any, added: Mapping[str, str | None], own: Iterable[str]) -> int | None:
    """Gives a model rows for the tokens `added`, each with the text that its row begins as, and for those of `own`, the
    tokens of every processor, that its tokenizer has beyond the model's rows.

    Returns the first id of them, None if there are none. Raises ConfigError for a tokenizer
    with other entries than that beyond the model's rows, and for a text without a token that the model knows.
    """
    rows = model.config.token_rows
    beyond = [tokenizer.convert_ids_to_tokens(id_) for id_ in range(rows, len(tokenizer))]
    missing = [token for token in beyond if token not in added]
    if not set(missing) <= set(own):
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} entries but the model {rows} embeddings: use the tokenizer that belongs to "
            "the model."
        )
    if not added and not missing:
        return None
    ids = tokenizer.convert_tokens_to_ids([*added, *missing])
    if missing:
        warnings.warn(
            f"the model has no embedding for {', '.join(missing)}: a row of its own is added for each, in the part new_tokens",
            stacklevel=2,
        )
    alike = {
        tokenizer.convert_tokens_to_ids(token): _ids_of(text, tokenizer, min(ids))
        for token, text in added.items()
        if text is not None
    }
    model.grow_token_rows(min(ids), len(tokenizer), alike)
    return min(ids)


def _ids_of(text: str, tokenizer: Any, first: int) -> list[int]:
    """The tokens of a text that a new row begins as. Raises ConfigError if one of them is new itself, or there are none."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids or max(ids) >= first:
        raise ConfigError(
            f"{_KEY} begins a token as {text!r}, which holds a new token itself, or none: name another text."
        )
    return ids
