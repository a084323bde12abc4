"""What people pass to `from_pretrained` and `save_pretrained` out of habit: it acts, changes nothing here, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from m4train.config.checks import size_in_bytes
from m4train.errors import ConfigError

# What of the loading of other libraries has no meaning here: models are always built without memory, and run no foreign code.
_NOTHING = ("low_cpu_mem_usage", "trust_remote_code", "weights_only", "resume_download", "use_fast", "is_main_process")
# What is refused unless it is None or False, and the way out.
_REFUSED = {
    "ignore_mismatched_sizes": "make a model of another shape from its configuration",
    "state_dict": "name a folder that holds the tensors",
    "subfolder": "name the folder itself",
    "variant": "name a folder whose files have no variant",
    "from_tf": "convert the files to safetensors first",
    "from_flax": "convert the files to safetensors first",
    "gguf_file": "convert the file to safetensors first",
    "load_in_8bit": "only 4 bits are implemented: give quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
    "max_memory": "give device_map, which names one device",
    "offload_folder": "give device_map, which names one device",
    "tp_plan": "give device_map, which names one device",
    "push_to_hub": "upload the folder with huggingface_hub",
    "save_peft_format": "m4train export writes folders of adapters",
    "repo_id": "upload the folder with huggingface_hub",
}


def refuse_options(owner: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are neither refused nor without meaning. Raises ConfigError for one that cannot act."""
    for name, way_out in _REFUSED.items():
        if options.get(name):
            raise ConfigError(f"{owner} does not implement {name}, which is {str(options[name])[:80]!r}: {way_out}")
    return {name: value for name, value in options.items() if name not in _NOTHING and name not in _REFUSED}


def one_device(device: Any, device_map: Any) -> Any:
    """The device for all of a model. Raises ConfigError for a map that names several, and where no tensor can be read."""
    if torch.get_default_device().type == "meta":
        raise ConfigError(
            "from_pretrained is called under torch.device('meta'), where weights cannot be: leave that context, as a model "
            "takes no memory here before its weights are read"
        )
    if device_map is None:
        return device
    if isinstance(device_map, Mapping):
        named = {str(torch.device(one)) for one in device_map.values()}
        if len(named) != 1:
            raise ConfigError(
                f"device_map names {', '.join(sorted(named)) or 'no device'}, but a model is put on one: name that one, or "
                "shard it over GPUs with engine=fsdp2"
            )
        return torch.device(named.pop())
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device_map)


def changed_config(kind: Any, config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration of class `kind` with the fields that a call gives. Raises TypeError for what is not a field."""
    unknown = sorted(set(changes) - {field.name for field in fields(kind)} - set(kind.generic_keys()))
    if unknown:
        raise TypeError(f"from_pretrained has no argument {', '.join(unknown)}, and neither has {kind.__name__}")
    return kind.from_dict({**config.to_dict(), **changes}) if changes else config


def given_config(kind: Any, given: Any) -> Any:
    """A configuration in any form: of this class, of another library, a mapping, or a folder."""
    if isinstance(given, kind):
        return given
    if isinstance(given, Mapping):
        return kind.from_dict(dict(given))
    return kind.from_dict(given.to_dict()) if hasattr(given, "to_dict") else kind.from_pretrained(given)


def shard_bytes(given: int | str) -> int:
    """Bytes of a max_shard_size such as "5GB" or a number."""
    return given if isinstance(given, int) else size_in_bytes("max_shard_size", given)
