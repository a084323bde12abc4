import os
import signal
import time

import pytest
import torch

from m4train.config import PartOptimizerConfig
from m4train.errors import TrainingError
from m4train.training.callbacks.base import Callback
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics

CLOCK = {"tokens_per_second", "data_wait_fraction", "tflops", "tflops/text", "tflops/vision", "memory_gib"}


def _without_clock(metrics):
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics]


class _At(Callback):
    """Does something when a step is reached."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            self.action(trainer)


def _run(config, *extra, **options):
    trainer = make_trainer(config, options.pop("model", None) or TinyModel(dropout=0.1), **options)
    trainer.callbacks[:0] = extra
    return trainer.train()


def _steps(run_dir):
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").iterdir())


def test_a_run_learns_and_logs_every_metric(tmp_path):
    config = make_config(tmp_path, max_steps=40, eval_every=20)
    config.optimizer.lr, config.optimizer.weight_decay = 3e-2, 0.0
    result = _run(config, model=TinyModel())
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert result.step == 40
    assert result.stopped_by == "max_steps"
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    expected = {"loss", "loss/web", "grad_norm", "grad_norm/text", "lr", "tokens", "loss_tokens", "images", "data_hash"}
    assert expected | CLOCK | {"padding_fraction", "skipped_steps", "quarantined"} <= set(lines[0])
    assert [line["step"] for line in lines if "eval/loss" in line] == [20, 40]
    assert lines[19]["eval/loss"] == pytest.approx(
        sum(lines[19][f"eval/loss/{s}"] * lines[19][f"eval/loss_tokens/{s}"] for s in ("web", "chat"))
        / lines[19]["eval/loss_tokens"]
    )


def test_only_asked_for_steps_are_logged(tmp_path):
    _run(make_config(tmp_path, log_every=5, eval_every=8))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 5, 8, 10, 12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_in_a_checkpoint_and_handlers_are_put_back(number, tmp_path):
    before = signal.getsignal(number)
    result = _run(make_config(tmp_path), _At(6, lambda trainer: os.kill(os.getpid(), number)))
    assert (result.step, result.stopped_by) == (6, "signal")
    assert _steps(tmp_path) == [4, 6]
    assert signal.getsignal(number) == before


def test_the_stop_file_is_obeyed_once(tmp_path):
    result = _run(make_config(tmp_path), _At(5, lambda trainer: (tmp_path / "stop").touch()))
    assert (result.step, result.stopped_by) == (5, "stop_file")
    assert _run(make_config(tmp_path)).stopped_by == "max_steps"


def test_the_end_of_the_data_ends_the_run(tmp_path):
    result = _run(make_config(tmp_path), steps=7)
    assert (result.step, result.stopped_by) == (7, "end_of_data")
    assert _steps(tmp_path) == [4, 7]


@pytest.mark.parametrize(
    ("steps", "stop", "logged", "measured"),
    [
        (7, None, [1, 5, 6, 7], [6, 7]),  # the data end after a step that was not logged,
        (5, None, [1, 5], [5]),  # that was logged but not measured,
        (6, None, [1, 5, 6], [6]),  # that was both
        (None, 7, [1, 5, 6, 7], [6]),  # a signal ends the run early: the step is logged, and nothing is measured
        (None, None, [1, 5, 6, 10, 12], [6, 12]),
    ],
)
def test_the_last_step_is_logged_and_at_the_end_of_the_data_measured(steps, stop, logged, measured, tmp_path):
    config = make_config(tmp_path, log_every=5, eval_every=6)
    result = _run(
        config, *([_At(stop, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))] if stop else []), steps=steps
    )
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == logged
    assert [line["step"] for line in lines if "eval/loss" in line] == measured
    assert result.metrics == lines[-1]
    assert all(0 <= line["data_wait_fraction"] <= 1 for line in lines)


def test_a_slow_first_batch_is_no_more_than_all_of_the_time(tmp_path):
    trainer = make_trainer(make_config(tmp_path, max_steps=2), TinyModel())
    batches = list(make_trainer(make_config(tmp_path / "other"), TinyModel(), steps=2).loader)

    def slowly():
        for batch in batches:
            time.sleep(0.5)
            yield batch

    trainer.loader = slowly()
    trainer.train()
    assert all(0 <= line["data_wait_fraction"] <= 1 for line in read_metrics(tmp_path))


def test_the_rate_of_every_part_is_logged(tmp_path):
    config = make_config(tmp_path, max_steps=4)
    config.optimizer.parts = {"vision": PartOptimizerConfig(lr=1e-4)}
    _run(config)
    for line in read_metrics(tmp_path):
        assert line["lr/text"] == line["lr"]
        assert line["lr/vision"] == pytest.approx(line["lr"] * 1e-2)


@pytest.mark.parametrize("pieces", [[5], [4, 4], [1, 2, 3]])
def test_an_interrupted_run_equals_an_uninterrupted_one_to_the_last_bit(pieces, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(make_config(whole, eval_every=6))
    for steps in pieces:
        assert _run(make_config(broken, eval_every=6, stop_after=steps)).stopped_by == "stop_after"
    _run(make_config(broken, eval_every=6))
    assert _without_clock(read_metrics(whole)) == _without_clock(read_metrics(broken))
    for name in ("tensors/__0_0.distcp",):
        files = [run / "checkpoints" / "step-000012" / name for run in (whole, broken)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_splitting_a_step_in_micro_batches_does_not_change_the_curve(tmp_path):
    curves = []
    for micro in (8, 4, 1):
        config = make_config(tmp_path / str(micro), micro_batch_size=micro)
        _run(config, model=TinyModel())
        curves.append(read_metrics(tmp_path / str(micro)))
    for other in curves[1:]:
        for a, b in zip(curves[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
            assert b["data_hash"] == a["data_hash"]


def test_a_finished_run_does_nothing_more(tmp_path):
    _run(make_config(tmp_path))
    result = _run(make_config(tmp_path))
    assert (result.step, result.stopped_by) == (12, "max_steps")


@pytest.mark.parametrize("rehearsed", [True, False])
def test_a_parameter_without_gradient_is_named(rehearsed, tmp_path):
    with pytest.raises(TrainingError, match=r"connector\.forgotten"):
        _run(make_config(tmp_path, worst_batch_first=rehearsed), model=TinyModel(unused=True))


def test_persistent_bad_steps_end_the_run_with_a_report(tmp_path):
    model = TinyModel()
    config = make_config(tmp_path, max_skipped_in_a_row=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="3 steps in a row up to step 3"):
        _run(config, model=model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_skipped_steps_are_counted_and_survive_a_resume(tmp_path):
    bad = {2, 5, 8}
    for stop_after in (5, None):
        model = TinyModel()
        trainer = make_trainer(make_config(tmp_path, stop_after=stop_after), model)
        model.lm_head.weight.register_hook(lambda g, t=trainer: g * float("inf") if t.step + 1 in bad else g)
        trainer.train()
    assert [line["skipped_steps"] for line in read_metrics(tmp_path)] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]


def test_quarantined_samples_are_shown(tmp_path):
    _run(make_config(tmp_path, max_steps=2), quarantined=lambda: 3)
    assert read_metrics(tmp_path)[-1]["quarantined"] == 3


def test_extra_files_are_put_into_every_checkpoint(tmp_path):
    _run(make_config(tmp_path), save_extra=lambda folder: (folder / "config.json").write_text("{}"))
    assert all((path / "config.json").exists() for path in (tmp_path / "checkpoints").iterdir())


def test_the_time_limit_ends_in_a_checkpoint(tmp_path):
    result = _run(make_config(tmp_path, max_hours=1e-9))
    assert (result.step, result.stopped_by) == (0, "time_limit")
    assert not (tmp_path / "checkpoints").exists()  # a fresh start is where this one ended
    trainer = make_trainer(make_config(tmp_path, max_hours=1.0))
    trainer._stops.out_of_time = lambda: trainer.step == 3
    assert trainer.train().stopped_by == "time_limit"
    assert _steps(tmp_path) == [3]
    assert _run(make_config(tmp_path, max_hours=1.0)).stopped_by == "max_steps"


def test_skipped_steps_leave_readable_json(tmp_path):
    model = TinyModel()
    trainer = make_trainer(make_config(tmp_path, max_steps=3), model)
    model.lm_head.weight.register_hook(lambda g: g * float("nan") if trainer.step == 1 else g)
    trainer.train()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert [line["grad_norm"] is None for line in read_metrics(tmp_path)] == [False, True, False]


def test_outliers_are_skipped_and_the_guard_survives_a_resume(tmp_path, monkeypatch):
    from m4train.training import guard

    monkeypatch.setattr(guard, "WINDOW", 4)
    for name, pieces in (("whole", (None,)), ("broken", (5, None))):
        for stop_after in pieces:
            model = TinyModel()
            config = make_config(tmp_path / name, stop_after=stop_after, skip_outliers=6.0)
            trainer = make_trainer(config, model)
            model.lm_head.weight.register_hook(lambda g, t=trainer: g * 1e3 if t.step + 1 in (3, 8) else g)
            trainer.train()
    whole, broken = (read_metrics(tmp_path / name) for name in ("whole", "broken"))
    assert whole[7]["skipped_steps"] == whole[6]["skipped_steps"] + 1
    assert whole[2]["skipped_steps"] == 0, "four norms must be known before one can be an outlier"
    assert _without_clock(whole) == _without_clock(broken)
