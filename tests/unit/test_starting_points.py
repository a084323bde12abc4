"""Where a model may come from: another run, one of its checkpoints, two backbones; and a run that goes on with a new optimizer."""

import os

import pytest
import torch

from m4train import build
from m4train.commands.train import _set_up
from m4train.config.compose import load_config
from m4train.errors import CheckpointError, ConfigError
from m4train.training.adapters import merge_adapters
from tests.helpers.checkpoints import saved_run
from tests.helpers.processing import tokenizer_folder
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


@pytest.mark.slow
@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_a_run_starts_from_the_weights_of_another(named, tmp_path):
    targets = "adapter.targets={text: [q_proj], vision: [q_proj]}"
    _, live = saved_run(tmp_path, "adapter=lora", targets)
    merge_adapters(live)
    folder = tmp_path if named == "run" else tmp_path / "checkpoints" / "step-000003"
    config = load_config(["experiment=digits_pretrain", f"model.pretrained={folder}", f"run_dir={tmp_path / 'next'}"])
    processor = build.build_processor(config)
    model = build.build_model(config, processor)
    started = dict(model.named_parameters())
    assert started.keys() == dict(live.named_parameters()).keys()
    for name, parameter in live.named_parameters():
        assert torch.allclose(started[name], parameter, atol=1e-6), name
        assert started[name].requires_grad
    assert build.build_layout(config, processor) is not None


def test_a_damaged_checkpoint_is_no_start(tmp_path):
    saved_run(tmp_path)
    damaged = tmp_path / "checkpoints" / "step-000003" / "tensors" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    config = load_config(["experiment=digits_pretrain", f"model.pretrained={tmp_path}"])
    with pytest.raises(CheckpointError, match="bytes"):
        build.build_model(config, build.build_processor(config))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["idefics", "idefics3"])
def test_a_model_is_assembled_from_backbones(family, tmp_path):
    from tests.parity.test_models_assemble import backbone

    vision = backbone("CLIP" if family == "idefics" else "Siglip", tmp_path / "vision")
    text = backbone("Llama", tmp_path / "text", vocab_size=400)
    config = load_config(
        [
            "experiment=digits_pretrain",
            "model=backbones",
            f"model.family={family}",
            f"model.vision_pretrained={tmp_path / 'vision'}",
            f"model.text_pretrained={tmp_path / 'text'}",
            f"model.tokenizer={tokenizer_folder()}",
            *(["model.architecture.alpha_initializer=zeros"] if family == "idefics" else []),
        ]
    )
    processor = build.build_processor(config)
    model = build.build_model(config, processor)
    assert model.config.token_rows == len(processor.tokenizer) > 400
    rows = model.get_parameter(f"{model.embedding_name}.weight")
    assert torch.equal(rows[:400], text.model.embed_tokens.weight)
    key = "encoder.layers.0.mlp.fc1.weight"
    theirs = dict(vision.named_parameters())
    stored = next(theirs[name] for name in theirs if name.endswith(key))
    assert torch.equal(model.get_parameter(f"model.vision_model.{key}"), stored)
    assert build.build_layout(config, processor) is not None


def test_one_backbone_alone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.vision_pretrained and model\.text_pretrained"):
        load_config(["experiment=digits_pretrain", "model.vision_pretrained=x"])
    both = ["model.vision_pretrained=x", "model.text_pretrained=y", "model.pretrained=z"]
    with pytest.raises(ConfigError, match="set one of them to null"):
        load_config(["experiment=digits_pretrain", *both])


def _moments(trainer):
    tensors = trainer.engine.tensors()
    return sum(t.abs().sum().item() for name, t in tensors.items() if name.startswith("optimizer/exp_avg/"))


def test_a_run_may_go_on_with_a_fresh_optimizer(tmp_path):
    make_trainer(make_config(tmp_path, stop_after=6), TinyModel()).train()
    config = make_config(tmp_path)
    config.optimizer.lr, config.schedule.name, config.optimizer.name = 1e-4, "constant", "torch.optim:Adam"
    with pytest.raises(CheckpointError, match=r"optimizer\.name \(adamw then, torch\.optim:Adam now\)"):
        make_trainer(config, TinyModel())
    config.resume_optimizer = "fresh"
    trainer = make_trainer(config, TinyModel())
    seen = {}
    trainer.callbacks[-1].on_start = lambda trainer: seen.update(moments=_moments(trainer), step=trainer.step)
    trainer.config.trainer.stop_after = 2
    trainer.train()
    assert seen == {"moments": 0.0, "step": 6}
    config.trainer.stop_after = None
    again = make_trainer(config, TinyModel())  # the same command again: it keeps what it has built since
    again.callbacks[-1].on_start = lambda trainer: seen.update(moments=_moments(trainer), step=trainer.step)
    again.train()
    assert seen["step"] == 8
    assert seen["moments"] > 0
    assert [line["step"] for line in read_metrics(tmp_path)][-1] == 12


def test_deterministic_asks_torch_for_it(monkeypatch, tmp_path):
    config = make_config(tmp_path, deterministic=True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        _set_up(config)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
