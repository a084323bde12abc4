"""Weights & Biases: its own offline files, and a server on loopback."""

from __future__ import annotations

import json
from typing import Any

import pytest
import wandb
from PIL import Image

from m4train.config import Config, LoggingConfig, WandbConfig
from m4train.config.compose import load_config, save_config, stored_config
from m4train.config.logging_checks import check_logging
from m4train.config.wandb_keys import VARIABLES, mode_of, options, said
from m4train.errors import ConfigError, TrainingError
from m4train.processing.images import data_uri
from m4train.training import wandb_runs
from m4train.training.callbacks import Callback, Checkpointing, Jsonl
from m4train.training.callbacks.first_packs import FirstPacks
from m4train.training.callbacks.samples import Samples
from m4train.training.callbacks.wandb import Wandb
from tests.helpers.training import TinyModel, make_config, make_trainer
from tests.helpers.wandb_files import logged, offline_files, opened, records

_LINK = data_uri(Image.new("RGB", (4, 4)))
SAID = {"source": "web", "key": "a", "question": "?", "answer": "7", "references": ["7"], "score": 1.0}
PACK = {"pack": 0, "source": "web", "key": "k", "tokens": 3, "loss_tokens": 1, "images": [_LINK], "problem": ""}
SPANS = [{"kind": "masked", "tokens": 1, "text": "<a>"}, {"kind": "trained", "tokens": 1, "text": "yes"}]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in (*VARIABLES.values(), "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CONSOLE", "off")


def wandb_trainer(run_dir, more: tuple = (), artifacts: str = "none", **trainer: Any):
    config = make_config(run_dir, **{"max_steps": 6, "save_every": 2, **trainer})
    config.logging.trackers, config.logging.wandb.artifacts = ["wandb"], artifacts
    callbacks = [Samples(3, 6), Jsonl(config), Wandb(config), FirstPacks(), *more, Checkpointing(2)]
    lines = [{**PACK, "spans": SPANS}]
    answers = lambda: [{**SAID, "images": [_LINK, _LINK]}]
    trainer = make_trainer(config, TinyModel(), callbacks=callbacks, answers=answers)
    trainer.packs = lambda: lines
    return trainer


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step == self.step:
            raise TrainingError("the machine is on fire at s3://me:secret@store/x")


@pytest.fixture(scope="module")
def restarted(tmp_path_factory, request):
    """The directory of a run that failed at step 5 and went on from its checkpoint of step 4 to its end, offline."""
    run_dir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        patch.setenv("WANDB_DATA_DIR", str(run_dir / "data"))
        with pytest.raises(TrainingError):
            wandb_trainer(run_dir, (KillAt(5),)).train()
        wandb_trainer(run_dir).train()
        wandb.teardown()  # all of it is in the files
    return run_dir


def test_a_run_that_goes_on_is_one_run_whose_steps_grow(restarted):
    runs = opened(restarted)
    assert len({run.run_id for run in runs}) == 1
    assert len(offline_files(restarted)) == 2
    assert {(run.project, run.display_name, run.run_group, run.job_type) for run in runs} == {
        ("m4train", "tiny", "tiny", "train")
    }
    steps = [line["_step"] for line in logged(restarted)]
    assert [step for step in steps if step] == [1, 2, 3, 4, 5, 6]
    assert steps == sorted(steps)
    assert [line["loss"] for line in logged(restarted) if "loss" in line] == [
        json.loads(line)["loss"] for line in (restarted / "metrics.jsonl").open()
    ]


def test_texts_are_not_in_the_history(restarted):
    assert "data_hash" not in {key for line in logged(restarted) for key in line}
    for line in logged(restarted):
        for key, value in line.items():
            assert isinstance(value, (int, float)) or key.startswith(("samples.", "first_packs.")), key


def test_tables_of_packs_and_answers_with_pictures(restarted):
    staged = [path.read_bytes() for path in (restarted / "data").rglob("*") if path.is_file()]
    tables = [
        json.loads(content)
        for content in staged
        if content.startswith(b'{"columns"') or b'"_type": "table"' in content[:200]
    ]
    rows = [dict(zip(table["columns"], row)) for table in tables for row in table["data"]]
    packs = next(row for row in rows if "masks" in row)
    assert (packs["tokens"], packs["loss_tokens"]) == (3, 1)
    assert (packs["images"]["_type"], packs["masks"]["_type"]) == ("image-file", "html-file")
    page = next(content.decode() for content in staged if b"&lt;a&gt;" in content)
    assert '<span title="masked" style="background:#eeeeee">&lt;a&gt;</span>' in page
    assert 'title="trained"' in page
    answers = [row for row in rows if "answer" in row]
    assert {row["step"] for row in answers} == {3, 6}
    assert all(row["images"]["_type"] == "image-file" for row in answers)
    assert any(content.startswith(b"\x89PNG") for content in staged)


def test_a_bad_end_is_an_alert_and_a_failed_run(restarted):
    first, second = ([*records(path)] for path in offline_files(restarted))
    kinds = [record.WhichOneof("record_type") for record in first]
    alert = first[kinds.index("alert")].alert
    assert alert.title == "tiny ended badly"
    assert "At step 5: the machine is on fire" in alert.text
    assert "secret" not in alert.text
    assert alert.level == "ERROR"
    assert [record.exit.exit_code for record in first if record.WhichOneof("record_type") == "exit"] == [1]
    assert [record.exit.exit_code for record in second if record.WhichOneof("record_type") == "exit"] == [0]
    assert "alert" not in [record.WhichOneof("record_type") for record in second]


# key -> what it is set to, and what W&B's variable says instead
VALUES = {
    "mode": ("online", "disabled"),
    "entity": ("team", "other"),
    "project": ("reading", "writing"),
    "group": ("stages", "others"),
    "job_type": ("sft", "pretraining"),
    "name": ("mine", "yours"),
    "id": ("abc", "def"),
    "tags": (["a", "b"], "c,d"),
    "notes": ("first try", "second try"),
    "dir": ("here", "there"),
    "resume": ("must", "never"),
    "save_code": (True, "false"),
}
OURS = {
    "project": "m4train",
    "name": "run",
    "id": "new",
    "group": "run",
    "job_type": "train",
    "dir": "runs",
    "resume": "allow",
}


def test_every_key_has_a_variable():
    assert VALUES.keys() == VARIABLES.keys()


@pytest.mark.parametrize("key", VALUES)
def test_a_key_counts_before_its_variable_and_that_before_what_m4train_gives(key, monkeypatch):
    of_the_key, of_the_variable = VALUES[key]
    plain, set_here = WandbConfig(), WandbConfig(**{key: of_the_key})
    assert options(plain, **OURS).get(key) == ({**OURS, "mode": "offline"}.get(key))
    monkeypatch.setenv(VARIABLES[key], of_the_variable)
    assert options(set_here, **OURS)[key] == of_the_key
    assert said(plain, key) == of_the_variable
    # what is left out is read by W&B itself from its variable
    assert options(plain, **OURS).get(key) == (of_the_variable if key == "mode" else None)


def test_the_modes_of_variables(monkeypatch):
    for variable, mode in (("run", "online"), ("dryrun", "offline")):
        monkeypatch.setenv("WANDB_MODE", variable)
        assert mode_of(WandbConfig()) == mode
        assert mode_of(WandbConfig(mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "shared")  # whose steps are W&B's own
    with pytest.raises(ConfigError, match="WANDB_MODE is 'shared'"):
        check_logging(Config(logging=LoggingConfig(trackers=["wandb"])))
    check_logging(Config(logging=LoggingConfig(trackers=["jsonl"])))
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert mode_of(WandbConfig()) == "disabled"
    assert mode_of(WandbConfig(mode="online")) == "online"


@pytest.mark.slow
def test_wandb_reads_its_variables_and_the_keys_reach_it(tmp_path, monkeypatch):
    """Both in one real run: the keys that are set, and for the others the variables."""
    place = {"dir": str(tmp_path / "elsewhere"), "mode": "offline", "resume": "allow", "save_code": "true"}
    (tmp_path / "elsewhere").mkdir()
    for key, (_, variable) in VALUES.items():
        monkeypatch.setenv(VARIABLES[key], place.get(key, variable))
    wandb.teardown()  # a process reads its variables once
    trainer = wandb_trainer(tmp_path / "run", max_steps=1, save_every=1)
    trainer.config.logging.wandb.project = "reading"
    trainer.config.logging.wandb.tags = ["a", "b"]
    trainer.train()
    wandb.teardown()
    (run,) = opened(tmp_path / "elsewhere")
    assert (run.project, list(run.tags)) == ("reading", ["a", "b"])
    assert (run.entity, run.run_group, run.job_type) == ("other", "others", "pretraining")
    assert (run.run_id, run.display_name, run.notes) == ("def", "yours", "second try")
    (path,) = offline_files(tmp_path / "elsewhere")
    code = [record.artifact.name for record in records(path) if record.WhichOneof("record_type") == "artifact"]
    assert "code-def" in code


REFUSED = [
    (["logging.wandb.mode=sometimes"], "logging.wandb.mode is 'sometimes'"),
    (["logging.wandb.resume=perhaps"], "logging.wandb.resume is 'perhaps'"),
    (["logging.wandb.artifacts=some"], "logging.wandb.artifacts is 'some'"),
    (["logging.wandb.artifacts=best"], "trainer.best.metric is null"),
    (["logging.wandb.by_reference=true"], "logging.wandb.artifacts is none"),
    (["logging.wandb.artifacts=all", "logging.wandb.by_reference=true"], "trainer.keep_every"),
    (["logging.wandb.id=a/b"], "logging.wandb.id is 'a/b'"),
    (["logging.trackers=[mlflow]"], "logging.trackers is 'mlflow'"),
    (["logging.trackers=[wandb,wandb]"], "names one twice"),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED)
def test_what_cannot_be_is_refused(overrides, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(["experiment=digits_pretrain", *overrides])
    assert sentence in str(error.value)


def test_the_keys_of_before_are_taken(tmp_path):
    given = load_config(["experiment=digits_pretrain", "logging.wandb=offline", "logging.project=p"]).logging
    stored = stored_config({"logging": {"wandb": "disabled", "project": "p"}}, tmp_path).logging
    for logging, mode in ((given, "offline"), (stored, "disabled")):
        assert (logging.wandb.mode, logging.wandb.project, logging.wandb.artifacts) == (mode, "p", "none")


def test_a_stage_is_in_the_group_of_the_one_before(tmp_path):
    first, second = make_config(tmp_path / "one"), make_config(tmp_path / "two")
    (tmp_path / "one").mkdir()
    save_config(first, tmp_path / "one" / "config.yaml")
    wandb_runs.remember(tmp_path / "one", {"id": "a", "group": "both", "step": 3})
    second.model.pretrained = str(tmp_path / "one")
    assert wandb_runs._group(second) == "both"
    (tmp_path / "one" / "export").mkdir()
    (tmp_path / "one" / "export" / "m4train.json").write_text(json.dumps({"run_dir": str(tmp_path / "one")}))
    second.model.pretrained = str(tmp_path / "one" / "export")
    assert wandb_runs._group(second) == "both"
    assert wandb_runs._group(first) == "tiny"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"id": 3}', '{"id": "a/b", "step": 1, "group": "g"}'])
def test_a_damaged_memory_is_none(damage, tmp_path):
    (tmp_path / "wandb.json").write_text(damage)
    assert wandb_runs.remembered(tmp_path) == {}
