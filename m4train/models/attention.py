"""The attention operator on the packed form: queries, keys and values of all segments end to end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4train.batch import Segments
from m4train.errors import ConfigError
from m4train.models.products import recomputed
from m4train.models.uncompiled import uncompiled

# Up to this length of the longest segment one padded call is cheaper than a call per segment (measured on CPU: 1.5 ms against
# 7 ms for 60 segments of 8 tokens; from about 60 tokens on, padding always loses).
_SHORT = 32


@uncompiled
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention within each segment.

    Args:
        query: (Tq, heads, head_dim).
        key, value: (Tk, kv_heads, head_dim); kv_heads divides heads.
        query_segments, key_segments: as many segments on both sides; query segment i attends to key segment i.
        causal: token i of a segment sees keys 0..i; the two sides then have equal lengths.
        window: with `causal`, see only this many last keys, the own one included.
        dropout: probability with which a weight is dropped; the kernel for half precision on CUDA is then not used, as it
            drops none.

    Returns:
        (Tq, heads, head_dim)
    """
    if torch.is_autocast_enabled(query.device.type):
        # A norm between projection and attention gives fp32 queries and keys with half-precision values.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if not causal:
        window = None
    if window is not None and window >= key_segments.longest:
        window = None
    if kernel(query.device, query.dtype, query.shape[-1], dropout) == "varlen":
        return _varlen(query, key, value, query_segments, key_segments, causal, window)
    dense = partial(_dense, causal=causal, window=window, dropout=dropout)
    if _uniform(query_segments) and _uniform(key_segments):
        count = len(query_segments)
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (query, key, value))
        return dense(q, k, v).transpose(1, 2).flatten(0, 1)
    if max(query_segments.longest, key_segments.longest) <= _SHORT:
        return _padded(query, key, value, query_segments, key_segments, causal, window, dropout)
    outputs = [
        dense(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)
        for qkv in zip(
            query.split(query_segments.lengths), key.split(key_segments.lengths), value.split(key_segments.lengths)
        )
    ]
    # The kernel keeps its outputs for its own backward pass.
    return recomputed(torch.cat(outputs), lambda *parts: torch.cat(parts), *outputs)


def kernel(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float = 0.0) -> str:
    """Which kernel computes `attention`: varlen, over all segments at once; or sdpa, scaled_dot_product_attention by segment."""
    half = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return "varlen" if half and not dropout and _fits_varlen(head_dim) else "sdpa"


def attention_kernels(
    blocks: Mapping[str, Iterable[nn.Module]], device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[str, ...]]:
    """Per part of `blocks`, the kernels its attention layers train with if it has any: modules with a `head_dim`."""
    found = {
        part: {
            kernel(device, dtype, module.head_dim, getattr(module, "dropout", 0.0))
            for block in members
            for module in block.modules()
            if isinstance(getattr(module, "head_dim", None), int)
        }
        for part, members in blocks.items()
    }
    return {part: tuple(sorted(kernels)) for part, kernels in found.items() if kernels}


def check_attention(name: str | None, dtype: torch.dtype) -> None:
    """Raises ConfigError if a model of this dtype would not use the kernels that `name`, of the reference's, stands for."""
    if name not in (None, "sdpa", "flash_attention_2"):
        raise ConfigError(
            f"attn_implementation is {name!r}, but only sdpa and flash_attention_2 are implemented: leave it out; attention weights come "
            "with output_attentions=True"
        )
    if name == "flash_attention_2" and dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"attn_implementation is flash_attention_2, which takes half precision, but the model is {dtype}: load it with "
            "dtype=torch.bfloat16"
        )


def _fits_varlen(head_dim: int) -> bool:
    return head_dim <= 256 and head_dim % 8 == 0


def _uniform(segments: Segments) -> bool:
    return len(set(segments.lengths)) == 1


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, q: Segments, k: Segments, causal: bool, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    return varlen_attn(
        query,
        key,
        value,
        q.cu_seqlens,
        k.cu_seqlens,
        q.longest,
        k.longest,
        window_size=(left, 0 if causal else -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _dense(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, window: int | None, dropout: float) -> Tensor:
    """(N, heads, L, head_dim) each; rows are whole segments."""
    gqa = query.shape[1] != key.shape[1]
    mask = None if window is None else causal_mask(query.shape[2], window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, enable_gqa=gqa
    )


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(length, length) bool, True where the row may look at the column."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q: Segments,
    k: Segments,
    causal: bool,
    window: int | None,
    dropout: float,
) -> Tensor:
    q_slots, k_slots = _slots(q.lengths, query.device), _slots(k.lengths, key.device)
    keys = torch.arange(k.longest, device=key.device)
    lengths = (k.cu_seqlens[1:] - k.cu_seqlens[:-1]).to(key.device)
    # A segment without keys gives zeros, as it has nothing to attend to: its row must still hold one key for the softmax.
    mask = (keys < lengths[:, None].clamp(min=1))[:, None, None]
    if causal:
        # Real queries come before the padding of their row, so the causal triangle hides it from them.
        mask = causal_mask(q.longest, window, query.device)
    out = F.scaled_dot_product_attention(
        _to_rows(query, q_slots, len(q), q.longest),
        _to_rows(key, k_slots, len(k), k.longest),
        _to_rows(value, k_slots, len(k), k.longest),
        attn_mask=None if causal and window is None else mask,
        dropout_p=dropout,
        is_causal=causal and window is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, q_slots)


@lru_cache(maxsize=32)
def _slots(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(T,) the place of each token in the rows of a padded batch; kept, because every layer asks for the same."""
    longest = max(lengths)
    with torch.inference_mode(False):  # else what an evaluation asked for first could not be used in training
        return torch.cat([torch.arange(i * longest, i * longest + n) for i, n in enumerate(lengths)]).to(device)


def _to_rows(x: Tensor, slots: Tensor, count: int, longest: int) -> Tensor:
    """(T, heads, head_dim) -> (count, heads, longest, head_dim), zeros between."""
    rows = x.new_zeros(count * longest, *x.shape[1:]).index_copy(0, slots, x)
    return rows.unflatten(0, (count, longest)).transpose(1, 2)
