"""Trackers: JSON lines, TensorBoard, and those of one's own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from m4train.config.compose import load_config
from m4train.errors import ConfigError, TrainingError
from m4train.training.callbacks import Callback, Checkpointing, default_callbacks
from m4train.training.callbacks.first_packs import FirstPacks
from m4train.training.callbacks.samples import Samples
from m4train.training.callbacks.tracker import Tracker, make_trackers, numbers
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics

SAID = {
    "source": "web",
    "key": "a",
    "question": "what?",
    "answer": "7",
    "references": ["7"],
    "score": 1.0,
    "images": [],
}


class Notes(Tracker):
    """One of one's own, as in docs/tracking.md."""

    heard: list[tuple[str, Any]] = []

    def begin(self, trainer: Any) -> None:
        self.heard.append(("begin", trainer.step))

    def log(self, metrics: dict[str, Any]) -> None:
        self.heard.append(("log", metrics["step"]))

    def on_samples(self, trainer: Any, samples: list[dict[str, Any]]) -> None:
        self.heard.append(("samples", samples[0]["answer"]))

    def on_packs(self, trainer: Any, lines: list[dict[str, Any]]) -> None:
        self.heard.append(("packs", lines))

    def on_saved(self, trainer: Any, folder: Any) -> None:
        assert (folder / "state.json").is_file()
        self.heard.append(("saved", folder.name))

    def on_failure(self, trainer: Any, error: BaseException) -> None:
        self.heard.append(("failure", str(error)))

    def finish(self) -> None:
        self.heard.append(("finish", None))


class NotOne:
    def __init__(self, config: Any) -> None:
        pass


def of(tmp_path, *names: str):
    config = make_config(tmp_path, max_steps=4, save_every=2)
    config.logging.trackers = list(names)
    return config


@pytest.mark.parametrize("in_background", [True, False])
def test_one_of_ones_own_hears_everything(tmp_path, in_background, monkeypatch):
    monkeypatch.setattr(Notes, "heard", [])
    config = of(tmp_path, f"{__name__}:Notes")
    config.trainer.async_checkpoint = in_background
    trainer = make_trainer(config, TinyModel(), answers=lambda: [SAID])
    trainer.callbacks.insert(0, Samples(4, 4))
    trainer.packs = lambda: ["packs"]
    trainer.train()
    kinds = [kind for kind, _ in Notes.heard]
    assert Notes.heard[:2] == [("begin", 0), ("packs", ["packs"])]
    assert [value for kind, value in Notes.heard if kind == "log"] == [1, 2, 3, 4]
    assert ("samples", "7") in Notes.heard
    assert [value for kind, value in Notes.heard if kind == "saved"] == ["step-000002", "step-000004"]
    assert (kinds[-1], kinds.count("finish"), kinds.count("failure")) == ("finish", 1, 0)


def test_a_failure_is_told_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(Notes, "heard", [])
    with pytest.raises(TrainingError):
        make_trainer(of(tmp_path, f"{__name__}:Notes"), TinyModel(unused=True)).train()
    assert [kind for kind, _ in Notes.heard][-2:] == ["failure", "finish"]
    assert "forgotten" in dict(Notes.heard)["failure"]


def test_a_hang_is_told_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Notes, "heard", [])
    trainer = make_trainer(of(tmp_path, f"{__name__}:Notes"), TinyModel())
    trainer.train()
    assert trainer.heart.tell is not None
    for callback in trainer.callbacks:
        callback.on_start(trainer)
    Notes.heard.clear()
    trainer.heart._tell("rank 0: in fetch of step 3")
    assert [kind for kind, _ in Notes.heard] == ["failure", "finish"]
    assert "rank 0: in fetch of step 3" in dict(Notes.heard)["failure"]


def test_only_rank_0_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(Notes, "heard", [])
    trainer = make_trainer(of(tmp_path, f"{__name__}:Notes"), TinyModel())
    trainer.engine.rank = 1
    (notes,) = (callback for callback in trainer.callbacks if isinstance(callback, Notes))
    notes.on_start(trainer)
    notes.on_metrics(trainer, {"step": 1})
    notes.close()
    assert not Notes.heard


def test_the_packs_are_shown_once(tmp_path):
    shown = []

    class Shown(Callback):
        def on_packs(self, trainer: Any, lines: list[dict[str, Any]]) -> None:
            shown.append(lines)

    for _ in range(2):
        trainer = make_trainer(
            make_config(tmp_path, max_steps=4, stop_after=2),
            TinyModel(),
            callbacks=[Shown(), FirstPacks(), Checkpointing(2)],
        )
        trainer.packs = lambda: [{"pack": 0}]
        trainer.train()
    assert shown == [[{"pack": 0}]]
    config = make_config(tmp_path)
    config.logging.first_packs = 0
    assert "FirstPacks" not in [type(callback).__name__ for callback in default_callbacks(config)]


def test_json_lines_are_always_there_and_once(tmp_path):
    for names in ([], ["jsonl"]):
        assert [type(tracker).__name__ for tracker in make_trackers(of(tmp_path, *names))] == ["Jsonl"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere:Tracker", "No module named 'nowhere'"),
        (f"{__name__}:Nobody", "has no attribute 'Nobody'"),
        (f"{__name__}:NotOne", "is not a Tracker"),
    ],
)
def test_one_that_cannot_be_made_is_refused(name, why, tmp_path):
    with pytest.raises(ConfigError, match=why):
        make_trackers(of(tmp_path, name))


def test_texts_are_no_curves():
    assert numbers({"step": 1, "loss": 2.0, "data_hash": "ab"}) == {"step": 1, "loss": 2.0}


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = of(tmp_path, "tensorboard")

    class Kill(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if trainer.step == 3:
                raise TrainingError("killed")

    first = make_trainer(config, TinyModel(), answers=lambda: [SAID])
    first.callbacks += [Kill()]
    with pytest.raises(TrainingError):
        first.train()
    again = make_trainer(config, TinyModel(), answers=lambda: [SAID])
    again.callbacks.insert(0, Samples(4, 4))
    again.train()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    events = found.Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert [event.value for event in events] == pytest.approx([line["loss"] for line in read_metrics(tmp_path)])
    assert "data_hash" not in found.Tags()["scalars"]
    assert any("samples/web/0" in tag for tag in found.Tags()["tensors"])


def test_a_tracker_that_a_stored_configuration_names_is_not_run(tmp_path):
    from m4train.config.compose import load_run_config, save_config

    config = load_config(
        ["experiment=digits_sft", f"logging.trackers=[wandb,'{__name__}:Notes']", f"run_dir={tmp_path}"]
    )
    save_config(config, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"names code to run, logging\.trackers"):
        load_run_config([f"run_dir={tmp_path}"])
    own = f"logging.trackers=[wandb,'{__name__}:Notes']"
    assert load_run_config([f"run_dir={tmp_path}", own]).logging.trackers[1].endswith("Notes")
    assert "tests" in sys.modules


def test_the_tracker_of_the_docs_page_works(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "tracking.md").read_text(encoding="utf-8")
    code = re.search(r'```python title="own/tracking.py"\n(.*?)```', page, re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    config = make_config(tmp_path, max_steps=2)
    make_trainer(config, TinyModel(), callbacks=[names["Notes"](config)]).train()
    assert len((tmp_path / "notes.txt").read_text().splitlines()) == 2
