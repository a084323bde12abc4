"""Weights & Biases, offline or online; a run that goes on after a stop or a kill is the same W&B run, each step once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m4train.config import Config
from m4train.config.packages import need
from m4train.errors import without_secrets
from m4train.run_files import BEST, CHECKPOINTS, WANDB
from m4train.training import wandb_runs
from m4train.training.callbacks.tracker import Tracker, numbers
from m4train.training.wandb_runs import BENCHMARK, EVALUATE, TRAIN
from m4train.wandb_artifacts import FROM

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer, TrainResult


class Wandb(Tracker):
    """Logs with the keys of logging.wandb."""

    def __init__(self, config: Config) -> None:
        need("wandb", "logging.trackers=wandb")
        super().__init__(config)
        self._run: Any = None
        self._failed = True  # until the run comes to a regular end
        self._id: str | None = None
        self._saved: Path | None = None  # the newest checkpoint
        self._texts: dict[str, str] = {}

    def begin(self, trainer: Trainer) -> None:
        self._held = wandb_runs.remembered(trainer.run_dir)
        departs = trainer.resume is not None and trainer.resume.departs
        if self._id and not departs and not self._held:  # the file is gone: the checkpoint knows it as well
            self._held = {"id": self._id, "step": trainer.step, "group": self.config.name}
        self._run = wandb_runs.open_run(self.config, TRAIN, self._held)
        self._id, self._before = self._held["id"], self._held["step"]
        start = self.config.model.pretrained
        if start is not None and start.startswith(FROM) and not self._run.offline:
            self._run.use_artifact(start.removeprefix(FROM))
        self._catch_up()

    def _catch_up(self) -> None:
        """Makes the artifact of the best checkpoint if a kill came before it."""
        best = self._best()
        folder = Path(self.config.run_dir) / CHECKPOINTS / f"step-{best:06d}" if best is not None else None
        wanted = self.config.logging.wandb.artifacts in ("best", "all") and self._held.get("best") != best
        if wanted and folder is not None and folder.is_dir():
            self._saved = folder
            self._log_checkpoint()

    def log(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        self._texts |= {name: value for name, value in metrics.items() if isinstance(value, str)}
        if step > self._before:  # what a killed run logged after its checkpoint is there, with the same values
            self._run.log(numbers(metrics), step=step)
            self._held["step"] = step
            wandb_runs.remember(Path(self.config.run_dir), self._held)

    def on_samples(self, trainer: Trainer, samples: list[dict[str, Any]]) -> None:
        if self.active and trainer.step > self._before:
            self._run.log({"samples": wandb_runs.answers_table(samples)}, step=trainer.step)

    def on_packs(self, trainer: Trainer, lines: list[dict[str, Any]]) -> None:
        if self.active and trainer.step > self._before:
            self._run.log({"first_packs": wandb_runs.packs_table(lines)}, step=trainer.step)

    def on_saved(self, trainer: Trainer, folder: Path) -> None:
        if not self.active:
            return
        self._saved, policy = folder, self.config.logging.wandb.artifacts
        if policy == "all" or (policy == "best" and self._is_best(folder)):
            self._log_checkpoint()

    def _log_checkpoint(self) -> None:
        assert self._saved is not None
        best, name = self._is_best(self._saved), wandb_runs.artifact_name(self.config, self._held["id"])
        aliases, about = [self._saved.name, *(["best"] if best else [])], {"step": _step_of(self._saved)}
        wandb_runs.log_model(self._run, self.config, self._saved, name, aliases, about)
        if best:
            self._held["best"] = _step_of(self._saved)
            wandb_runs.remember(Path(self.config.run_dir), self._held)

    def _is_best(self, folder: Path) -> bool:
        return self._best() == _step_of(folder)

    def _best(self) -> int | None:
        """The step of the best checkpoint; None if there is none, or its note is damaged."""
        try:
            return int(json.loads((Path(self.config.run_dir) / BEST).read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def on_evaluation(self, name: str, scores: dict[str, dict[str, Any]], lines: list[dict[str, Any]]) -> None:
        held = wandb_runs.remembered(Path(self.config.run_dir))
        run = wandb_runs.open_run(self.config, EVALUATE, held)
        run.summary.update(
            {f"{source}/{key}": value for source, found in scores.items() for key, value in numbers(found).items()}
        )
        run.summary["model"] = name
        if lines:
            run.log(
                {"answers": wandb_runs.answers_table(lines)}, step=held["step"] if run.id == held.get("id") else None
            )
        run.finish()

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        if self.active:
            self._run.summary.update({**self._texts, "stopped_by": result.stopped_by})
            self._failed = False

    def on_failure(self, trainer: Trainer, error: BaseException) -> None:
        self._failed = True
        if self.active and isinstance(error, Exception):
            said = without_secrets(f"At step {trainer.step}: {error}")
            self._run.alert(f"{self.config.name} ended badly", said, level="ERROR")

    def state(self) -> dict[str, Any]:
        return {"id": self._id} if self._id else {}

    def load(self, state: dict[str, Any]) -> None:
        self._id = state.get("id")

    def finish(self) -> None:
        if self.config.logging.wandb.artifacts == "last" and self._saved is not None:
            self._log_checkpoint()
        self._run.finish(exit_code=int(self._failed))


def post(config: Config, run_dir: Path, metrics: dict[str, Any]) -> None:
    """Adds metrics, `step` among them, to the run of benchmarks next to the W&B run of a training, also while that goes on. Without
    its id nothing is added."""
    held = wandb_runs.remembered(run_dir)
    if not held:
        print(f"{run_dir / WANDB} names no W&B run: scores are in {run_dir} only.", flush=True)
        return
    run = wandb_runs.open_run(replace(config, run_dir=str(run_dir)), BENCHMARK, held)
    run.log(numbers(metrics), step=metrics["step"])
    run.finish()


def _step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])
