from collections.abc import Iterator
from pathlib import Path

import pytest

from m4train.data.storage import files as storage
from tests.helpers.data import documents, write_shards
from tests.helpers.stores import HttpStore, http_store


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> Iterator[HttpStore]:
    """Three shards of ten documents each on an HTTP server, whose readers hardly wait before they ask again."""
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    write_shards(tmp_path / "shards", documents(30), max_samples=10)
    with http_store(tmp_path / "shards") as served:
        yield served
