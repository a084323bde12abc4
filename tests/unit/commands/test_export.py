"""Export: what is written answers as what was trained, whatever was trained and however it is written."""

import json

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from m4train import AutoModelForImageTextToText, AutoProcessor
from m4train.commands import export as export_run
from m4train.commands.export import export_checkpoint
from m4train.config.compose import load_run_config
from m4train.errors import CheckpointError, ConfigError
from m4train.training.adapters import merge_adapters
from tests.helpers.checkpoints import export_rounding, saved_run

LORA = ["adapter=lora", "adapter.rank=4"]


def _reloaded(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


def _probe(folder):
    processor = AutoProcessor.from_pretrained(folder)
    return export_run._probe(processor)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["tiny_idefics", "tiny_idefics3", pytest.param("tiny_idefics2", marks=pytest.mark.full)]
)
def test_every_family_is_exported_by_shards_with_its_end_tokens(model, tmp_path):
    config, live = saved_run(tmp_path, model=model)
    config.export.max_shard_size = "1MB"
    done = export_checkpoint(config)
    again = _reloaded(done.folder)
    for name, parameter in live.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    largest = max(p.numel() * 4 for p in live.parameters())
    assert len(files) > 3
    assert all((done.folder / file).stat().st_size < 1_000_000 + largest for file in files)
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in live.parameters())
    processor = AutoProcessor.from_pretrained(done.folder)
    stated = json.loads((done.folder / "generation_config.json").read_text())
    assert stated["eos_token_id"] == [processor.eos_id, processor.end_of_utterance_id]
    assert json.loads((done.folder / "config.json").read_text())["torch_dtype"] == "float32"
    assert done.drift <= export_rounding(done.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["lora", "qlora", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("dora", "rslora"))]
)
def test_adapters_are_merged_one_layer_at_a_time(kind, tmp_path):
    wanted = ["adapter=lora", "adapter.rank_stabilized=true"] if kind == "rslora" else [f"adapter={kind}"]
    embeddings = ", embeddings: [embed_tokens]" if kind == "lora" else ""
    untied = ["model.architecture.tie_word_embeddings=false"] if embeddings else []
    targets = f"adapter.targets={{text: [q_proj, down_proj]{embeddings}}}"
    config, live = saved_run(tmp_path, *wanted, "adapter.rank=4", targets, "freeze=none", *untied)
    done = export_checkpoint(config)
    merge_adapters(live)
    again = _reloaded(done.folder)
    for name, parameter in live.named_parameters():
        assert torch.allclose(again.get_parameter(name), parameter, atol=1e-6), name
    with safe_open(done.folder / "model.safetensors", "pt") as stored:
        assert not [name for name in stored.keys() if "lora" in name or "absmax" in name]  # noqa: SIM118
    # The products of layers in 4 bits are computed in bf16.
    assert 0 < done.drift < export_rounding(done.folder, dtype=torch.bfloat16 if kind == "qlora" else torch.float32)


@pytest.mark.slow
def test_new_rows_are_folded_in(tmp_path):
    targets = "adapter.targets={text: [q_proj], vision: [q_proj]}"
    new = "freeze.rules=[{part: new_tokens, trainable: true}]"
    config, live = saved_run(tmp_path, *LORA, targets, "freeze.new_rows_from=400", new)
    done = export_checkpoint(config)
    merge_adapters(live)
    rows = live.model.text_model.embed_tokens
    expected = torch.cat([rows.weight, rows.additional_embedding.weight])
    again = _reloaded(done.folder)
    assert torch.equal(again.model.text_model.embed_tokens.weight, expected)
    assert done.drift <= export_rounding(done.folder)


@pytest.mark.slow
def test_bf16_halves_the_folder_and_reports_its_drift(tmp_path):
    config, _ = saved_run(tmp_path)
    whole = (export_checkpoint(config).folder / "model.safetensors").stat().st_size
    config.export.dtype = "bf16"
    done = export_checkpoint(config)
    assert (done.folder / "model.safetensors").stat().st_size < 0.52 * whole
    assert (
        json.loads((done.folder / "m4train.json").read_text())["drift"]
        == done.drift
        > 10 * export_rounding(done.folder)
    )
    assert _reloaded(done.folder).dtype is torch.bfloat16


@pytest.mark.slow
def test_an_adapter_apart_is_read_by_peft_on_transformers(tmp_path):
    base, _ = saved_run(tmp_path / "base")
    folder = export_checkpoint(base).folder
    targets = "adapter.targets={text: [q_proj], vision: [q_proj]}"
    config, live = saved_run(tmp_path / "run", *LORA, f"model.pretrained={folder}", targets, moved="trained")
    live.eval()
    config.export.adapters = "apart"
    done = export_checkpoint(config)
    assert done.drift < 1e-5
    inputs = _probe(done.folder)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    before = plain(**inputs).logits
    theirs = peft.PeftModel.from_pretrained(plain, done.folder).eval()(**inputs).logits
    with torch.no_grad():
        ours = live(**inputs).logits
    assert (theirs - ours).abs().max() <= export_rounding(folder)
    assert (theirs - before).abs().max() > 1e-2
    assert json.loads((done.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_what_adapter_modules_to_save_names_is_carried_apart(tmp_path):
    named = "adapter.modules_to_save=[lm_head, connector]"
    untied = "model.architecture.tie_word_embeddings=false"
    config, live = saved_run(tmp_path, *LORA, "adapter.targets={text: [q_proj]}", named, untied)
    config.export.adapters = "apart"
    done = export_checkpoint(config)
    stored = load_file(done.folder / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.lm_head.weight"], live.lm_head.weight)
    whole = json.loads((done.folder / "adapter_config.json").read_text())["modules_to_save"]
    assert sorted(whole) == ["lm_head", "model.connector"]
    assert done.drift < 1e-5


@pytest.mark.slow
def test_qlora_may_be_merged_into_the_original_base(tmp_path):
    base, _ = saved_run(tmp_path / "base")
    folder = export_checkpoint(base).folder
    targets = "adapter.targets={text: [q_proj]}"
    config, _ = saved_run(
        tmp_path / "run", "adapter=qlora", "freeze=none", targets, f"model.pretrained={folder}", "adapter.rank=4"
    )
    trained = _reloaded(export_checkpoint(config).folder)
    config.export.base = "original"
    original = _reloaded(export_checkpoint(config).folder)
    kept = "model.text_model.layers.0.mlp.up_proj.weight"  # quantised, not adapted
    assert torch.equal(original.get_parameter(kept), load_file(folder / "model.safetensors")[kept])
    assert not torch.equal(trained.get_parameter(kept), original.get_parameter(kept))


@pytest.mark.parametrize("damage", ["zero", "nan"])
def test_an_adapter_without_effect_or_with_nan_is_refused(damage, tmp_path):
    config, live = saved_run(tmp_path, *LORA, "adapter.targets={text: [q_proj]}")
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.0 if damage == "zero" else float("nan"))
    from m4train import build
    from tests.helpers.checkpoints import save

    save(config, live, build.build_processor(config))
    config.export.adapters = "apart"
    with pytest.raises(CheckpointError, match="lora_B" if damage == "nan" else "are all zero"):
        export_checkpoint(config)
    assert not (tmp_path / "export").exists()


def test_what_does_not_answer_like_the_checkpoint_is_not_put_in_place(tmp_path, monkeypatch):
    config, _ = saved_run(tmp_path)
    write = export_run.write_weights

    def damaging(folder, *rest):
        write(folder, *rest)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.text_model.norm.weight"] *= 1.1
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(export_run, "write_weights", damaging)
    with pytest.raises(CheckpointError, match="differ from the checkpoint's"):
        export_checkpoint(config)
    assert not (tmp_path / "export").exists()


def test_a_checkpoint_that_was_moved_away_is_exported_alone(tmp_path):
    config, live = saved_run(tmp_path / "run")
    alone = tmp_path / "elsewhere" / "step-000003"
    alone.parent.mkdir()
    (tmp_path / "run" / "checkpoints" / "step-000003").rename(alone)
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            path.unlink()
    del config
    config = load_run_config([f"resume={alone}", f"export.folder={tmp_path / 'out'}"])
    done = export_checkpoint(config)
    assert done.folder == tmp_path / "out"
    name = "model.text_model.norm.weight"
    assert torch.equal(_reloaded(done.folder).get_parameter(name), live.get_parameter(name))


def test_overrides_of_a_run_are_checked(tmp_path):
    saved_run(tmp_path)
    assert load_run_config([f"run_dir={tmp_path}", "engine=ddp", "evaluation.batch_size=3"]).engine.name == "ddp"
    with pytest.raises(ConfigError, match=r"evaluation\.batch_siz is not a configuration key"):
        load_run_config([f"run_dir={tmp_path}", "evaluation.batch_siz=3"])
    with pytest.raises(ConfigError, match="max_shard_size"):
        load_run_config([f"run_dir={tmp_path}", "export.max_shard_size=much"])
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        load_run_config([f"run_dir={tmp_path / 'nowhere'}"])


@pytest.mark.slow
def test_generation_ends_at_the_end_of_a_turn(tmp_path):
    """transformers stops at <end_of_utterance> by the exported generation_config alone."""
    config, live = saved_run(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoints" / "step-000003")
    with torch.no_grad():  # a head that says nothing else
        live.lm_head.weight.zero_()
        live.lm_head.weight[processor.end_of_utterance_id] = live.model.text_model.norm.weight.sign()
        live.model.text_model.norm.weight.abs_()
    from tests.helpers.checkpoints import save

    save(config, live, processor)
    folder = export_checkpoint(config).folder
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    model.lm_head.weight.data[processor.end_of_utterance_id] = 0.0
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
    model.lm_head.bias.data[processor.end_of_utterance_id] = 9.0
    inputs = _probe(folder)
    new = model.generate(**inputs, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :]
    assert new.tolist() == [processor.end_of_utterance_id]
