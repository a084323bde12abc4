"""Model configurations, read from and written as the config.json of Hugging Face folders.

Both vintages of the files are read: `torch_dtype`/`dtype`, `rope_theta` + `rope_scaling`/`rope_parameters`,
`pad_token_id`/`_pad_token_id`. What is written uses the older keys, which every release of transformers from 4.46 on loads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from m4train.errors import ConfigError
from m4train.hub import CONFIG_FILES, HUB_OPTIONS, model_folder, refuse_upload
from m4train.json_files import AsJson, read_mapping

# Keys that releases of transformers dump into every config and that change no computation here.
_GENERIC_KEYS = frozenset(
    key
    for line in """_attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path add_cross_attention architectures
    auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torchscript
    pad_token_id tie_encoder_decoder tie_word_embeddings use_cache transformers.js_config transformers_version typical_p
    use_bfloat16""".splitlines()
    for key in line.split()
)

# What is read of a configuration that does not say it.
_IF_NOT_SAID: dict[str, Any] = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_return_dict": True,
    "architectures": None,
    "is_encoder_decoder": False,
    "name_or_path": "",
}


class _TakesAnyKey(type):
    """Renames the keys of old releases, and keeps those that no field has as `extra`, with a warning if they have no meaning."""

    def __call__(cls, **values: Any) -> Any:
        kind: Any = cls
        values = kind._modernise(values)
        values.pop("model_type", None)
        known = {f.name for f in fields(kind)}
        extra = {**values.pop("extra", {}), **{key: values.pop(key) for key in list(values) if key not in known}}
        unknown = sorted(set(extra) - _GENERIC_KEYS)
        if unknown:
            warnings.warn(f"{cls.__name__} keeps but does not use the keys {', '.join(unknown)}", stacklevel=2)
        return super().__call__(**values, extra=extra)


@dataclass(kw_only=True)
class PretrainedConfig(AsJson, metaclass=_TakesAnyKey):
    """Fields shared by every configuration.

    `extra` holds the keys of a config.json, or further arguments, that no field has; they can be read as attributes, and are
    written back unchanged. Among them `output_attentions`, `output_hidden_states` and `return_dict` are what the models give
    if a call does not say.
    """

    model_type: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {"torch_dtype": "dtype"}
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {}

    dtype: str | None = None
    initializer_range: float = 0.02
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, kind in self.sub_configs.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                values = value or {}
                setattr(self, name, kind.for_type(values.get("model_type")).from_dict(values))
        if self.dtype is not None:
            self.dtype = str(self.dtype).removeprefix("torch.")

    @staticmethod
    def generic_keys() -> frozenset[str]:
        """Keys of any config.json that no field has and that change no computation here."""
        return _GENERIC_KEYS

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The configuration of the text model; without one of its own, this one. `decoder` and `encoder` change nothing."""
        text = self.__dict__.get("text_config")
        return text if isinstance(text, PretrainedConfig) else self

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration a config.json describes; keys m4train does not know are kept and warned about, once."""
        return cls(**values)

    def __getattr__(self, name: str) -> Any:
        for values in (self.__dict__.get("extra", {}), _IF_NOT_SAID):
            if name in values:
                return values[name]
        raise AttributeError(f"{type(self).__name__} has no field {name}")

    @classmethod
    def for_type(cls, model_type: str | None) -> type[PretrainedConfig]:
        """The class that reads a sub-configuration of this `model_type`."""
        return cls

    @classmethod
    def _modernise(cls, values: dict[str, Any]) -> dict[str, Any]:
        for old, new in cls.renamed.items():
            if old in values:
                values.setdefault(new, values[old])
                del values[old]
        return values

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **changes: Any,
    ) -> Self:
        """Reads config.json of a folder or hub model; `changes` are fields that take the place of the file's, and HUB_OPTIONS.

        Raises:
            ConfigError: the file is missing or describes another kind of model.
        """
        hub = {name: changes.pop(name) for name in HUB_OPTIONS if name in changes}
        folder = model_folder(
            pretrained_model_name_or_path, CONFIG_FILES, revision, cache_dir, required=(CONFIG_FILES,), **hub
        )
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"there is no config.json in {folder}: name a folder that holds a saved model")
        return cls._read(path, changes)

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """Reads a file of the form of config.json. Raises as `from_pretrained`."""
        return cls._read(Path(json_file), {})

    @classmethod
    def _read(cls, path: Path, changes: dict[str, Any]) -> Self:
        values = read_mapping(path)
        if values.get("model_type", cls.model_type) not in (cls.model_type, *cls.also_reads()):
            raise ConfigError(
                f"{path} has model_type {values['model_type']!r}, but {cls.__name__} reads {cls.model_type!r}: "
                "use the class of that model"
            )
        try:
            config = cls.from_dict({**values, **changes})
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
            raise ConfigError(
                f"{path} holds a value of a kind that {cls.__name__} cannot have ({error}): correct it, or copy the file again."
            ) from error
        for name, value in config._not_whole():
            raise ConfigError(
                f"{path} has {name} {value!r}, but it must be a whole number: correct it, or copy the file again."
            )
        return config

    def _not_whole(self) -> Iterator[tuple[str, Any]]:
        """The fields for whole numbers, of this configuration and those inside it, that hold something else."""
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if isinstance(value, PretrainedConfig):
                yield from value._not_whole()
            elif field_.type == "int" and not (
                isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            ):
                yield field_.name, value

    @classmethod
    def also_reads(cls) -> tuple[str, ...]:
        """Other values of `model_type` with the same meaning."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        values: dict[str, Any] = {"model_type": self.model_type} if self.model_type else {}
        for name in (f.name for f in fields(self) if f.name not in ("extra", "dtype")):
            value = getattr(self, name)
            values[name] = value.to_dict() if isinstance(value, PretrainedConfig) else value
        if self.dtype is not None:
            values["torch_dtype"] = self.dtype
        if "text_config" in values and "tie_word_embeddings" in values:  # transformers 4.57 looks for it there
            values["text_config"] = {**values["text_config"], "tie_word_embeddings": values["tie_word_embeddings"]}
        return {**self.extra, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """What of `to_dict` is not as in a configuration that is given nothing; always the model_type."""
        plain = type(self)().to_dict()
        return {key: value for key, value in self.to_dict().items() if key == "model_type" or plain.get(key) != value}

    def update(self, values: dict[str, Any]) -> None:
        """Sets fields, and keys that no field has, as `from_dict` would."""
        names = {f.name for f in fields(self)}
        for name, value in self._modernise(dict(values)).items():
            if name in names:
                setattr(self, name, value)
            else:
                self.extra[name] = value
        PretrainedConfig.__post_init__(self)  # a sub-configuration may be given as a mapping

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> None:
        """Writes `save_directory`/config.json. Raises ConfigError for a value it cannot hold, such as a function."""
        refuse_upload(push_to_hub)
        text = self.to_json_string()
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "config.json").write_text(text, encoding="utf-8")


def check_dropout(config: PretrainedConfig, *names: str) -> None:
    """Raises ConfigError for the first of these fields that is not a probability below 1."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(
                f"{type(config).__name__}.{name} is {value}, but must be at least 0 and below 1: change it"
            )


def refuse(config: PretrainedConfig, **allowed: tuple[Any, ...]) -> None:
    """Raises ConfigError for the first field whose value is not among those implemented."""
    for name, values in allowed.items():
        value = getattr(config, name)
        if value not in values:
            choices = " or ".join(str(v) for v in values)
            raise ConfigError(
                f"{type(config).__name__}.{name} is {value!r}, but only {choices} is implemented: change it"
            )
