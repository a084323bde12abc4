"""The tool that runs transformers' test modules, on a made-up module of their shape."""

from pathlib import Path

import pytest

from tests.foreign import in_place, run
from tests.foreign.listed import LISTED

COMMON = """
class ModelTesterMixin:
    def test_it_is_a_model(self):
        self.assertTrue(hasattr(self.model_class, "forward"))

    def test_it_is_of_transformers(self):
        from transformers import PreTrainedModel
        self.assertTrue(issubclass(self.model_class, PreTrainedModel))

    def test_no_class_can_do_this(self):
        self.fail("theirs neither")

    def test_is_skipped(self):
        self.skipTest("for every class")

    def test_is_skipped_by_what_ours_lacks(self):
        if not hasattr(self.model_class, "post_init"):
            self.skipTest("not for this class")
"""
MODULE = """
import os, unittest
from transformers import Idefics3Model
from transformers.models.idefics3 import modeling_idefics3
from ...test_modeling_common import ModelTesterMixin

class Idefics3ModelTest(ModelTesterMixin, unittest.TestCase):
    model_class = Idefics3Model

    def test_in_its_module_too(self):
        self.assertIs(modeling_idefics3.Idefics3Model, Idefics3Model)

    def test_files_are_found_by_their_names(self):
        self.assertTrue(os.path.isfile("HuggingFaceM4/Idefics3-8B-Llama3/preprocessor_config.json"))
        self.assertTrue(os.path.isfile("statue_of_liberty_64x64.jpg"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "transformers" / "tests"
    for package in (home, home / "models", home / "models" / "idefics3"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (home / "test_modeling_common.py").write_text(COMMON)
    (home / "models" / "idefics3" / "test_modeling_idefics3.py").write_text(MODULE)
    return home.parent


@pytest.mark.slow
@pytest.mark.full
def test_what_came_of_each_test(folder, monkeypatch, capsys):
    monkeypatch.setattr(run, "NEEDED", ())  # which the made-up module does not import
    monkeypatch.setattr(run, "LISTED", {"another base": ("test_it_is_of_transformers",)})
    assert run.main([str(folder), "--only", "idefics3"]) == 1
    said = capsys.readouterr().out
    assert "| test_modeling_idefics3.py | 3 | 1 | 1 | 1 | 1 |" in said
    assert "FAILED tests/models/idefics3/test_modeling_idefics3.py::Idefics3ModelTest::test_is_skipped_by" in said


def test_a_folder_without_their_tests_is_said(tmp_path):
    with pytest.raises(SystemExit, match="holds no tests/models/FAMILY"):
        run.modules(tmp_path)


def test_what_is_missing_to_import_them_is_said(folder, monkeypatch):
    monkeypatch.setattr(run, "NEEDED", ("no_such_package",))
    with pytest.raises(SystemExit, match="pip install no_such_package"):
        run.modules(folder)


def test_every_listed_test_has_one_reason():
    patterns = [one for patterns in LISTED.values() for one in patterns]
    assert len(set(patterns)) == len(patterns)
    assert all(why.strip() == why and why[0].islower() for why in LISTED)


def test_the_plugin_imports_nothing_of_these_tests():
    """`tests` is another package where it runs."""
    text = Path(in_place.__file__).read_text()
    assert "from tests" not in text
    assert "import tests" not in text
