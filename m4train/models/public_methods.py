"""What people ask of a model besides calling it, under the names that transformers gives it."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m4train.errors import ConfigError, WrongArgument
from m4train.models.attention import check_attention
from m4train.models.token_rows import has_own_rows, resize_rows


class PublicMethods(nn.Module):
    """Embeddings, head, size and activation checkpointing of a model, with or without head."""

    config: Any
    embedding_name: ClassVar[str]  # of the module that embeds tokens
    main_input_name: ClassVar[str] = "input_ids"
    base_model_prefix: ClassVar[str] = "model"
    supports_gradient_checkpointing: ClassVar[bool] = True

    @classmethod
    def can_generate(cls) -> bool:
        return hasattr(cls, "generate")

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings, without those that an Idefics keeps apart."""
        return self.config.get_text_config().vocab_size

    @property
    def base_model(self) -> nn.Module:
        """The model without head."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.get_submodule(self.embedding_name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        parent, _, leaf = self.embedding_name.rpartition(".")
        setattr(self.get_submodule(parent), leaf, value)
        self._tie()

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None for a model without one."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, value: nn.Module) -> None:
        if self.get_output_embeddings() is None:
            raise ConfigError(f"{type(self).__name__} has no head to replace: use the class with one")
        self.lm_head = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Gives the embeddings, and the head, `new_num_tokens` rows, and returns the embeddings.

        New rows begin at the mean of the others (`mean_resizing`), or at random. Raises ConfigError for a model whose new
        tokens have rows of their own (Idefics with additional_vocab_size).
        """
        embedding = self.get_input_embeddings()
        if has_own_rows(embedding):
            raise ConfigError(
                f"{type(self).__name__} keeps its new tokens in a table of {self.config.token_rows - embedding.num_embeddings} "
                "rows of their own: make a model with another additional_vocab_size"
            )
        rows = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        for name, value in (("new_num_tokens", rows), ("pad_to_multiple_of", pad_to_multiple_of or 1)):
            if not isinstance(value, int) or value < 1:
                raise WrongArgument(f"{name} is {value!r}, but must be a whole number above 0: give one")
        if pad_to_multiple_of:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows != embedding.num_embeddings:
            std = None if mean_resizing else self.config.initializer_range
            for owner in (embedding, self.get_output_embeddings()):
                if owner is not None:
                    resize_rows(owner, rows, std)
            self.config.get_text_config().vocab_size = rows
            self._tie()
        return embedding

    def _tie(self) -> None:
        self.tie_weights()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters there are; tied ones count once."""
        left_out = {id(p) for p in self.get_input_embeddings().parameters()} if exclude_embeddings else set()
        counted = (p for p in self.parameters() if id(p) not in left_out and (p.requires_grad or not only_trainable))
        return sum(p.numel() for p in counted)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Raises ConfigError for kernels that this model would not use: device and dtype alone decide."""
        check_attention(attn_implementation, next(self.parameters()).dtype)

    def enable_input_require_grads(self) -> None:
        """Lets gradients flow through the embeddings though they are frozen, as checkpointing with adapters asks for."""
        self.disable_input_require_grads()
        hook = self.get_input_embeddings().register_forward_hook(lambda module, given, out: out.requires_grad_(True))
        self.__dict__["_input_grads"] = hook

    def disable_input_require_grads(self) -> None:
        if (hook := self.__dict__.pop("_input_grads", None)) is not None:
            hook.remove()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Keeps only the inputs of each layer while training, and computes the rest again in the backward pass.

        `gradient_checkpointing_kwargs` are those of `torch.utils.checkpoint.checkpoint`.
        """
        self.gradient_checkpointing_disable()
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for layer in self._layers():
            layer.forward = partial(_checkpointed, layer, layer.forward, options)
            self._checkpointed = [*getattr(self, "_checkpointed", []), layer]

    def gradient_checkpointing_disable(self) -> None:
        for layer in self.__dict__.pop("_checkpointed", []):
            del layer.forward

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.__dict__.get("_checkpointed"))

    def _layers(self) -> list[nn.Module]:
        """The layers of its towers and decoder."""
        lists = [module for module in self.modules() if isinstance(module, nn.ModuleList)]
        return [layer for held in lists for layer in held if isinstance(layer, nn.Module) and _is_layer(layer)]


def _is_layer(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList)


def _checkpointed(layer: nn.Module, forward: Any, options: dict[str, Any], *given: Any, **named: Any) -> Tensor:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*given, **named)
    return checkpoint(forward, *given, **options, **named)
