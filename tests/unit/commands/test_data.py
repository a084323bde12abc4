import json
from pathlib import Path

from m4train.commands import data as data_run
from m4train.config import Config, SourceConfig
from tests.helpers.data import FakeProcessor, data_config, documents, write_shards


def test_stats_say_what_is_wrong_with_a_source_without_a_good_sample(tmp_path: Path, monkeypatch, capsys) -> None:
    write_shards(tmp_path, documents(3))
    data = data_config(sources={"pages": SourceConfig(path=str(tmp_path / "*.tar"), format="pairs")})
    monkeypatch.setattr(data_run.build, "prepared_processor", lambda config: FakeProcessor())
    assert data_run.stats(Config(data=data)) == 0
    found = json.loads(capsys.readouterr().out)["pages"]
    assert (found["samples"], found["tokens"]) == (3, 0)
    assert sum(found["bad"].values()) == 3
