import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import m4train.processing
from m4train.errors import ConfigError
from m4train.hub import PROCESSOR_FILES, model_folder, weight_folder
from tests.helpers.processing import tiny_idefics3_processor


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


def test_a_cache_that_holds_no_more_than_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"The cache holds no \*.safetensors of the hub model owner/name, .*: download it first"
    ):
        weight_folder("owner/name", allow_pickle=False)
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ConfigError, match=r"holds no \*.safetensors"):
        weight_folder("owner/name", allow_pickle=False)
    assert weight_folder("owner/name", allow_pickle=True) == tmp_path
    (tmp_path / "model.safetensors").write_text("")
    assert weight_folder("owner/name", allow_pickle=False) == tmp_path


@pytest.mark.parametrize("kind", ["AutoProcessor", "AutoTokenizer", "Idefics3Processor"])
def test_processors_take_what_a_download_takes(kind, tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options)
        return str(tmp_path)

    tiny_idefics3_processor(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    given = {
        "token": "secret",
        "local_files_only": True,
        "force_download": False,
        "revision": "abc",
        "cache_dir": "here",
    }
    processor = getattr(m4train.processing, kind).from_pretrained("owner/name", **given)
    assert processor.decode([]) == ""
    assert {name: asked[name] for name in given} == given
