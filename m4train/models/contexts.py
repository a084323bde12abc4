"""What decoder layers attend to: packed segments, a key-value cache, or dense rows whose weights are wanted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from m4train.batch import CrossSegments, Segments
from m4train.models.attention import attention
from m4train.models.uncompiled import uncompiled

Tables = tuple[Tensor, Tensor]


class KeyValueCache:
    """Keys and values of the tokens seen so far, one slot per column of the padded input.

    `keys[layer]`, `values[layer]`: (B, kv_heads, capacity, head_dim); `mask` (B, length) True where a column holds a token.
    For cross-attention (Idefics): `cross[layer]` the keys and values (images x n, heads, head_dim) of all images, and
    `images` (B, N) which of them is at each place of a row.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.mask: Tensor | None = None
        self.capacity = capacity
        self.cross: dict[int, tuple[Tensor, Tensor]] = {}
        self.images: Tensor | None = None

    @classmethod
    def of(cls, layers: Iterable[tuple[Tensor, Tensor]], mask: Tensor | None = None) -> KeyValueCache:
        """From keys and values (B, kv_heads, length, head_dim) of each layer; `mask` (B, length), by default all ones."""
        cache = cls()
        for layer, (key, value) in enumerate(layers):
            cache.keys[layer], cache.values[layer] = key, value
        batch, _, length, _ = cache.keys[0].shape
        cache.mask = (
            cache.keys[0].new_ones(batch, length, dtype=torch.bool) if mask is None else mask[:, :length].bool()
        )
        cache.capacity = length
        return cache

    @property
    def length(self) -> int:
        return 0 if self.mask is None else self.mask.shape[1]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (B, kv_heads, length, head_dim) each."""
        if layer not in self.keys:
            raise IndexError(layer)
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def extend(self, mask: Tensor) -> None:
        """Opens the columns of `mask` (B, n) behind those held."""
        mask = mask.bool()
        self.mask = mask if self.mask is None else torch.cat((self.mask, mask), dim=1)
        self.capacity = max(self.capacity, self.length)

    def write(self, layer: int, rows: Tensor, columns: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores `key` and `value` (T, kv_heads, head_dim) at (`rows`, `columns`)."""
        for store, new in ((self.keys, key), (self.values, value)):
            held = self._room(store.get(layer), new)
            held[rows, :, columns] = new
            store[layer] = held

    def write_last(self, layer: int, count: int, key: Tensor, value: Tensor) -> None:
        """Stores `key` and `value` (B * count, kv_heads, head_dim), row by row, in the last `count` columns of every row."""
        for store, new in ((self.keys, key), (self.values, value)):
            held = self._room(store.get(layer), new)
            held[:, :, self.length - count : self.length] = new.unflatten(0, (-1, count)).transpose(1, 2)
            store[layer] = held

    def select(self, rows: Tensor) -> None:
        """Keeps the rows `rows` (B',) of the batch, in this order."""
        assert self.mask is not None
        self.mask = self.mask[rows]
        self.images = None if self.images is None else self.images[rows]
        for store in (self.keys, self.values):
            for layer, held in store.items():
                store[layer] = held.index_select(0, rows)

    def _room(self, held: Tensor | None, new: Tensor) -> Tensor:
        assert self.mask is not None
        if held is not None and held.shape[2] >= self.length:
            return held
        capacity = self.capacity if held is None else max(self.capacity, 2 * held.shape[2])
        room = new.new_zeros(self.mask.shape[0], new.shape[1], capacity, new.shape[2])
        if held is not None:
            room[:, :, : held.shape[2]] = held
        return room


class PackedContext:
    """Causal attention within each segment; writes a cache if one is given.

    Args:
        tables: of `Rotary`, for the T tokens.
        segments: of the T tokens.
        window: sliding window in tokens, or None.
        cache, rows, columns: where the keys and values of each token go.
    """

    def __init__(
        self,
        tables: Tables,
        segments: Segments,
        window: int | None = None,
        cache: KeyValueCache | None = None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        self.tables = tables
        self.segments = segments
        self.window = window
        self.cache = cache
        self.rows = rows
        self.columns = columns

    @uncompiled
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """(T, heads, head_dim), (T, kv_heads, head_dim) twice -> (T, heads, head_dim); weights drop out."""
        if self.cache is not None:
            assert self.rows is not None
            assert self.columns is not None
            self.cache.write(layer, self.rows, self.columns, key, value)
        segments, window = self.segments, self.window
        return attention(query, key, value, segments, segments, causal=True, window=window, dropout=dropout)


class CachedContext:
    """Attention of the last n columns of every row to all columns of the cache: one masked call for the batch.

    The T = B x n tokens are taken row by row, padding columns included.
    """

    def __init__(self, tables: Tables, cache: KeyValueCache, count: int, window: int | None = None) -> None:
        assert cache.mask is not None
        self.tables, self.cache, self.count = tables, cache, count
        length, device = cache.mask.shape[1], cache.mask.device
        columns = torch.arange(length - count, length, device=device)
        keys = torch.arange(length, device=device)
        visible = keys <= columns[:, None]
        if window is not None:
            visible = visible & (keys > columns[:, None] - window)  # in columns, as the reference counts them
        # A padding column attends to itself, so that its softmax is defined; nothing reads its output.
        own = keys == columns[:, None]
        self.mask = (visible & (cache.mask[:, None] | own))[:, None]  # (B, 1, n, length)

    @uncompiled
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """(B * n, heads, head_dim), (B * n, kv_heads, head_dim) twice -> (B * n, heads, head_dim); weights drop out."""
        self.cache.write_last(layer, self.count, key, value)
        keys, values = self.cache[layer]
        batch, kv_heads = keys.shape[:2]
        count, group = query.shape[0] // batch, query.shape[1] // kv_heads
        # The query heads that share a key head become further queries of it: no key is copied.
        query = query.view(batch, count, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = self.mask if group == 1 or count == 1 else self.mask.repeat(1, 1, group, 1)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
        return mixed.unflatten(2, (group, count)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


class RecordingContext:
    """Dense attention that keeps its weights, for `output_attentions`.

    `weights` collects (B, heads, T, T) per layer, zero in rows and columns of padding.
    """

    def __init__(self, tables: Tables, rows: Tensor, columns: Tensor, mask: Tensor, window: int | None) -> None:
        self.tables = tables
        self.rows, self.columns, self.shape = rows, columns, mask.shape
        there = torch.zeros_like(mask)
        there[rows, columns] = True
        visible = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=rows.device).tril()
        self.mask = visible & mask[:, None, :] & there[:, :, None]
        if window is not None:
            order = mask.long().cumsum(1)
            self.mask &= order[:, None, :] > order[:, :, None] - window
        self.weights: list[Tensor] = []

    def _spread(self, x: Tensor) -> Tensor:
        rows = x.new_zeros(*self.shape, *x.shape[1:])
        rows[self.rows, self.columns] = x
        return rows.transpose(1, 2)

    @uncompiled
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """(T, heads, head_dim), (T, kv_heads, head_dim) twice -> (T, heads, head_dim); weights drop out."""
        group = query.shape[1] // key.shape[1]
        queries = self._spread(query)
        keys, values = (self._spread(x).repeat_interleave(group, dim=1) for x in (key, value))
        scores = queries @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = scores.float() if scores.dtype != torch.float64 else scores
        hidden_from = ~self.mask[:, None]
        weights = scores.masked_fill(hidden_from, torch.finfo(scores.dtype).min).softmax(-1)
        weights = weights.masked_fill(hidden_from, 0.0).to(query.dtype)
        weights = F.dropout(weights, dropout)
        self.weights.append(weights)
        return (weights @ values).transpose(1, 2)[self.rows, self.columns]


class DenseContext:
    """Attention of every column of padded rows, padding included, as the reference computes it.

    The T = B x columns tokens are taken row by row. A query sees the real columns up to its own, of which a `window` counts
    columns; one that sees none, such as padding on the left, gets zeros.

    Args:
        tables: of `Rotary`, for the T tokens.
        real: (B, columns) bool, False at padding.
        window: sliding window in columns, or None.
        cache, rows, columns: where the keys and values of each token go.
    """

    def __init__(
        self,
        tables: Tables,
        real: Tensor,
        window: int | None = None,
        cache: KeyValueCache | None = None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        self.tables, self.cache, self.rows, self.columns = tables, cache, rows, columns
        self.shape = real.shape
        place = torch.arange(real.shape[1], device=real.device)
        visible = place <= place[:, None]
        if window is not None:
            visible = visible & (place > place[:, None] - window)
        seen = visible & real[:, None]
        self.blind = ~seen.any(-1)[:, None, :, None]  # (B, 1, columns, 1)
        # What sees nothing looks at itself, so that softmax and gradient are defined; its output is replaced.
        self.mask = seen[:, None] | (self.blind & (place == place[:, None]))

    @uncompiled
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        if self.cache is not None:
            assert self.rows is not None
            assert self.columns is not None
            self.cache.write(layer, self.rows, self.columns, key, value)
        group = query.shape[1] // key.shape[1]
        queries, keys, values = (x.unflatten(0, self.shape).transpose(1, 2) for x in (query, key, value))
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask, dropout_p=dropout)
        return mixed.masked_fill(self.blind, 0.0).transpose(1, 2).flatten(0, 1)


class CrossContext:
    """Cross-attention of segments of tokens to the features of the images they see (Idefics).

    Args:
        cross: the segments, and the images that each sees.
        per_image: number of feature vectors of an image.
        cache: where the keys and values of the images are kept for later steps.
    """

    def __init__(self, cross: CrossSegments, per_image: int, cache: KeyValueCache | None = None) -> None:
        self.tokens = cross.tokens
        self.queries = cross.queries
        self.keys = Segments(tuple(n * per_image for n in cross.seen.lengths), cross.seen.cu_seqlens * per_image)
        self.images = cross.images
        self.per_image = per_image
        self.cache = cache

    @uncompiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """(Q, heads, head_dim) for the tokens of the segments; (images x per_image, heads, head_dim) twice."""
        if not self.queries.lengths:
            # Nothing sees an image: an empty result of all three, so that each gets a gradient of zeros.
            return torch.cat((query[:0], key[:0], value[:0]))
        key, value = (
            x.unflatten(0, (-1, self.per_image)).index_select(0, self.images).flatten(0, 1) for x in (key, value)
        )
        return attention(query, key, value, self.queries, self.keys, dropout=dropout)
