"""Building and checking the sidecar indexes of shards."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from m4train.data.arrays import read_arrays, write_arrays
from m4train.data.index import PIECE_KINDS, VERSION, Pieces, ShardIndex, index_path, tokens_path
from m4train.data.rendering import Renderer
from m4train.data.sources.base import Member, ShardFormat
from m4train.data.storage import FileReader, is_remote, stamp, stamps
from m4train.errors import BadSample, DataError, StaleIndexError

_LOG = logging.getLogger(__name__)
_INLINE_BYTES = 256 << 20  # fewer bytes are indexed sooner here than in new processes
_REMOTE_BYTES = 256 << 20  # more bytes in an object store are not fetched for an index without being asked to
_READ_AHEAD = 8 << 20
_STRUCTURE_TYPES: dict[str, Any] = {"offsets": np.int64, "sizes": np.int64, "hashes": np.uint64}
_STRUCTURE_TYPES |= dict.fromkeys(("widths", "heights", "parts"), np.int32)


def build_index(
    shards: Sequence[str],
    shard_format: ShardFormat,
    renderer: Renderer,
    index_dir: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Makes or renews the indexes of all shards, in parallel, each under a lock.

    What is already fresh is left alone, so an interrupted build goes on where it stopped. `progress(done, total)` is called
    after each shard.
    """
    jobs = [(shard, shard_format, renderer, index_dir) for shard in shards]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers < 2 or sum(size for size, _ in stamps(shards).values()) < _INLINE_BYTES:
        for done, job in enumerate(jobs, 1):
            _build_shard(*job)
            if progress is not None:
                progress(done, len(jobs))
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done, _ in enumerate(pool.map(_build_shard, *zip(*jobs)), 1):
            if progress is not None:
                progress(done, len(jobs))


def open_index(
    shards: Sequence[str], shard_format: ShardFormat, renderer: Renderer, index_dir: str | None, auto_limit: int
) -> list[ShardIndex]:
    """The indexes of all shards, built now where they are missing or stale and hold at most `auto_limit` samples together.

    Raises StaleIndexError above that: many processes of a job should not each wait for a long build.
    """
    fingerprint = renderer.fingerprint()
    found = stamps(shards)
    stale = {s: why for s in shards if (why := _staleness(s, found[s], shard_format, index_dir, fingerprint))}
    if stale:
        above = _too_large({shard: found[shard][0] for shard in stale}, shard_format, auto_limit)
        if above is not None:
            raise StaleIndexError(
                f"{len(stale)} of {len(shards)} shards need indexing (first: {next(iter(stale))}, {next(iter(stale.values()))}) "
                f"and hold more than {above}: run `m4train data index` with the same settings first."
            )
        build_index(list(stale), shard_format, renderer, index_dir)
    opened = [ShardIndex(shard, index_dir, fingerprint) for shard in shards]
    for index in opened:
        if index.bad:
            first = next(iter(index.bad.values()))
            _LOG.warning(
                "%s: %d of %d samples cannot be used, first: %s", index.shard, len(index.bad), len(index), first[1]
            )
    return opened


def _too_large(shards: Mapping[str, int], shard_format: ShardFormat, auto_limit: int) -> str | None:
    """What shards of these sizes in bytes hold more of than is indexed on first use; None where they do not."""
    if sum(size for shard, size in shards.items() if is_remote(shard)) > _REMOTE_BYTES:
        return f"{_REMOTE_BYTES >> 20} MiB in an object store"
    samples, files = 0, FileReader()
    for shard in shards:
        samples += 0 if is_remote(shard) else shard_format.count(files, shard, auto_limit - samples)
        if samples > auto_limit:
            return f"data.auto_index_limit={auto_limit} samples"
    return None


def _staleness(
    shard: str, found: list[Any], shard_format: ShardFormat, index_dir: str | None, fingerprint: str
) -> str | None:
    """Why a shard with the stamp `found` must be indexed, or None."""
    try:
        meta, _ = read_arrays(index_path(shard, index_dir))
        if meta.get("version") != VERSION or found != meta["stamp"]:
            return "the shard has changed since it was indexed"
        if meta["format"] != shard_format.name:
            return f"it was indexed as {meta['format']}"
        tokens, _ = read_arrays(tokens_path(shard, index_dir, fingerprint))
    except (FileNotFoundError, NotADirectoryError) as error:
        return "no index" if str(error.filename).endswith(".index") else "no token counts for this processor"
    except StaleIndexError as error:
        return str(error)
    if (tokens.get("version"), tokens["fingerprint"], tokens["digest"]) != (VERSION, fingerprint, meta["digest"]):
        return "the token counts are for other content"
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time per shard; the others wait and then find it done. The lock file goes with the lock."""
    lock = path.with_name(f".{path.name}.lock")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "w")  # noqa: SIM115 (closed below, after the lock)
        except OSError as error:
            raise DataError(
                f"The index cannot be written to {path.parent} ({error}): set data.index_dir to a folder that can."
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # whoever held it has removed it
            try:
                yield
            finally:
                lock.unlink()
            return


def _build_shard(shard: str, shard_format: ShardFormat, renderer: Renderer, index_dir: str | None) -> None:
    path, fingerprint = index_path(shard, index_dir), renderer.fingerprint()
    with _locked(path):
        found = stamp(shard)
        if _staleness(shard, found, shard_format, index_dir, fingerprint) is None:
            return
        files = FileReader(read_ahead=_READ_AHEAD)
        try:
            meta, parts = read_arrays(path)
            fresh = (meta.get("version"), meta.get("format")) == (VERSION, shard_format.name)
            fresh = fresh and meta["stamp"] == found
        except (FileNotFoundError, StaleIndexError):
            fresh = False
        if not fresh:
            meta, parts = _scan(files, shard, shard_format)
            write_arrays(path, meta, parts)
        token_meta, tokens = _count_tokens(files, shard, shard_format, renderer, meta, parts)
        write_arrays(tokens_path(shard, index_dir, fingerprint), token_meta, tokens)


def _scan(files: FileReader, shard: str, shard_format: ShardFormat) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    found = stamp(shard)
    keys, key_ends, member_ends, bad = bytearray(), [], [], {}
    rows: list[tuple[int, ...]] = []
    for number, sample in enumerate(shard_format.scan(files, shard)):
        keys += sample.key.encode("utf-8")
        key_ends.append(len(keys))
        rows.extend((m.offset, m.size, m.hash, m.width, m.height, m.part) for m in sample.members)
        member_ends.append(len(rows))
        if sample.bad is not None:
            bad[str(number)] = sample.bad
    if stamp(shard) != found:
        raise DataError(f"{shard} changed while it was indexed: wait until it is written, then start again.")
    columns = list(zip(*rows)) or [()] * len(_STRUCTURE_TYPES)
    arrays = {name: np.array(column, kind) for (name, kind), column in zip(_STRUCTURE_TYPES.items(), columns)}
    arrays |= {"keys": np.frombuffer(bytes(keys), np.uint8)}
    arrays |= {"key_ends": np.array(key_ends, np.int64), "member_ends": np.array(member_ends, np.int64)}
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    meta = {"version": VERSION, "format": shard_format.name, "stamp": found, "bad": bad, "digest": digest.hexdigest()}
    meta["blocks"] = shard_format.blocks(files, shard)
    return meta, arrays


def _count_tokens(
    files: FileReader,
    shard: str,
    shard_format: ShardFormat,
    renderer: Renderer,
    meta: dict[str, Any],
    parts: dict[str, np.ndarray],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    columns = [parts[name].tolist() for name in _STRUCTURE_TYPES]
    ends = parts["member_ends"].tolist()
    keys, key_ends = parts["keys"].tobytes(), parts["key_ends"].tolist()
    pieces: list[Pieces] = []  # of every variant of every sample
    bad = {}
    for number, end in enumerate(ends):
        found = [Pieces(*(np.empty(0, np.int32) for _ in range(3)))] * renderer.variants
        if str(number) not in meta["bad"]:
            begin = ends[number - 1] if number else 0
            members = tuple(Member(*row) for row in zip(*(column[begin:end] for column in columns)))
            try:
                sample = shard_format.sample(files, shard, members)
                key = keys[key_ends[number - 1] if number else 0 : key_ends[number]].decode()
                sizes = [(member.width, member.height) for member in members if member.is_image]
                found = [renderer.prepare(sample, key, sizes, n).planned for n in range(renderer.variants)]
            except BadSample as error:
                bad[str(number)] = (error.reason, error.detail)
        pieces += found
    types = {"tokens": np.int32, "kinds": np.uint8, "frames": np.int32}
    arrays = {
        f"piece_{name}": np.concatenate([getattr(p, name) for p in pieces] or [[]]).astype(kind)
        for name, kind in types.items()
    }
    shape = (len(ends), renderer.variants)
    arrays["lengths"] = np.array([p.tokens.sum() for p in pieces], np.int32).reshape(shape)
    arrays["frames"] = np.array([p.frames.sum() for p in pieces], np.int32).reshape(shape)
    arrays["piece_ends"] = np.cumsum([len(p.tokens) for p in pieces], dtype=np.int64)
    return {
        "version": VERSION,
        "fingerprint": renderer.fingerprint(),
        "digest": meta["digest"],
        "kinds": PIECE_KINDS,
        "bad": bad,
    }, arrays
