"""What `m4train train` does with a run of several stages: one after another, and on from wherever it was stopped.

`stages.json` in the folder of the whole lists the stages and, of each, which checkpoint it began from and, once it is trained,
which it ended with. That is written when a stage has ended, so that a kill at any moment leaves a stage that goes on.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m4train import exits
from m4train.build import all_sources
from m4train.commands.train import ALREADY, EARLY, make_run_dir, train, train_run
from m4train.config import Config
from m4train.config.stages import Staged
from m4train.data.shards import expand_shards
from m4train.data.storage.files import is_remote
from m4train.errors import ConfigError, DataError
from m4train.run_files import CHECKPOINTS, CONFIG, STAGES, load_yaml, noted_stages
from m4train.training.checkpoints.changes import (
    BASES,
    OF_A_START,
    SHOWN_KEYS,
    WITHOUT_EFFECT,
    config_dict,
    differences,
    flatten,
    matches,
)
from m4train.training.checkpoints.files import checkpoints_in, write_json
from m4train.training.checkpoints.state import checkpoint_id
from m4train.training.claim import claim
from m4train.training.engines import make_engine
from m4train.training.engines.base import Engine, agreed
from m4train.training.stopping import forget_request

_DONE = ("max_steps", "end_of_data", "early_stopping", ALREADY)  # a stage that ended like this is trained


def train_stages(staged: Staged) -> int:
    """Trains what is not trained yet, or the one stage that was asked for; returns 0, or 3 if it was ended early.

    Raises ConfigError for a stage whose start is not trained, or was trained again since, and for one that was trained with
    other settings.
    """
    if not staged.whole:
        return train(staged.configs[0])
    make_run_dir(staged.folder)
    distributed = [config for config in staged.configs if config.engine.name != "single"]
    group = make_engine(copy.deepcopy([*distributed, *staged.configs][0]))  # one process group for all stages
    stopped_by = ALREADY
    with claim(staged.folder, group) or nullcontext():
        if group.rank == 0:
            forget_request(staged.folder)
            _say_what_is_missing(staged)
            _say_what_was_trained(staged)
        began = time.monotonic()
        agreed(group, partial(_check_starts, staged))
        for number in range(len(staged.configs)):
            if agreed(group, partial(_is_due, staged, number)):
                stopped_by = _train_stage(staged, number, group, time.monotonic() - began)
                if stopped_by not in _DONE:
                    break
    group.shutdown()
    return exits.stopped_early() if stopped_by in EARLY else exits.COMPLETE


def _say_what_is_missing(staged: Staged) -> None:
    """Says which data of later stages is not there yet: they may begin in days, and would end the run then."""
    for config in staged.configs[1:] if staged.asked is None else []:
        sources = all_sources(config.data).values() if config.data.prepare is None else ()
        for path in {
            source.path: source.format for source in sources if not (source.stream or is_remote(source.path))
        }.items():
            try:
                expand_shards(*path)
            except DataError as missing:
                print(f"stage {config.stage} will need data that is not there yet: {missing}", flush=True)


def _say_what_was_trained(staged: Staged) -> None:
    """Says which held-out samples of a stage are trained on by one before it, whose weights it goes on with."""
    for before, config in itertools.combinations(staged.configs, 2):
        kept = {source.path: before.data.holdout for source in before.data.sources.values()}
        for name, source in config.data.validation.items():
            share = config.data.holdout if source.held_out else 1.0
            if share > kept.get(source.path, 1.0):
                print(
                    f"stage {config.stage} measures on data.validation.{name} what stage {before.stage} trains on: give both the same "
                    f"data.holdout (now {config.data.holdout:g} and {before.data.holdout:g}), or name other files.",
                    flush=True,
                )


def _train_stage(staged: Staged, number: int, group: Engine, seconds: float) -> str:
    """Trains one stage, `seconds` after this start began, and notes if it is trained; returns what stopped it."""
    config = copy.deepcopy(staged.configs[number])
    if config.trainer.max_hours is not None:
        config.trainer.max_hours -= seconds / 3600
        if group.agree([config.trainer.max_hours <= 0])[0]:
            return "time_limit"
    if group.rank == 0:
        print(f"stage {number + 1} of {len(staged.configs)}: {config.stage}, in {config.run_dir}", flush=True)
        if _content(config) is None:
            _note_start(staged, number)
    threads = torch.get_num_threads()
    try:
        stopped_by = train_run(config)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    if group.rank == 0 and stopped_by in _DONE:
        _note(staged, number)
    group.barrier()
    gc.collect()  # the model of this stage, before the next one's
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return stopped_by


def _is_due(staged: Staged, number: int) -> bool:
    """Whether a stage is to be trained now. One that is trained and asked for is set aside first."""
    config, asked = staged.configs[number], staged.asked
    if asked is not None and config.stage != asked:
        return False
    noted, folder = noted_stages(staged.folder), Path(config.run_dir)
    _write(staged, noted)  # the names, for those who look
    trained = _is_trained(noted, config)
    before = staged.configs[number - 1] if number else None
    if before is not None and not _is_trained(noted, before):
        raise ConfigError(
            f"stage {config.stage} starts from {before.stage}, which is not trained yet: leave stage out, or train "
            f"stage={before.stage} first."
        )
    start = None if before is None else _content(before)
    stale = _content(config) is not None and noted.get(str(config.stage), {}).get("began_from", start) != start
    if (trained or stale) and asked is not None:
        if folder.resolve() not in Path(config.resume).resolve().parents:  # else it goes back within the stage
            _set_aside(folder)
        return True
    if stale:
        raise _began_elsewhere(config, before)
    if trained and (changed := _changed(config)):
        raise ConfigError(
            f"stage {config.stage} in {folder} was trained with {changed}: put them back, or {_again(config)}."
        )
    if trained:
        place = f"stage {number + 1} of {len(staged.configs)}"
        print(f"{place}: {config.stage} is trained already{_moved(config)}.", flush=True)
    return not trained


def _check_starts(staged: Staged) -> None:
    """Raises ConfigError, before anything is trained, for a stage that cannot go on after those before it: it began from weights
    that are not what the one before it holds, such as those of a stage that had its place."""
    noted = noted_stages(staged.folder)
    for before, config in itertools.pairwise(staged.configs) if staged.asked is None else ():
        began = noted.get(str(config.stage), {}).get("began_from")
        if began is not None and began != _content(before) and _content(config) is not None:
            raise _began_elsewhere(config, before)


def _began_elsewhere(config: Config, before: Config | None) -> ConfigError:
    other = f"weights that {before.stage} does not hold" if before else "another stage, and is now the first"
    return ConfigError(f"stage {config.stage} in {config.run_dir} began from {other}: {_again(config)}.")


def _again(config: Config) -> str:
    return f"stage={config.stage} trains it again, and keeps what it replaces"


def _is_trained(noted: dict[str, dict[str, Any]], config: Config) -> bool:
    """Whether a stage is noted as trained, and its run is still what was noted."""
    held = noted.get(str(config.stage), {}).get("checkpoint")
    return held is not None and held == _content(config)


def _changed(config: Config) -> str:
    """What a stage was trained with otherwise than it is configured now, of the keys that change what is learnt; "" for nothing."""
    kept: tuple[str, ...] = (*OF_A_START, *WITHOUT_EFFECT, *BASES, "data.sources.*.path")
    if config.trainer.precision == "auto":
        kept = (*kept, "trainer.precision")  # the run stores what it became
    stored = load_yaml(Path(config.run_dir, CONFIG))
    old, new = flatten(config_dict(stored)), flatten(config_dict(config))
    if all(old.get(key) == new.get(key) or matches(key, kept) for key in old.keys() | new.keys()):
        return ""  # at once: defaults take a second
    found = differences(stored, config)
    named = [f"{key}={then} (now {now})" for key, (then, now) in found.items() if not matches(key, kept)]
    more = f" and {len(named) - SHOWN_KEYS} more" if len(named) > SHOWN_KEYS else ""
    return ", ".join(named[:SHOWN_KEYS]) + more


def _moved(config: Config) -> str:
    """The paths of its data that are others than a stage was trained with, as the end of a sentence; "" for none."""
    stored = flatten(config_dict(load_yaml(Path(config.run_dir, CONFIG))))
    paths = {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
    other = [f"{key}={stored[key]} (now {path})" for key, path in paths.items() if stored.get(key, path) != path]
    return f", with {', '.join(other)}" if other else ""


def _content(config: Config) -> str | None:
    """The content of the newest checkpoint of a stage; None if there is none."""
    checkpoints = checkpoints_in(Path(config.run_dir, CHECKPOINTS))
    return checkpoint_id(checkpoints[-1][1]) if checkpoints else None


def _set_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    print(f"stage {folder.name} is trained again; what it was is kept in {aside}.", flush=True)


def _note_start(staged: Staged, number: int) -> None:
    """Notes which weights a stage begins from."""
    start = {"began_from": _content(staged.configs[number - 1])} if number else {}
    _write(staged, noted_stages(staged.folder) | {str(staged.configs[number].stage): start})


def _note(staged: Staged, number: int) -> None:
    """Notes which weights a stage began from, and which it ended with."""
    start = {"began_from": _content(staged.configs[number - 1])} if number else {}
    config = staged.configs[number]
    _write(staged, noted_stages(staged.folder) | {str(config.stage): {**start, "checkpoint": _content(config)}})


def _write(staged: Staged, noted: dict[str, dict[str, Any]]) -> None:
    """Written aside and renamed, so that it is whole whenever it is read."""
    names = [str(config.stage) for config in staged.configs]
    aside = staged.folder / f".{STAGES}"
    write_json(aside, [{"name": name, **noted.get(name, {})} for name in names])
    os.replace(aside, staged.folder / STAGES)
