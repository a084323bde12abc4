"""Every key that a user's DeepSpeed file may set leaves the weights as they are; dora trains under zero3 in bf16 as elsewhere."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from m4train.config.deepspeed_keys import FREE_ZERO
from m4train.errors import CheckpointError
from m4train.training.engines import make_engine
from m4train.training.parts_table import parameter_table
from tests.distributed.cases import Case, build
from tests.helpers.distributed import run_distributed
from tests.helpers.training import full_parameters, make_trainer, read_metrics

VALUES = {  # of each free key one that is not its default
    "allgather_bucket_size": 64,
    "allgather_partitions": False,
    "contiguous_gradients": False,
    "ignore_unused_parameters": False,
    "overlap_comm": True,
    "reduce_bucket_size": 64,
    "reduce_scatter": False,
    "stage3_gather_16bit_weights_on_model_save": True,
    "stage3_max_live_parameters": 64,
    "stage3_max_reuse_distance": 64,
    "stage3_model_persistence_threshold": 64,
    "stage3_param_persistence_threshold": 64,
    "stage3_prefetch_bucket_size": 64,
    "sub_group_size": 4096,
}
DEVICES = {"offload_optimizer", "offload_param"}  # whose device is engine.offload's, with tests of its own


def _weights(folder, engine, **options):
    """The parameters after three steps, on rank 0, and the table of parts that the run printed."""
    values, precision = options.get("zero", {}), options.get("precision", "fp32")
    case = Case(engine, packs=4, steps=3, adapter=options.get("adapter", "none"))
    config, model, shape = build(case, str(folder))
    config.trainer.precision, config.trainer.save_every = precision, 3
    config.adapter.rank = options.get("rank", 4)
    if values:
        path = Path(folder).with_suffix(".json")
        path.write_text(json.dumps({"zero_optimization": values}))
        config.engine.deepspeed = str(path)
    trainer = make_trainer(config, model, make_engine(config), packs=4, shape=shape)
    trainer.train()
    table = parameter_table(model, config, trainer.engine.device)
    decays = {row.part: row.decay for row in table}
    return full_parameters(trainer.engine), [line["loss"] for line in read_metrics(folder)], decays


def _all(runs):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    found = {}
    for number, (name, (engine, options)) in enumerate(runs.items()):
        try:
            found[name] = _weights(Path(box[0]) / str(number), engine, **options)
        except Exception as error:
            found[name] = repr(error)
            dist.barrier()
    return found


def test_every_free_key_has_a_value_here():
    assert VALUES.keys() | DEVICES == FREE_ZERO


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), 2, 3])
def test_a_free_key_changes_no_weight(stage):
    keys = {key: value for key, value in VALUES.items() if stage == 3 or not key.startswith(("stage3_", "sub_group"))}
    runs = {"plain": (f"zero{stage}", {})}
    runs |= {key: (f"zero{stage}", {"zero": {key: value}}) for key, value in keys.items()}
    found = run_distributed(_all, 2, runs, timeout=900)[0]
    for key in keys:
        assert not isinstance(found[key], str), (key, found[key])
        for name, weight in found["plain"][0].items():
            assert torch.allclose(weight, found[key][0][name], rtol=1e-4, atol=1e-6), (key, name)


@pytest.mark.slow
def test_dora_under_zero3_in_bf16_trains_as_elsewhere_and_the_table_says_what_decays():
    options = {"adapter": "dora", "precision": "bf16"}
    runs = {engine: (engine, options) for engine in ("ddp", "zero2", "zero3")}
    runs |= {f"{engine}, rank 1": (engine, {"adapter": "lora", "rank": 1}) for engine in ("ddp", "zero3")}
    found = run_distributed(_all, 2, runs, timeout=900)[0]
    assert not any(isinstance(value, str) for value in found.values()), found
    for engine in ("zero2", "zero3"):
        assert found[engine][1] == pytest.approx(found["ddp"][1], rel=1e-2)
        assert found[engine][2] == found["ddp"][2]
    for name in ("ddp, rank 1", "zero3, rank 1"):
        assert 0.1 in found[name][2]["text"], name


def _scrambled(folder):
    """A run whose checkpoints would get other values than its ranks compute with, as from an option of DeepSpeed."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    box = [folder]
    dist.broadcast_object_list(box)
    said = {}
    for name in ("ddp", "zero2", "fsdp2"):
        config, model, shape = build(Case(name, packs=4, steps=2), str(Path(box[0]) / name))
        trainer = make_trainer(config, model, make_engine(config), packs=4, shape=shape)
        kept = trainer.engine.tensors

        def scrambled(kept=kept):
            tensors = kept()
            key = next((key for key in tensors if key.startswith("parameter/")), None)  # none on rank 1 under ZeRO
            return {**tensors, key: tensors[key] + 1.0} if key else tensors

        trainer.engine.tensors = scrambled
        try:
            trainer.train()
        except CheckpointError as error:
            said[name] = str(error)
        dist.barrier()
    return said


@pytest.mark.slow
def test_a_checkpoint_that_would_hold_other_values_is_not_written(tmp_path):
    for said in run_distributed(_scrambled, 2, str(tmp_path), timeout=300):
        assert said.keys() == {"ddp", "zero2", "fsdp2"}
        assert all("is not what the engine would write into the checkpoint" in sentence for sentence in said.values())
    assert not list(tmp_path.glob("*/checkpoints/step-*"))
