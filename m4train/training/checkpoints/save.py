"""Checkpoints that survive anything: written aside, flushed, re-read, renamed.

The portable form holds full tensors by canonical name in the format of torch.distributed.checkpoint, so that any engine on
any number of ranks reads it. A folder named `step-NNNNNN` is always whole: everything before the rename happens in a
folder of another name.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import m4train
from m4train.durable import fsync_folder, remove
from m4train.errors import CheckpointError, ConfigError
from m4train.json_files import read_mapping
from m4train.run_files import BEST, STATE
from m4train.training.checkpoints.files import (
    checkpoints_in,
    file_hashes,
    fsync_tree,
    write_json,
    write_manifest,
)
from m4train.training.checkpoints.state import Checkpoint, sealed
from m4train.training.checkpoints.tensor_files import one_process_is_fine, read_tensors, stored_tensors
from m4train.training.engines.base import Engine
from m4train.training.tensors import BUFFER, GUARD, NATIVE, OPTIMIZER, PARAMETER, SCALE

TENSORS = "tensors"
_PROBE = 2**16  # bytes
_VERIFY_BYTES = 512 * 2**20  # how much is held twice while a checkpoint is read back


def save_checkpoint(
    folder: Path,
    engine: Engine,
    state: dict[str, Any],
    keep_last: int,
    keep_every: int = 0,
    save_extra: Callable[[Path], None] | None = None,
) -> Path:
    """Writes `folder/step-NNNNNN` for `state["step"]` with the engine's live tensors; see `write_checkpoint`."""
    return write_checkpoint(folder, engine, engine.tensors(), state, keep_last, keep_every, save_extra)


def write_checkpoint(
    folder: Path,
    engine: Engine,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep_last: int,
    keep_every: int = 0,
    save_extra: Callable[[Path], None] | None = None,
) -> Path:
    """Writes `folder/step-NNNNNN` for `state["step"]`, then removes the oldest beyond `keep_last`; all ranks call it.

    Checkpoints of steps that `keep_every` divides are never removed (0: none). It may run in a thread alongside training: it
    speaks to other ranks through `engine.checkpoint_group` alone, and touches nothing of the engine but `tensors`.

    `save_extra(path)` runs on rank 0 inside the folder being written. Raises CheckpointError on every rank if any of them
    could not write; the half-written folder is then gone and earlier checkpoints are untouched.
    """
    hashes: dict[str, str] = {}  # of the files, so that each is read once for them
    name = f"step-{state['step']:06d}"
    target, aside = folder / name, folder / f".writing-{name}"
    stages: list[Callable[[], None]] = [
        lambda: _on_main(engine, lambda: _make_folder(aside)),
        lambda: _write_tensors(aside / TENSORS, tensors, engine),
        lambda: _on_main(engine, lambda: _write_rest(aside, state, save_extra, hashes)),
        lambda: _verify(aside / TENSORS, tensors),
        lambda: _on_main(engine, lambda: _seal(aside, hashes)),
        lambda: _on_main(engine, lambda: _publish(aside, target)),
    ]
    for stage in stages:
        problem = _attempt(stage)
        if _on_any_rank(engine, problem is not None):
            why = (problem and _refusal(aside)) or problem or "another rank failed"
            _on_main(engine, lambda: shutil.rmtree(aside, ignore_errors=True))
            earlier = [path.name for step, path in checkpoints_in(folder) if step < state["step"]]
            kept = f"{earlier[-1]} before it is kept" if earlier else "there is none before it"
            raise CheckpointError(f"Checkpoint {target} could not be written ({why}); {kept}.")
    _on_main(engine, lambda: _prune(folder, state["step"], keep_last, keep_every))
    return target


def load_checkpoint(
    checkpoint: Checkpoint, engine: Engine, optimizer: bool = True, begin: Collection[str] = (), whole: bool = False
) -> None:
    """Overwrites the engine's live tensors from a checkpoint, those of its optimizer as asked; all ranks call it.

    `begin`: canonical names of the parameters whose optimizer state stays as it begins, since they did not train before.
    Raises CheckpointError naming what the model has and the checkpoint lacks, or has in another shape, and with `whole` what
    the optimizer of the checkpoint has and this one lacks.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    folder = checkpoint.folder / TENSORS
    held = stored_tensors(folder)
    seen: set[str] = set()

    def is_there(name: str) -> bool:
        """False for what begins here: a run may go on in fp16, or watch for outliers, from a checkpoint that did not."""
        if name.startswith(OPTIMIZER):
            return name.split("/", 2)[2] not in begin
        return name in held or not name.startswith((SCALE, GUARD))

    def read(tensors: dict[str, Tensor]) -> None:
        wanted = {name: t for name, t in tensors.items() if optimizer or name.startswith((PARAMETER, BUFFER))}
        read_tensors(folder, {name: t for name, t in wanted.items() if is_there(name)})
        seen.update(wanted)

    native = optimizer and _is_native(checkpoint, engine, held)
    try:
        engine.load(read, native)
    except (CheckpointException, RuntimeError, ValueError) as error:
        cause = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"Checkpoint {checkpoint.folder} does not fit this model: {cause.rstrip('.')}."
        ) from error
    left = [name for name in held if name.startswith(OPTIMIZER) and name not in seen]
    if whole and left:
        raise CheckpointError(
            f"optimizer.start is kept, but checkpoint {checkpoint.folder} has {left[0]}, and this run trains other parameters or "
            "has another optimizer: set optimizer.start=fresh."
        )


def _is_native(checkpoint: Checkpoint, engine: Engine, names: Iterable[str]) -> bool:
    """Whether the checkpoint holds the optimizer, of its tensors `names`, as this engine on this number of ranks keeps it.

    Raises CheckpointError if it does so for another engine or number of ranks.
    """
    native = next((name for name in names if name.startswith(NATIVE)), None)
    if native is not None and (engine.native_prefix is None or not native.startswith(engine.native_prefix)):
        _, name, ranks, *_ = native.split("/")
        raise CheckpointError(
            f"Checkpoint {checkpoint.folder} holds the optimizer as {name} on {ranks} ranks keeps it: continue there, once "
            "with engine.checkpoint=portable to move on elsewhere, or set resume_optimizer=fresh."
        )
    return native is not None


def versions() -> dict[str, str]:
    """What a checkpoint was written by; `revision` is the git commit of a checkout, with + if files were changed."""
    found = {"m4train": m4train.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | ({"revision": revision} if (revision := _revision()) else {})


@cache
def _revision() -> str | None:
    checkout = Path(m4train.__file__).parents[1]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def _on_any_rank(engine: Engine, here: bool) -> bool:
    if engine.checkpoint_group is None:
        return here
    flag = torch.tensor(int(here))
    dist.all_reduce(flag, group=engine.checkpoint_group)
    return bool(flag)


def _on_main(engine: Engine, action: Callable[[], None]) -> None:
    if engine.rank == 0:
        action()


def _attempt(stage: Callable[[], None]) -> str | None:
    """Runs a stage and returns what went wrong on this rank, in words."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        stage()
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        return f"{type(first).__name__}: {first}"
    except (OSError, RuntimeError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _refusal(aside: Path) -> str | None:
    """What the system says to writing on if a write failed, such as "No space left on device": torch does not pass it on."""
    files = sorted((aside / TENSORS).glob("*")) if (aside / TENSORS).is_dir() else []
    for path in [*files, aside.parent / f".probe-{os.getpid()}"]:
        try:
            with path.open("ab") as file:
                file.write(bytes(_PROBE))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a file that cannot be synced
                return f"{error.strerror}: {path}"
        finally:
            if path.name.startswith(".probe-"):
                path.unlink(missing_ok=True)
    return None


def _make_folder(aside: Path) -> None:
    for stale in aside.parent.glob(".writing-*"):  # left by a run that was killed in the middle of a save
        remove(stale)
    aside.parent.mkdir(exist_ok=True)  # not the run directory: one that vanished takes its metrics with it
    aside.mkdir()


def _write_tensors(folder: Path, tensors: dict[str, Tensor], engine: Engine) -> None:
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(folder)
    with one_process_is_fine():
        dcp.save(
            dict(tensors), storage_writer=writer, process_group=engine.checkpoint_group, no_dist=engine.world_size == 1
        )


def _write_rest(
    aside: Path, state: dict[str, Any], save_extra: Callable[[Path], None] | None, hashes: dict[str, str]
) -> None:
    if save_extra is not None:
        save_extra(aside)
    hashes.update(file_hashes(aside))
    write_json(aside / STATE, sealed(state, hashes))


def _verify(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Reads every tensor back, frozen ones too, and compares its bits with the live one."""
    for chunk in _chunks(tensors):
        again = {name: torch.empty_like(tensor) for name, tensor in chunk.items()}
        read_tensors(folder, again)
        for name, tensor in chunk.items():
            if not torch.equal(_bits(tensor), _bits(again[name])):
                raise CheckpointError(f"tensor {name} reads back with other values")


def _chunks(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    chunk: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        chunk[name] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= _VERIFY_BYTES:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of this rank's share of a tensor, so that NaN equals itself."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().contiguous().reshape(-1).view(torch.uint8)


def _seal(aside: Path, hashes: Mapping[str, str]) -> None:
    write_manifest(aside, hashes)
    fsync_tree(aside)


def _publish(aside: Path, target: Path) -> None:
    """The moment the checkpoint comes to exist. One of the same step can only be damaged, or it would have been resumed."""
    remove(target)
    os.rename(aside, target)
    fsync_folder(target.parent)


def _prune(folder: Path, newest: int, keep_last: int, keep_every: int) -> None:
    """Removes the oldest checkpoints up to step `newest`; each is renamed first, so that a half-removed one is never taken for
    whole."""
    best = best_step(folder)
    for step, old in [found for found in checkpoints_in(folder) if found[0] <= newest][:-keep_last]:
        if (keep_every and step % keep_every == 0) or step == best:
            continue
        doomed = folder / f".writing-{old.name}"
        os.rename(old, doomed)
        remove(doomed)


def best_step(folder: Path) -> int | None:
    """The step of the checkpoint with the best value of trainer.best.metric; None if there is none, or its file is damaged."""
    path = folder / Path(BEST).name
    try:
        return read_mapping(path).get("step") if path.is_file() else None
    except ConfigError:
        return None
