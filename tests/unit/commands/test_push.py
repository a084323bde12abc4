"""`m4train export --push-to`: a Hub on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from m4train.cli import main
from m4train.commands import export as exporting
from m4train.commands.push import check_push, push
from m4train.errors import ConfigError, TrainingError
from m4train.hub import WEIGHT_FILES, model_folder
from tests.helpers.hub_server import TOKEN, connected


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "export"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "idefics3"}')
    (path / "README.md").write_text("---\nlibrary_name: transformers\n---\n# run\n")
    for number in (1, 2):
        (path / f"model-{number}.safetensors").write_bytes(bytes([number]) * 1000)
    return path


def test_a_folder_is_pushed_and_starts_a_model_again(hub, folder, tmp_path):
    assert push(folder, "org/name", True, "Step 3 of run").endswith("/org/name")
    repo = hub.model("org/name")
    assert (repo.private, repo.messages) == (True, ["Step 3 of run"])
    again = model_folder("org/name", WEIGHT_FILES)
    assert again.is_relative_to(tmp_path / "cache")
    for path in folder.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert TOKEN in hub.tokens


def test_an_interrupted_push_sends_the_rest_alone(hub, folder):
    hub.broken = "/commit/"
    with pytest.raises(TrainingError, match=r"could not be pushed to org/name .*: the same command goes on"):
        push(folder, "org/name", False, "first")
    assert len(hub.sent) == 2
    hub.broken, hub.sent[:] = None, []
    push(folder, "org/name", False, "second")
    assert not hub.sent
    assert set(hub.model("org/name").commits[-1][1]) == {path.name for path in folder.iterdir()}


def test_weights_that_are_not_there_any_more_go(hub, folder):
    push(folder, "org/name", False, "two")
    (folder / "model-2.safetensors").unlink()
    (folder / "notes.txt").write_text("n")
    push(folder, "org/name", False, "one")
    assert set(hub.model("org/name").commits[-1][1]) == {"config.json", "README.md", "model-1.safetensors", "notes.txt"}


def test_what_cannot_be_pushed_is_refused_before_anything_is_exported(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "export_checkpoint", lambda *_: pytest.fail("exported"))
    run = ["export", "experiment=digits_pretrain", "logging=none"]
    assert main([*run, "--private"]) == 2
    assert "--private goes with --push-to" in capsys.readouterr().err
    assert main([*run, "--push-to", "name"]) == 2
    assert "its form is ORG/NAME" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main([*run, "push_to=org/name", "private=true"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not hub.asked


def test_without_a_token_nothing_is_asked(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    with pytest.raises(ConfigError, match="there is no token of the Hub: run `hf auth login`, or set HF_TOKEN"):
        check_push("org/name")
    assert not hub.asked


def test_a_token_of_a_login_is_taken(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    Path(tmp_path / "token").write_text("hf_login")
    check_push("org/name")
    push(folder, "org/name", False, "m")
    assert "hf_login" in hub.tokens


def test_private_of_a_public_repository_is_refused(hub, folder):
    hub.add("model", "org/name", {})
    with pytest.raises(ConfigError, match="is there already, and public"):
        push(folder, "org/name", True, "m")
    assert not hub.sent


def test_nothing_is_pushed_unasked(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "export_checkpoint", lambda *_: exporting.Exported(3, folder, None))
    assert main(["export", "experiment=digits_pretrain", "logging=none", "export.model_card=true"]) == 0
    assert not hub.asked
    assert main(["export", "experiment=digits_pretrain", "logging=none", "--push-to", "org/name", "--private"]) == 0
    assert "pushed to http" in capsys.readouterr().out
    assert hub.model("org/name").private
