"""What a run measured of itself, for estimates of others: run_dir/estimate.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from m4train.config import Config
from m4train.errors import ConfigError
from m4train.json_files import read_mapping
from m4train.run_files import ESTIMATE


@dataclass(frozen=True)
class Calibration:
    """What was expected of a run, and what was measured. Bytes of one rank, seconds, floating-point operations of one rank."""

    gpu: str | None  # as `--gpu` names it; None: a CPU, or a GPU that is not known
    device: str  # as it names itself
    family: str
    precision: str
    engine: str
    ranks: int
    expected_bytes: float  # of tensors
    measured_bytes: float | None = (
        None  # of tensors, at the peak of the first step; None: it was not with the largest batch
    )
    reserved_bytes: float | None = None  # what the allocator took from the device for them
    expected_seconds: float | None = None  # of a step
    measured_seconds: float | None = None
    operations_per_second: float | None = None  # what is computed again included

    @property
    def memory_factor(self) -> float:
        assert self.reserved_bytes is not None  # reading refuses it
        return self.reserved_bytes / self.expected_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_calibration(given: str) -> Calibration:
    """The calibration in a file or run directory. Raises ConfigError if it is not there or damaged, or nothing was measured."""
    path = Path(given) / ESTIMATE if Path(given).is_dir() else Path(given)
    return _read(path)


def check_kind(found: Calibration, config: Config, gpu: str | None) -> None:
    """Raises ConfigError for a calibration of another kind of GPU, family of models or precision than an estimate of `config`."""
    kinds = {
        "GPU": (found.gpu or found.device, gpu or "cpu"),
        "model.family": (found.family, config.model.family),
        "trainer.precision": (found.precision, config.trainer.precision),
    }
    for key, (there, here) in kinds.items():
        if there != here:
            raise ConfigError(
                f"--calibration was measured with {key} {there}, but this is about {key} {here}: give that of a run of the same "
                "kind, or leave it out."
            )


def _read(path: Path) -> Calibration:
    if not path.is_file():
        raise ConfigError(
            f"--calibration: {path} does not exist: give the {ESTIMATE} of a run that measured its first steps, or its folder."
        )
    try:
        values = read_mapping(path)
    except ConfigError as error:
        raise ConfigError(f"--calibration: {error}") from error
    names = {field.name for field in fields(Calibration)}
    numbers = ("expected_bytes", "measured_bytes", "reserved_bytes", "operations_per_second")
    wrong = [
        name
        for name in numbers
        if values.get(name) is not None and not (_is_number(values[name]) and 0 < values[name] < float("inf"))
    ]
    missing = [name for name in ("device", "family", "precision", *numbers[:3]) if values.get(name) is None]
    if wrong or missing or set(values) - names or {"engine", "ranks"} - set(values):
        why = (
            (wrong and f"gives {wrong[0]} as {values[wrong[0]]!r}")
            or (missing and f"lacks {missing[0]}")
            or "has other keys"
        )
        raise ConfigError(f"--calibration {path} {why}: give the {ESTIMATE} that a run wrote.")
    return Calibration(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
