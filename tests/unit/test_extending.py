"""What is added to the program is added where the documents say, and nowhere else."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m4train import build, families, optimizers
from m4train.cli import main
from m4train.config import SourceConfig, compose
from m4train.config.compose import load_config, resource_folder
from m4train.contracts import require_members
from m4train.data.sources.registry import FORMATS
from m4train.data.sources.tar import CanonicalTar
from m4train.errors import ConfigError
from m4train.evaluation.metrics import load_metric
from m4train.models.auto import AutoModelForImageTextToText
from m4train.processing.auto import AutoProcessor
from m4train.processing.protocol import SampleProcessor
from m4train.training.callbacks.base import Callback
from m4train.training.model_protocol import TrainableModel
from tests.helpers.training import make_config, make_trainer, read_metrics

MODULE = """
from dataclasses import dataclass
from typing import ClassVar

from m4train.models.idefics3 import Idefics3ForConditionalGeneration, Idefics3Model
from m4train.models.model_configs import Idefics3Config
from m4train.processing.idefics3 import Idefics3Processor
from m4train.processing.idefics3_images import Idefics3ImageProcessor


@dataclass(kw_only=True)
class ToyConfig(Idefics3Config):
    model_type: ClassVar[str] = "toy"
    loudness: float = 1.0


class ToyModel(Idefics3Model):
    config_class = ToyConfig


class ToyForSpeech(Idefics3ForConditionalGeneration):
    config_class = ToyConfig
    model_class = ToyModel

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        if getattr(output, "logits", None) is not None:
            output.logits = output.logits * self.config.loudness
        return output


class ToyImageProcessor(Idefics3ImageProcessor):
    pass


class ToyProcessor(Idefics3Processor):
    image_processor_class = ToyImageProcessor
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A family of its own: a module, a row, and a YAML in a copy of conf/."""
    (tmp_path / "toy_family.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    row = families.Family("toy", "Toy", "ForSpeech", *["toy_family"] * 3, "frames", "toy_family")
    monkeypatch.setitem(families.FAMILIES, "toy", row)
    conf = tmp_path / "conf"
    shutil.copytree(resource_folder("conf"), conf)
    tiny = (conf / "model" / "tiny_idefics3.yaml").read_text()
    (conf / "model" / "tiny_toy.yaml").write_text(
        tiny.replace("family: idefics3", "family: toy").replace("architecture:", "architecture:\n  loudness: 2.0")
    )
    monkeypatch.setattr(compose, "resource_folder", lambda name: tmp_path / name)
    yield tmp_path
    sys.modules.pop("toy_family", None)


def test_a_family_is_a_module_a_row_and_a_yaml(toy: Path, digits_root: Path, capsys: Any) -> None:
    run = toy / "run"
    arguments = [
        "experiment=digits_pretrain",
        "model=tiny_toy",
        f"data.root={digits_root}",
        f"run_dir={run}",
        "trainer.max_steps=2",
        "trainer.eval_every=0",
        "trainer.global_batch_size=1",
        "trainer.micro_batch_size=1",
        "schedule.warmup_steps=0",
        "data.sequence_length=256",
        "data.num_workers=0",
        "logging=none",
    ]
    assert main(["train", *arguments]) == 0
    assert main(["export", f"run_dir={run}"]) == 0, capsys.readouterr().err
    model: Any = AutoModelForImageTextToText.from_pretrained(run / "export")
    processor = AutoProcessor.from_pretrained(run / "export")
    assert type(model).__name__ == "ToyForSpeech"
    assert type(processor).__name__ == "ToyProcessor"
    assert model.config.loudness == 2.0
    config = load_config(
        [*arguments[2:], "experiment=digits_sft", "model=tiny_toy", f"model.pretrained={run / 'export'}"]
    )
    again: Any = build.build_model(config, build.build_processor(config))
    assert torch.equal(
        model.state_dict()["model.text_model.norm.weight"], again.state_dict()["model.text_model.norm.weight"]
    )
    import m4train

    assert m4train.ToyProcessor is type(processor)
    assert "ToyForSpeech" in dir(m4train)


def test_a_model_or_processor_that_lacks_something_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"The model Linear lacks attention_kernels, blocks, flops, parts"):
        require_members(torch.nn.Linear(2, 2), TrainableModel, "The model")
    with pytest.raises(ConfigError, match=r"The processor object lacks at_detail, .*encode_document, .*tokens_for"):
        require_members(object(), SampleProcessor, "The processor")


def plain_sgd(groups: list[dict], config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)


def test_an_optimizer_is_a_row_and_a_function(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", optimizers.OptimizerKind(f"{__name__}:plain_sgd"))
    assert load_config(["experiment=digits_pretrain", "optimizer.name=sgd"]).optimizer.name == "sgd"
    for stop in (6, 12):
        config = make_config(tmp_path, max_steps=12, stop_after=6)
        config.optimizer.name, config.optimizer.lr = "sgd", 0.1
        trainer = make_trainer(config)
        assert trainer.train().step == stop
        assert isinstance(trainer.engine.optimizer, torch.optim.SGD)
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert losses[-1] < losses[0]


def test_a_format_is_a_class_and_a_line(tmp_path: Path, monkeypatch: Any) -> None:
    from tests.helpers.data import data_config, documents, write_shards

    class Reversed(CanonicalTar):
        name = "reversed"

        def compose(self, texts: Any, images: Any) -> Any:
            sample = super().compose(texts, images)
            items = [{"text": item["text"][::-1]} if "text" in item else item for item in sample.items]
            return dataclasses.replace(sample, items=items)

    monkeypatch.setitem(FORMATS, "reversed", Reversed)
    write_shards(tmp_path, documents(2))
    from m4train.data.source import build_sources
    from tests.helpers.data import FakeProcessor

    path = str(tmp_path / "*.tar")
    configs = {name: SourceConfig(path=path, format=name) for name in ("canonical", "reversed")}
    plain, turned = build_sources(configs, data_config(), FakeProcessor())
    texts = [[item["text"] for item in source.read(0).items if "text" in item] for source in (plain, turned)]
    assert texts[1] == [text[::-1] for text in texts[0]]


def test_a_freeze_policy_is_a_yaml(toy: Path) -> None:
    (toy / "conf" / "freeze" / "norms_only.yaml").write_text(
        "rules:\n  - {trainable: false}\n  - {module_types: ['*Norm'], trainable: true}\n"
    )
    config = load_config(["experiment=digits_pretrain", "freeze=norms_only"])
    assert [rule.trainable for rule in config.freeze.rules] == [False, True]


def test_a_callback_is_a_class_in_the_list(tmp_path: Path) -> None:
    class Loudest(Callback):
        def __init__(self) -> None:
            self.highest = 0.0

        def on_metrics(self, trainer: Any, metrics: dict[str, Any]) -> None:
            self.highest = max(self.highest, metrics["loss"])

        def state(self) -> dict[str, Any]:
            return {"highest": self.highest}

        def load(self, state: dict[str, Any]) -> None:
            self.highest = state.get("highest", 0.0)

    from m4train.training.callbacks import default_callbacks

    seen = []
    for steps in (4, 8):
        config = make_config(tmp_path, max_steps=8, stop_after=4, save_every=4)
        callback = Loudest()
        make_trainer(config, callbacks=[callback, *default_callbacks(config)]).train()
        seen.append(callback.highest)
        assert len(read_metrics(tmp_path)) == steps
    assert seen[1] >= seen[0] == max(row["loss"] for row in read_metrics(tmp_path)[:4])


def share_of_vowels(answer: str, references: Any) -> float:
    return sum(letter in "aeiou" for letter in answer) / max(1, len(answer))


def test_a_metric_is_a_function() -> None:
    assert load_metric(f"{__name__}:share_of_vowels")("aab", ["x"]) == pytest.approx(2 / 3)
