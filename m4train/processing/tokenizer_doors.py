"""What people ask of a tokenizer besides ids and texts, under the names that transformers gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from m4train.processing.calls import conversations_of, ended_in_last_message, refuse_to_continue
from m4train.processing.chat import ChatTemplate


class TokenizerDoors:
    """Vocabulary, tokens as strings, and conversations of texts."""

    backend: Backend
    chat_template: str | None
    named_templates: dict[str, str]
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    model_input_names = ["input_ids", "attention_mask"]
    is_fast = True

    @property
    def special_tokens_map(self) -> dict[str, str]:
        raise NotImplementedError

    @property
    def added_tokens(self) -> dict[str, int]:
        raise NotImplementedError

    @property
    def all_special_ids(self) -> list[int]:
        raise NotImplementedError

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    @property
    def unk_token_id(self) -> int | None:
        return self._id(self.unk_token)

    @property
    def all_special_tokens(self) -> list[str]:
        return [token for token, id_ in self.added_tokens.items() if id_ in set(self.all_special_ids)]

    def get_vocab(self) -> dict[str, int]:
        """The id of every token, added ones too."""
        return self.backend.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """The id of every added token, special or not."""
        return dict(self.added_tokens)

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """A text as the strings of its tokens."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).tokens

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of the strings of tokens."""
        decoder = self.backend.decoder
        return decoder.decode(list(tokens)) if decoder is not None else " ".join(tokens)

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """A conversation of texts (or each of several) as ids, with the mask if `return_dict`, or as a string.

        `chat_template` may name one of `named_templates`; `options` that the template reads are its variables, the others
        (padding, truncation, max_length, return_tensors) are those of a call. Raises ValueError if there is no template.
        """
        refuse_to_continue(continue_final_message, False, add_generation_prompt)
        source = self.named_templates.get(chat_template or "", chat_template) or self.chat_template
        if source is None:
            raise ValueError("The tokenizer has no chat template: set chat_template, or give one.")
        template = ChatTemplate(source, self.special_tokens_map)
        variables = {name: options.pop(name) for name in list(options) if name in template.variables}
        conversations, several = conversations_of(conversation)
        texts = [template.render(template.prepare(c), add_generation_prompt, **variables) for c in conversations]
        if continue_final_message:
            texts = [ended_in_last_message(text, c) for text, c in zip(texts, conversations)]
        given: Any = texts if several else texts[0]
        if not tokenize:
            return given
        features = self(given, add_special_tokens=False, **options, **(tokenizer_kwargs or {}))  # type: ignore[operator]
        return features if return_dict else features["input_ids"]
