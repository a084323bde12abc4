"""Runs of Weights & Biases: opened with the keys of `logging.wandb`, and what a run directory remembers of them."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import m4train
from m4train.config import Config
from m4train.config.packages import need
from m4train.config.wandb_keys import options, said
from m4train.errors import ConfigError, without_secrets
from m4train.run_files import WANDB, origin_of
from m4train.training.checkpoints.changes import config_dict
from m4train.training.checkpoints.save import versions

TRAIN, EVALUATE, EXPORT, BENCHMARK = "train", "evaluate", "export", "benchmark"  # job types
_ID = re.compile(r"[^/\\#?%:]{1,64}")
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
_HEIGHT, _AT_MOST = 224, 8  # pixels, and images, of the picture in a cell
_COLOURS = {"trained": "#b7e4c7", "structural": "#d0d0ff", "masked": "#eeeeee"}


def remembered(run_dir: Path) -> dict[str, Any]:
    """What wandb.json holds of the training: `id`, `group`, `step` (the last one that was logged), `dir` (where W&B writes, null:
    run_dir); empty if there is none, or it is damaged."""
    try:
        held = json.loads((run_dir / WANDB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    sound = isinstance(held, dict) and isinstance(held.get("id"), str) and isinstance(held.get("step"), int)
    sound = sound and isinstance(held.get("dir", ""), (str, type(None))) and isinstance(held.get("group"), str)
    return held if sound and _ID.fullmatch(held["id"]) else {}


def remember(run_dir: Path, held: dict[str, Any]) -> None:
    """Writes wandb.json aside, and renames it."""
    aside = run_dir / f".{WANDB}"
    aside.write_text(json.dumps(held) + "\n", encoding="utf-8")
    os.replace(aside, run_dir / WANDB)


def open_run(config: Config, job: str, held: dict[str, Any]) -> Any:
    """A wandb run for training, an evaluation, an export or benchmarks of the run directory of `config`, in the group of its stages.

    `held` is what the directory remembers; training brings it up to date. The ids of the others begin with that of the training.
    Raises ConfigError for what W&B refuses.
    """
    need("wandb", "logging.trackers=wandb")
    import wandb

    run_dir, keys = Path(config.run_dir), config.logging.wandb
    run_dir.mkdir(parents=True, exist_ok=True)
    name = said(keys, "name") or config.name
    group = held.setdefault("group", _group(config))
    own = uuid.uuid4().hex[:8]
    if job == TRAIN:
        _take_id(held, said(keys, "id") or held.get("id") or own)
        held["dir"] = said(keys, "dir")
        remember(run_dir, held)
        own = held["id"]
    elif "id" in held:
        own = f"{held['id']}-{job}" if job == BENCHMARK else f"{held['id']}-{job}-{own[:4]}"
    given = options(
        keys,
        project="m4train",
        name=name if job == TRAIN else f"{name}-{job}",
        id=own,
        group=group,
        job_type=job,
        dir=str(run_dir),
        resume="allow",
    )
    try:
        run = wandb.init(**given, config=_public({**config_dict(config), "versions": versions()}))
    except (wandb.errors.Error, ValueError) as error:
        raise ConfigError(
            f"W&B refuses the run ({error}): correct logging.wandb, or choose logging=offline."
        ) from error
    if run.settings.save_code:
        run.log_code(
            str(Path(m4train.__file__).parent),
            name=f"code-{run.id}",
            include_fn=lambda path: path.endswith((".py", ".j2")),
        )
    return run


def _take_id(held: dict[str, Any], name: str) -> None:
    if held.get("id") != name:  # another run than before: it has no step yet
        held |= {"id": name, "step": -1}


def _group(config: Config) -> str:
    """The group of the run that this one's weights come from; else the name of this run."""
    start = config.model.pretrained
    origin = None if start is None else origin_of(Path(start))
    return remembered(Path(origin)).get("group", config.name) if origin else config.name


def artifact_name(config: Config, run_id: str) -> str:
    """NAME-ID: one collection for each run."""
    return _NOT_OF_A_NAME.sub("-", f"{said(config.logging.wandb, 'name') or config.name}-{run_id}")


def log_model(run: Any, config: Config, folder: Path, name: str, aliases: list[str], about: dict[str, Any]) -> None:
    """Makes a version of the artifact `name` of a folder: its files, or references to them."""
    import wandb

    artifact = wandb.Artifact(name, type="model", metadata={**about, "group": run.group})
    if config.logging.wandb.by_reference:
        artifact.add_reference(folder.resolve().as_uri())
    else:
        artifact.add_dir(str(folder))
    run.log_artifact(artifact, aliases=["latest", *aliases])


def answers_table(lines: Sequence[dict[str, Any]]) -> Any:
    """A table of answers: lines of samples.jsonl or answers.jsonl, with their pictures."""
    import wandb

    table = wandb.Table(columns=["step", "source", "key", "images", "question", "answer", "references", "score"])
    for line in lines:
        texts = (line["question"], line["answer"], " | ".join(line["references"]), line["score"])
        table.add_data(line.get("step"), line["source"], line["key"], _picture(line["images"]), *texts)
    return table


def packs_table(lines: Sequence[dict[str, Any]]) -> Any:
    """A table of the documents of the first packs: what is trained on is green, structure blue, the rest grey."""
    import wandb

    table = wandb.Table(columns=["pack", "source", "key", "tokens", "loss_tokens", "images", "masks", "problem"])
    for line in lines:
        said = wandb.Html("".join(map(_marked, line["spans"])), inject=False)
        place = (line["pack"], line["source"], line["key"], line["tokens"], line["loss_tokens"])
        table.add_data(*place, _picture(line["images"]), said, line["problem"])
    return table


def _marked(span: dict[str, Any]) -> str:
    if span["kind"] == "image":
        return f"<em>[image, {span['tokens']} tokens]</em>"
    text = html.escape(span["text"]).replace("\n", "<br>")
    return f'<span title="{span["kind"]}" style="background:{_COLOURS[span["kind"]]}">{text}</span>'


def _picture(links: Sequence[str]) -> Any:
    import wandb

    return wandb.Image(_side_by_side(links[:_AT_MOST])) if links else None


def _side_by_side(links: Sequence[str]) -> Image.Image:
    """One picture of the images that data links hold: a cell of a table shows one."""
    images = [Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) for link in links]
    for image in images:
        image.thumbnail((2 * _HEIGHT, _HEIGHT))
    strip = Image.new("RGB", (sum(image.width + 2 for image in images) - 2, max(image.height for image in images)))
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width + 2
    return strip


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the passwords that URLs of data may hold."""
    return json.loads(without_secrets(json.dumps(config)))
