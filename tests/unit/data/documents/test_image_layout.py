from pathlib import Path

import numpy as np
import torch

from m4train.config import SourceConfig
from m4train.data.documents.image_layout import CrossFrames, Patches
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from m4train.positions import patch_position_ids
from m4train.processing.idefics import IdeficsProcessor
from m4train.processing.idefics2 import Idefics2Processor
from m4train.processing.idefics2_images import Idefics2ImageProcessor
from m4train.processing.idefics_images import IdeficsImageProcessor
from m4train.processing.tokenizer import Tokenizer
from tests.helpers.data import conversations, data_config, documents, write_shards
from tests.helpers.processing import tokenizer_folder


def first_batch(folder: Path, processor, layout):
    write_shards(folder / "pages", documents(12))
    write_shards(folder / "digits", conversations(12))
    configs = {name: SourceConfig(path=str(folder / name / "*.tar")) for name in ("pages", "digits")}
    data = data_config(sequence_length=1024)
    sources = build_sources(configs, data, processor)
    plan = Plan(sources, data, 0, 2)
    [step] = Loader(plan, processor, data, seed=0, micro_batch_size=2, stop_step=1, layout=layout)
    assert not step.bad
    return step.micro_batches[0], {source.name: source for source in sources}


def images_of(batch, sources: dict) -> list:
    """The original images of the documents of a batch, in order."""
    found = []
    for record in batch.documents:
        source = sources[record.source]
        number = next(n for n in range(len(source)) if source.key(n) == record.key)
        found += list(source.images(number).values())
    return found


def test_patches_are_those_of_each_image_with_its_own_grid(tmp_path: Path) -> None:
    images = Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=False)
    processor = Idefics2Processor(images, Tokenizer.from_pretrained(tokenizer_folder()), image_seq_len=4)
    batch, sources = first_batch(tmp_path, processor, Patches(size=14, side=7))
    packed = batch.images
    originals = images_of(batch, sources)
    assert packed.count == len(packed.patches) == len(originals) > 3
    assert len(set(packed.patches.lengths)) > 1, "images of one shape prove nothing"
    begin = 0
    for original, length in zip(originals, packed.patches.lengths):
        frame = torch.from_numpy(processor.encode_image(original).frames[0])
        rows, columns = frame.shape[1] // 14, frame.shape[2] // 14
        cut = frame.unfold(1, 14, 14).unfold(2, 14, 14)[:, :rows, :columns].permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert torch.equal(packed.pixels[begin : begin + length], cut)
        assert torch.equal(packed.patch_position_ids[begin : begin + length], patch_position_ids(rows, columns, 7))
        begin += length
    assert len(batch.image_positions) == 4 * packed.count
    empty = Patches(size=14, side=7).images([np.zeros((3, 42, 28), np.uint8)], 0, processor.pixel_table())
    assert empty.patches.lengths == (1,)


def test_tokens_see_the_latest_image_of_their_document_as_the_processor_says(tmp_path: Path) -> None:
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=16), Tokenizer.from_pretrained(tokenizer_folder()))
    layout = CrossFrames(processor.image_token_id, processor.eos_id)
    batch, _ = first_batch(tmp_path, processor, layout)
    expected = np.full(batch.tokens, -1)
    first = 0
    for number, record in enumerate(batch.documents):
        begin, end = batch.segments.cu_seqlens[number : number + 2].tolist()
        mask = processor._image_attention(batch.input_ids[begin:end].tolist(), record.images)
        expected[begin:end] = np.where(mask.any(1), mask.argmax(1) + first, -1)
        first += record.images
    assert first == batch.images.count > 3
    found = np.full(batch.tokens, -1)
    assert set(batch.cross.seen.lengths) == {1}
    found[batch.cross.tokens] = np.repeat(batch.cross.images, batch.cross.queries.lengths)
    assert np.array_equal(found, expected)


def test_an_eos_ends_what_is_seen_until_the_next_image() -> None:
    image, eos = 7, 2
    ids = np.array([0, image, 5, eos, 5, 5, image, image, 5])
    cross = CrossFrames(image, eos).cross([ids, np.array([5, 5]), np.array([image])])
    assert cross.tokens.tolist() == [1, 2, 3, 6, 7, 8, 11]
    assert np.repeat(cross.images, cross.queries.lengths).tolist() == [0, 0, 0, 1, 2, 2, 3]
