"""Shards written by this package, prepared and read by Megatron-Energon: every sample, with the same bytes."""

import json
from pathlib import Path

import pytest

from tests.helpers.data import documents, write_shards

energon = pytest.importorskip("megatron.energon", reason="Energon is not installed")


def test_energon_reads_the_same_samples(tmp_path: Path) -> None:
    from megatron.energon.flavors import BaseWebdatasetFactory

    paths = write_shards(tmp_path, documents(12), max_samples=4)
    BaseWebdatasetFactory.prepare_dataset(
        tmp_path, [path.name for path in paths], split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    (tmp_path / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors: {}\n"
    )
    found = {}

    class Keep(energon.DefaultTaskEncoder):
        decoder = None  # bytes as they are stored
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]

        def batch(self, samples):
            return samples

    dataset = energon.get_train_dataset(
        tmp_path,
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=Keep(),
    )
    for [sample] in energon.get_loader(dataset):
        found[sample["__key__"].split("/")[-1]] = sample
    for key, content, images in documents(12):
        stored = json.loads(found[key]["json"])
        assert [item.get("text") for item in stored["items"]] == [item.get("text") for item in content["items"]]
        assert {name: bytes(found[key][name]) for name in images} == images
    assert len(found) == 12
