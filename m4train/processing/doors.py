"""What people ask of a processor besides calling it, under the names that transformers gives it."""

from __future__ import annotations

import tempfile
from typing import Any

from m4train.errors import ConfigError
from m4train.json_files import AsJson
from m4train.processing.files import templates_of
from m4train.processing.image_processor import ImageProcessor
from m4train.processing.tokenizer import Tokenizer

FAKE, IMAGE, END_OF_UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"


def own_tokenizer(given: Any) -> Tokenizer:
    """A tokenizer, or one of another library as its files say it. Raises ConfigError for anything else."""
    if isinstance(given, Tokenizer):
        return given
    if not hasattr(given, "save_pretrained"):
        raise ConfigError(f"tokenizer is a {type(given).__name__}: give a Tokenizer, or one of transformers.")
    with tempfile.TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        return Tokenizer.from_pretrained(folder)


class ProcessorDoors(AsJson):
    """The tokens that have a meaning, their ids, ids back to text, and the settings as a mapping."""

    tokenizer: Tokenizer
    image_processor: ImageProcessor
    image_token, fake_image_token, end_of_utterance_token = IMAGE, FAKE, END_OF_UTTERANCE

    named_templates: dict[str, str]

    @property
    def chat_template(self) -> str:
        """The template of conversations; set to a mapping, its "default", the others joining `named_templates`."""
        return self.__dict__["_chat_template"]

    @chat_template.setter
    def chat_template(self, given: Any) -> None:
        default, named = templates_of(given)
        self.named_templates = {**self.named_templates, **named}
        if default is not None or "_chat_template" not in self.__dict__:
            self.__dict__["_chat_template"] = default

    def _stated_settings(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE)

    @property
    def fake_image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(FAKE)

    @property
    def end_of_utterance_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE)

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int | None:
        return self.tokenizer.pad_token_id

    @property
    def model_input_names(self) -> list[str]:
        """What a call makes of text and images."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds, with the settings of the image processor."""
        return {**self._stated_settings(), "image_processor": self.image_processor.to_dict()}

    def decode(self, ids: Any, **options: Any) -> str:
        return self.tokenizer.decode(ids, **options)

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(rows, **options)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """The texts of what `generate` returned: rows of ids (B, T)."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)
