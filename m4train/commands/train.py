"""What `m4train train` does with a configuration."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m4train import build, exits, startup
from m4train.config import Config
from m4train.config.compose import save_config
from m4train.data.loading.quarantine import left_out_at_end
from m4train.data.plan.lengths import needs_plan, passes, settled
from m4train.data.plan.plan import Plan
from m4train.errors import ConfigError, TrainingError, of_the_system
from m4train.estimation.expectation import Expectation
from m4train.evaluation.answers import decoding_of, sample_answers
from m4train.evaluation.benchmarks.training import benchmark_scores
from m4train.inspection.outlook import outlook
from m4train.inspection.pack_lines import first_packs
from m4train.run_files import CHECKPOINTS, CONFIG, PARAMETERS
from m4train.terminal import stage
from m4train.training.callbacks import Callback, default_callbacks
from m4train.training.callbacks.pack_times import PackTimes
from m4train.training.checkpoints.bases import bases
from m4train.training.checkpoints.changes import changed_since
from m4train.training.checkpoints.files import checkpoints_in
from m4train.training.checkpoints.find import agreed_checkpoint
from m4train.training.checkpoints.state import Checkpoint
from m4train.training.claim import claim
from m4train.training.engines import make_engine
from m4train.training.engines.base import Engine
from m4train.training.heartbeat import Heartbeat
from m4train.training.parts_table import parameter_table
from m4train.training.stopping import forget_request
from m4train.training.trainer import Trainer, TrainResult

EARLY = ("signal", "time_limit", "stop_file")  # ways to stop that are not what the configuration asked for
ALREADY = "trained"  # there was nothing left to do


def train(config: Config) -> int:
    """Trains, or continues, the run of `config`; returns 0, or 3 if a signal, the time limit or the stop file ended it early."""
    return exits.stopped_early() if train_run(config) in EARLY else exits.COMPLETE


def train_run(config: Config) -> str:
    """Trains, or continues, one run; returns what stopped it, as `TrainResult.stopped_by` says, or ALREADY."""
    return trained(config).stopped_by


def trained(config: Config, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Does so with more callbacks, which are called before the one that saves.

    Raises TrainingError, saying which checkpoint is kept, if the operating system refuses to read or write.
    """
    try:
        return _train_claimed(config, callbacks)
    except OSError as error:
        held = checkpoints_in(Path(config.run_dir) / CHECKPOINTS)
        kept = f"{held[-1][1].name} is kept" if held else "there is no checkpoint yet"
        if (refused := of_the_system(error)) is None:
            raise
        raise TrainingError(f"{refused} {kept[0].upper()}{kept[1:]}.") from error


def _train_claimed(config: Config, callbacks: Sequence[Callback]) -> TrainResult:
    make_run_dir(Path(config.run_dir))
    startup.enter("engine")
    _set_up(config)
    engine = make_engine(config)
    plan = None
    claimed = claim(Path(config.run_dir), engine)
    if engine.rank == 0:
        forget_request(Path(config.run_dir))
    watched = Heartbeat(Path(config.run_dir), engine.rank, engine.world_size, config.trainer.hang_timeout)
    with claimed or nullcontext(), watched as heart:
        if needs_plan(config):
            heart.beat("index")
            plan = _plan(config, engine)
        written, config = config, settled(config, lambda: _plan(config, engine) if plan is None else plan)
        heart.beat("checkpoint")
        stage("looking for a checkpoint")
        resume = agreed_checkpoint(config, engine, bases=bases(config))
        if resume is None or resume.step < config.trainer.max_steps:
            result = _train(config, engine, resume, heart, written, plan, callbacks)
            if result.stopped_by in EARLY and engine.rank == 0:
                held = "with a checkpoint" if result.step else "before the first step"
                print(f"stopped early by {result.stopped_by} {held}: the same command goes on.", flush=True)
        else:
            result = TrainResult(resume.step, {}, ALREADY)
            if engine.rank == 0:
                changed = changed_since(resume.state["config"], config)
                print(f"{config.run_dir} is trained already: {resume.folder.name} is its last step{changed}.")
    engine.shutdown()
    return result


def _plan(config: Config, engine: Engine) -> Plan:
    if engine.rank == 0:
        build.prepare_data(config.data)
    engine.barrier()
    return build.build_plan(config, build.build_processor(config))


def _train(
    config: Config,
    engine: Engine,
    resume: Checkpoint | None,
    heart: Heartbeat,
    written: Config,
    plan: Plan | None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Trains on data and model made as the configuration says, and says which samples were left out. `written` is the
    configuration with lengths as they were given; `plan` is there if it was needed before."""
    heart.beat("data")
    if engine.rank == 0:
        build.prepare_data(config.data)
    engine.barrier()
    heart.beat("model")
    processor = build.build_processor(config)
    model = build.build_model(config, processor)
    heart.beat("index")
    data = build.build_data(config, processor, engine.rank, engine.world_size, plan)
    if engine.rank == 0:
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(written, run_dir / CONFIG)
        table = [dataclasses.asdict(row) for row in parameter_table(model, config, engine.device)]
        (run_dir / PARAMETERS).write_text(json.dumps(table, indent=1) + "\n")
        if config.trainer.eval_every and config.evaluation.shown:
            print(f"samples: {decoding_of(config, model, processor).line()}", flush=True)
        if data.plan is not None:
            for sentence in outlook(data.plan, config, engine.world_size):
                print(sentence, flush=True)
    stage(None)
    expected = [Expectation()] if config.logging.console else []
    timed = [] if data.plan is None else _timed_packs(config, engine, data.plan, processor, resume)
    trainer = Trainer(
        config,
        model,
        data.steps(resume),
        engine,
        default_callbacks(config, [*timed, *callbacks, *expected]),
        validation=data.validation_steps if data.validation else None,
        resume=resume,
        save_extra=lambda folder: describe_model(folder, model, processor),
        quarantined=lambda: data.quarantine.bad,
        too_long=lambda: {name: data.quarantine.too_long(name) for name in config.data.sources},
        answers=lambda: sample_answers(data.validation, engine, model, processor, config, heart),
        benchmarks=lambda: benchmark_scores(config, engine, model, processor, heart),
        heart=heart,
        bases=bases(config),  # again: by now data.prepare has made what it makes
        passed=None if data.plan is None else partial(passes, data.plan, until=config.trainer.epochs_until),
        packs=None if data.plan is None else partial(first_packs, data.plan, processor, config),
    )
    result = trainer.train()
    lines = left_out_at_end(engine.gather(data.quarantine.counted))
    if engine.rank == 0 and lines:
        print(*lines, sep="\n", flush=True)
    return result


def _timed_packs(
    config: Config, engine: Engine, plan: Plan, processor: Any, resume: Checkpoint | None
) -> list[Callback]:
    """What times the packs of this run, if it is asked to, or left to it and of use."""
    several = engine.world_size > 1 and engine.device.type == "cuda" and not config.trainer.deterministic
    if not (several if config.data.cost.measured is None else config.data.cost.measured):
        return []
    state = resume.plan if resume else None
    return [PackTimes(lambda: build.varied_batches(config, plan, processor, state), plan.measured)]


def describe_model(folder: Path, model: Any, processor: Any) -> None:
    """Everything of a Hugging Face folder but the weights: configuration, tokenizer, processor, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(model.generation_config, indent=2) + "\n")
    processor.save_pretrained(folder)


def make_run_dir(path: Path) -> None:
    """Raises ConfigError, before anything is built, if the folder cannot be written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "is a file" if path.is_file() else f"cannot be made ({error.strerror})"
        raise ConfigError(f"run_dir {path} {why}: choose another folder.") from error
    if (path / CHECKPOINTS).exists() and not (path / CHECKPOINTS).is_dir():
        raise ConfigError(
            f"{path / CHECKPOINTS} is a file, where checkpoints go: move it away, or choose another run_dir."
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir {path} cannot be written ({os.strerror(errno.EACCES)}): choose another folder.")


def _set_up(config: Config) -> None:
    """What torch must be told before anything is computed."""
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if config.threads is not None:
        torch.set_num_threads(config.threads)
