"""The commands as functions of Python."""

import dataclasses

import pytest

import m4train
from m4train.errors import ConfigError
from tests.end_to_end.conftest import small_run

pytestmark = pytest.mark.slow


class Watcher(m4train.Callback):
    """Keeps what it is called with."""

    def __init__(self):
        self.steps, self.losses, self.ended = [], [], None

    def on_step_end(self, trainer):
        self.steps.append(trainer.step)

    def on_metrics(self, trainer, metrics):
        self.losses.append(metrics["loss"])

    def on_end(self, trainer, result):
        self.ended = result.stopped_by

    def state(self):
        return {"steps": self.steps}

    def load(self, state):
        self.steps = list(state.get("steps", []))


def test_a_model_lives_its_life_in_python(digits_root, tmp_path):
    run = [
        *small_run(digits_root, tmp_path),
        "experiment=digits_sft",
        "trainer.max_steps=4",
        "trainer.stop_after=2",
        "data.num_workers=0",
        "logging.console=false",
        "evaluation.max_samples=3",
    ]
    config = m4train.load_config(run)
    shown = m4train.preview(config, packs=2)
    assert len(shown.packs) == 2
    assert shown.packs[0].loss_tokens > 0
    assert "<iframe" in shown._repr_html_()
    estimate = m4train.estimate(config)
    assert estimate.fits
    assert estimate.memory.expected > 0

    watcher = Watcher()
    result = m4train.train(config, callbacks=[watcher])
    assert (result.step, result.stopped_by, watcher.ended) == (2, "stop_after", "stop_after")
    assert watcher.steps == [1, 2]
    assert [loss for _, loss in result.series("loss")] == watcher.losses
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step-000002"
    assert "&lt;svg" in result._repr_html_()
    again = Watcher()
    assert m4train.train(config, callbacks=[again]).step == 4
    assert again.steps == [1, 2, 3, 4]  # its state is kept in the checkpoint
    assert m4train.train(config).stopped_by == "trained"  # there was nothing to do

    run_of = m4train.load_config([f"run_dir={tmp_path / 'run'}"], run=True)
    evaluated = m4train.evaluate(dataclasses.replace(run_of))
    assert {name: score["count"] for name, score in evaluated.scores.items()} == {"single": 3, "multi": 3}
    assert all({"question", "answer", "score", "images"} <= set(answer) for answer in evaluated.answers)
    assert "Held-out answers" in evaluated._repr_html_()
    exported = m4train.export(run_of)
    assert exported.folder == tmp_path / "run" / "export"
    assert exported.drift is not None


def test_what_a_function_cannot_do_is_said(tmp_path):
    config = m4train.load_config(
        ["experiment=digits_pretrain", "engine=ddp", "launch.processes=2", f"run_dir={tmp_path}"]
    )
    for function in (m4train.train, m4train.evaluate, m4train.preview):
        with pytest.raises(ConfigError, match=r"launch\.processes is 2, but a function of Python works in its own"):
            function(config)
    with pytest.raises(ConfigError, match=r"did you mean trainer\.max_steps"):
        m4train.load_config(["experiment=digits_pretrain", "trainer.max_step=2"])
    with pytest.raises(ConfigError, match="--config-dir names nowhere"):
        m4train.load_config(["experiment=digits_pretrain"], config_dir="nowhere")


@pytest.mark.parametrize("name", ["load_config", "train", "evaluate", "estimate", "export", "preview"])
def test_functions_are_documented(name):
    assert name in m4train.__all__
    assert len(getattr(m4train, name).__doc__) > 60
