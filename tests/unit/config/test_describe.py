"""Every key of the schema is described: in the schema, on the page, and as something that a module reads."""

from pathlib import Path

import pytest

from m4train.config.describe import all_keys, find
from m4train.config.page import page
from m4train.config.readers import modules_that_read

ROOT = Path(__file__).parents[3]
KEYS = {key.name: key for key in all_keys()}


def test_keys_have_their_type_default_and_comment():
    key = KEYS["trainer.global_batch_size"]
    assert (key.type, key.default, key.group) == ("int", "8", False)
    assert "packs per optimizer step" in key.meaning
    assert KEYS["optimizer.betas"].default == "[0.9, 0.999]"
    assert KEYS["optimizer.lr"].default == "0.0001"
    assert KEYS["data.mixture.schedule"].type == "mapping of int to mapping of str to float"
    assert KEYS["freeze.rules.N.part"].type == "str or null"
    assert KEYS["data.sources"].group
    assert KEYS["data.sources.NAME.images.scaled_decode"].default == "false"
    assert "data.validation.NAME.weight" not in KEYS


def test_a_comment_on_the_lines_or_above_them_is_found(tmp_path, monkeypatch):
    from m4train.config import describe

    written = tmp_path / "schema.py"
    written.write_text(
        '@dataclass\nclass A:\n    """What it is,\n    in two lines."""\n\n    # above,\n    # in two lines\n    a: int = 1\n'
        "    b: int = (\n        2  # inside\n    )\n    c: int = 3\n    d: str = '# no comment'  # beside\n"
    )
    monkeypatch.setattr(describe.schema, "__file__", str(written))
    found = describe._comments.__wrapped__()["A"]
    assert found == {"": "What it is, in two lines.", "a": "above, in two lines", "b": "inside", "c": "", "d": "beside"}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("trainer.max_steps", ["trainer.max_steps"]),
        ("warmup_steps", ["schedule.warmup_steps"]),
        ("lr", ["optimizer.lr", "optimizer.parts.NAME.lr"]),
        ("data.sources.mine.weight", ["data.sources.NAME.weight"]),
        ("data.validation.mine.weight", ["data.sources.NAME.weight"]),
        ("freeze.rules.3.part", ["freeze.rules.N.part"]),
        ("launch", ["launch", "launch.processes", "launch.attempts", "launch.chain", "launch.exclude_bad_nodes"]),
        ("batch_ramp", [f"trainer.batch_ramp{end}" for end in ("", ".start", ".increment", ".steps")]),
        ("trainer.nothing", []),
        ("nothing", []),
    ],
)
def test_find(asked, found):
    assert [key.name for key in find(asked)] == found


def test_every_key_says_its_unit_and_effect():
    silent = [key.name for key in all_keys() if len(key.meaning.split()) < 2]
    assert not silent, f"give these keys a comment with unit and effect in the schema: {silent}"


def test_the_page_is_the_one_of_this_schema():
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == page(), "docs/configuration.md is stale: run `make configuration`"


def test_every_key_is_read_by_some_module():
    checks = {f"m4train/config/{name}.py" for name in ("checks", "data_checks", "combinations")}
    dead = [name for name, modules in modules_that_read(KEYS.values()).items() if set(modules) <= checks]
    assert not dead, f"these keys change nothing: {dead}"


def test_the_readers_of_a_key_are_those_of_its_own_group():
    readers = modules_that_read(KEYS.values())
    expected = ["m4train/inspection/outlook.py", "m4train/training/schedule.py", "m4train/config/checks.py"]
    assert readers["schedule.warmup_steps"] == expected
    assert readers["adapter.rank_stabilized"] == ["m4train/training/adapters.py"]
    assert "m4train/training/schedule.py" not in readers["optimizer.name"]  # schedule.name is another key


def test_a_key_that_nobody_reads_is_seen(monkeypatch):
    from m4train.config import readers

    monkeypatch.setitem(readers.FIELDS["TrainerConfig"], "unused", int)
    dead = readers.modules_that_read([readers.Key("trainer.unused", "int", "0", "", False, "TrainerConfig")])
    assert dead == {"trainer.unused": []}
