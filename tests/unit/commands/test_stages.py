"""Runs of several stages: each starts from the last one's weights, a kill at any moment loses nothing, and one may be redone."""

import copy
import json
import os
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from m4train.cli import main
from m4train.commands import stages
from m4train.config import SourceConfig
from m4train.config.compose import load_config, load_run_config, load_stages, save_config
from m4train.config.holdout import hold_out
from m4train.config.stages import Staged
from m4train.errors import ConfigError
from m4train.inspection.report import write_report
from m4train.run_files import STAGES, read_run
from m4train.training.checkpoints.tensor_files import read_tensors, stored_tensors
from tests.helpers import warm
from tests.helpers.data import conversations, documents, write_shards
from tests.helpers.distributed import end_ranks, start_ranks
from tests.helpers.processing import tokenizer_folder

SIZES = [
    "data.num_workers=0",
    "data.sequence_length=256",
    "data.images_per_pack=16",
    "data.packing_pool=6",
    "threads=1",
]
SIZES += ["trainer.global_batch_size=1", "trainer.micro_batch_size=1", "trainer.precision=fp32", "trainer.max_steps=2"]
SIZES += [
    "trainer.log_every=1",
    "trainer.save_every=1",
    "schedule.warmup_steps=1",
    "trainer.eval_every=0",
    "logging=none",
]
SIZES += ["data.prepare=null", "trainer.worst_batch_first=false"]
MEASURED = ("step", "loss", "grad_norm", "data_hash")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Two stages of two steps: full training on documents, then LoRA on conversations."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "pages", documents(10))
    write_shards(folder / "talks", conversations(10))
    paths = [f"'data.sources.documents.path={folder}/pages/*.tar'", "'~data.validation.documents'"]
    first = f"{{name: pretrain, experiment: digits_pretrain, overrides: [{', '.join(paths)}]}}"
    paths = [f"'data.sources.{name}.path={folder}/talks/*.tar'" for name in ("single", "multi")]
    paths += ["'~data.validation.single'", "'~data.validation.multi'"]
    second = f"{{name: sft, experiment: digits_sft, overrides: [{', '.join(paths)}]}}"
    return [f"stages=[{first}, {second}]", f"model.tokenizer={tokenizer_folder()}", "name=digits", *SIZES]


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[key] for key in MEASURED) for line in lines]


def train(folder, overrides):
    return main(["train", f"run_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def composed(overrides):
    return load_stages([*overrides, "run_dir=WHOLE"])


def again(composed, folder, asked=None, **changes):
    """Trains the composed stages in another folder; returns the exit code."""
    configs = copy.deepcopy(composed.configs)
    for config in configs:
        config.run_dir = config.run_dir.replace("WHOLE", str(folder))
        config.model.pretrained = config.model.pretrained and config.model.pretrained.replace("WHOLE", str(folder))
        config.seed = changes.get("seed", 0)
        config.trainer.max_hours = changes.get("max_hours")
    return stages.train_stages(Staged(folder, configs, asked))


@pytest.fixture(scope="module")
def whole(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, overrides) == 0
    return folder


def test_each_stage_starts_from_the_weights_of_the_one_before(whole, overrides, tmp_path, capsys):
    alone = ["experiment=digits_sft", f"run_dir={tmp_path}/alone", f"model.pretrained={whole}/pretrain", *overrides[2:]]
    alone += [
        f"data.sources.{n}.path={load_stages(overrides).configs[1].data.sources[n].path}" for n in ("single", "multi")
    ]
    alone += ["~data.validation.single", "~data.validation.multi"]
    assert main(["train", *alone]) == 0
    assert rows(whole / "sft") == rows(tmp_path / "alone")
    assert [row[0] for row in rows(whole / "pretrain")] == [1, 2]
    assert train(whole, overrides) == 0  # nothing is left to do
    assert capsys.readouterr().out.count("is trained already") == 2


def test_a_command_about_the_whole_is_about_its_last_stage(whole, overrides, tmp_path, capsys):
    assert load_run_config([f"run_dir={whole}"]).run_dir == f"{whole}/sft"
    assert load_run_config([f"run_dir={whole}", "stage=pretrain"]).run_dir == f"{whole}/pretrain"
    assert load_config([*overrides, f"run_dir={whole}"]).stage == "pretrain"
    assert "stage=NAME chooses another of pretrain, sft" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds pretrain, sft: choose another"):
        load_run_config([f"run_dir={whole}", "stage=other"])
    with pytest.raises(ConfigError, match="give experiment=NAME again"):
        load_stages([f"run_dir={whole}"])
    assert main(["report", f"run_dir={whole}"]) == 0
    page = (whole / "report.html").read_text()
    assert "digits_pretrain: curves" in page
    assert "digits_sft: curves" in page
    shutil.copytree(whole, tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.move(whole, tmp_path / "aside")  # where the configuration of the second stage looks for the first
    try:
        page = write_report(load_run_config([f"run_dir={tmp_path}/moved/sft"])).read_text()
    finally:
        shutil.move(tmp_path / "aside", whole)
    assert [name for name in ("pretrain", "sft") if f"digits_{name}: curves" in page] == ["pretrain", "sft"]
    config = load_run_config([f"run_dir={whole}"])
    assert config.logging.wandb.group == "digits"
    assert read_run(whole / "sft").config.model.pretrained == f"{whole}/pretrain"


class Killed(BaseException):
    """What nobody catches: files are as a kill leaves them."""


BORDERS = ["_is_due", "_write", "write_json", "train_run", "_note_start", "_note", "make_run_dir", "claim"]


def kill_at(monkeypatch, name, when, count):
    calls, function = [], getattr(stages, name)

    def killing(*args, **keywords):
        calls.append(name)
        if (len(calls), when) == (count, "before"):
            raise Killed
        result = function(*args, **keywords)
        if (len(calls), when) == (count, "after"):
            raise Killed
        return result

    monkeypatch.setattr(stages, name, killing)


@pytest.fixture
def quick(monkeypatch):
    """Stages that leave a checkpoint whose content depends on that of the stage before, and train no model."""
    trained = []

    def train_run(config):
        folder = Path(config.run_dir) / "checkpoints" / "step-000002"
        if folder.exists():
            return "trained"
        start = config.model.pretrained
        before = (Path(start) / "checkpoints" / "step-000002" / "manifest.json").read_text() if start else "new"
        folder.mkdir(parents=True)
        save_config(config, Path(config.run_dir) / "config.yaml")
        (folder / "manifest.json").write_text(f"{before} {config.stage} {config.seed}")
        trained.append(config.stage)
        return "max_steps"

    monkeypatch.setattr(stages, "train_run", train_run)
    return trained


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", BORDERS)
def test_killed_at_every_border(point, when, count, quick, composed, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        kill_at(patch, point, when, count)
        try:
            again(composed, tmp_path)
        except Killed:
            pass
        else:
            assert point in ("make_run_dir", "claim"), "the point was never reached"
    assert again(composed, tmp_path) == 0
    assert sorted(quick) == ["pretrain", "sft"]  # each once
    noted = json.loads((tmp_path / STAGES).read_text())
    assert [entry["name"] for entry in noted] == ["pretrain", "sft"]
    assert noted[1]["began_from"] == noted[0]["checkpoint"] != noted[1]["checkpoint"]


DAMAGED_NOTES = {
    "deleted": None,
    "emptied": b"",
    "halved": b'[{"name": "pretrain", "check',
    "a NUL block": b"\0" * 200,
    "JSON of another type": b"7",
    "a list of others": b'[1, null, {"name": 3}, "pretrain"]',
    "not text": b"\xff\xfe[]",
}


@pytest.mark.parametrize("how", list(DAMAGED_NOTES))
@pytest.mark.parametrize("trained", [1, 2])
def test_damaged_notes_of_the_stages_are_made_anew(how, trained, quick, composed, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        kill_at(patch, "train_run", "before", trained + 1)
        with pytest.raises(Killed) if trained == 1 else nullcontext():
            again(composed, tmp_path)
    (tmp_path / STAGES).unlink()
    if DAMAGED_NOTES[how] is not None:
        (tmp_path / STAGES).write_bytes(DAMAGED_NOTES[how])
    assert again(composed, tmp_path) == 0
    assert quick == ["pretrain", "sft"]  # each once
    noted = json.loads((tmp_path / STAGES).read_text())
    assert noted[1]["began_from"] == noted[0]["checkpoint"]


def test_one_stage_alone_and_again(quick, composed, tmp_path):
    with pytest.raises(ConfigError, match="starts from pretrain, which is not trained yet"):
        again(composed, tmp_path, "sft")
    assert again(composed, tmp_path, "pretrain") == 0
    assert quick == ["pretrain"]
    assert again(composed, tmp_path) == 0
    assert quick == ["pretrain", "sft"]
    assert again(composed, tmp_path, "sft") == 0
    assert (tmp_path / "sft.before-1" / "checkpoints").is_dir()
    assert again(composed, tmp_path, "pretrain", seed=1) == 0
    assert quick == ["pretrain", "sft", "sft", "pretrain"]
    with pytest.raises(ConfigError, match="stage=sft trains it again"):  # it no longer follows from the first
        again(composed, tmp_path, seed=1)
    assert again(composed, tmp_path, "sft", seed=1) == 0
    assert again(composed, tmp_path, seed=1) == 0
    assert len(quick) == 5


def test_a_stage_that_began_from_other_weights_is_not_gone_on_with(quick, composed, monkeypatch, tmp_path):
    def half(config):
        if config.stage == "sft":
            folder = Path(config.run_dir) / "checkpoints" / "step-000001"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("half")
            return "signal"
        return whole(config)

    whole = stages.train_run
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_run", half)
        assert again(composed, tmp_path) == 3
    assert again(composed, tmp_path, "pretrain", seed=1) == 0
    with pytest.raises(ConfigError, match="began from weights that pretrain does not hold: stage=sft trains"):
        again(composed, tmp_path, seed=1)
    assert again(composed, tmp_path, "sft", seed=1) == 0
    assert (tmp_path / "sft.before-1" / "checkpoints" / "step-000001").is_dir()
    assert quick == ["pretrain", "pretrain", "sft"]


def test_other_settings_of_a_trained_stage_are_not_passed_over(quick, composed, tmp_path):
    assert again(composed, tmp_path) == 0
    changed = copy.deepcopy(composed)
    changed.configs[0].optimizer.lr *= 2
    changed.configs[1].logging.console = False
    with pytest.raises(
        ConfigError, match=r"was trained with optimizer.lr=0.003 \(now 0.006\): put them back, or stage=pretrain"
    ):
        again(changed, tmp_path)
    changed.configs[0].optimizer.lr /= 2
    assert again(changed, tmp_path, max_hours=5) == 0  # how it runs and logs says nothing of what was learnt
    assert quick == ["pretrain", "sft"]


def test_going_back_within_a_stage_leaves_its_folder_where_it_is(quick, composed, tmp_path):
    assert again(composed, tmp_path) == 0
    back = copy.deepcopy(composed)
    back.configs[1].resume = f"{tmp_path}/sft/checkpoints/step-000002"
    assert again(back, tmp_path, "sft") == 0
    assert not (tmp_path / "sft.before-1").exists()
    back.configs[1].resume = f"{tmp_path}/pretrain/checkpoints/step-000002"  # a new beginning, elsewhere
    assert again(back, tmp_path, "sft") == 0
    assert (tmp_path / "sft.before-1").exists()


@pytest.mark.parametrize("change", ["one between", "one less", "the other way round", "one more"])
def test_another_list_of_stages(change, quick, composed, tmp_path):
    three = copy.deepcopy(composed)
    three.configs.insert(1, copy.deepcopy(three.configs[1]))
    three.configs[1].stage, three.configs[1].run_dir = "middle", three.configs[1].run_dir.replace("sft", "middle")
    three.configs[2].model.pretrained = three.configs[1].run_dir
    first, then = (three, composed) if change == "one less" else (composed, three)
    if change == "the other way round":
        then = copy.deepcopy(composed)
        then.configs.reverse()
        then.configs[0].model.pretrained, then.configs[1].model.pretrained = None, then.configs[0].run_dir
    if change == "one more":
        then.configs.append(then.configs.pop(1))
        then.configs[1].model.pretrained, then.configs[2].model.pretrained = (then.configs[n].run_dir for n in (0, 1))
    assert again(first, tmp_path) == 0
    if change == "one more":
        assert again(then, tmp_path) == 0
        assert quick == ["pretrain", "sft", "middle"]
    else:
        trained = list(quick)
        with pytest.raises(ConfigError, match=r"began from (weights that (middle|pretrain) does|another stage)"):
            again(then, tmp_path)
        assert quick == trained  # nothing is trained before it is refused


def test_data_that_a_later_stage_will_miss_is_said_at_once(quick, composed, tmp_path, capsys):
    missing = copy.deepcopy(composed)
    missing.configs[1].data.sources["single"].path = str(tmp_path / "none-*.tar")
    assert again(missing, tmp_path) == 0
    said = capsys.readouterr().out
    assert said.index("stage sft will need data that is not there yet: No shard matches") < said.index("stage 1 of 2")
    assert said.count("will need data") == 1


def test_trained_stages_name_the_data_that_they_were_trained_with(quick, composed, tmp_path, capsys):
    assert again(composed, tmp_path) == 0
    other = copy.deepcopy(composed)
    other.configs[1].data.sources["single"].path = "other.json"
    assert again(other, tmp_path) == 0
    assert re.search(
        r"sft is trained already, with data\.sources\.single\.path=\S+ \(now other\.json\)", capsys.readouterr().out
    )


@pytest.mark.parametrize(("before", "after", "said"), [(0.0, 0.1, True), (0.02, 0.1, True), (0.1, 0.1, False)])
def test_a_stage_that_measures_what_an_earlier_one_trains_on_is_said(
    before, after, said, quick, composed, tmp_path, capsys
):
    mixed = copy.deepcopy(composed)
    for config, share in zip(mixed.configs, (before, after)):
        config.data.holdout, config.data.sources = share, {"a": SourceConfig(path="a.json")}
        config.data.validation = {}
        hold_out(config.data)
    assert again(mixed, tmp_path) == 0
    line = "stage sft measures on data.validation.a what stage pretrain trains on"
    assert (line in capsys.readouterr().out) == said


@pytest.mark.parametrize("stopped_by", ["signal", "time_limit", "stop_file", "stop_after"])
def test_a_stage_that_was_stopped_is_not_passed_over(stopped_by, quick, composed, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_run", lambda config: stopped_by)
        assert again(composed, tmp_path) == (0 if stopped_by == "stop_after" else 3)
    assert "checkpoint" not in json.loads((tmp_path / STAGES).read_text())[0]
    assert again(composed, tmp_path) == 0
    assert quick == ["pretrain", "sft"]


def test_the_time_limit_is_that_of_the_whole(quick, composed, tmp_path):
    assert again(composed, tmp_path, max_hours=1e-9) == 3
    assert quick == []


def test_the_stop_file_of_the_whole_stops_a_stage(composed, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "forget_request", lambda folder: (folder / "stop").touch())
    assert again(composed, tmp_path) == 3
    assert not (tmp_path / "stop").exists()
    assert not (tmp_path / "sft").exists()


def test_the_optimizer_is_kept_where_asked(overrides, tmp_path):
    path = load_stages(overrides).configs[0].data.sources["documents"].path
    plain = [
        f"data.sources.documents.path={path}",
        "~data.validation.documents",
        "experiment=digits_pretrain",
        *overrides[1:],
    ]
    listed = "stages=[{name: a}, {name: fresh}, {name: kept, overrides: ['optimizer.start=kept']}]"
    assert train(tmp_path, [listed, *plain]) == 0
    counts = {}
    for stage in ("a", "fresh", "kept"):
        folder = tmp_path / stage / "checkpoints" / "step-000002" / "tensors"
        name = next(name for name in stored_tensors(folder) if name.startswith("optimizer/step/"))
        read = {name: torch.zeros(())}
        read_tensors(folder, read)
        counts[stage] = int(read[name])
    assert counts == {"a": 2, "fresh": 2, "kept": 4}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["stage=other"], "stage is 'other', but must be one of pretrain, sft"),
        (["experiment=digits_sft", "stages=[]", "stage=sft"], "lists no stages"),
        (["stages=[{name: a, experiment: digits_pretrain}, {name: a}]"], "has a twice"),
        (["stages=[{name: a/b, experiment: digits_pretrain}]"], "must be a name for a folder"),
        (["stages=[{name: a, experiment: digits_pretrain, overrides: ['run_dir=x']}]"], "sets run_dir, which follows"),
        (["stages=[{nam: a}]"], "did you mean stages.0.name?"),
        (["stages=[{name: logs, experiment: digits_pretrain}]"], "what a file or folder of a run is called"),
        (["stages=[a, b]"], "stages"),
        (["resume=runs/x/checkpoints/step-000001"], "say with stage=NAME which one begins there"),
        (
            [
                "stages=[{name: a, experiment: digits_pretrain}, {name: b, experiment: digits_sft, overrides: ['model=tiny_idefics2']}]"
            ],
            "stage b has model.family=idefics2, but starts from the weights of stage a, of idefics3",
        ),
        (["experiment=digits_sft", "stages=[{name: a, experiment: digits_pretrain}]"], "stands next to stages"),
        (["trainer.max_step=7"], "did you mean trainer.max_steps?"),
        (["optimizer.start=kept"], "stage pretrain: optimizer.start is kept, which needs model.pretrained"),
        (["launch.processes=2"], "which runs on one"),
    ],
)
def test_stages_that_cannot_be_are_refused(given, said, overrides):
    with pytest.raises(ConfigError) as refused:
        load_stages([*overrides, *given])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def _train_in_two(folder, overrides):
    sys.exit(main(["train", f"run_dir={folder}", *overrides, "engine=ddp"]))


@pytest.mark.slow
def test_two_processes_go_through_the_stages_as_one_does(whole, overrides, tmp_path):
    """With one process group for all stages."""
    ranks = start_ranks(_train_in_two, 2, str(tmp_path / "run"), overrides, folder=tmp_path)
    try:
        assert [child.wait(timeout=240) for child in ranks] == [0, 0], ranks[0].said()
    finally:
        end_ranks(ranks)
    for stage in ("pretrain", "sft"):
        expected, got = rows(whole / stage), rows(tmp_path / "run" / stage)
        assert [(row[0], row[3]) for row in got] == [(row[0], row[3]) for row in expected]
        assert [row[1] for row in got] == pytest.approx([row[1] for row in expected], rel=1e-5)


def _train_killed(folder, overrides):
    note = stages._note

    def killed(*args):
        note(*args)
        os.kill(os.getpid(), 9)

    stages._note = killed
    main(["train", f"run_dir={folder}", *overrides])


@pytest.mark.slow
def test_a_real_kill_between_stages_changes_nothing(whole, overrides, tmp_path):
    killed = warm.start(_train_killed, str(tmp_path / "run"), overrides, output=tmp_path / "log")
    assert killed.wait(timeout=120) == -9, killed.said()
    assert not (tmp_path / "run" / "sft").exists()
    assert train(tmp_path / "run", overrides) == 0
    for stage in ("pretrain", "sft"):
        assert rows(tmp_path / "run" / stage) == rows(whole / stage)
