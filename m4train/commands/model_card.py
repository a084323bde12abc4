"""README.md of an exported folder: what a model was trained on, how, how well it does, and how it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import m4train
from m4train.config import Config
from m4train.data.storage.files import is_remote
from m4train.errors import without_secrets
from m4train.inspection.charts import Line, line_drawing
from m4train.json_lines import OF_A_STEP, read_lines
from m4train.run_files import EVALUATION, METRICS, shown_score
from m4train.training.checkpoints.state import Checkpoint

CARD, CURVES = "README.md", "curves.svg"
_STYLE = "<style>text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}</style>"
_USE = """```python
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
{imports}
processor = AutoProcessor.from_pretrained("{name}")
model = AutoModelForImageTextToText.from_pretrained("{base}", dtype=torch.bfloat16)
{load}messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What does this image show?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=[Image.open("image.jpg")], return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True)[0])
```"""


def write_card(config: Config, checkpoint: Checkpoint, folder: Path, name: str, base: str | None) -> None:
    """Writes the card, and the curves that it shows if the run has logged any. `name` is what the folder will be called by its
    users; `base` the model that an adapter needs, None if the folder is the whole model."""
    curves = _curves(Path(config.run_dir), checkpoint.step)
    if curves:
        (folder / CURVES).write_text(curves, encoding="utf-8")
    parts = [
        _front(config, base),
        f"# {config.name}\n\n{_summary(config, checkpoint)}",
        f"## Data\n\n{_data(config)}",
        f"## Settings\n\n{_table(('setting', 'value'), _settings(config, checkpoint))}",
        f"## Curves\n\n![loss over the steps]({CURVES})" if curves else "",
        _scores(Path(config.run_dir)),
        f"## Licence\n\n{_licence(config)}",
        f"## Use\n\n{_use(name, base)}",
    ]
    (folder / CARD).write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _front(config: Config, base: str | None) -> str:
    """What the Hub reads of a card."""
    began = config.model.pretrained
    lines = [
        f"library_name: {'transformers' if base is None else 'peft'}",
        "pipeline_tag: image-text-to-text",
        "tags: [m4train]",
    ]
    if began is not None and began.count("/") == 1 and not Path(began).exists():
        lines.append(f"base_model: {began.partition('@')[0]}")
    if config.export.license is not None:
        lines.append(f"license: {config.export.license}")
    return "\n".join(["---", *lines, "---"])


def _summary(config: Config, checkpoint: Checkpoint) -> str:
    adapted = "" if config.adapter.kind == "none" else f", {config.adapter.kind} adapters"
    packs, length = config.trainer.global_batch_size, config.data.sequence_length
    return (
        f"A model of the {config.model.family} family. Trained for {checkpoint.step:,} optimizer steps of {packs} packs of up to "
        f"{length:,} tokens with m4train {m4train.__version__}{adapted}."
    )


def _data(config: Config) -> str:
    rows = [(name, _shown_path(source.path), f"{source.weight:g}") for name, source in config.data.sources.items()]
    held = [(f"{name} (held out)", _shown_path(source.path), "") for name, source in config.data.validation.items()]
    return _table(("source", "path", "weight"), [*rows, *held])


def _shown_path(path: str) -> str:
    """A path that means something elsewhere: of a local one no more than its last two names."""
    return without_secrets(path) if is_remote(path) else "/".join(Path(path).parts[-2:])


def _settings(config: Config, checkpoint: Checkpoint) -> list[tuple[str, Any]]:
    keys = {
        "seed": config.seed,
        "optimizer": config.optimizer.name,
        "optimizer.lr": config.optimizer.lr,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "schedule": config.schedule.name,
        "trainer.max_steps": config.trainer.max_steps,
        "trainer.global_batch_size": f"{config.trainer.global_batch_size} packs",
        "data.sequence_length": config.data.sequence_length,
        "trainer.precision": config.trainer.precision,
        "engine": config.engine.name,
        "adapter": config.adapter.kind,
    }
    if config.adapter.kind != "none":
        keys |= {"adapter.rank": config.adapter.rank, "adapter.alpha": config.adapter.alpha}
    versions = {name: value for name, value in checkpoint.state.get("versions", {}).items() if name != "revision"}
    return [*keys.items(), *versions.items()]


def _scores(run_dir: Path) -> str:
    path = run_dir / EVALUATION
    if not path.is_file():
        return ""
    rows = []
    for source, found in json.loads(path.read_text(encoding="utf-8")).items():
        loss = f"{found['loss']:.4f}" if "loss" in found else ""
        score = f"{shown_score(found)} ({found['metric']} of {found['count']})" if "metric" in found else ""
        rows.append((source, loss, score))
    return f"## Scores\n\nOn held-out data.\n\n{_table(('source', 'loss', 'score'), rows)}"


def _licence(config: Config) -> str:
    if config.export.license is not None:
        return f"{config.export.license}. The licences of the data and of the model it began with hold as well."
    return "None was chosen for these weights; those of the data and of the model it began with hold."


def _use(name: str, base: str | None) -> str:
    if base is None:
        return _USE.format(name=name, base=name, imports="", load="")
    return _USE.format(
        name=name,
        base=base,
        imports="from peft import PeftModel\n",
        load=f'model = PeftModel.from_pretrained(model, "{name}")\n',
    )


def _curves(run_dir: Path, last: int) -> str:
    rows = [row for row in read_lines(run_dir / METRICS, OF_A_STEP) if row["step"] <= last]
    lines = [
        Line(label, [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))], dots)
        for label, key, dots in (("training", "loss", False), ("held-out", "eval/loss", True))
    ]
    return line_drawing(lines, "step", "loss", _STYLE)


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    return "\n".join(_lines(head, rows))


def _lines(head: tuple[str, ...], rows: list[tuple]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(str(value).replace('|', chr(92) + '|') for value in row)} |"
