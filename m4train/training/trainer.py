"""The training loop: a short walk over optimizer steps. Everything optional is a callback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m4train.batch import PackedBatch
from m4train.config import Config
from m4train.errors import TrainingError
from m4train.run_files import CHECKPOINTS
from m4train.training.callbacks.base import Callback
from m4train.training.checkpoints.aside import set_aside
from m4train.training.checkpoints.changes import config_dict, continuing, starts_fresh_optimizer
from m4train.training.checkpoints.find import start_checkpoint
from m4train.training.checkpoints.live import check_live
from m4train.training.checkpoints.save import load_checkpoint, versions
from m4train.training.checkpoints.saver import Saver
from m4train.training.checkpoints.state import VERSION, Checkpoint
from m4train.training.checkpoints.trained import TrainedAnew, trained_anew
from m4train.training.engines.base import Engine, Update
from m4train.training.heartbeat import Heartbeat
from m4train.training.loss_weights import LossWeights
from m4train.training.metrics import StepSums, real_tokens
from m4train.training.model_protocol import Step, TrainableModel
from m4train.training.neftune import EmbeddingNoise
from m4train.training.optim import peak_rate
from m4train.training.schedule import rate_factor
from m4train.training.starts import note_start
from m4train.training.step import SkipCounter, reseed, run_micro_batches
from m4train.training.stopping import StopRequests
from m4train.training.throughput import Throughput, memory_gib
from m4train.training.worst_batch import worst_batch

# Why ranks may stop that only one of them may know.
_AGREED = ("end_of_data", "signal", "stop_file", "time_limit", "failed_save", "early_stopping")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: its last step, the metrics last logged, and `stopped_by`: max_steps, stop_after, signal,
    stop_file, time_limit, end_of_data or early_stopping."""

    step: int
    metrics: dict[str, Any]
    stopped_by: str


@dataclass
class _Window:
    """Host-side counts of this rank since the last logged step."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    tokens: int = 0


class Trainer:
    """Trains `model` on the steps of `loader` until a stop is due; every way to stop ends in a saved checkpoint.

    `loader` yields one object with `micro_batches` and `state` per optimizer step of this rank (see model_protocol.Step).
    `validation()` returns a fresh pass over held-out steps, equally many on every rank. `resume` is the checkpoint to
    continue from, whose plan state the loader was already given. `save_extra(folder)` adds files to every checkpoint.
    `quarantined()` counts the samples this rank has dropped since the run began, `too_long()` by source those that it left out
    for their length and the documents that it used. `answers()`, which all ranks call, gives rank 0 what the model answers to
    held-out questions. `passed(state)` says how often the run has been through its data by a state of the plan, `packs()` gives
    rank 0 the documents of the first packs. `heart` already watches what came before. `bases` names what the run starts from.
    """

    def __init__(
        self,
        config: Config,
        model: TrainableModel,
        loader: Iterable[Step],
        engine: Engine,
        callbacks: Sequence[Callback],
        validation: Callable[[], Iterable[Step]] | None = None,
        resume: Checkpoint | None = None,
        save_extra: Callable[[Path], None] | None = None,
        quarantined: Callable[[], int] | None = None,
        too_long: Callable[[], Mapping[str, tuple[int, int]]] | None = None,
        answers: Callable[[], list[dict[str, Any]]] | None = None,
        benchmarks: Callable[[], dict[str, float]] | None = None,
        heart: Heartbeat | None = None,
        bases: Mapping[str, str] | None = None,
        passed: Callable[[Mapping[str, Any]], dict[str, float]] | None = None,
        packs: Callable[[], list[dict[str, Any]]] | None = None,
    ) -> None:
        self.config, self.model, self.loader, self.engine = config, model, loader, engine
        self.callbacks, self.validation, self.resume = list(callbacks), validation, resume
        self.quarantined, self.answers, self.passed = quarantined, answers, passed
        self.benchmarks, self.packs = benchmarks, packs
        self._asked_to_stop = False
        self._seen = 0  # tokens of this rank since the start, and of all before it
        self._seen_before = resume.state.get("tokens_seen", 0) if resume else 0
        self.too_long = too_long or dict
        self.run_dir = Path(config.run_dir)
        self.step = resume.step if resume else 0
        self.saved_step = self.step  # before the first step there is nothing that a fresh start would not make again
        self.metrics: dict[str, Any] = {}
        self._checked = False  # whether what checkpoints get was compared with what the ranks compute with
        self.ending = False  # whether the data have ended, so that this step is the last
        self._unlogged: tuple[StepSums, Update, float] | None = None  # what is measured of the step made last
        self._fresh = resume is not None and starts_fresh_optimizer(resume.state, config)
        self._anew = trained_anew(resume, model, config) if resume and not self._fresh else TrainedAnew()
        self.continued = continuing(resume.state, config, str(self._anew)) if resume else None  # what a person is told
        self._origin = {"lineage": resume.lineage if resume else [], "bases": dict(bases or {})}
        self._first_step = self.step + 1
        self.plan_state: dict[str, Any] = resume.plan if resume else {}
        whole = self.run_dir.parent if config.stage else None
        self._stops = StopRequests(self.run_dir, config.trainer.max_hours, whole)
        self.heart = heart or Heartbeat(self.run_dir, engine.rank, engine.world_size, config.trainer.hang_timeout)
        self._noise: EmbeddingNoise | None = None
        trainer, folder = config.trainer, self.run_dir / CHECKPOINTS
        self._saver = Saver(folder, engine, trainer.keep_last, trainer.keep_every, save_extra, trainer.async_checkpoint)
        self._weights = LossWeights({name: source.loss_weight for name, source in config.data.sources.items()})

    def train(self) -> TrainResult:
        """Runs until the first of max_steps, stop_after, a signal, the stop file, max_hours, early stopping, or the end of the
        data.

        Raises TrainingError for a parameter without gradient or persistent non-finite steps, CheckpointError if a
        checkpoint cannot be written or read.
        """
        try:
            with self._stops:
                self._start()
                stopped_by = self._loop()
                if stopped_by == "failed_save":
                    self._saver.wait()  # raises why
                result = TrainResult(self.step, self.metrics, stopped_by)
                self._tell("on_end", result)
                self.heart.beat("save", self.step)
                self._saver.wait()
                return result
        except BaseException as error:
            self._tell("on_failure", error)
            raise
        finally:
            self._saver.close()
            self._announce()
            self.heart.close()
            self._close()

    def save(self) -> None:
        """Saves a checkpoint of the current step, unless there is one already; all ranks call it."""
        if self.saved_step == self.step:
            return
        self.heart.beat("save", self.step)
        state = {
            "step": self.step,
            "plan": self.plan_state,
            "config": config_dict(self.config),
            "callbacks": {type(callback).__name__: callback.state() for callback in self.callbacks},
            "skipped": self._check_skips(),
            "versions": versions(),
            "tokens_seen": self._seen_before + int(self.engine.agree([self._seen])[0]),
            "version": VERSION,
            **self._origin,
        }
        if not self._checked:
            check_live(self.engine)
            self._checked = True
        self._saver.save(state)
        self.saved_step = self.step

    def _tell(self, hook: str, *what: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *what)

    def _announce(self) -> None:
        for folder in self._saver.take_written():
            self._tell("on_saved", folder)

    def _stalled(self, line: str) -> None:
        """In a thread of the heartbeat, right before the process ends."""
        self._tell("on_failure", TrainingError(f"The run made no progress. {line}"))
        self._close()

    def _close(self) -> None:
        for callback in self.callbacks:
            callback.close()

    def ask_to_stop(self) -> None:
        """Ends the run at the next step border, as `early_stopping`; any rank may ask."""
        self._asked_to_stop = True

    def _start(self) -> None:
        self.heart.tell = self._stalled
        self.heart.start()
        self.heart.beat("start", self.step)
        if self.engine.rank == 0:
            said = set_aside(self.run_dir, self.step, self.resume.departs) if self.resume else None
            if said:
                print(said, flush=True)
            note_start(self.run_dir, self.step, config_dict(self.config))
        if self.config.trainer.neftune_alpha:
            self._noise = EmbeddingNoise(self.model, self.config.trainer.neftune_alpha, self.config.seed)
        self._throughput = Throughput(self.model)
        self.engine.prepare(self.model)
        saved = self.resume.state if self.resume else {}
        self._skips = SkipCounter(self.engine.device, saved.get("skipped", 0))
        if self.resume:
            load_checkpoint(self.resume, self.engine, not self._fresh, self._anew.join)
        elif self.config.optimizer.start == "kept":  # with the weights that the model has already
            load_checkpoint(start_checkpoint(self.config), self.engine, whole=True)
        self.heart.beat("callbacks", self.step)
        for callback in self.callbacks:
            callback.load(saved.get("callbacks", {}).get(type(callback).__name__, {}))
            callback.on_start(self)
        self.model.train()
        if self.step == 0 and any(callback.measures(0) for callback in self.callbacks):
            self._publish({"step": 0, **dict(pair for each in self.callbacks for pair in each.measure(self).items())})

    def _loop(self) -> str:
        window, batches = _Window(), iter(self.loader)
        while (reason := self._limit()) is None:
            batch = self._fetch(batches, window)
            total, reason = self._agree(batch)
            if reason is not None:
                break
            assert batch is not None  # end_of_data was agreed otherwise
            self._run(batch, total, window)
            if self._unlogged is None:
                window = _Window()
            ended = time.perf_counter()
            self._tell("on_step_end")
            if self.step == self._first_step:  # what callbacks do then is part of the start
                window.started += time.perf_counter() - ended
            self._announce()
        if reason == "stop_file" and self.engine.rank == 0:
            self._stops.clear()
        if reason != "failed_save":
            self._finish(reason, window)
        return reason

    def _finish(self, reason: str, window: _Window) -> None:
        """Logs the last step, if it was not yet; at the end of the data with what is measured at the end of a run."""
        self.ending = reason == "end_of_data"
        if self._unlogged is not None:
            self._log(self._unlogged, window)
        elif self.ending and self.step >= self._first_step:
            others = [callback for callback in self.callbacks if not callback.measures(self.step)]
            if more := {name: value for callback in others for name, value in callback.measure(self).items()}:
                self._publish({**self.metrics, **more})

    def _limit(self) -> str | None:
        """The limits every rank knows by itself."""
        trainer = self.config.trainer
        if self.step >= trainer.max_steps:
            return "max_steps"
        if trainer.stop_after is not None and self.step - self._first_step + 1 >= trainer.stop_after:
            return "stop_after"
        return None

    def _fetch(self, batches: Iterator[Step], window: _Window) -> Step | None:
        self.heart.beat("fetch", self.step + 1)
        before = time.perf_counter()
        batch = next(batches, None)
        window.waited += time.perf_counter() - before
        return batch

    def _agree(self, batch: Step | None) -> tuple[float, str | None]:
        """What the losses of the whole step are divided by, and the reason to stop if any rank has one, in one
        host-side reduction."""
        mine = self._weights.counts(batch.micro_batches if batch else [])
        micro_batches = len(batch.micro_batches) if batch else 0
        flags = [batch is None, self._stops.signalled(), self._stops.file_present(), self._stops.out_of_time()]
        flags += [self._saver.failed(), self._asked_to_stop]
        total, *agreed = self.engine.agree([micro_batches, *flags, *mine])
        raised, counts = agreed[: len(flags)], agreed[len(flags) :]
        reason = next((name for name, flag in zip(_AGREED, raised, strict=True) if flag), None)
        if reason is None and total != micro_batches * self.engine.world_size:
            raise TrainingError(
                f"Rank {self.engine.rank} has {micro_batches} micro-batches in step {self.step + 1}, other ranks have another number."
            )
        return self._weights.total(counts), reason

    def _run(self, batch: Step, total: float, window: _Window) -> None:
        """One optimizer step, logged if that is due."""
        step = self.step + 1
        self._tell("on_step_begin")
        reseed(self.config.seed, step, self.engine.rank)
        factor = rate_factor(self.config.schedule, self.config.trainer.max_steps, step)
        sums = StepSums(list(self.config.data.sources), self.engine.device)
        if step == self._first_step and self.config.trainer.worst_batch_first:
            self._rehearse(batch)
            window.started, window.waited = time.perf_counter(), 0.0
        z_loss = self.config.model.z_loss
        weigh = self._weights.weighted
        run_micro_batches(self.engine, batch.micro_batches, total, z_loss, sums, weigh, self._entering)
        if step == self._first_step and not self.config.trainer.worst_batch_first:
            self._check_gradients()
        self.heart.beat("update", step)
        update = self.engine.update(factor, self.config.trainer.max_grad_norm)
        self._skips.update(update.skipped)
        self.step, self.plan_state = step, batch.state
        for micro in batch.micro_batches:
            window.tokens += real_tokens(micro)
            self._seen += real_tokens(micro)
            self._throughput.add(micro)
        self._unlogged = (sums, update, factor)
        if self._logged(step):
            self._log(self._unlogged, window)

    def _log(self, step: tuple[StepSums, Update, float], window: _Window) -> None:
        self._unlogged = None
        self.metrics = self._measure(*step, window)
        self.heart.beat("measure", self.step)
        for callback in self.callbacks:
            self.metrics.update(callback.measure(self))
        self._publish(self.metrics)

    def _publish(self, metrics: dict[str, Any]) -> None:
        self.metrics = metrics
        self._tell("on_metrics", metrics)

    def _entering(self, stage: str, batch: PackedBatch) -> None:
        self.heart.beat(stage, self.step + 1, batch)
        if stage == "forward" and self._noise is not None:
            self._noise.prepare(batch, self.step + 1)

    def _rehearse(self, batch: Step) -> None:
        """Runs a whole step on the largest batch there can be, with a loss that is not a number: memory that does not suffice
        shows now; the update is skipped like any that is not finite, so nothing changes."""
        data, packs = self.config.data, self.config.trainer.micro_batch_size
        worst = worst_batch(batch.micro_batches[0], data.sequence_length * packs, data.images_per_pack * packs)
        self.heart.beat("worst batch", self.step + 1, worst)
        worst = self._weights.weighted(worst.to(self.engine.device))
        for last in [False, True] if len(batch.micro_batches) > 1 else [True]:  # with the gradients of one before
            with self.engine.accumulation(last):
                loss = self.engine.forward(worst, self.config.model.z_loss).loss
                self.engine.backward(loss * float("nan"), last)
        self._check_gradients()
        self.engine.update(0.0, self.config.trainer.max_grad_norm)
        reseed(self.config.seed, self.step + 1, self.engine.rank)

    def _logged(self, step: int) -> bool:
        trainer = self.config.trainer
        regular = step == 1 or step % trainer.log_every == 0 or step == trainer.max_steps
        return regular or any(callback.measures(step) for callback in self.callbacks)

    def _check_gradients(self) -> None:
        names = self.engine.without_gradient()
        if self.engine.agree([len(names)])[0]:
            named = ", ".join(names[:5]) or "a parameter of another rank"
            raise TrainingError(
                f"{named} got no gradient in the first step ({len(names)} in all); freeze what the model does not use."
            )

    def _check_skips(self) -> int:
        skipped, in_a_row = self._skips.read()
        limit = self.config.trainer.max_skipped_in_a_row
        if in_a_row >= limit:
            raise TrainingError(
                f"{in_a_row} steps in a row up to step {self.step} had a gradient norm that is not finite "
                f"(trainer.max_skipped_in_a_row={limit}; {skipped} skipped in all, last loss {self.metrics.get('loss')}); "
                "lower optimizer.lr, or replay these steps to see their data."
            )
        return skipped

    def _measure(self, sums: StepSums, update: Update, factor: float, window: _Window) -> dict[str, Any]:
        """Metrics of a logged step: one reduction over ranks, and the only wait for the device between two of them."""
        elapsed = time.perf_counter() - window.started
        dropped = self.quarantined() if self.quarantined else 0
        long: Mapping[str, tuple[int, int]] = self.too_long()
        vector = sums.vector()
        counts = [self._seen, window.tokens, window.waited / elapsed, dropped]
        counts += [n for pair in long.values() for n in pair]
        mine = torch.tensor(counts, dtype=vector.dtype, device=vector.device)
        shared = torch.stack([update.total, *update.by_part]).to(vector)
        reduced: Tensor = self.engine.reduce(torch.cat([vector, mine]))
        values = torch.cat([reduced, shared]).tolist()
        seen, tokens, waited, dropped, *rest = values[len(vector) :]
        lost, used = rest[: 2 * len(long) : 2], rest[1 : 2 * len(long) : 2]
        total, *by_part = rest[2 * len(long) :]
        return {
            "step": self.step,
            **sums.read(values[: len(vector)]),
            "tokens_seen": self._seen_before + int(seen),
            **(self.passed(self.plan_state) if self.passed else {}),
            "lr": self.config.optimizer.lr * factor,
            **{f"lr/{part}": peak_rate(self.config.optimizer, part) * factor for part in update.parts},
            "grad_norm": total,
            **{f"grad_norm/{part}": norm for part, norm in zip(update.parts, by_part, strict=True)},
            "tokens_per_second": tokens / elapsed,
            "data_wait_fraction": waited / self.engine.world_size,
            **self._throughput.rates(elapsed, self.engine.device),
            "memory_gib": memory_gib(self.engine.device),
            "skipped_steps": self._check_skips(),
            **({} if update.loss_scale is None else {"loss_scale": update.loss_scale.item()}),
            "quarantined": int(dropped),
            **{f"too_long/{name}": n / max(1.0, n + of) for name, n, of in zip(long, lost, used, strict=True)},
        }
