"""Export asks transformers what it makes of the folder: three conversations and a greedy answer."""

import json
from pathlib import Path

import pytest

from m4train import Idefics2Processor
from m4train.commands.export import export, export_checkpoint
from tests.helpers.checkpoints import saved_run
from tests.helpers.processing import tiny_idefics2_processor

pytestmark = [pytest.mark.slow, pytest.mark.asks_transformers]


FULL = pytest.mark.full
CASES = [
    ("tiny_idefics3", "apart"),
    ("tiny_idefics2", "merge"),
    ("tiny_idefics", "apart"),
    pytest.param("tiny_idefics3", "merge", marks=FULL),
    pytest.param("tiny_idefics2", "apart", marks=FULL),
    pytest.param("tiny_idefics", "merge", marks=FULL),
]


@pytest.mark.parametrize(("model", "adapters"), CASES)
def test_transformers_renders_and_answers_the_same(model, adapters, tmp_path, capsys):
    given = ["adapter=lora", "adapter.rank=4"] if adapters == "apart" else []
    given += ["model.processor.space_after_image=true"] if model == "tiny_idefics2" else []
    config, _ = saved_run(tmp_path, *given, model=model)
    config.export.adapters = adapters
    assert export(config) == 0
    said = capsys.readouterr().out
    assert "renders and answers the same" in said
    stored = json.loads((tmp_path / "export" / "m4train.json").read_text())["transformers"]
    assert (stored["ids"], stored["pixels"], stored["answer"]) == (True, True, True)


def test_another_prompt_than_the_one_trained_on_is_said(tmp_path):
    config, _ = saved_run(tmp_path, model="tiny_idefics2")
    found = export_checkpoint(config).rendered
    assert not found.ids
    assert found.pixels
    assert "renders another prompt than the one this model trained on" in found.sentences[0]
    assert "model.processor.space_after_image" in found.sentences[1]


def test_a_folder_that_transformers_cannot_use_is_said(tmp_path, monkeypatch):
    config, _ = saved_run(tmp_path)
    monkeypatch.setattr("m4train.commands.export_check._HEAD", "raise OSError('no room')\n")
    found = export_checkpoint(config).rendered
    assert found.sentences == ("transformers cannot use the folder (OSError: no room)",)


def test_a_folder_is_read_with_the_space_of_the_version_that_wrote_it(tmp_path):
    """transformers 5 nests the settings of images; 4 and this library write them flat, here with the key itself."""
    import transformers

    ours = tiny_idefics2_processor(tmp_path / "flat")
    assert not Idefics2Processor.from_pretrained(tmp_path / "flat").space_after_image
    transformers.Idefics2Processor.from_pretrained(tmp_path / "flat").save_pretrained(tmp_path / "nested")
    assert not Path(tmp_path / "nested" / "preprocessor_config.json").exists()
    read = Idefics2Processor.from_pretrained(tmp_path / "nested")
    assert read.space_after_image
    assert not Idefics2Processor.from_pretrained(tmp_path / "nested", space_after_image=False).space_after_image
    read.save_pretrained(tmp_path / "again")
    assert Idefics2Processor.from_pretrained(tmp_path / "again").space_after_image
    assert not ours.space_after_image
