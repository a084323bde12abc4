"""The commands as functions of Python: configurations go in, results come out as values, which notebooks show as pages.

import m4train

config = m4train.load_config(["experiment=digits_sft", "trainer.max_steps=50"])
result = m4train.train(config, callbacks=[MyCallback()])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m4train.commands.arguments import EVALUATES, READS, TRAINS
from m4train.commands.estimate import estimated
from m4train.commands.evaluate import evaluated
from m4train.commands.export import Exported, exported
from m4train.commands.inspect import first_packs
from m4train.commands.train import trained
from m4train.config import Config
from m4train.config.compose import load_config as composed
from m4train.config.compose import load_run_config as composed_of_run
from m4train.config.loading import Where
from m4train.config.packages import check_packages
from m4train.errors import ConfigError
from m4train.estimation.needs import Estimate
from m4train.inspection.pages import frame
from m4train.inspection.preview import PackView, preview_page
from m4train.inspection.report import answers_page, report_page
from m4train.json_lines import OF_A_STEP, read_lines
from m4train.launching import check_launched, starts_processes
from m4train.run_files import CHECKPOINTS, METRICS
from m4train.scratch import scratch
from m4train.training.callbacks import Callback
from m4train.training.checkpoints.files import checkpoints_in

__all__ = ["Evaluated", "Preview", "Trained", "estimate", "evaluate", "export", "load_config", "preview", "train"]


@dataclass(frozen=True)
class Trained:
    """A run after `train`: its last step, why it stopped (max_steps, stop_after, signal, stop_file, time_limit, end_of_data,
    early_stopping, or trained: there was nothing to do), the lines of metrics.jsonl, and its newest checkpoint."""

    run_dir: Path
    step: int
    stopped_by: str
    metrics: list[dict[str, Any]]
    checkpoint: Path | None

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every logged step that has `key`, such as loss, eval/loss or lr."""
        return [(row["step"], row[key]) for row in self.metrics if isinstance(row.get(key), (int, float))]

    def _repr_html_(self) -> str:
        return frame(report_page(self.run_dir))


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found: `scores` by source (loss, metric, score, counts, as evaluation.json has them), and every answer
    (question, answer, references, score, images as data URIs)."""

    scores: dict[str, dict[str, Any]]
    answers: list[dict[str, Any]]

    def _repr_html_(self) -> str:
        return frame(answers_page(self.scores, self.answers))


@dataclass(frozen=True)
class Preview:
    """The first packs of a run as the model sees them: segments, spans (trained, masked, structural, image) and frames."""

    name: str
    packs: list[PackView]

    def _repr_html_(self) -> str:
        return frame(preview_page(f"{self.name}: the first packs", f"{len(self.packs)} packs", self.packs))


def load_config(
    overrides: Sequence[str] = (), config_dir: str | Sequence[str] = (), config_name: str = "train", run: bool = False
) -> Config:
    """The configuration that the same words give on the command line.

    Args:
        overrides: `group=choice` and `key=value`, as Hydra documents them.
        config_dir: folders like conf/, of which groups and experiments are taken as well.
        config_name: the root that is composed.
        run: take what the run in `run_dir=` (or of the checkpoint `resume=`) was trained with, `overrides` on top.

    Raises:
        ConfigError: an unknown key or choice, a wrong type, or a combination that cannot work.
    """
    where = Where((config_dir,) if isinstance(config_dir, str) else tuple(config_dir), config_name)
    return (composed_of_run if run else composed)(list(overrides), where)


def train(config: Config, callbacks: Sequence[Callback] = ()) -> Trained:
    """Trains, or continues, the run in `config.run_dir`, in this process.

    Args:
        config: of `load_config`.
        callbacks: objects of `m4train.Callback`, called after the ones that the configuration asks for, before a checkpoint
            is saved.

    Raises:
        ConfigError: a configuration for several processes, which `m4train train` and torchrun start.
        M4Error: what stops a run, in one sentence.
    """
    with _at_work(config, TRAINS):
        result = trained(config, callbacks)
    run_dir = Path(config.run_dir)
    found = checkpoints_in(run_dir / CHECKPOINTS)
    rows = read_lines(run_dir / METRICS, OF_A_STEP)
    return Trained(run_dir, result.step, result.stopped_by, rows, found[-1][1] if found else None)


def evaluate(config: Config) -> Evaluated:
    """Held-out loss and scored answers of the newest checkpoint of the run, or of `evaluation.model`; also written into run_dir.

    Raises:
        ConfigError: no held-out sources, or a metric that there is not.
        CheckpointError: a run without a checkpoint.
    """
    with _at_work(config, EVALUATES):
        return Evaluated(*evaluated(config))


def export(config: Config, push_to: str | None = None, private: bool = False) -> Exported:
    """Writes the newest checkpoint of the run as a Hugging Face folder, verified by reloading it.

    Args:
        config: of `load_config`.
        push_to: ORG/NAME, the repository of the Hub that the folder is pushed to; None: none.
        private: a repository that is made is private.

    Raises:
        CheckpointError: no checkpoint, or a folder that does not answer as the checkpoint does.
    """
    with _at_work(config, ("adapter",)):
        return exported(config, push_to, private)


def estimate(
    config: Config,
    gpu: str | None = None,
    ranks: int = 1,
    mfu: float | None = None,
    calibration: str | None = None,
    what_if: bool = False,
) -> Estimate:
    """Memory, time, data and storage of a configuration, before anything is downloaded.

    Args:
        config: of `load_config`.
        gpu: the kind of GPU, such as h100; None for this machine's CPU.
        ranks: how many of them.
        mfu: the share of the peak that is reached; None for three usual ones.
        calibration: the estimate.json of a run on such a GPU, or its folder.
        what_if: also estimate changes of the configuration, and how much more would fit.
    """
    with _at_work(config, READS):
        return estimated(config, gpu, ranks, mfu, calibration, what_if)


def preview(config: Config, packs: int = 4) -> Preview:
    """The first `packs` packs of the run, built exactly as training does."""
    with _at_work(config, READS):
        return Preview(config.name, first_packs(config, packs))


@contextmanager
def _at_work(config: Config, needs: Sequence[str]) -> Iterator[None]:
    check_packages(config, needs)
    check_launched(config)
    if starts_processes(config):
        raise ConfigError(
            f"launch.processes is {config.launch.processes}, but a function of Python works in its own process: leave it out, "
            "start the program by torchrun, or use `m4train train`."
        )
    with scratch():
        yield
