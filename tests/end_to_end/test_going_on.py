"""The commands on a run whose data moved, whose keys changed on the way, or whose directory is gone."""

import json
import shutil
from pathlib import Path

import pytest

from m4train import cli
from tests.helpers.data import documents, write_shards
from tests.helpers.processing import tokenizer_folder

STEPS = 4


def _arguments(root, *more):
    """A run of a few documents by a small model."""
    return [
        "experiment=digits_pretrain",
        "data.prepare=null",
        f"model.tokenizer={tokenizer_folder()}",
        f"run_dir={root / 'run'}",
        "logging=none",
        "data.num_workers=0",
        f"data.sources.documents.path={root}/data/*.tar",
        f"data.validation.documents.path={root}/held/*.tar",
        "schedule.name=constant",
        "schedule.warmup_steps=0",
        "trainer.eval_every=0",
        "trainer.worst_batch_first=false",
        "trainer.global_batch_size=2",
        "trainer.log_every=1",
        f"trainer.max_steps={STEPS}",
        *more,
    ]


def _rows(root):
    return [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run of four steps, and what it was made from."""
    folder = tmp_path_factory.mktemp("whole")
    write_shards(folder / "data", documents(16), max_samples=4)
    write_shards(folder / "held", documents(4))
    assert cli.main(["train", *_arguments(folder)]) == 0
    return folder


@pytest.fixture
def half(root, tmp_path):
    """The same, stopped after two steps, on data of its own."""
    for name in ("data", "held"):
        shutil.copytree(root / name, tmp_path / name)
    assert cli.main(["train", *_arguments(tmp_path, "trainer.stop_after=2")]) == 0
    return tmp_path


@pytest.mark.slow
def test_data_that_moved_are_the_same_by_what_they_hold(half, root, capsys):
    """Another folder, other times, no index next to them: the hashes of the index that is made again decide."""
    moved = half / "elsewhere" / "shards"
    moved.mkdir(parents=True)
    for shard in (half / "data").glob("*.tar"):
        shutil.copyfile(shard, moved / shard.name)
    shutil.rmtree(half / "data")
    assert cli.main(["train", *_arguments(half, f"data.sources.documents.path={moved}/*.tar")]) == 0
    assert "changed: data.sources.documents.path" in capsys.readouterr().out
    assert [(r["step"], r["loss"], r["data_hash"]) for r in _rows(half)] == [
        (r["step"], r["loss"], r["data_hash"]) for r in _rows(root)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["replaced", "halved", "gone"])
def test_data_that_hold_something_else_are_refused(how, half, capsys):
    """In another place and in the same one."""
    shards = sorted((half / "data").glob("*.tar"))
    if how == "replaced":
        shutil.rmtree(half / "data")
        write_shards(half / "data", documents(15), max_samples=4)
    elif how == "halved":
        for shard in shards[2:]:
            shard.unlink()
    else:
        shutil.rmtree(half / "data")
    assert cli.main(["train", *_arguments(half)]) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert str(half / "data") in said or "documents" in said
    assert "Traceback" not in said
    assert len(_rows(half)) == 2  # nothing of the run was touched


@pytest.mark.slow
def test_a_step_is_replayed_with_the_configuration_it_was_made_with(half, capsys):
    """Weights, packs a step and draws of augmentation changed after step 2: each side is shown as it was."""
    changed = ("trainer.global_batch_size=3", "data.augment.shift_pixels=2", "trainer.max_steps=5")
    assert cli.main(["train", *_arguments(half, *changed)]) == 0
    logged = {row["step"]: row["data_hash"] for row in _rows(half)}
    capsys.readouterr()
    for step, packs in ((1, 2), (2, 2), (3, 3), (5, 3)):
        assert cli.main(["replay", "--step", str(step), f"run_dir={half / 'run'}", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["data_hash"] == report["logged_data_hash"] == logged[step]
        assert len({sample["pack"] for sample in report["samples"]}) == packs


LOOKS = {
    "report": [],
    "replay": ["--step", "1"],
    "preview": [],
    "evaluate": ["evaluation.max_samples=1"],
    "export": ["export.verify=false"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", [*LOOKS, "plan", "validate", "estimate", "bench", "train"])
def test_a_run_directory_that_is_gone_is_one_sentence(command, tmp_path, capsys):
    gone = tmp_path / "gone"
    assert cli.main([command, f"run_dir={gone}", *LOOKS.get(command, [])]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("m4train: ")
    assert not gone.exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", LOOKS)
def test_a_run_directory_that_vanishes_while_a_command_works_is_one_sentence(
    command, root, tmp_path, capsys, monkeypatch
):
    """Right before the first file is written into it."""
    run = tmp_path / "run"
    shutil.copytree(root / "run", run)
    opened = Path.open

    def vanish(path, mode="r", *rest, **options):
        if "w" in mode and run in path.parents:
            shutil.rmtree(run, ignore_errors=True)
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", vanish)
    assert cli.main([command, f"run_dir={run}", *LOOKS[command]]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(run) in said
    assert "No such file" in said
    assert "M4TRAIN_DEBUG" not in said
    assert not run.exists()
