import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from m4train.errors import ConfigError
from m4train.hub import PROCESSOR_FILES, model_folder


def test_an_existing_folder_is_itself(tmp_path):
    assert model_folder(str(tmp_path), PROCESSOR_FILES) == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match="There is no folder"):
        model_folder(name, PROCESSOR_FILES)


def test_a_hub_id_is_downloaded_at_its_revision(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_folder("owner/name", ["*.json"], revision="abc", cache_dir=tmp_path) == tmp_path
    assert asked == {"name": "owner/name", "revision": "abc", "cache_dir": tmp_path, "allow_patterns": ["*.json"]}


def test_without_a_network_one_sentence_says_so(monkeypatch):
    def download(*_, **__):
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        ConfigError, match=r"owner/name at revision v1 is neither cached nor within reach \(no connection\)"
    ):
        model_folder("owner/name", PROCESSOR_FILES, revision="v1")
