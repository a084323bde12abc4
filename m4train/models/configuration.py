"""Model configurations, read from and written as the config.json of Hugging Face folders.

Both vintages of the files are read: `torch_dtype`/`dtype`, `rope_theta` + `rope_scaling`/`rope_parameters`,
`pad_token_id`/`_pad_token_id`. What is written uses the older keys, which every release of transformers from 4.46 on loads.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from m4train.errors import ConfigError

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
    transformers.js_config transformers_version typical_p use_bfloat16""".splitlines()
    for key in line.split()
)


@dataclass(kw_only=True)
class ModelConfig:
    """Fields shared by every configuration.

    `extra` holds the keys of a config.json that m4train does not use; they are written back unchanged.
    """

    model_type: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {"torch_dtype": "dtype"}
    sub_configs: ClassVar[dict[str, type[ModelConfig]]] = {}

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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration a config.json describes; keys m4train does not know are kept and warned about, once."""
        values = cls._modernise(dict(values))
        known = {f.name for f in fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in known and key != "model_type"}
        unknown = sorted(set(extra) - _GENERIC_KEYS)
        if unknown:
            warnings.warn(f"{cls.__name__} keeps but does not use the keys {', '.join(unknown)}", stacklevel=2)
        return cls(**{key: value for key, value in values.items() if key in known}, extra=extra)

    @classmethod
    def for_type(cls, model_type: str | None) -> type[ModelConfig]:
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
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads `folder`/config.json.

        Raises:
            ConfigError: the file is missing or describes another kind of model.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(f"there is no config.json in {folder}: name a folder that holds a saved model")
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("model_type", cls.model_type) not in (cls.model_type, *cls.also_reads()):
            raise ConfigError(
                f"{path} has model_type {values['model_type']!r}, but {cls.__name__} reads {cls.model_type!r}: "
                "use the class of that model"
            )
        return cls.from_dict(values)

    @classmethod
    def also_reads(cls) -> tuple[str, ...]:
        """Other values of `model_type` with the same meaning."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        values: dict[str, Any] = {"model_type": self.model_type} if self.model_type else {}
        for name in (f.name for f in fields(self) if f.name not in ("extra", "dtype")):
            value = getattr(self, name)
            values[name] = value.to_dict() if isinstance(value, ModelConfig) else value
        if self.dtype is not None:
            values["torch_dtype"] = self.dtype
        return {**self.extra, **values}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `folder`/config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")


def refuse(config: ModelConfig, **allowed: tuple[Any, ...]) -> None:
    """Raises ConfigError for the first field whose value is not among those implemented."""
    for name, values in allowed.items():
        value = getattr(config, name)
        if value not in values:
            choices = " or ".join(str(v) for v in values)
            raise ConfigError(
                f"{type(config).__name__}.{name} is {value!r}, but only {choices} is implemented: change it"
            )


@dataclass(kw_only=True)
class SiglipVisionConfig(ModelConfig):
    """The SigLIP tower of Idefics2, Idefics3 and SmolVLM."""

    model_type: ClassVar[str] = "idefics3"

    hidden_size: int = 1152
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                if len(set(value)) != 1:
                    raise ConfigError(
                        f"vision_config.{name} is {value}, but the tower takes square ones: give one number"
                    )
                setattr(self, name, value[0])
        refuse(self, num_channels=(3,), attention_dropout=(0.0,))

    @property
    def grid(self) -> int:
        """Patches per side of a full frame."""
        return self.image_size // self.patch_size


@dataclass(kw_only=True)
class LlamaConfig(ModelConfig):
    """A Llama decoder."""

    model_type: ClassVar[str] = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    pad_token_id: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: change one of them"
            )
        refuse(self, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), attention_dropout=(0.0,))

    @property
    def window(self) -> int | None:
        """How many tokens, itself included, a token sees; None: all of its document."""
        return None

    @classmethod
    def for_type(cls, model_type: str | None) -> type[ModelConfig]:
        kinds: dict[str | None, type[ModelConfig]] = {None: cls, "llama": LlamaConfig, "mistral": MistralConfig}
        if model_type not in kinds:
            raise ConfigError(f"text_config.model_type {model_type!r} is not implemented: llama and mistral are")
        return kinds[model_type]

    @classmethod
    def _modernise(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._modernise(values)
        rope = dict(values.pop("rope_parameters", None) or {})
        if rope:
            values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", cls.rope_theta))
            values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        scaling = values.get("rope_scaling")
        if scaling and "type" in scaling:
            scaling = dict(scaling)
            scaling.setdefault("rope_type", scaling.pop("type"))
            values["rope_scaling"] = scaling
        return values


@dataclass(kw_only=True)
class MistralConfig(LlamaConfig):
    """A Mistral decoder: Llama with a sliding window. The defaults are those Idefics2 gives its text model."""

    model_type: ClassVar[str] = "mistral"

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 32768
    sliding_window: int | None = 4096
    pad_token_id: int | None = 0

    @property
    def window(self) -> int | None:
        return self.sliding_window


@dataclass(kw_only=True)
class Idefics3Config(ModelConfig):
    """Idefics3: SigLIP frames, pixel shuffle, a linear projection and a Llama decoder."""

    model_type: ClassVar[str] = "idefics3"
    renamed: ClassVar[dict[str, str]] = {**ModelConfig.renamed, "_pad_token_id": "pad_token_id"}
    sub_configs: ClassVar[dict[str, type[ModelConfig]]] = {
        "vision_config": SiglipVisionConfig,
        "text_config": LlamaConfig,
    }

    vision_config: SiglipVisionConfig = None  # type: ignore[assignment]
    text_config: LlamaConfig = None  # type: ignore[assignment]
    image_token_id: int = 128257
    scale_factor: int = 2
    pad_token_id: int | None = 128002
    tie_word_embeddings: bool = False
    use_cache: bool = True

    @classmethod
    def also_reads(cls) -> tuple[str, ...]:
        return ("idefics3", "smolvlm")

    @property
    def tokens_per_image(self) -> int:
        """Tokens a frame takes in the text."""
        return (self.vision_config.grid // self.scale_factor) ** 2


@dataclass(kw_only=True)
class SmolVLMVisionConfig(SiglipVisionConfig):
    """The vision tower of SmolVLM: that of Idefics3 under another name."""

    model_type: ClassVar[str] = "smolvlm_vision"


@dataclass(kw_only=True)
class SmolVLMConfig(Idefics3Config):
    """SmolVLM: the architecture of Idefics3 under another name."""

    model_type: ClassVar[str] = "smolvlm"
    sub_configs: ClassVar[dict[str, type[ModelConfig]]] = {
        "vision_config": SmolVLMVisionConfig,
        "text_config": LlamaConfig,
    }

    image_token_id: int = 128257


@dataclass(kw_only=True)
class Idefics2VisionConfig(SiglipVisionConfig):
    """The vision tower of Idefics2, which takes images of any shape."""

    model_type: ClassVar[str] = "idefics2"

    hidden_size: int = 768
    num_attention_heads: int = 12


@dataclass(kw_only=True)
class Idefics2PerceiverConfig(ModelConfig):
    """The perceiver that turns the patches of an image into a fixed number of tokens."""

    model_type: ClassVar[str] = "idefics2"

    hidden_act: str = "silu"
    hidden_size: int = 4096
    rms_norm_eps: float = 1e-6
    resampler_n_latents: int = 64
    resampler_depth: int = 3
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    num_key_value_heads: int = 4
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, hidden_act=("silu",), attention_dropout=(0.0,))
        if self.resampler_n_heads % self.num_key_value_heads:
            raise ConfigError(
                f"resampler_n_heads {self.resampler_n_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: change one of them"
            )


@dataclass(kw_only=True)
class Idefics2Config(ModelConfig):
    """Idefics2: SigLIP on images of any shape, a perceiver, and a Mistral decoder."""

    model_type: ClassVar[str] = "idefics2"
    sub_configs: ClassVar[dict[str, type[ModelConfig]]] = {
        "vision_config": Idefics2VisionConfig,
        "perceiver_config": Idefics2PerceiverConfig,
        "text_config": MistralConfig,
    }

    vision_config: Idefics2VisionConfig = None  # type: ignore[assignment]
    perceiver_config: Idefics2PerceiverConfig = None  # type: ignore[assignment]
    text_config: LlamaConfig = None  # type: ignore[assignment]
    image_token_id: int = 32001
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceiver_config.hidden_size != self.text_config.hidden_size:
            # A perceiver of another width was never set up for this text model: it takes over width and epsilon.
            self.perceiver_config.hidden_size = self.text_config.hidden_size
            self.perceiver_config.rms_norm_eps = self.text_config.rms_norm_eps

    @property
    def tokens_per_image(self) -> int:
        return self.perceiver_config.resampler_n_latents
