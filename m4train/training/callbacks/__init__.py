"""What a run does in addition to training, one callback per file."""

from __future__ import annotations

from collections.abc import Sequence

from m4train.config import Config
from m4train.training.callbacks.base import Callback
from m4train.training.callbacks.benchmarks import Benchmarks
from m4train.training.callbacks.checkpointing import Checkpointing
from m4train.training.callbacks.console import Console
from m4train.training.callbacks.cursors import Cursors
from m4train.training.callbacks.evaluation import Evaluation
from m4train.training.callbacks.first_packs import FirstPacks
from m4train.training.callbacks.jsonl import Jsonl as Jsonl
from m4train.training.callbacks.samples import Samples
from m4train.training.callbacks.startup import Startup
from m4train.training.callbacks.tracker import Tracker as Tracker
from m4train.training.callbacks.tracker import make_trackers
from m4train.training.callbacks.watched import Best, EarlyStopping


def default_callbacks(config: Config, more: Sequence[Callback] = ()) -> list[Callback]:
    """The callbacks a configuration asks for, and `more`, in their order: what measures first, what saves last."""
    callbacks: list[Callback] = [Startup()]
    if config.trainer.eval_every:
        measured = (config.trainer.eval_every, config.trainer.max_steps, config.trainer.eval_first)
        callbacks.append(Evaluation(*measured))
        if config.evaluation.shown:
            callbacks.append(Samples(*measured))
        if config.trainer.benchmarks:
            callbacks.append(Benchmarks(*measured))
    if config.logging.console:
        callbacks.append(Console())
    callbacks += [*make_trackers(config), Cursors()]
    if config.logging.first_packs:
        callbacks.append(FirstPacks())
    if config.trainer.best.metric is not None:
        callbacks.append(Best(config.trainer.best))
    if config.trainer.early_stopping.patience:
        callbacks.append(EarlyStopping(config.trainer.early_stopping))
    callbacks += more
    callbacks.append(Checkpointing(config.trainer.save_every))
    return callbacks
