import multiprocessing

import pytest

from data_pipelines.once import build_once
from m4train.errors import DataError


def _build_and_count(arguments):
    root, counter = arguments

    def build(folder):
        with open(counter, "a") as file:
            file.write("x")
        (folder / "data").write_text("whole")

    return build_once(root, {"recipe": "r"}, build)


def test_several_processes_build_once(tmp_path):
    root, counter = tmp_path / "data" / "set", tmp_path / "count"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        built = pool.map(_build_and_count, [(root, counter)] * 3)
    assert sum(built) == 1
    assert counter.read_text() == "x"
    assert (root / "data").read_text() == "whole"


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(tmp_path):
    root = tmp_path / "set"

    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError):
        build_once(root, {"recipe": "r"}, fail)
    assert not root.exists()
    assert build_once(root, {"recipe": "r"}, lambda folder: (folder / "data").write_text("whole"))
    assert not (root / "half").exists()


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    root = tmp_path / "set"
    build_once(root, {"recipe": "r", "version": 1}, lambda folder: None)
    with pytest.raises(DataError, match=r"data\.root"):
        build_once(root, {"recipe": "r", "version": 2}, lambda folder: None)
