"""Anything damaged in a run directory falls back: the losses of a run that nothing happened to, or a refusal by name."""

import json
import re
import shutil
from unittest.mock import MagicMock

import pytest

from m4train import run_files
from m4train.data.loading.quarantine import Quarantine, QuarantineEntry
from m4train.errors import CheckpointError, DataError
from m4train.json_lines import read_lines
from m4train.run_files import read_run
from m4train.training.callbacks.base import Callback
from m4train.training.callbacks.samples import Samples
from m4train.training.callbacks.wandb import Wandb
from m4train.training.checkpoints.files import MANIFEST, write_manifest
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.claim import claim
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


def _nothing(content):
    return None


def _another_type(content):
    for value in ([], {}, "text", None):
        try:
            if type(json.loads(content.splitlines()[0] if content.count(b"}\n{") else content)) is not type(value):
                return json.dumps(value).encode() + b"\n"
        except ValueError:
            return b"[1, 2]\n"
    return b"7\n"


DAMAGES = {
    "deleted": _nothing,
    "emptied": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "a bit": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "JSON of another type": _another_type,
    "a NUL block": lambda content: content[: len(content) // 2] + b"\0" * (len(content) - len(content) // 2),
}
IN_A_CHECKPOINT = ("tensors/__0_0.distcp", "tensors/.metadata", "state.json", "manifest.json", "config.json")
OF_A_RUN = ("metrics.jsonl", "cursors.jsonl", "starts.jsonl")


def _trainer(run_dir, **options):
    extra = lambda folder: (folder / "config.json").write_text('{"model_type": "tiny"}')
    return make_trainer(make_config(run_dir, **options), TinyModel(dropout=0.1), save_extra=extra)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run stopped after step 8 of 12, with checkpoints of steps 4 and 8; and the losses of one left alone."""
    folder = tmp_path_factory.mktemp("begun")
    _trainer(folder / "whole").train()
    run_dir = folder / "run"
    _trainer(run_dir, stop_after=8).train()
    (run_dir / "cursors.jsonl").write_text('{"step": 3, "plan": "x"}\n{"step": 6, "plan": "x"}\n')
    return run_dir, _losses(folder / "whole")


def _losses(run_dir):
    return {line["step"]: (line.get("loss"), line.get("data_hash")) for line in read_metrics(run_dir)}


def _damage(path, how):
    content = DAMAGES[how](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("fitted", [False, True], ids=["manifest as it was", "manifest made to fit"])
@pytest.mark.parametrize("file", IN_A_CHECKPOINT)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(file, fitted, begun, tmp_path):
    for how in DAMAGES:
        run_dir = tmp_path / how
        shutil.copytree(begun[0], run_dir)
        folder = run_dir / "checkpoints" / "step-000008"
        _damage(folder / file, how)
        if fitted:
            if file == MANIFEST:
                continue
            (folder / MANIFEST).unlink()
            write_manifest(folder)
        said = []
        if fitted and how == "a bit" and find_checkpoint(make_config(run_dir), lambda _: None).step == 8:
            continue  # a letter of a text that nothing depends on, such as a version
        assert find_checkpoint(make_config(run_dir), said.append).step == 4, how
        assert len(said) == 1, how
        assert "step-000008" in said[0], how
        assert file in said[0] or file == MANIFEST, how
        config = make_config(run_dir)
        config.resume = str(folder)
        with pytest.raises(CheckpointError, match="step-000008"):  # by its name alone it is refused
            find_checkpoint(config, said.append)
    assert _trainer(run_dir).train().step == 12
    assert _losses(run_dir) == begun[1]


STATES = {
    "no plan": lambda state: {**state, "plan": None},
    "an empty plan": lambda state: {**state, "plan": {}},
    "a plan of another step": lambda state: {**state, "plan": {"step": 5, **state["plan"]}},
    "a plan of half a shape": lambda state: {**state, "plan": {"plan": "x", "step": 8, "streams": None}},
    "no step": lambda state: {key: value for key, value in state.items() if key != "step"},
    "another step": lambda state: {**state, "step": 9},
    "a step that is text": lambda state: {**state, "step": "8"},
    "a later version": lambda state: {**state, "version": 99},
    "a version that is none": lambda state: {**state, "version": None},
    "a config that is a list": lambda state: {**state, "config": []},
    "a config of other types": lambda state: {**state, "config": {"trainer": {"max_steps": "many"}}},
    "callbacks that are none": lambda state: {**state, "callbacks": None},
    "another count": lambda state: {**state, "skipped": 3},
    "no lineage": lambda state: {**state, "lineage": "none"},
}


@pytest.mark.parametrize("change", STATES)
def test_a_state_of_another_shape_is_passed_over(change, begun, tmp_path):
    shutil.copytree(begun[0], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-000008"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(STATES[change](state)))
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    said = []
    assert find_checkpoint(make_config(tmp_path / "run"), said.append).step == 4
    assert "state.json" in said[0]
    assert "\n" not in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("file", OF_A_RUN)
def test_a_damaged_file_of_the_run_is_repaired_or_made_anew(file, begun, tmp_path, capsys):
    for how in DAMAGES:
        run_dir = tmp_path / how
        shutil.copytree(begun[0], run_dir)
        _damage(run_dir / file, how)
        assert _trainer(run_dir, stop_after=2).train().step == 10, how
        found = _losses(run_dir)
        assert found.keys() >= {9, 10}, how
        other = [step for step, value in found.items() if begun[1].get(step) != value]
        assert other == [] or (how == "a bit" and len(other) == 1 and other[0] not in (9, 10)), how
        if file == "metrics.jsonl":
            said, lines = capsys.readouterr().out, (begun[0] / file).read_bytes().count(b"\n")
            assert ("damaged line" in said) == (how in ("a NUL block", "JSON of another type")) or how == "a bit", how
            kept = {"deleted": 0, "emptied": 0, "halved": lines // 2, "JSON of another type": 0}.get(how)
            assert kept is None or len(found) - 2 == pytest.approx(kept, abs=1), how


BAD = {"step": 1, "source": "web", "shard": "a.tar", "key": "k", "reason": "no_image", "detail": ""}
ALSO_OF_A_RUN = {
    run_files.QUARANTINE: json.dumps(BAD) + "\n",
    run_files.SAMPLES: '{"step": 3, "answer": "a"}\n{"step": 8, "answer": "b"}\n',
    run_files.ANSWERS: '{"source": "web"}\n',
    run_files.PARAMETERS: '[{"part": "text"}]\n',
    run_files.EVALUATION: '{"web": {"loss": 1.0}}\n',
    run_files.EVALUATIONS: '{"checkpoint": "step-000004", "benchmark": "docvqa", "score": 0.5}\n',
    run_files.DEATHS: '{"rank": 1, "samples": [["web", "k", "a.tar"]]}\n',
    run_files.ESTIMATE: '{"device": "cpu", "expected_bytes": 100}\n',
    run_files.DEEPSPEED: '{"zero_optimization": {"stage": 2}}\n',
    run_files.BEST: '{"step": 8, "value": 1.0}\n',
    run_files.WANDB: '{"id": "0a1b2c3d", "group": "run", "step": -1}\n',
    run_files.CLAIM: "process 1 on elsewhere\n",
    run_files.CONFIG: "name: run\n",
    run_files.REPORT: "<html></html>",
    run_files.PREVIEW: "<html></html>",
    f"{run_files.STALLED}/ranks.txt": "rank 0: in step 3\n",
    run_files.replay_page(3): "<html></html>",
}
OTHERS = {
    run_files.CHECKPOINTS,
    run_files.STATE,
    run_files.EXPORT,
    run_files.STOP,
    run_files.LINEAGE_FILE,
    run_files.TENSORBOARD,
    run_files.STAGES,  # of the folder of the whole: tests/unit/commands/test_stages.py
}


def test_every_file_of_a_run_is_damaged_somewhere_in_here():
    names = {
        value for name, value in vars(run_files).items() if name.isupper() and name[0] != "_" and isinstance(value, str)
    }
    damaged = {*OF_A_RUN, *(name if name in names else name.split("/")[0] for name in ALSO_OF_A_RUN)}
    assert names - OTHERS == damaged - {run_files.replay_page(3)}


@pytest.mark.parametrize("how", DAMAGES)
def test_no_other_file_of_a_run_keeps_it_from_going_on(how, begun, tmp_path, monkeypatch):
    """All of them damaged at once: the run goes on with the losses of an undamaged one."""
    run_dir = tmp_path / "run"
    shutil.copytree(begun[0], run_dir)
    for name, content in ALSO_OF_A_RUN.items():
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text(content)
        _damage(run_dir / name, how)
    ids = []
    fake = lambda **options: ids.append(options["id"]) or MagicMock(offline=False)
    monkeypatch.setattr("wandb.init", fake)
    trainer = _trainer(run_dir)
    trainer.callbacks += [Samples(100, 12), Wandb(trainer.config)]
    with claim(run_dir, trainer.engine):
        assert trainer.train().step == 12
    assert _losses(run_dir) == begun[1]
    assert re.fullmatch(r"[A-Za-z0-9_-]+", ids[0])
    assert json.loads((run_dir / run_files.WANDB).read_text())["id"] == ids[0]
    quarantine = Quarantine(run_dir / run_files.QUARANTINE, 0.5)
    quarantine.add([QuarantineEntry(9, 0, "web", "k", "a.tar", "no_image", "")], 9)
    whole = [line for line in read_lines(run_dir / run_files.QUARANTINE) if line["key"] == "k"]
    assert whole  # named once, whatever was there


def test_a_run_directory_that_vanishes_is_one_sentence(tmp_path):
    run_dir = tmp_path / "run"

    class Vanish(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 5:
                trainer._saver.wait()
                shutil.rmtree(run_dir)

    trainer = _trainer(run_dir)
    trainer.callbacks.append(Vanish())
    with pytest.raises(
        CheckpointError, match=r"step-000008 could not be written \(No such file or directory"
    ) as refusal:
        trainer.train()
    assert "\n" not in str(refusal.value)
    assert not run_dir.exists()  # and is not made again around a run whose metrics are gone


def test_only_damaged_lines_are_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(1, 9)]
    odd = [
        b"\0" * 300,
        b"",
        b"[1]",
        b"null",
        b'{"loss": 1}',
        b'{"step": null}',
        b'{"step": "7"}',
        b'{"step": 2',
        b"\xff\xfe",
    ]
    mixed = [line for pair in zip(good, odd) for line in pair] + good[len(odd) :]
    path.write_bytes(b"\n".join(mixed) + b'\n{"step": 9')
    said = []
    from m4train.json_lines import keep_lines, read_lines

    assert [line["step"] for line in read_lines(path, ("step",))] == list(range(1, 9))
    assert [line["step"] for line in keep_lines(path, 6, say=said.append)] == list(range(1, 7))
    assert path.read_bytes() == b"".join(line + b"\n" for line in good[:6])
    assert len(said) == 1
    assert keep_lines(path, 6, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", ["config.yaml", "parameters.json", "evaluation.json", "samples.jsonl"])
def test_what_is_only_looked_at_falls_back_or_is_named(file, how, tmp_path):
    contents = {
        "config.yaml": "name: run\nseed: 0\n",
        "parameters.json": "[]",
        "evaluation.json": '{"a": {"loss": 1.0}}',
    }
    for name in contents:
        (tmp_path / name).write_text(contents[name])
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "answer": "a"}\n{"step": 2, "answer": "b"}\n')
    _damage(tmp_path / file, how)
    if file == "config.yaml" and how != "halved":
        with pytest.raises(DataError, match=r"config\.yaml") as caught:
            read_run(tmp_path)
        assert "\n" not in str(caught.value)
        return
    run = read_run(tmp_path)
    assert isinstance(run.evaluation, dict)
    assert all(line["step"] in (1, 2) for line in run.samples)
