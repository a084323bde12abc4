"""`m4train export`: a checkpoint of any engine as a Hugging Face folder, written file by file and verified."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import m4train
from m4train import build
from m4train.commands import export_check
from m4train.commands.export_adapter import BASE, has_rows_of, is_model_folder, peft_model, write_adapter
from m4train.commands.export_check import Rendered, rendered_by_transformers
from m4train.commands.model_card import write_card
from m4train.commands.push import check_push, push
from m4train.config import Config
from m4train.config.checks import size_in_bytes
from m4train.config.wandb_keys import uses_wandb
from m4train.durable import remove
from m4train.errors import CheckpointError, ConfigError
from m4train.families import FAMILIES
from m4train.hub import WEIGHT_FILES, model_folder
from m4train.models.pretrained import TensorFolder
from m4train.models.weight_files import write_weights
from m4train.restore import hub_weights, restore_model, restore_processor
from m4train.run_files import EXPORT, LINEAGE_FILE
from m4train.terminal import stage
from m4train.training import wandb_runs
from m4train.training.checkpoints.changes import MODEL_KEYS
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.checkpoints.state import Checkpoint

# Largest difference of logits between the checkpoint and what was exported, relative to the largest logit: what fp32
# arithmetic in another order leaves, and what rounding every weight to bf16 (or a base stored in 4 bits) can leave.
EXACT, ROUNDED = 1e-4, 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the step, the folder, the drift of its logits, what transformers makes of it (None if that was not
    verified), and the address it was pushed to."""

    step: int
    folder: Path
    drift: float | None
    rendered: Rendered | None = None
    pushed: str | None = None


def export(config: Config, push_to: str | None = None, private: bool = False) -> int:
    """Does what `exported` says, and prints it; returns 0."""
    done = exported(config, push_to, private)
    checked = "not verified" if done.drift is None else f"largest logit difference after reloading {done.drift:.1e}"
    print(f"exported step {done.step} to {done.folder} ({checked})")
    if done.rendered is not None:
        print(*done.rendered.lines(), sep="\n")
    if done.pushed is not None:
        print(f"pushed to {done.pushed}", flush=True)
    return 0


def exported(config: Config, push_to: str | None = None, private: bool = False) -> Exported:
    """Writes export.folder from the newest checkpoint of run_dir, or from the one `resume` names, and pushes it to the Hub if
    `push_to` names a repository."""
    if private and push_to is None:
        raise ConfigError("--private goes with --push-to ORG/NAME: nothing is pushed without it.")
    if push_to is not None:
        check_push(push_to)
    stage("exporting the checkpoint")
    done = export_checkpoint(config, push_to)
    if uses_wandb(config.logging) and config.logging.wandb.artifacts != "none":
        _log_artifact(config, done)
    if push_to is not None:
        stage(f"pushing to {push_to}")
        done = replace(done, pushed=str(push(done.folder, push_to, private, f"Step {done.step} of {config.name}")))
    stage(None)
    return done


def _log_artifact(config: Config, done: Exported) -> None:
    """The folder as a version of NAME-ID-export, from a W&B run of its own in the group of the training."""
    held = wandb_runs.remembered(Path(config.run_dir))
    run = wandb_runs.open_run(config, wandb_runs.EXPORT, held)
    name = f"{wandb_runs.artifact_name(config, held.get('id', run.id))}-export"
    wandb_runs.log_model(
        run, config, done.folder, name, [f"step-{done.step:06d}"], {"step": done.step, "drift": done.drift}
    )
    run.finish()


def export_checkpoint(config: Config, push_to: str | None = None) -> Exported:
    """Writes the folder aside, verifies it and replaces an earlier one by it; with a model card for `push_to`, if it is given.

    Raises CheckpointError if there is no checkpoint, or if what was written does not answer as the checkpoint does.
    """
    checkpoint = find_checkpoint(config, among=MODEL_KEYS)
    if checkpoint is None:
        raise CheckpointError(f"{config.run_dir} holds no checkpoint: train first, or set run_dir to a trained run.")
    target = Path(config.export.folder or Path(config.run_dir) / EXPORT).resolve()  # what a link points to is replaced
    _check_target(target)
    unfinished = target.with_name(f".{target.name}.unfinished")
    remove(unfinished)
    unfinished.mkdir(parents=True)
    processor = restore_processor(config, checkpoint.folder)
    processor.save_pretrained(unfinished)
    if config.export.adapters == "apart":
        write_adapter(config, checkpoint, unfinished, _base_name(config, checkpoint, unfinished, target, processor))
    else:
        _write_model(config, checkpoint, unfinished)
    drift = _drift(config, checkpoint, unfinished, processor) if config.export.verify else None
    rendered = (
        _rendered(config, checkpoint, unfinished, processor)
        if config.export.verify and export_check.installed()
        else None
    )
    _describe(config, checkpoint, unfinished, drift, rendered)
    if config.export.model_card or push_to is not None:
        write_card(config, checkpoint, unfinished, push_to or str(target), _stated_base(config, unfinished))
    earlier = target.with_name(f".{target.name}.earlier")
    remove(earlier)
    if target.exists():
        target.rename(earlier)
    unfinished.rename(target)
    remove(earlier)
    return Exported(checkpoint.step, target, drift, rendered)


def _check_target(target: Path) -> None:
    """Raises ConfigError for a place that holds something else than an export, which would be lost."""
    if target.is_dir():
        held = sorted(path.name for path in target.iterdir())
        if held and LINEAGE_FILE not in held:
            raise ConfigError(
                f"export.folder {target} holds {', '.join(held[:3])}{' and more' if len(held) > 3 else ''}, which no export wrote: "
                "choose another folder, which is made."
            )
    elif target.exists():
        raise ConfigError(f"export.folder {target} is a file: choose a folder, which is made.")


def _base_name(config: Config, checkpoint: Checkpoint, folder: Path, target: Path, processor: Any) -> str:
    """The model an adapter names as its base: model.pretrained if transformers can load it, else one that is written with it.

    A run made from scratch has no such model, one that began with another run's checkpoint none in that form, and one that
    added tokens none with rows for them.
    """
    base = config.model.pretrained
    kind = FAMILIES[config.model.family].model_class.__name__
    if base is None or not is_model_folder(base, kind) or not has_rows_of(base, config, checkpoint):
        processor.save_pretrained(folder / BASE)
        _write_model(config, checkpoint, folder / BASE, adapted=False)
        return str((target / BASE).resolve())
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def _write_model(config: Config, checkpoint: Checkpoint, folder: Path, adapted: bool = True) -> None:
    """config.json, generation_config.json and the weights, adapters merged (or left out), rows of new tokens joined."""
    original = _original(config) if adapted else None
    model, shapes, read = hub_weights(config, checkpoint.folder, original, adapted)
    dtype = export_dtype(config)
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.extra["architectures"] = [type(model).__name__]
    model.config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(model.generation_config, indent=2) + "\n")
    limit = size_in_bytes("export.max_shard_size", config.export.max_shard_size)
    write_weights(folder, shapes, dtype, limit, read)


def _original(config: Config) -> Callable[[str], Tensor] | None:
    """The weights adapters are merged into, if those are not the ones they were trained on."""
    if config.export.base == "trained":
        return None
    if config.adapter.kind == "none" or config.model.pretrained is None:
        raise ConfigError(
            "export.base is original, but this run has no adapter on a model.pretrained; use export.base=trained."
        )
    stored = TensorFolder(model_folder(config.model.pretrained, WEIGHT_FILES))
    return lambda name: stored[name]


def export_dtype(config: Config) -> torch.dtype:
    """The dtype weights are exported in: export.dtype, else that of the model training began with, else fp32."""
    if config.export.dtype is not None:
        return DTYPES[config.export.dtype]
    if config.model.pretrained is None:
        return torch.float32
    try:
        began = build.pretrained_architecture(config).dtype
    except ConfigError:  # the folder is gone; nothing else says what it was
        began = None
    return getattr(torch, began) if began else torch.float32


def _drift(config: Config, checkpoint: Checkpoint, folder: Path, processor: Any) -> float:
    """How far the logits of what was written are from those of the checkpoint, on an image and a question.

    One of the two models is in memory at a time. Raises CheckpointError if the drift is more than rounding.
    """
    stage("comparing the logits of checkpoint and export")
    probe = _probe(processor)
    live = _logits(restore_model(config, checkpoint.folder), probe)
    gc.collect()  # modules refer to each other in circles, and would stay in memory next to those that are loaded next
    if config.export.adapters == "apart":
        again = peft_model(config, folder)
    else:
        again = FAMILIES[config.model.family].model_class.from_pretrained(folder, dtype=torch.float32)
    logits = _logits(again, _probe(type(processor).from_pretrained(folder)))
    drift = (logits - live).abs().max().item()
    allowed = _tolerance(config) * max(1.0, live.abs().max().item())
    if not drift <= allowed:
        raise CheckpointError(
            f"The exported model's logits differ from the checkpoint's by {drift:.1e}, more than {allowed:.0e}; "
            "the folder was not put in place."
        )
    return drift


def _rendered(config: Config, checkpoint: Checkpoint, folder: Path, processor: Any) -> Rendered:
    """What transformers makes of the folder, against the checkpoint's model."""
    stage("asking transformers")
    base = str(folder)
    if (stated := _stated_base(config, folder)) is not None:
        base = str(folder / BASE) if (folder / BASE).is_dir() else stated
    gc.collect()
    return rendered_by_transformers(folder, base, processor, restore_model(config, checkpoint.folder))


def _stated_base(config: Config, folder: Path) -> str | None:
    """The model that an adapter apart needs; None if the folder holds a whole one."""
    if config.export.adapters != "apart":
        return None
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]


def _tolerance(config: Config) -> float:
    """How far exported logits may be from the checkpoint's, relative to the largest."""
    if config.export.base == "original":
        return sys.float_info.max  # another base than was trained on: reported, and refused only if it is not a number
    return EXACT if export_dtype(config) is torch.float32 and config.adapter.kind != "qlora" else ROUNDED


def _probe(processor: Any) -> dict[str, Tensor]:
    """Inputs with an image and text, to compare two forms of a model with."""
    gradient = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    question = [{"type": "image"}, {"type": "text", "text": "What does this image show?"}]
    return processor.apply_chat_template(
        [[{"role": "user", "content": question}]],
        images=[[gradient]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits.float()


def _describe(
    config: Config, checkpoint: Checkpoint, folder: Path, drift: float | None, rendered: Rendered | None
) -> None:
    """m4train.json: where the folder came from."""
    origin = {
        "run_dir": str(config.run_dir),
        "step": checkpoint.step,
        "base": config.model.pretrained,
        "dtype": str(export_dtype(config)).removeprefix("torch."),
        "adapters": config.export.adapters if config.adapter.kind != "none" else None,
        "drift": drift,
        "transformers": None if rendered is None else asdict(rendered),
        "versions": checkpoint.state["versions"],
        "m4train": m4train.__version__,
    }
    (folder / LINEAGE_FILE).write_text(json.dumps(origin, indent=1) + "\n")
