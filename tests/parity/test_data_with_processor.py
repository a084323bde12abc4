"""The data side with the real processor: planned lengths, labels and batches of Idefics3."""

from pathlib import Path

import numpy as np

from m4train.config import SourceConfig
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from tests.helpers.data import conversations, data_config, documents, write_shards
from tests.helpers.processing import tiny_idefics3_processor


def test_packs_of_the_real_processor_are_as_planned_and_train_on_the_answers(tmp_path: Path) -> None:
    write_shards(tmp_path / "pages", documents(30))
    write_shards(tmp_path / "digits", conversations(30))
    sources = {name: SourceConfig(path=str(tmp_path / name / "*.tar")) for name in ("pages", "digits")}
    data = data_config(sequence_length=512, sources=sources, epochs=1)
    processor = tiny_idefics3_processor(split=True)
    built = build_sources(sources, data, processor)
    loader = Loader(Plan(built, data, 0, 4), processor, data, seed=0, micro_batch_size=4)
    answers = 0
    for step in loader:
        assert not step.bad
        for batch in step.micro_batches:
            assert (batch.input_ids[batch.image_positions] == processor.image_token_id).all()
            assert not np.isin(batch.targets, [processor.image_token_id]).any()
            for number, record in enumerate(batch.documents):
                begin, end = batch.segments.cu_seqlens[number : number + 2].tolist()
                trained = [int(t) for p, t in zip(batch.loss_positions, batch.targets) if begin <= p < end]
                if record.source == "digits":
                    assert processor.decode(trained).strip().startswith("It is ")
                    assert trained[-1] == processor.end_of_utterance_id
                    answers += 1
    assert answers == 30
