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


class AsJson:
    """The JSON text and file of what has `to_dict`, under the names that transformers gives them."""

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json_string(self) -> str:
        """`to_dict` as JSON, keys in order. Raises ConfigError for a value that JSON cannot hold, such as a function."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=_refuse_value) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Writes `to_json_string` there."""
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")


def _refuse_value(value: Any) -> Any:
    raise ConfigError(
        f"the configuration holds {value!r}, which config.json cannot: give a function such as hidden_act by its name"
    )
