"""What is added to the program is added where the documents say, and nowhere else."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from m4train import build, families, optimizers
from m4train.cli import main
from m4train.config import ENGINES, SourceConfig, compose
from m4train.config.compose import load_config, resource_folder
from m4train.contracts import require_members
from m4train.data.sources.registry import FORMATS
from m4train.errors import ConfigError
from m4train.evaluation.metrics.registry import load_metric
from m4train.evaluation.metrics.said import Said
from m4train.models.auto import AutoModelForImageTextToText
from m4train.processing.auto import AutoProcessor
from m4train.processing.protocol import SampleProcessor
from m4train.training.engines import make_engine
from m4train.training.model_protocol import TrainableModel
from tests.helpers.training import make_config, make_trainer, read_metrics

PAGE = Path(__file__).parents[2] / "docs/extending.md"


def block(title: str) -> str:
    """The code that the page shows under the name of a file."""
    (code,) = re.findall(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture
def written(tmp_path: Path, monkeypatch: Any) -> Iterator[Callable[[str], Path]]:
    """Writes a file of the page where it belongs, in a copy of conf/ or as a module of its package in a folder of its own."""
    shutil.copytree(resource_folder("conf"), tmp_path / "conf")
    monkeypatch.setattr(compose, "resource_folder", lambda name: tmp_path / name)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(title: str) -> Path:
        path = tmp_path / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block(title))
        package = ".".join(Path(title).parts[:-1])
        if path.suffix == ".py" and package:
            place = [*importlib.import_module(package).__path__, str(path.parent)]
            monkeypatch.setattr(importlib.import_module(package), "__path__", list(dict.fromkeys(place)))
        return path

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def toy(written: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> Path:
    """A family of its own: two modules, a row, and a YAML."""
    for title in ("m4train/models/toy.py", "m4train/processing/toy.py", "conf/model/tiny_toy.yaml"):
        written(title)
    row = eval(block("m4train/families.py"), vars(families))
    monkeypatch.setitem(families.FAMILIES, row.model_type, row)
    return tmp_path


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
    assert type(model).__name__ == "ToyForConditionalGeneration"
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
    assert "ToyForConditionalGeneration" in dir(m4train)


def test_a_model_or_processor_that_lacks_something_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"The model Linear lacks attention_kernels, blocks, flops, parts"):
        require_members(torch.nn.Linear(2, 2), TrainableModel, "The model")
    with pytest.raises(ConfigError, match=r"The processor object lacks at_detail, .*encode_document, .*tokens_for"):
        require_members(object(), SampleProcessor, "The processor")


def test_an_optimizer_is_a_row_and_a_function(written: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    written("m4train/training/sgd.py")
    monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", eval(block("m4train/optimizers.py"), vars(optimizers)))
    assert load_config(["experiment=digits_pretrain", "optimizer.name=sgd"]).optimizer.name == "sgd"
    with pytest.raises(ConfigError, match="DeepSpeed has not been tried with it; choose engine=single, ddp or fsdp2"):
        load_config(["experiment=digits_pretrain", "optimizer.name=sgd", "engine=zero2"])
    for stop in (6, 12):
        config = make_config(tmp_path, max_steps=12, stop_after=6)
        config.optimizer.name, config.optimizer.lr = "sgd", 0.1
        trainer = make_trainer(config)
        assert trainer.train().step == stop
        assert isinstance(trainer.engine.optimizer, torch.optim.SGD)
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert losses[-1] < losses[0]


def test_an_engine_is_a_class_and_a_row(written: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    written("m4train/training/engines/cpu.py")
    for name, place in ast.literal_eval(block("m4train/config/schema.py")).items():
        monkeypatch.setitem(ENGINES, name, place)
    assert load_config(["experiment=digits_pretrain", "engine.name=cpu"]).engine.name == "cpu"
    config = make_config(tmp_path / "run", max_steps=3)
    config.engine.name = "cpu"
    engine = make_engine(config)
    assert type(engine).__name__ == "CpuEngine"
    trainer = make_trainer(config, engine=engine)
    assert trainer.train().step == 3
    assert trainer.engine.device.type == "cpu"
    plain = make_config(tmp_path / "plain", max_steps=3)
    make_trainer(plain).train()
    both = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("run", "plain")]
    assert both[0] == pytest.approx(both[1])


def test_a_format_is_a_class_and_a_line(written: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    written("m4train/data/sources/windows_lines.py")
    from m4train.data.source import build_sources
    from m4train.data.sources import windows_lines  # type: ignore[attr-defined]
    from tests.helpers.data import FakeProcessor, data_config, write_shards

    monkeypatch.setitem(FORMATS, "windows_lines", windows_lines.WindowsLines)
    write_shards(tmp_path, [("page", {"items": [{"text": "one\r\ntwo\r\n"}]}, {})])
    path = str(tmp_path / "*.tar")
    configs = {name: SourceConfig(path=path, format=name) for name in ("canonical", "windows_lines")}
    texts = [source.read(0).items[0]["text"] for source in build_sources(configs, data_config(), FakeProcessor())]
    assert texts == ["one\r\ntwo\r\n", "one\ntwo\n"]


def test_a_freeze_policy_is_a_yaml(toy: Path, written: Callable[[str], Path], digits_root: Path) -> None:
    written("conf/freeze/norms_and_connector.yaml")
    overrides = ["experiment=digits_pretrain", "model=tiny_toy", f"data.root={digits_root}"]
    config = load_config([*overrides, "freeze=norms_and_connector"])
    model: Any = build.build_model(config, build.build_processor(config))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    connector = {name for name, _ in model.named_parameters() if "connector" in name}
    norms = {name for name, _ in model.named_parameters() if "vision" in name and "norm" in name.lower()}
    assert trains == connector | norms
    assert connector
    assert norms


def test_a_callback_is_a_class_in_the_list(written: Callable[[str], Path], tmp_path: Path) -> None:
    written("m4train/training/callbacks/highest.py")
    from m4train.training.callbacks import default_callbacks
    from m4train.training.callbacks.highest import Highest  # type: ignore[import-not-found]

    seen = []
    for steps in (4, 8):
        config = make_config(tmp_path, max_steps=8, stop_after=4, save_every=4)
        callback = Highest()
        make_trainer(config, callbacks=[callback, *default_callbacks(config)]).train()
        seen.append(callback.highest)
        assert len(read_metrics(tmp_path)) == steps
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert seen == [max(losses[:4]), max(losses)]
    assert [row["highest_loss"] for row in read_metrics(tmp_path)] == list(accumulate(losses, max))


def test_a_metric_is_a_function(written: Callable[[str], Path]) -> None:
    written("my_metrics.py")
    metric = load_metric("my_metrics:first_word")
    said = [Said("two lines", ("Two.", "two")), Said("two lines", ("three",)), Said("", ("three",))]
    assert metric(said).samples == [1.0, 0.0, 0.0]


def test_all_code_of_the_page_is_run() -> None:
    used = set(re.findall(r'(?:written|block)\("(.+?)"\)', Path(__file__).read_text()))
    used |= set(re.findall(r'"(\S+/\S+\.(?:py|yaml))"', Path(__file__).read_text()))
    assert set(re.findall(r'^```\w+ title="(.*?)"', PAGE.read_text(), re.MULTILINE)) <= used
    assert "\n```python\n" not in PAGE.read_text()
