"""Weights & Biases against a server on loopback: online runs, artifacts, and what offline runs become when they are sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import wandb

from m4train.build import start_folder
from m4train.cli import main
from m4train.commands import stages
from m4train.commands.sync import sync
from m4train.config import BestConfig
from m4train.config.compose import save_config
from m4train.config.stages import Staged
from m4train.errors import ConfigError, TrainingError
from m4train.run_files import WANDB
from m4train.training import wandb_runs
from m4train.training.callbacks import Best, Callback, Checkpointing, Jsonl
from m4train.training.callbacks.wandb import Wandb
from m4train.wandb_artifacts import artifact_folder
from tests.helpers.checkpoints import saved_run
from tests.helpers.data import conversations, write_shards
from tests.helpers.training import TinyModel, make_config, make_trainer
from tests.helpers.wandb_server import KEY, Server, serving


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The server that wandb of this process, and of those it starts, talks to."""
    with serving() as server:
        for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR", "WANDB_DISABLED"):
            monkeypatch.delenv(name, raising=False)
        for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
            monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
        for name, value in {"BASE_URL": server.address, "API_KEY": KEY, "SILENT": "true", "CONSOLE": "off"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        wandb.teardown()  # a process reads its variables once
        artifact_folder.cache_clear()
        yield server
        wandb.teardown()


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step == self.step:
            raise TrainingError("out of order")


def config_of(run_dir: Path, mode: str = "online", **keys: Any):
    config = make_config(run_dir, max_steps=6, save_every=2, keep_last=9)
    config.trainer.best = BestConfig("loss")
    config.logging.trackers = ["wandb"]
    for key, value in {"mode": mode, "entity": "team", "project": "reading", **keys}.items():
        setattr(config.logging.wandb, key, value)
    return config


def trainer_of(run_dir: Path, more: tuple = (), mode: str = "online", **keys: Any):
    config = config_of(run_dir, mode, **keys)
    callbacks = [Jsonl(config), Wandb(config), Best(config.trainer.best), *more, Checkpointing(2)]
    return make_trainer(config, TinyModel(), callbacks=callbacks)


def steps_of(server: Server) -> list[int]:
    (run,) = server.runs.values()
    return [line["_step"] for line in run.history]


@pytest.mark.slow
def test_a_restarted_offline_run_is_sent_as_one_run(server, tmp_path, capfd):
    with pytest.raises(TrainingError):
        trainer_of(tmp_path / "run", (KillAt(5),), "offline").train()
    trainer_of(tmp_path / "run", mode="offline").train()
    wandb.teardown()  # all of it is in the files
    assert not server.runs
    assert sync([str(tmp_path / "run")]) == 0
    (run,) = server.runs.values()
    assert (run.entity, run.project, run.said["groupName"], run.said["jobType"]) == ("team", "reading", "tiny", "train")
    assert steps_of(server) == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in run.history] == [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").open()
    ]
    assert [alert["title"] for alert in run.alerts] == ["tiny ended badly"]
    assert run.exit_code == 0
    assert run.summary["stopped_by"] == "max_steps"
    assert sync([str(tmp_path / "run")]) == 0  # there is nothing more
    assert "nothing to send: all 2 offline parts are at W&B already" in capfd.readouterr().out
    assert len(steps_of(server)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", pytest.param("offline", marks=pytest.mark.full)])
def test_stages_are_one_group_with_a_run_each_also_after_a_kill(mode, server, tmp_path, monkeypatch):
    configs = []
    for stage in ("pretrain", "sft"):
        config = config_of(tmp_path / "run" / stage, mode, group="both")
        config.name, config.stage = f"both_{stage}", stage
        configs.append(config)
    killed: list[tuple] = [(KillAt(3),), (KillAt(5),)]  # in the first stage, then in the second

    def train_run(config: Any) -> str:
        more = killed.pop(0) if killed and config.stage == ("sft" if len(killed) == 1 else "pretrain") else ()
        callbacks = [Jsonl(config), Wandb(config), *more, Checkpointing(2)]
        result = make_trainer(config, TinyModel(), callbacks=callbacks).train()
        save_config(config, Path(config.run_dir) / "config.yaml")
        return result.stopped_by

    monkeypatch.setattr(stages, "train_run", train_run)
    staged = Staged(tmp_path / "run", configs)
    for _ in range(2):
        with pytest.raises(TrainingError):
            stages.train_stages(staged)
    assert stages.train_stages(staged) == 0
    assert killed == []
    if mode == "offline":
        wandb.teardown()
        assert not server.runs
        assert sync([str(tmp_path / "run")]) == 0
    runs = {run.said["displayName"]: run for run in server.runs.values()}
    assert len(runs) == len(server.runs) == 2
    assert {run.said["groupName"] for run in runs.values()} == {"both"}
    for name in ("both_pretrain", "both_sft"):
        assert [line["_step"] for line in runs[name].history] == [1, 2, 3, 4, 5, 6]
        assert runs[name].exit_code == 0


@pytest.mark.slow
def test_an_online_run_goes_on_and_its_checkpoints_are_artifacts(server, tmp_path):
    with pytest.raises(TrainingError):
        trainer_of(tmp_path / "run", (KillAt(5),), artifacts="all").train()
    trainer_of(tmp_path / "run", artifacts="all").train()
    assert steps_of(server) == [1, 2, 3, 4, 5, 6]
    (run,) = server.runs.values()
    assert len(run.alerts) == 1
    name = f"tiny-{run.id}"
    found = [one for one in server.artifacts if one.type == "model"]
    assert {one.collection for one in found} == {name}
    assert all(one.committed for one in found)
    print([(o.aliases, o.metadata, list(server.contents(o))[:4]) for o in found])
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["step"]
    assert next(one for one in found if "best" in one.aliases).metadata["step"] == best
    assert "latest" in found[-1].aliases
    folder = Path(start_folder(f"wandb:team/reading/{name}:best"))
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{best:06d}"
    files = {path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == files
    assert all((folder / path).read_bytes() == (checkpoint / path).read_bytes() for path in files)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["last", "best"])
def test_artifacts_by_reference_hold_paths(policy, server, tmp_path):
    trainer_of(tmp_path / "run", artifacts=policy, by_reference=True).train()
    found = [one for one in server.artifacts if one.type == "model"]
    if policy == "last":
        assert [one.metadata["step"] for one in found] == [6]
    assert "best" in found[-1].aliases or policy == "last"
    newest = tmp_path / "run" / "checkpoints" / f"step-{found[-1].metadata['step']:06d}"
    entries = server.contents(found[-1])
    assert entries["state.json"]["ref"] == (newest / "state.json").as_uri()
    assert not [path for path in server.storage if path.startswith("artifacts/") and path.endswith("state.json")]
    folder = artifact_folder(f"wandb:team/reading/{found[-1].collection}:latest")
    assert (folder / "state.json").read_bytes() == (newest / "state.json").read_bytes()


@pytest.mark.slow
def test_the_artifact_of_the_best_that_a_kill_prevented_is_made_at_the_next_start(server, tmp_path, monkeypatch):
    keys = {"artifacts": "best", "by_reference": True}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt  # after the checkpoint is whole and noted as the best, before its artifact

    first = trainer_of(tmp_path / "run", **keys)
    best = next(each for each in first.callbacks if isinstance(each, Best))
    best.metric, best._sign = "step", 1.0  # the first checkpoint stays the best
    with monkeypatch.context() as patch:
        patch.setattr(wandb_runs, "log_model", killed)
        with pytest.raises(KeyboardInterrupt):
            first.train()
    noted = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["step"]
    assert not [one for one in server.artifacts if one.type == "model"]
    again = trainer_of(tmp_path / "run", **keys)
    best = next(each for each in again.callbacks if isinstance(each, Best))
    best.metric, best._sign = "step", 1.0
    again.train()
    assert [one.metadata["step"] for one in server.artifacts if one.type == "model"] == [noted]
    trainer_of(tmp_path / "run", **keys).train()  # it is there: not made twice
    assert len([one for one in server.artifacts if one.type == "model"]) == 1


ONLINE = ("logging.trackers=[wandb]", "logging.wandb.mode=online", "logging.wandb.project=reading")


@pytest.mark.slow
def test_the_command_export_makes_an_artifact(server, tmp_path):
    saved_run(tmp_path / "run", *ONLINE, "logging.wandb.artifacts=last", "export.verify=false")
    (tmp_path / "run" / WANDB).write_text('{"id": "abc12345", "group": "stages", "step": 3}')
    assert main(["export", f"run_dir={tmp_path / 'run'}"]) == 0
    (made,) = (one for one in server.artifacts if one.type == "model")
    assert (made.collection, made.committed) == ("digits_pretrain-abc12345-export", True)
    assert made.metadata == {"step": 3, "drift": None, "group": "stages"}
    assert set(made.aliases) == {"latest", "step-000003"}
    files = {path.name: path for path in (tmp_path / "run" / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys() == set(server.contents(made))
    sent = server.storage[f"artifacts/{made.id}/model.safetensors"]
    assert sent == files["model.safetensors"].read_bytes()


@pytest.mark.slow
def test_the_command_evaluate_sends_its_answers_with_their_pictures(server, tmp_path):
    write_shards(tmp_path, conversations(3))
    held = ("~data.validation.multi", f"data.validation.single.path={tmp_path}/*.tar", "evaluation.max_new_tokens=2")
    saved_run(tmp_path / "run", "data=digits_conversations", "data.prepare=null", *held, *ONLINE, "data.num_workers=0")
    (tmp_path / "run" / WANDB).write_text('{"id": "abc12345", "group": "stages", "step": 3}')
    assert main(["evaluate", f"run_dir={tmp_path / 'run'}"]) == 0
    (run,) = server.runs.values()
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").open()]
    assert (run.said["groupName"], run.said["jobType"], len(lines)) == ("stages", "evaluate", 3)
    (made,) = server.artifacts  # a table with pictures is one
    table = json.loads(server.storage[f"artifacts/{made.id}/answers.table.json"])
    rows = [dict(zip(table["columns"], row)) for row in table["data"]]
    assert [(row["key"], row["answer"]) for row in rows] == [(line["key"], line["answer"]) for line in lines]
    assert run.summary["answers"]["nrows"] == len(rows)
    for row in rows:
        assert row["images"]["_type"] == "image-file"
        assert server.storage[f"artifacts/{made.id}/{row['images']['path']}"].startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_evaluation_is_a_run_of_its_own_in_the_group(server, tmp_path):
    trainer = trainer_of(tmp_path / "run", group="stages", artifacts="none")
    trainer.train()
    line = {
        "source": "web",
        "key": "k",
        "question": "?",
        "answer": "7",
        "references": ["7"],
        "score": 1.0,
        "images": [],
    }
    scores = {"web": {"loss": 1.5, "metric": "exact_match", "exact_match": 0.5, "count": 2}}
    Wandb(trainer.config).on_evaluation("step-000006", scores, [line])
    first, second = server.runs.values()
    assert [run.said["groupName"] for run in (first, second)] == ["stages", "stages"]
    assert [run.said["jobType"] for run in (first, second)] == ["train", "evaluate"]
    assert (second.said["displayName"], second.summary["web/exact_match"], second.summary["model"]) == (
        "tiny-evaluate",
        0.5,
        "step-000006",
    )
    assert second.summary["answers"]["_type"] == "table-file"
    run = wandb_runs.open_run(trainer.config, wandb_runs.EXPORT, wandb_runs.remembered(tmp_path / "run"))
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    wandb_runs.log_model(run, trainer.config, export, f"tiny-{first.id}-export", ["step-000006"], {"step": 6})
    run.finish()
    made = server.artifacts[-1]
    assert (made.collection, made.metadata["group"], made.committed) == (f"tiny-{first.id}-export", "stages", True)
    assert list(server.contents(made)) == ["config.json"]


@pytest.mark.parametrize("name", ["wandb:model", "wandb:project/model", "wandb:a/b/c/d"])
def test_what_is_no_artifact_is_refused(name):
    with pytest.raises(ConfigError, match="its form is wandb:ENTITY/PROJECT/NAME:best"):
        artifact_folder(name)


def test_sync_refuses_what_has_no_files(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="sync needs the directories of runs"):
        sync([])
    with pytest.raises(ConfigError, match="holds no offline files of W&B"):
        sync([str(tmp_path)])
    part = tmp_path / "wandb" / "offline-run-1-abc"
    part.mkdir(parents=True)
    (part / "run-abc.wandb").touch()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="There is no W&B key"):
        sync([str(tmp_path)])
