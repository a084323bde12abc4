"""The commands on a run whose data moved, whose keys changed on the way, or whose directory is gone."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from m4train import cli
from tests.helpers import warm
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
def test_the_losses_of_a_replay_are_those_of_the_step(half, capsys):
    """By the checkpoint before it, whose weights made the step."""
    assert cli.main(["train", *_arguments(half, "trainer.keep_last=9")]) == 0
    capsys.readouterr()
    assert cli.main(["replay", "--step", "3", f"run_dir={half / 'run'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["losses"] == "by step-000002"
    samples = found["samples"]
    total = sum(sample["loss"] * sample["loss_tokens"] for sample in samples if sample["loss_tokens"])
    assert total / sum(sample["loss_tokens"] for sample in samples) == pytest.approx(_rows(half)[2]["loss"], rel=1e-5)
    page = (half / "run" / "replay-step-3.html").read_text()
    assert 'title="loss ' in page


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


@pytest.fixture
def run(root, tmp_path):
    """A copy of the whole run, to change."""
    return Path(shutil.copytree(root / "run", tmp_path / "run"))


def _refused(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "M4TRAIN_DEBUG" not in said
    return said


def _names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("place", [".", "checkpoints", "../other", "config.yaml"])
def test_an_export_replaces_nothing_but_an_export(place, run, capsys):
    """What a person names by mistake: the run itself, its checkpoints, a folder with work of a week, a file."""
    (run.parent / "other").mkdir()
    (run.parent / "other" / "thesis.tex").write_text("text")
    before = _names(run.parent)
    said = _refused(capsys, "export", f"run_dir={run}", "export.verify=false", f"export.folder={run / place}")
    assert "export.folder" in said
    assert "choose" in said
    assert _names(run.parent) == before


@pytest.mark.slow
def test_an_export_behind_a_link_goes_where_it_leads_and_is_replaced_there(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (run / "export").symlink_to(tmp_path / "disk" / "model")
    for _ in range(2):
        assert cli.main(["export", f"run_dir={run}", "export.verify=false"]) == 0
        assert (run / "export").is_symlink()
        assert (tmp_path / "disk" / "model" / "model.safetensors").is_file()
    assert _names(tmp_path / "disk")[0] == "model"
    assert not list((tmp_path / "disk").glob(".*"))


@pytest.mark.slow
def test_a_run_is_not_a_checkpoint_to_begin_from(run, tmp_path, capsys):
    root = tmp_path / "x"
    for name in ("data", "held"):
        write_shards(root / name, documents(4))
    said = _refused(capsys, "train", *_arguments(root, f"resume={run}"))
    assert f"name one of it, such as resume={run}/checkpoints/step-000004" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "config.yaml", "starts.jsonl", "claim"])
def test_a_file_for_a_folder_or_a_folder_for_a_file_is_named(name, half, capsys):
    path = half / "run" / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("")
    else:
        path.unlink()
        path.mkdir()
    assert str(path) in _refused(capsys, "train", *_arguments(half))


def _terminated(command, at, run, arguments):
    """The command in a process that is sent SIGTERM when it calls the function `at`, as a queue does at the end of a job."""
    import importlib

    module, _, name = at.partition(":")
    setattr(importlib.import_module(module), name, lambda *given, **options: os.kill(os.getpid(), signal.SIGTERM))
    sys.exit(cli.main([command, f"run_dir={run}", *arguments]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "at", "result"),
    [
        ("export", "m4train.commands.export:_describe", "export"),
        ("evaluate", "m4train.commands.evaluate:_write", "evaluation.json"),
    ],
)
def test_a_command_that_is_terminated_leaves_what_was_there(command, at, result, run, tmp_path):
    arguments = {"export": ["export.verify=false"], "evaluate": ["evaluation.max_samples=1"]}[command]
    assert cli.main([command, f"run_dir={run}", *arguments]) == 0
    before = {name: (run / name).read_bytes() for name in _names(run) if (run / name).is_file()}
    child = warm.start(_terminated, command, at, str(run), arguments, output=tmp_path / "log")
    assert child.wait(timeout=100) in (-signal.SIGTERM, 128 + signal.SIGTERM), child.said()
    assert all((run / name).read_bytes() == content for name, content in before.items())
    assert cli.main([command, f"run_dir={run}", *arguments]) == 0
    assert (run / result).exists()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
