"""What a run says at its start of the memory and time that it will need, and at its end of how far off that was."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m4train.estimation.calibration import Calibration
from m4train.estimation.peak import Peak
from m4train.estimation.ranks import accompany
from m4train.estimation.step import worst_case
from m4train.estimation.subject import Subject, Work, speeds
from m4train.gpus import named
from m4train.models.token_rows import has_own_rows
from m4train.run_files import ESTIMATE
from m4train.terminal import stage
from m4train.training.callbacks.base import Callback
from m4train.training.checkpoints.files import write_json
from m4train.training.compiling import compiles
from m4train.training.throughput import pass_factors

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer, TrainResult

_GIB = 2.0**30
_STEPS, _SECONDS = 3, 2.0  # after the first step, from which the time of the others is expected


class Expectation(Callback):
    """Speaks on rank 0. The memory is that of the largest batch there can be, which trainer.worst_batch_first runs before the
    first step; run_dir/estimate.json keeps what was expected and measured, for `m4train estimate --calibration`. What fails
    here is said, and ends no run.

    On a CPU it is said after the first step: importing what estimates (torch's fake tensors, which bring its compiler and
    sympy) takes as long as all else of ours before that step, and there is no card that may be too small.
    """

    def __init__(self) -> None:
        self._main = False  # whether this rank speaks, and nothing has failed
        self._found: Calibration | None = None
        self._measured: tuple[float, float] | None = (
            None  # bytes that tensors held at most, and that were taken for them
        )
        self._news: dict[str, float] = {}  # for the next line of metrics
        self._rates: list[float] = []  # operations a second of this rank
        self._began: tuple[int, float] | None = None  # number and time of the end of the first step
        self._expected: float | None = None  # seconds per step, by the last figure that was said
        self._timed = False

    def on_start(self, trainer: Trainer) -> None:
        self._main = trainer.engine.rank == 0
        if trainer.engine.device.type != "cpu":
            self._look_ahead(trainer)
        self._try(lambda: self._watch(trainer))

    def _watch(self, trainer: Trainer) -> None:
        self._peak = Peak(trainer.engine.device)

    def _look_ahead(self, trainer: Trainer) -> None:
        """On every rank, since those of a group estimate together."""
        if trainer.engine.rank:
            with suppress(Exception):  # as it will be on the first rank, which says it
                accompany(_subject(trainer).config, trainer.engine.world_size)
            return
        self._try(lambda: self._expect(trainer, _subject(trainer)))

    def _try(self, act: Callable[[], None]) -> None:
        if not self._main:
            return
        try:
            act()
        except Exception as error:
            self._main = False
            said = str(error).strip().splitlines() or [type(error).__name__]
            stage(None)
            print(f"expected: nothing more is said of memory and time, since estimating failed ({said[0]})", flush=True)

    def _expect(self, trainer: Trainer, subject: Subject) -> None:
        stage("estimating memory and time")
        device = trainer.engine.device
        with warnings.catch_warnings(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            warnings.simplefilter("ignore")
            memory = subject.memory()
        flops = trainer.model.flops(worst_case(subject.architecture, subject.shape))
        self._work = Work.of(subject.config, flops, pass_factors(trainer.model), tuple(trainer.model.blocks()))
        self._news["expected/memory_gib"] = memory.tensors / _GIB
        text = f"expected: {_gib(memory.tensors)} of tensors per rank at the peak"
        if memory.on_gpu:
            text += f", {_gib(memory.expected)} ({_gib(memory.low)} to {_gib(memory.high)}) of the GPU's memory"
        steps = trainer.config.trainer.max_steps - trainer.step
        if found := speeds(subject, self._work, 0):
            slow, usual, fast = (speed.step_seconds for speed in found)
            self._expected = usual
            text += f"; {_step(usual)} ({_step(fast)} to {_step(slow)}), {_run(steps, usual)}"
        stage(None)
        print(text, flush=True)
        self._found = Calibration(
            gpu=subject.gpu,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            family=subject.config.model.family,
            precision=subject.config.trainer.precision,
            engine=subject.config.engine.name,
            ranks=subject.ranks,
            expected_bytes=memory.tensors,
            expected_seconds=self._expected,
        )

    def on_step_begin(self, trainer: Trainer) -> None:
        if self._began is None and _comparable(trainer):
            self._try(lambda: self._peak.begin(_own(trainer)))

    def on_step_end(self, trainer: Trainer) -> None:
        if self._began is not None:
            self._try(lambda: self._pace(trainer))
            return
        self._try(lambda: self._weigh(trainer))
        if trainer.engine.device.type == "cpu":
            self._look_ahead(trainer)
        self._try(lambda: self._keep(trainer))
        self._began = trainer.step, time.perf_counter()

    def _weigh(self, trainer: Trainer) -> None:
        if _comparable(trainer):
            self._measured = self._peak.end()

    def _keep(self, trainer: Trainer) -> None:
        assert self._found is not None  # what is expected comes first
        if self._measured is not None:
            measured, reserved = self._measured
            self._found = replace(self._found, measured_bytes=measured, reserved_bytes=reserved)
            self._news["measured/memory_gib"] = measured / _GIB
            self._write(trainer)

    def _pace(self, trainer: Trainer) -> None:
        steps, each = self._passed(trainer)
        left = trainer.config.trainer.max_steps - trainer.step
        if self._timed or not left or steps < _STEPS or steps * each < _SECONDS:
            return
        self._timed, self._expected = True, each
        self._news["expected/seconds_per_step"] = each
        print(f"expected: {_step(each)} by the last {steps} steps, {_run(left, each)}", flush=True)

    def _passed(self, trainer: Trainer) -> tuple[int, float]:
        """Steps since the first, and seconds of each, with all that came between them."""
        assert self._began is not None
        steps = trainer.step - self._began[0]
        return steps, (time.perf_counter() - self._began[1]) / max(1, steps)

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        if self._began is not None and self._main and trainer.step == trainer.config.trainer.max_steps:
            self._news["measured/seconds_per_step"] = self._passed(trainer)[1]
        news, self._news = self._news, {}
        return news if self._main else {}

    def on_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if self._began is not None and "tflops" in metrics:
            self._rates.append(metrics["tflops"] * 1e12)

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        if self._began is not None:
            self._try(lambda: self._compare(trainer))

    def _compare(self, trainer: Trainer) -> None:
        assert self._found is not None
        said, found = [], self._found
        if found.measured_bytes is not None:
            off = _off(found.measured_bytes, found.expected_bytes)
            said.append(f"{_gib(found.measured_bytes)} of tensors at the peak of the first step, {off}")
        steps, each = self._passed(trainer)
        if steps:
            off = "" if self._expected is None else f", {_off(each, self._expected)}"
            said.append(f"{_step(each)} after it{off}")
            rate = statistics.median(self._rates) * self._work.whole / self._work.once if self._rates else None
            self._found = replace(found, measured_seconds=each, operations_per_second=rate)
            self._write(trainer)
        if said:
            print(f"measured: {'; '.join(said)}", flush=True)

    def _write(self, trainer: Trainer) -> None:
        assert self._found is not None
        write_json(trainer.run_dir / ESTIMATE, self._found.as_dict())

    def on_failure(self, trainer: Trainer, error: BaseException) -> None:
        self._main = False

    def close(self) -> None:
        if peak := getattr(self, "_peak", None):
            peak.drop()


def _subject(trainer: Trainer) -> Subject:
    """The run as an estimate sees it."""
    model: Any = trainer.model
    config, device = copy.deepcopy(trainer.config), trainer.engine.device
    embedding, architecture = model.get_input_embeddings(), copy.deepcopy(model.config)
    if has_own_rows(embedding) and not getattr(architecture, "additional_vocab_size", 0):
        config.freeze.new_rows_from = embedding.num_embeddings
    frozen = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    gpu = named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Subject(config, architecture, next(frozen, None), trainer.engine.world_size, gpu, device.type)


def _comparable(trainer: Trainer) -> bool:
    """Whether the first step runs the largest batch, and can be watched: on a CPU, compiled blocks would not be compiled then."""
    watched = trainer.engine.device.type == "cuda" or not compiles(trainer.config)
    return trainer.config.trainer.worst_batch_first and watched


def _own(trainer: Trainer) -> list[Tensor]:
    engine: Any = trainer.engine
    model: Any = trainer.model
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    return [*model.parameters(), *model.buffers(), *(v for v in states if isinstance(v, Tensor))]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / 2**20:.1f} MiB"


def _step(seconds: float) -> str:
    return f"{seconds:.3g} s per step"


def _run(steps: int, seconds: float) -> str:
    return f"{steps:,} steps in {timedelta(seconds=round(steps * seconds))}"


def _off(measured: float, expected: float) -> str:
    how = f"{measured / expected - 1:+.1%}"
    return f"{how} of what was expected"
