"""Configurations of the backbones: the SigLIP tower, the Llama and Mistral decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from m4train.errors import ConfigError
from m4train.models.configuration import PretrainedConfig, check_dropout, refuse


@dataclass(kw_only=True)
class SiglipVisionConfig(PretrainedConfig):
    """The SigLIP tower of Idefics2, Idefics3 and SmolVLM."""

    model_type: ClassVar[str] = "idefics3"

    hidden_size: int = 1152
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str | Callable[[Any], Any] = "gelu_pytorch_tanh"
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
        refuse(self, num_channels=(3,))
        check_dropout(self, "attention_dropout")

    @property
    def grid(self) -> int:
        """Patches per side of a full frame."""
        return self.image_size // self.patch_size


@dataclass(kw_only=True)
class LlamaConfig(PretrainedConfig):
    """A Llama decoder."""

    model_type: ClassVar[str] = "llama"
    norm_weight_first: ClassVar[bool] = False  # see RMSNorm

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str | Callable[[Any], Any] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
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
        refuse(self, attention_bias=(False,), mlp_bias=(False,))
        check_dropout(self, "attention_dropout")

    @property
    def window(self) -> int | None:
        """How many tokens, itself included, a token sees; None: all of its document."""
        return None

    @property
    def residual_dropout(self) -> float:
        """Dropout of what attention and MLP add to the residual stream."""
        return 0.0

    @classmethod
    def for_type(cls, model_type: str | None) -> type[PretrainedConfig]:
        kinds: dict[str | None, type[PretrainedConfig]] = {None: cls, "llama": LlamaConfig, "mistral": MistralConfig}
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
