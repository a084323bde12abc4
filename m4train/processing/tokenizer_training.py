"""A byte-level BPE tokenizer from scratch, with the special tokens of Idefics3."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from m4train.errors import ConfigError
from m4train.processing.idefics3 import GLOBAL_IMAGE, position_tokens
from m4train.processing.processor import END_OF_UTTERANCE, FAKE, IMAGE
from m4train.processing.tokenizer import Tokenizer

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"


def train_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: str | Path, padding_side: str = "left"
) -> Tokenizer:
    """Trains a tokenizer of at most `vocab_size` entries, special tokens included, and saves it in `folder`.

    Text is split as GPT-2 splits it; bos is put before every text. The special tokens come after the base vocabulary.
    Raises ConfigError if `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    special = [BOS, EOS, PAD, FAKE, IMAGE, END_OF_UTTERANCE, GLOBAL_IMAGE, *position_tokens()]
    base = vocab_size - len(special)
    if base < 256:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(special)} special tokens need {256 + len(special)}."
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=base, initial_alphabet=alphabet, show_progress=False)
    )
    config = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "padding_side": padding_side}
    tokenizer = Tokenizer(backend, config)
    tokenizer.add_special_tokens(special)
    bos = (BOS, tokenizer.convert_tokens_to_ids(BOS))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
