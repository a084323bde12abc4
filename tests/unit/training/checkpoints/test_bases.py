"""What a run starts from is known by its content."""

import pytest

from m4train.errors import CheckpointError
from m4train.training.checkpoints.bases import bases
from m4train.training.checkpoints.find import find_checkpoint
from tests.helpers.training import TinyModel, make_config, make_trainer


def _folder(path, weights=b"w" * 3_000_000, config="{}"):
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    (path / "m4train.json").write_text(f'{{"run_dir": "{path}"}}')
    return path


def test_a_folder_is_the_same_wherever_it_lies_and_another_once_anything_in_it_is(tmp_path):
    config = make_config(tmp_path)
    contents = []
    for number, options in enumerate(
        ({}, {}, {"config": '{"a": 1}'}, {"weights": b"w" * 2_999_999 + b"v"}, {"weights": b"w" * 2_999_999})
    ):
        config.model.pretrained = str(_folder(tmp_path / str(number), **options))
        contents.append(bases(config)["model.pretrained"])
    assert contents[0] == contents[1]
    assert len(set(contents)) == 4


def test_what_is_not_there_is_left_out(tmp_path):
    config = make_config(tmp_path)
    config.model.pretrained = "owner/name"
    assert bases(config) == {}


@pytest.mark.parametrize("key", ["pretrained", "tokenizer"])
def test_a_base_may_move_but_not_be_replaced(key, tmp_path):
    def _config(folder):
        config = make_config(tmp_path / "run")
        setattr(config.model, key, str(folder))
        return config

    config = _config(_folder(tmp_path / "base"))
    make_trainer(config, TinyModel(), bases=bases(config)).train()
    moved = _config((tmp_path / "base").rename(tmp_path / "moved"))
    assert find_checkpoint(moved, bases=bases(moved)).step == 12
    for folder, weights in (("moved", b"v" * 3_000_000), ("other", b"u" * 3_000_000)):
        if folder == "moved":
            (tmp_path / folder / "model.safetensors").write_bytes(weights)
        else:
            _folder(tmp_path / folder, weights)
        replaced = _config(tmp_path / folder)
        with pytest.raises(CheckpointError, match=rf"model\.{key} names .*{folder}, which holds something else"):
            find_checkpoint(replaced, bases=bases(replaced))


def test_the_base_of_a_run_directory_is_its_newest_checkpoint(tmp_path):
    config = make_config(tmp_path / "second")
    config.model.pretrained = str(tmp_path / "first")
    contents = []
    for stop in (4, None):
        make_trainer(make_config(tmp_path / "first", stop_after=stop), TinyModel()).train()
        contents.append(bases(config)["model.pretrained"])
    assert contents[0] != contents[1]
    config.model.pretrained = str(tmp_path / "first" / "checkpoints" / "step-000012")
    assert bases(config)["model.pretrained"] == contents[1]
