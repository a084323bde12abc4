"""The step `tokenizer`: a byte-level BPE tokenizer of the texts of documents, for a model from scratch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator

from datatrove.data import Document

from data_pipelines.frame.step import Step
from m4train.errors import ConfigError
from m4train.processing.tokenizer_training import train_bpe_tokenizer

FOLDER = "tokenizer"  # in the folder of the stage


class TrainTokenizer(Step):
    """Trains on all documents, so its stage has one task; they are not passed on."""

    name = "tokenizer"

    def __init__(self, vocab_size: int = 4096) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        if world_size != 1:
            raise ConfigError("tokenizer is trained on all documents at once: set tasks to 1 for its stage.")
        folder = self.folder() / FOLDER
        unfinished = folder.with_name(f".{FOLDER}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        train_bpe_tokenizer((document.text for document in documents), self.vocab_size, unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        yield from ()
