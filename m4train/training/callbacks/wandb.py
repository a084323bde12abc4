"""Weights & Biases, offline or online; a resumed run goes on in the same W&B run."""

from __future__ import annotations

import base64
import io
import json
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from m4train.config import Config
from m4train.config.packages import need
from m4train.errors import without_secrets
from m4train.run_files import WANDB_ID
from m4train.training.callbacks.base import Callback
from m4train.training.checkpoints.changes import config_dict
from m4train.training.checkpoints.save import versions

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer, TrainResult


class Wandb(Callback):
    """Logs on rank 0 in `mode` offline or online, as one of the runs of `group`."""

    def __init__(self, mode: str, project: str, group: str | None = None) -> None:
        need("wandb", f"logging.wandb={mode}")
        self.mode, self.project, self.group = mode, project, group
        self._run: Any = None
        self._failed = True  # until the run comes to a regular end
        self._id: str | None = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.engine.rank != 0:
            return
        import wandb

        mode: Any = self.mode
        trainer.run_dir.mkdir(parents=True, exist_ok=True)
        id_file = trainer.run_dir / WANDB_ID
        if trainer.resume is not None and trainer.resume.departs:
            self._id = None  # that of another run, or of the branch that was set aside
        held = _held_id(trainer.run_dir)
        if not held:
            held = self._id or uuid.uuid4().hex[:8]
            id_file.write_text(held, encoding="utf-8")
        self._id = held
        self._run = wandb.init(
            project=self.project,
            group=self.group,
            name=trainer.config.name,
            id=self._id,
            dir=trainer.run_dir,
            mode=mode,
            resume="allow",
            config=_public({**config_dict(trainer.config), "versions": versions()}),
        )
        self._run.define_metric("*", step_metric="step")

    def on_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log(metrics)

    def on_samples(self, trainer: Trainer, samples: list[dict[str, Any]]) -> None:
        if self._run is None:
            return
        import wandb

        table = wandb.Table(columns=["step", "source", "images", "question", "answer", "references", "score"])
        for line in samples:
            images = wandb.Image(_side_by_side(line["images"])) if line["images"] else None
            said = (line["question"], line["answer"], " | ".join(line["references"]), line["score"])
            table.add_data(line["step"], line["source"], images, *said)
        self._run.log({"samples": table, "step": trainer.step})

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        if self._run is not None:
            self._run.summary["stopped_by"] = result.stopped_by
            self._failed = False

    def state(self) -> dict[str, Any]:
        return {"id": self._id} if self._id else {}

    def load(self, state: dict[str, Any]) -> None:
        self._id = state.get("id")

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(self._failed))
            self._run = None


def _held_id(run_dir: Path) -> str:
    """The id of the W&B run of a run; empty if it is missing or damaged."""
    path = run_dir / WANDB_ID
    held = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    return held if re.fullmatch(r"[A-Za-z0-9_-]+", held) else ""


def post(config: Config, run_dir: Path, metrics: dict[str, Any]) -> None:
    """Adds metrics, `step` among them, to the W&B run of a run from another process, also while it goes on. Without its id nothing
    is added."""
    need("wandb", f"logging.wandb={config.logging.wandb}")
    import wandb

    if not (held := _held_id(run_dir)):
        print(f"{run_dir / WANDB_ID} names no W&B run: scores are in {run_dir} only.", flush=True)
        return
    online = config.logging.wandb == "online"
    shared = wandb.Settings(mode="shared", x_primary=False, x_label="evaluation") if online else None
    how: Any = {"settings": shared} if online else {"mode": "offline"}
    run = wandb.init(project=config.logging.project, id=held, dir=run_dir, resume="allow", **how)
    run.define_metric("*", step_metric="step")
    run.log(metrics)
    run.finish()


def _side_by_side(links: list[str]) -> Image.Image:
    """One picture of the images that data links hold: a cell of a table shows one."""
    images = [Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) for link in links]
    strip = Image.new("RGB", (sum(image.width + 2 for image in images) - 2, max(image.height for image in images)))
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width + 2
    return strip


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the passwords that URLs of data may hold."""
    return json.loads(without_secrets(json.dumps(config)))
