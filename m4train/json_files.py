"""JSON files that hold one mapping each, such as those of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m4train.errors import ConfigError


def read_mapping(path: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises ConfigError, in one sentence, if it cannot be read or holds anything but a mapping."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): give the folder of a whole model or run."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): copy it again from where it came.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {str(values)[:40]!r}, but must hold a mapping: copy it again from where it came."
        )
    return values
