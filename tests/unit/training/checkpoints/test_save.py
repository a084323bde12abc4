import errno
import json
import os

import pytest
import torch

from m4train.errors import CheckpointError, ConfigError
from m4train.training.callbacks.base import Callback
from m4train.training.checkpoints import save as module
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.checkpoints.state import open_checkpoint
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


def _train(config, **options):
    return make_trainer(config, TinyModel(), **options).train()


def _names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_only_the_last_are_kept(tmp_path):
    _train(make_config(tmp_path, save_every=2, keep_last=3))
    assert _names(tmp_path) == ["step-000008", "step-000010", "step-000012"]


def test_some_are_kept_for_good(tmp_path):
    _train(make_config(tmp_path, save_every=1, keep_last=2, keep_every=5))
    assert _names(tmp_path) == ["step-000005", "step-000010", "step-000011", "step-000012"]


def test_what_else_lies_next_to_checkpoints_is_left_alone(tmp_path):
    (tmp_path / "checkpoints" / "step-000001.bak").mkdir(parents=True)
    _train(make_config(tmp_path, save_every=2, keep_last=1, stop_after=4))
    _train(make_config(tmp_path, save_every=2, keep_last=1))
    assert _names(tmp_path) == ["step-000001.bak", "step-000012"]


@pytest.mark.parametrize("file", ["tensors/__0_0.distcp", "tensors/.metadata", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(file, damage, tmp_path):
    config = make_config(tmp_path)
    _train(config)
    expected = read_metrics(tmp_path)[-1]["loss"]
    path = tmp_path / "checkpoints" / "step-000012" / file
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(flipped if damage == "flip" else content[:middle])
    if (file, damage) == ("manifest.json", "flip"):
        path.write_bytes(content.replace(b'"sha256": "', b'"sha256": "f', 1))
    said = []
    assert find_checkpoint(config, said.append).step == 8
    assert "step-000012" in said[0]
    assert "Falling back" in said[0]
    assert _train(config).step == 12
    assert read_metrics(tmp_path)[-1]["loss"] == expected
    assert open_checkpoint(tmp_path / "checkpoints" / "step-000012").step == 12


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    config = make_config(tmp_path, keep_last=1)
    _train(config)
    (tmp_path / "checkpoints" / "step-000012" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="Every checkpoint"):
        find_checkpoint(config)


def test_another_configuration_is_refused_by_key(tmp_path):
    _train(make_config(tmp_path))
    config = make_config(tmp_path)
    config.optimizer.name, config.data.sequence_length = "muon", 77
    with pytest.raises(
        CheckpointError,
        match=r"of data\.sequence_length \(32 then, 77 now\), optimizer\.name \(adamw then, muon now\); put them back",
    ):
        find_checkpoint(config)
    config.data.sequence_length = 32
    with pytest.raises(CheckpointError, match=r"resume_optimizer=fresh, which keeps the weights and loses"):
        find_checkpoint(config)


def test_keys_that_change_nothing_may_change(tmp_path):
    _train(make_config(tmp_path))
    config = make_config(tmp_path, stop_after=3, log_every=7, save_every=9, keep_last=5, micro_batch_size=2)
    config.data.num_workers, config.data.prefetch_steps, config.threads = 9, 9, 1
    config.logging.wandb.project, config.resume = "other", "auto"
    assert find_checkpoint(config).step == 12


def test_resume_never_and_from_a_path(tmp_path):
    config = make_config(tmp_path)
    config.resume = "never"
    assert find_checkpoint(config) is None
    _train(make_config(tmp_path))
    with pytest.raises(ConfigError, match="resume=never"):
        find_checkpoint(config)
    config.resume = str(tmp_path / "checkpoints" / "step-000008")
    assert find_checkpoint(config).step == 8


def _fail_after(function, written):
    """A `function` that leaves something behind and then finds the disk full."""

    def failing(*args, **keywords):
        if written:
            function(*args, **keywords)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return failing


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("stage", ["_write_tensors", "_write_rest", "_verify", "_seal", "write_manifest"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_sentence(stage, written, tmp_path, monkeypatch):
    _train(make_config(tmp_path, stop_after=4))
    monkeypatch.setattr(module, stage, _fail_after(getattr(module, stage), written))
    with pytest.raises(CheckpointError, match=r"step-000008 could not be written \(.*No space left") as caught:
        _train(make_config(tmp_path))
    assert "\n" not in str(caught.value)
    assert _names(tmp_path) == ["step-000004"]
    monkeypatch.undo()
    assert _train(make_config(tmp_path)).step == 12


def test_a_real_full_disk(tmp_path):
    """The device that is always full, instead of the file of tensors."""
    _train(make_config(tmp_path, stop_after=4))
    aside = tmp_path / "checkpoints" / ".writing-step-000008" / "tensors"
    original = module._make_folder

    def trap(folder):
        original(folder)
        aside.mkdir()
        (aside / "__0_0.distcp").symlink_to("/dev/full")

    module._make_folder = trap
    try:
        with pytest.raises(
            CheckpointError,
            match=r"could not be written \(No space left on device: .*__0_0\.distcp\); step-000004 before it is kept",
        ):
            _train(make_config(tmp_path))
    finally:
        module._make_folder = original
    assert _names(tmp_path) == ["step-000004"]


def test_a_write_that_reads_back_differently_is_refused(tmp_path, monkeypatch):
    original = module._write_tensors

    def corrupting(folder, tensors, engine):
        changed = {name: t.clone() for name, t in tensors.items()}
        changed["parameter/vision.patch.bias"][0] += 1.0
        original(folder, changed, engine)

    monkeypatch.setattr(module, "_write_tensors", corrupting)
    with pytest.raises(CheckpointError, match=r"vision\.patch\.bias reads back"):
        _train(make_config(tmp_path))


def test_a_checkpoint_holds_frozen_parameters_and_buffers(tmp_path):
    import torch.distributed.checkpoint as dcp

    model = TinyModel()
    model.vision.requires_grad_(False)
    model.register_buffer("scale", torch.ones(2))
    make_trainer(make_config(tmp_path, max_steps=1), model).train()
    stored = dcp.FileSystemReader(tmp_path / "checkpoints" / "step-000001" / "tensors").read_metadata()
    keys = set(stored.state_dict_metadata)
    assert {f"parameter/{name}" for name, _ in model.named_parameters()} | {"buffer/scale"} <= keys
    assert not any(key.startswith("optimizer/") and "/vision." in key for key in keys)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    config = make_config(tmp_path)
    _train(config)
    other = TinyModel()
    other.extra = torch.nn.Linear(2, 2)
    other.parts = lambda: {**TinyModel.parts(other), "extra": ("extra.",)}
    with pytest.raises(CheckpointError, match=r"does not fit this model.*extra"):
        make_trainer(make_config(tmp_path, stop_after=1), other).train()


def test_a_checkpoint_of_an_earlier_version_lacks_keys_at_their_default(tmp_path):
    from m4train.training.checkpoints.files import MANIFEST, write_manifest

    config = make_config(tmp_path)
    config.data.mixture.schedule = {5: {"web": 2.0}}
    _train(config)
    folder = tmp_path / "checkpoints" / "step-000012"
    state = json.loads((folder / "state.json").read_text())
    del state["config"]["trainer"]["neftune_alpha"], state["config"]["adapter"]
    del state["config"]["data"]["sources"]["web"]["weight"]
    (folder / "state.json").write_text(json.dumps(state))
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    assert find_checkpoint(config).step == 12
    config.freeze.new_rows_from = 60
    with pytest.raises(CheckpointError, match=r"new_rows_from"):
        find_checkpoint(config)


def test_a_save_during_training_holds_what_was_when_it_began(tmp_path, monkeypatch):
    """The writing waits until three more steps were made; the files are those of a save within the loop."""
    import threading

    steps, reached = [], threading.Event()
    original = module._write_tensors

    def late(folder, tensors, engine):
        if "step-000004" in str(folder):
            assert reached.wait(30)
        original(folder, tensors, engine)

    class Count(Callback):
        def on_step_end(self, trainer):
            steps.append(trainer.step)
            if trainer.step == 7:
                reached.set()

    monkeypatch.setattr(module, "_write_tensors", late)
    for name, in_background in (("alongside", True), ("within", False)):
        config = make_config(tmp_path / name, async_checkpoint=in_background, max_steps=8, keep_last=3)
        trainer = make_trainer(config, TinyModel(dropout=0.1))
        trainer.callbacks.append(Count())
        if not in_background:
            reached.set()
        trainer.train()
    stored = [_tensors(tmp_path / name / "checkpoints" / "step-000004") for name in ("alongside", "within")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    states = [
        json.loads((tmp_path / name / "checkpoints/step-000004/state.json").read_text())
        for name in ("alongside", "within")
    ]
    assert states[0]["plan"] == states[1]["plan"] == {"steps": 4}


def _tensors(folder):
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(folder / "tensors").read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in metadata.items()}
    module.read_tensors(folder / "tensors", tensors)
    return tensors


def test_a_failed_save_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_seal", _fail_after(module._seal, False))
    steps = []

    class Watch(Callback):
        def on_step_end(self, trainer):
            steps.append(trainer.step)
            if trainer._saver._thread is not None:
                trainer._saver._thread.join()

    trainer = make_trainer(make_config(tmp_path))
    trainer.callbacks.append(Watch())
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.train()
    assert steps == [1, 2, 3, 4]
