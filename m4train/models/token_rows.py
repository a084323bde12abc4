"""Rows of new tokens as parameters of their own, so that they can train while the rows of the others are frozen.

Idefics is published like this; any model can be put into this form for training, and is put back whenever it is saved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4train.errors import ConfigError
from m4train.models.loss import LMHead

NEW_ROWS = ".additional_embedding.weight"  # how the name of new tokens' embeddings ends
OWN_ROWS = re.compile(r"\.(additional_embedding|additional_fc)$")  # and how their modules are called
_ENDINGS = (NEW_ROWS, ".additional_fc.weight")


class DecoupledEmbedding(nn.Embedding):
    """Token embedding whose rows beyond the vocabulary are a table of their own, so that the others can be frozen."""

    additional_embedding: nn.Embedding | None

    def __init__(self, vocab: int, additional: int, size: int) -> None:
        super().__init__(vocab, size)
        self.additional_embedding = nn.Embedding(additional, size) if additional else None

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (...,) -> embeddings (..., size)."""
        if self.additional_embedding is None:
            return F.embedding(ids, self.weight)
        base = F.embedding(ids.clamp(max=self.num_embeddings - 1), self.weight)
        more = self.additional_embedding((ids - self.num_embeddings).clamp(min=0))
        return torch.where((ids < self.num_embeddings)[..., None], base, more)


def split_rows(model: Any, first: int) -> None:
    """Gives the token ids from `first` on rows of their own, in the embedding and in the head, with the same values.

    `model` is a model with head. Raises ConfigError if it has such rows already, or none from `first` on.
    """
    embedding, head = model.get_submodule(model.embedding_name), model.lm_head
    rows, size = embedding.num_embeddings, embedding.embedding_dim
    if has_own_rows(embedding):
        raise ConfigError(
            f"freeze.new_rows_from is {first}, but the new tokens of this model have rows of their own already "
            f"(additional_vocab_size {model.config.token_rows - rows}): remove freeze.new_rows_from."
        )
    if not 0 < first < rows:
        raise ConfigError(
            f"freeze.new_rows_from is {first}, but the model has embeddings for the ids 0 to {rows - 1}: give the first "
            "id that the text backbone did not know."
        )
    split = DecoupledEmbedding(first, rows - first, size)
    _fill(split, split.additional_embedding, embedding.weight, first)
    parent, _, leaf = model.embedding_name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, split)
    model.lm_head = LMHead(size, first, rows - first)
    _fill(model.lm_head, model.lm_head.additional_fc, head.weight, first)
    model.tie_weights()


@torch.no_grad()
def grow_rows(model: Any, first: int, count: int, alike: Mapping[int, Sequence[int]]) -> None:
    """Gives embedding and head of a model with head a row for each of `count` ids, those from `first` on new.

    The row of a new id begins as the mean of the rows of the ids that `alike` names for it, or of all before `first`; rows
    that the model has to spare are used first. Rows that an Idefics keeps apart stay apart, and the new ones join them.
    """
    embedding, config = model.get_submodule(model.embedding_name), model.config
    rows, base = max(count, config.token_rows), embedding.num_embeddings
    for owner, more in (
        (embedding, getattr(embedding, "additional_embedding", None)),
        (model.lm_head, model.lm_head.additional_fc),
    ):
        tables = [owner.weight] if more is None else [owner.weight, more.weight]
        old = torch.cat([table.float() for table in tables])
        new = torch.cat([old, old[:first].mean(0).expand(rows - len(old), -1)])
        new[first:count] = old[:first].mean(0)
        for id_, ids in alike.items():
            new[id_] = old[list(ids)].mean(0)
        if more is None:
            _set_rows(owner, new)
        else:
            _set_rows(more, new[base:])
    if has_own_rows(embedding):
        config.additional_vocab_size = rows - base
    else:
        config.get_text_config().vocab_size = rows
    model.tie_weights()


def _fill(module: Any, more: Any, weight: nn.Parameter, first: int) -> None:
    module.weight = nn.Parameter(weight.detach()[:first].clone(), requires_grad=weight.requires_grad)
    more.weight = nn.Parameter(weight.detach()[first:].clone(), requires_grad=weight.requires_grad)


@torch.no_grad()
def resize_rows(owner: Any, rows: int, std: float | None) -> None:
    """Gives an embedding or a head so many rows: the first stay, new ones are the mean of them, or random with `std`."""
    old = owner.weight
    weight = old.new_empty(rows, old.shape[1])
    kept = min(rows, old.shape[0])
    weight[:kept] = old[:kept]
    weight[kept:] = old.float().mean(0).to(old.dtype) if std is None else torch.randn_like(weight[kept:]) * std
    _set_rows(owner, weight)


def _set_rows(owner: Any, weight: Tensor) -> None:
    """Another table for an embedding or a head, in the dtype of the one it has."""
    old = owner.weight
    owner.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    if isinstance(owner, nn.Embedding):
        owner.num_embeddings = weight.shape[0]
    else:
        owner.out_features = weight.shape[0]


def has_own_rows(embedding: nn.Module) -> bool:
    """Whether the new tokens of an embedding have a table of their own."""
    return getattr(embedding, "additional_embedding", None) is not None


def joined_rows(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` by parameter name as a model folder holds them: rows that `split_rows` set apart follow the others again.

    Those of an Idefics with additional_vocab_size stay apart, as published.
    """
    if getattr(config, "additional_vocab_size", 0):
        return dict(tensors)
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_ENDINGS):
            continue
        more = _more(name, tensors)
        joined[name] = tensor if more is None else torch.cat([tensor, more.to(tensor)])
    return joined


def apart_rows(tensors: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `joined_rows`: whole tables cut as those of a model with the parameters `live` are."""
    cut = dict(tensors)
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        more = next((stem + end for end in _ENDINGS if stem + end in live), None)
        if more is not None and more not in tensors:
            first = live[name].shape[0]
            cut |= {name: tensor[:first], more: tensor[first:]}
    return cut


def _more(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The new tokens' rows of the table `name`, if there are any."""
    stem = name.removesuffix(".weight")
    return next((tensors[stem + end] for end in _ENDINGS if stem + end in tensors), None)
