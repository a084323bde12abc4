"""`m4train estimate`: whether a configuration fits a GPU, and how long it takes, before anything is downloaded or queued."""

from __future__ import annotations

import copy

from m4train.commands.architectures import architecture_of
from m4train.commands.inspect import show
from m4train.config import Config
from m4train.errors import ConfigError
from m4train.estimation.calibration import check_kind, read_calibration
from m4train.estimation.needs import Estimate, estimate
from m4train.estimation.subject import Subject
from m4train.estimation.tables import as_report, estimate_tables
from m4train.gpus import GPUS


def run(
    config: Config,
    gpu: str | None,
    ranks: int | None,
    mfu: str | None,
    calibration: str | None,
    what_if: bool,
    as_json: bool,
) -> int:
    """Prints the estimate of a configuration; returns 0 if it fits, 1 if it does not."""
    found = estimated(config, gpu, ranks, _share(mfu), calibration, what_if)
    show(as_report(found), estimate_tables(found), as_json)
    return 0 if found.fits else 1


def estimated(
    config: Config,
    gpu: str | None,
    ranks: int | None,
    mfu: float | None,
    calibration: str | None = None,
    variants: bool = False,
) -> Estimate:
    """The estimate of a configuration. Raises ConfigError for a GPU that is not known, a share of the peak of none, several
    ranks under engine=single, a calibration that is not of its kind, and as `estimate` does."""
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu} is not known: choose {', '.join(GPUS)}.")
    config, measured = copy.deepcopy(config), None if calibration is None else read_calibration(calibration)
    gpu = measured.gpu if measured is not None and gpu is None else gpu
    if mfu is not None and gpu is None:
        raise ConfigError(
            f"--mfu {mfu} is a share of the peak of a GPU, and none is named: add --gpu ({', '.join(GPUS)})."
        )
    processes = ranks or config.launch.processes or 1
    if processes > 1 and config.engine.name == "single" and not config.stages:
        raise ConfigError(
            f"--ranks {processes} cannot share the work under engine.name=single: choose engine=ddp, fsdp2 or zero1 to zero3."
        )
    if config.trainer.precision == "auto":
        usual = "fp32" if gpu is None else "fp16" if gpu in ("t4", "v100") else "bf16"
        config.trainer.precision = usual if measured is None else measured.precision
    if measured is not None:
        check_kind(measured, config, gpu)
    architecture, stored = architecture_of(config)
    return estimate(Subject(config, architecture, stored, processes, gpu, calibration=measured), mfu, variants)


def _share(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--mfu {given} is not a share of the peak between 0 and 1, such as --mfu 0.4.")
    return share
