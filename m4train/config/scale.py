"""scale=tiny: the same recipe at a size that a laptop trains, to rehearse everything but the learning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from m4train.config.schema import Config

_MOST: dict[str, int] = {  # keys and what tiny runs have of them at most
    "data.sequence_length": 512,
    "data.images_per_pack": 32,
    "data.packing_pool": 16,
    "trainer.max_steps": 4,
    "trainer.global_batch_size": 4,
    "trainer.micro_batch_size": 2,
    "trainer.save_every": 2,
    "trainer.eval_every": 2,
    "schedule.warmup_steps": 1,
    "adapter.rank": 4,
    "freeze.new_rows_from": 64,
}
_TOKENIZER = Path(__file__).parents[1] / "processing" / "tiny_tokenizer"  # 2,048 entries, of English text and code
_FRAME = 32  # pixels of a side of the tiny models' frames


def scale_down(config: Config, given: Sequence[str], conf: Path) -> None:
    """Makes a configuration with scale=tiny small, except for the keys that are `given`: a tiny model of the same family from random
    weights, short and few packs, few steps; data, mixture, freezing, adapters, optimizer and schedule stay. `conf` holds the tiny models."""
    if config.scale != "tiny":
        return
    if "model.pretrained" not in given:
        _scale_model(config, given, conf)
    else:  # a tiny model, whose folder says everything else
        config.model.architecture, config.model.processor, config.model.tokenizer = {}, _cut(config), None
    for key, most in _MOST.items():
        group, _, name = key.partition(".")
        value = getattr(getattr(config, group), name)
        if key not in given and isinstance(value, int | float) and value > most:  # `epoch` stays
            setattr(getattr(config, group), name, most)


def _scale_model(config: Config, given: Sequence[str], conf: Path) -> None:
    model = config.model
    own = conf / "model" / f"tiny_{model.family}.yaml"
    tiny: Any = OmegaConf.load(own if own.is_file() else conf / "model" / "tiny_idefics3.yaml")
    model.architecture, model.processor = _plain(tiny.architecture), {**_plain(tiny.processor), **_cut(config)}
    config.optimizer.start = "fresh"
    model.pretrained = model.vision_pretrained = model.text_pretrained = None
    model.tokenizer = model.tokenizer or f"{config.data.root}/tokenizer"
    made = config.data.prepare is not None or "model.tokenizer" in given  # with the data, or by whom it is named
    if not made and not (Path(model.tokenizer) / "tokenizer.json").is_file():
        model.tokenizer = str(_TOKENIZER)


def _cut(config: Config) -> dict[str, Any]:
    """The settings by which tiny images are cut into as many tiles as the recipe's; none if it does not say."""
    own, drawn = config.model.processor, []
    for source in config.data.sources.values():
        drawn += [*source.images.tiles] if source.images.enlarge else [2, *source.images.tiles]
    if config.model.family == "idefics2":
        split = own.get("do_image_splitting", max(drawn) > 1 if drawn else None)
        return {} if split is None else {"do_image_splitting": split}
    longest, frame = (own.get(key, {}).get("longest_edge") for key in ("size", "max_image_size"))
    tiles = longest // frame if longest and frame else max(drawn, default=0)
    return {"do_image_splitting": tiles > 1, "size": {"longest_edge": tiles * _FRAME}} if tiles else {}


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)
