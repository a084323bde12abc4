"""Building and checking the sidecar indexes of shards."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m4train.data.documents.rendering import Renderer
from m4train.data.index.catalogue import MappedShards, catalogue_path, fresh, kept, most_mapped, stamps_of
from m4train.data.index.outside import changed_outside
from m4train.data.index.scan import Stored, count_shard, scan_shard
from m4train.data.index.shard_index import VERSION, index_path, tokens_path
from m4train.data.sources.base import ShardFormat
from m4train.data.storage.arrays import read_arrays, write_arrays
from m4train.data.storage.files import FileReader, is_remote, stamp, stamps
from m4train.data.storage.packed import check_packed
from m4train.errors import DataError, StaleIndexError
from m4train.terminal import counted

_LOG = logging.getLogger(__name__)
_INLINE_BYTES = 256 << 20  # fewer bytes are indexed sooner here than in new processes
_REMOTE_BYTES = 256 << 20  # more bytes in an object store are not fetched for an index without being asked to
_READ_AHEAD = 8 << 20


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
    sizes = {shard: size for shard, (size, _) in stamps(shards).items()}
    check_packed(sizes)
    jobs = [(shard, shard_format, renderer, index_dir) for shard in shards]
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers < 2 or sum(sizes.values()) < _INLINE_BYTES:
        for done, job in enumerate(jobs, 1):
            _build_shard(*job)
            if progress is not None:
                progress(done, len(jobs))
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        building = [pool.submit(_build_shard, *job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(building), 1):
                future.result()
                if progress is not None:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def build_structure(shard: str, shard_format: ShardFormat, index_dir: str | None = None) -> None:
    """Writes the part of a shard's index that no processor decides; whoever trains on it counts tokens from its texts alone."""
    path = index_path(shard, index_dir)
    with _locked(path):
        structure, _ = scan_shard(shard, shard_format, None, FileReader(read_ahead=_READ_AHEAD))
        write_arrays(path, *structure)


def open_index(
    shards: Sequence[str], shard_format: ShardFormat, renderer: Renderer, index_dir: str | None, auto_limit: int
) -> MappedShards:
    """The indexes of all shards, built now if they are missing or stale and hold at most `auto_limit` samples together.

    Raises StaleIndexError above that: many processes of a job should not each wait for a long build.
    """
    fingerprint, found = renderer.fingerprint(), stamps(shards)
    check_packed({shard: size for shard, (size, _) in found.items()})
    if len(shards) <= most_mapped():
        _renew(shards, found, shard_format, renderer, index_dir, auto_limit)
        opened = MappedShards(shards, index_dir, fingerprint)
        said = [line for index in opened for line in index.said()]
    else:
        reading = {"format": shard_format.name, "settings": dict(shard_format.settings)}
        path = catalogue_path(shards, index_dir, fingerprint, reading)
        catalogue = fresh(path, stamps_of(found, index_dir, fingerprint))
        if catalogue is not None:
            outside = {shards[number]: found[shards[number]] for number in catalogue[0]["outside"]}
            catalogue = None if _stale(outside, shard_format, index_dir, fingerprint) else catalogue
        if catalogue is None:
            _renew(shards, found, shard_format, renderer, index_dir, auto_limit)
            now = stamps_of(found, index_dir, fingerprint)
            opened = MappedShards(shards, index_dir, fingerprint)
            assert opened.catalogue is not None
            if kept(path, opened.catalogue, now) is not None:
                opened = MappedShards(shards, index_dir, fingerprint, path)
        else:
            opened = MappedShards(shards, index_dir, fingerprint, path)
        assert opened.catalogue is not None
        said = opened.catalogue[0]["said"]
    for line in said:
        _LOG.warning("%s", line)
    return opened


def _renew(
    shards: Sequence[str],
    found: Mapping[str, list[Any]],
    shard_format: ShardFormat,
    renderer: Renderer,
    index_dir: str | None,
    auto_limit: int,
) -> None:
    """Builds what is missing or stale, as `open_index` says; `found` are the stamps of the shards."""
    stale = _stale({shard: found[shard] for shard in shards}, shard_format, index_dir, renderer.fingerprint())
    if not stale:
        return
    above = _too_large({shard: found[shard][0] for shard in stale}, shard_format, auto_limit)
    if above is not None:
        raise StaleIndexError(
            f"{len(stale)} of {len(shards)} shards need indexing (first: {next(iter(stale))}, {next(iter(stale.values()))}) "
            f"and hold more than {above}: run `m4train data index` with the same settings first."
        )
    build_index(list(stale), shard_format, renderer, index_dir, progress=counted)


def _stale(
    found: Mapping[str, list[Any]], shard_format: ShardFormat, index_dir: str | None, fingerprint: str
) -> dict[str, str]:
    """Why each shard that must be indexed must be."""
    reasons = {shard: _staleness(shard, stamp, shard_format, index_dir, fingerprint) for shard, stamp in found.items()}
    return {shard: why for shard, why in reasons.items() if why is not None}


def _too_large(shards: Mapping[str, int], shard_format: ShardFormat, auto_limit: int) -> str | None:
    """What shards of these sizes in bytes hold more of than is indexed on first use; None if they do not."""
    if sum(size for shard, size in shards.items() if is_remote(shard)) > _REMOTE_BYTES:
        return f"{_REMOTE_BYTES >> 20} MiB in an object store"
    samples, files = 0, FileReader()
    for shard in shards:
        samples += 0 if is_remote(shard) else shard_format.count(files, shard, auto_limit - samples)
        if samples > auto_limit:
            return f"data.auto_index_limit={auto_limit} samples"
    return None


def _staleness(
    shard: str,
    found: list[Any],
    shard_format: ShardFormat,
    index_dir: str | None,
    fingerprint: str,
    thorough: bool = False,
) -> str | None:
    """Why a shard with the stamp `found` must be indexed, or None."""
    structure, why = _structure(shard, found, shard_format, index_dir, thorough)
    if structure is None:
        return why
    try:
        tokens, _ = read_arrays(tokens_path(shard, index_dir, fingerprint))
    except (FileNotFoundError, NotADirectoryError):
        return "no token counts for this processor"
    except StaleIndexError as error:
        return str(error)
    if (tokens.get("version"), tokens["fingerprint"], tokens["digest"]) != (
        VERSION,
        fingerprint,
        structure[0]["digest"],
    ):
        return "the token counts are for other content"
    return None


def _structure(
    shard: str, found: list[Any], shard_format: ShardFormat, index_dir: str | None, thorough: bool
) -> tuple[Stored | None, str]:
    """What `SHARD.index` holds, or why it is not what a scan would find now."""
    try:
        meta, arrays = read_arrays(index_path(shard, index_dir))
    except (FileNotFoundError, NotADirectoryError):
        return None, "no index"
    except StaleIndexError as error:
        return None, str(error)
    if meta.get("version") != VERSION or found != meta["stamp"]:
        return None, "the shard has changed since it was indexed"
    if meta["format"] != shard_format.name:
        return None, f"it was indexed as {meta['format']}"
    if meta.get("settings", {}) != dict(shard_format.settings):
        return None, "it was indexed with other settings of its source, or by other rules of an earlier version"
    changed = changed_outside(shard, arrays, thorough)
    return (None, changed) if changed else ((meta, arrays), "")


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
        if _staleness(shard, found, shard_format, index_dir, fingerprint, thorough=True) is None:
            return
        structure, _ = _structure(shard, found, shard_format, index_dir, thorough=True)
        if structure is not None:
            counts = count_shard(shard, shard_format, renderer, structure)
        else:
            structure, counted = scan_shard(shard, shard_format, renderer, FileReader(read_ahead=_READ_AHEAD))
            assert counted is not None
            counts = counted
            write_arrays(path, *structure)
        write_arrays(tokens_path(shard, index_dir, fingerprint), *counts)
