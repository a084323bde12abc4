"""Configurations of the models: Idefics, Idefics2, Idefics3 and SmolVLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from m4train.errors import ConfigError
from m4train.models.backbone_configs import LlamaConfig, MistralConfig, SiglipVisionConfig
from m4train.models.configuration import PretrainedConfig, check_dropout, refuse


@dataclass(kw_only=True)
class Idefics3Config(PretrainedConfig):
    """Idefics3: SigLIP frames, pixel shuffle, a linear projection and a Llama decoder."""

    model_type: ClassVar[str] = "idefics3"
    renamed: ClassVar[dict[str, str]] = {**PretrainedConfig.renamed, "_pad_token_id": "pad_token_id"}
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
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
    def token_rows(self) -> int:
        """Rows of the token embedding."""
        return self.text_config.vocab_size

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
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
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
class Idefics2PerceiverConfig(PretrainedConfig):
    """The perceiver that turns the patches of an image into a fixed number of tokens."""

    model_type: ClassVar[str] = "idefics2"

    hidden_act: str | Callable[[Any], Any] = "silu"
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
        check_dropout(self, "attention_dropout")
        if self.resampler_n_heads % self.num_key_value_heads:
            raise ConfigError(
                f"resampler_n_heads {self.resampler_n_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: change one of them"
            )


@dataclass(kw_only=True)
class Idefics2Config(PretrainedConfig):
    """Idefics2: SigLIP on images of any shape, a perceiver, and a Mistral decoder."""

    model_type: ClassVar[str] = "idefics2"
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
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
    def token_rows(self) -> int:
        """Rows of the token embedding."""
        return self.text_config.vocab_size

    @property
    def tokens_per_image(self) -> int:
        """Tokens an image takes in the text."""
        return self.perceiver_config.resampler_n_latents


@dataclass(kw_only=True)
class IdeficsVisionConfig(PretrainedConfig):
    """The CLIP tower of Idefics."""

    model_type: ClassVar[str] = "idefics"
    renamed: ClassVar[dict[str, str]] = {**PretrainedConfig.renamed, "hidden_size": "embed_dim"}

    embed_dim: int = 768
    image_size: int = 224
    intermediate_size: int = 5120
    patch_size: int = 14
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    hidden_act: str | Callable[[Any], Any] = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, num_channels=(3,))
        check_dropout(self, "attention_dropout")

    @property
    def grid(self) -> int:
        """Patches per side of a frame of the configured size."""
        return self.image_size // self.patch_size


@dataclass(kw_only=True)
class IdeficsPerceiverConfig(PretrainedConfig):
    """The resampler of Idefics, used if `use_resampler` of the model is set."""

    model_type: ClassVar[str] = "idefics"

    use_resampler: bool = False
    resampler_n_latents: int = 64
    resampler_depth: int = 6
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    qk_layer_norms_perceiver: bool = False


@dataclass(kw_only=True)
class IdeficsTextConfig(LlamaConfig):
    """The decoder fields of an `IdeficsConfig`, as the decoder layers take them."""

    norm_weight_first: ClassVar[bool] = True

    @property
    def residual_dropout(self) -> float:
        return self.attention_dropout


# Keys that early releases wrote at the top level, and the sub-configuration they belong to.
_FLAT_VISION = (
    "embed_dim",
    "image_size",
    "patch_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
)
_FLAT_PERCEIVER = ("resampler_depth", "resampler_head_dim", "resampler_n_heads", "resampler_n_latents")


@dataclass(kw_only=True)
class IdeficsConfig(PretrainedConfig):
    """Idefics: a CLIP tower, an optional resampler, and a Llama decoder with gated cross-attention."""

    model_type: ClassVar[str] = "idefics"
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
        "vision_config": IdeficsVisionConfig,
        "perceiver_config": IdeficsPerceiverConfig,
    }

    vocab_size: int = 32000
    additional_vocab_size: int = 0
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    dropout: float = 0.0
    hidden_act: str | Callable[[Any], Any] = "silu"
    alpha_initializer: str = "zeros"
    alphas_initializer_range: float = 0.0
    alpha_type: str = "float"
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    cross_layer_interval: int = 1
    qk_layer_norms: bool = False
    freeze_text_layers: bool = True
    freeze_text_module_exceptions: list[str] = field(default_factory=list)
    freeze_lm_head: bool = False
    freeze_vision_layers: bool = True
    freeze_vision_module_exceptions: list[str] = field(default_factory=list)
    use_resampler: bool = False
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    vision_config: IdeficsVisionConfig = None  # type: ignore[assignment]
    perceiver_config: IdeficsPerceiverConfig = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            self,
            alpha_type=("float", "vector"),
            alpha_initializer=("zeros", "ones", "normal", "gaussian", "random"),
        )
        check_dropout(self, "dropout")
        if self.num_hidden_layers % self.cross_layer_interval:
            raise ConfigError(
                f"num_hidden_layers {self.num_hidden_layers} is not a multiple of cross_layer_interval "
                f"{self.cross_layer_interval}: change one of them"
            )

    @property
    def text_config(self) -> IdeficsTextConfig:
        """The decoder, for code that serves all models."""
        names = "hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act rms_norm_eps rope_theta"
        values = {name: getattr(self, name) for name in names.split()}
        values["attention_dropout"] = self.dropout
        values |= {"pad_token_id": self.pad_token_id, "eos_token_id": self.eos_token_id}
        return IdeficsTextConfig(vocab_size=self.vocab_size, **values)

    @property
    def token_rows(self) -> int:
        """Rows of the token embedding, the additional ones included."""
        return self.vocab_size + self.additional_vocab_size

    @property
    def tokens_per_image(self) -> int:
        """Feature vectors an image gives to the cross-attention; none of them takes a place in the text."""
        return self.perceiver_config.resampler_n_latents if self.use_resampler else self.vision_config.grid**2 + 1

    @classmethod
    def _modernise(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._modernise(values)
        rope = values.pop("rope_parameters", None) or {}
        values.setdefault("rope_theta", rope.get("rope_theta", cls.rope_theta))
        for key in ("cross_layer_activation_function", "max_sequence_length", "ffn_dim", "vision_model_name"):
            values.pop(key, None)
        flat = {"vision_config": {}, "perceiver_config": {}}  # type: dict[str, dict[str, Any]]
        for key in _FLAT_VISION:
            if f"vision_{key}" in values:
                flat["vision_config"][key] = values.pop(f"vision_{key}")
        for key in (*_FLAT_PERCEIVER, "qk_layer_norms_perceiver"):
            if key in values:
                flat["perceiver_config"][key] = values.pop(key)
        for name, old in flat.items():
            held = values.get(name)
            if old and not isinstance(held, PretrainedConfig):
                values[name] = {**old, **(held or {})}
        return values
