import io
import json
import re
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console as RichConsole

from m4train.errors import TrainingError
from m4train.processing.images import data_uri
from m4train.training.callbacks import Checkpointing, Console, Jsonl, cursors, default_callbacks
from m4train.training.callbacks.samples import Samples
from m4train.training.callbacks.wandb import Wandb
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


def test_default_callbacks_follow_the_configuration(tmp_path):
    config = make_config(tmp_path, eval_every=3)
    config.logging.console, config.logging.wandb = True, "offline"
    names = [type(callback).__name__ for callback in default_callbacks(config)]
    assert names == ["Evaluation", "Samples", "Console", "Jsonl", "Cursors", "Wandb", "Checkpointing"]
    config.evaluation.shown = 0
    assert "Samples" not in [type(callback).__name__ for callback in default_callbacks(config)]
    assert [type(c).__name__ for c in default_callbacks(make_config(tmp_path))] == ["Jsonl", "Cursors", "Checkpointing"]


def test_cursors_are_logged_and_those_after_the_checkpoint_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(cursors, "EVERY", 2)
    path = tmp_path / "cursors.jsonl"
    run = lambda **changes: make_trainer(make_config(tmp_path, **changes), TinyModel())
    first = run(stop_after=5)
    empty = {"packs": 0, "streams": {}, "active": [], "shares": {}, "pool": [], "waiting": [], "closed": []}
    state = lambda step: {"plan": "x", "step": step, "steps": step, **empty}
    first.loader = (replace(step, state=state(n)) for n, step in enumerate(first.loader, 1))
    first.train()
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    assert logged == [state(2), state(4)]
    path.write_text(path.read_text() + json.dumps({"step": 6}) + '\n{"step": 8, "pl')
    again = run(stop_after=1)
    again.train()  # whose data has no plan
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*logged, state(5)]


def test_no_step_appears_twice_after_a_kill(tmp_path):
    make_trainer(make_config(tmp_path, stop_after=4), TinyModel()).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.0}\n{"step": 6, "lo')
    make_trainer(make_config(tmp_path), TinyModel()).train()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[4]["loss"] > 0


def _printed(tmp_path, terminal):
    stream = io.StringIO()
    console = Console(RichConsole(file=stream, force_terminal=terminal, width=200))
    make_trainer(make_config(tmp_path, max_steps=4), TinyModel(), callbacks=[console]).train()
    return stream.getvalue()


def test_plain_lines_in_a_log_file(tmp_path):
    text = _printed(tmp_path, terminal=False)
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    assert lines[-1].startswith("step 4/4  loss ")
    assert "tokens/s" in lines[0]
    assert "left" not in lines[0]  # the first step tells nothing of the pace
    assert re.search(r"left 0:\d\d:\d\d", lines[1])
    assert "\x1b" not in text
    assert "vision" in text
    assert "stopped at step 4 by max_steps" in text


def test_a_progress_bar_on_a_terminal(tmp_path):
    text = _printed(tmp_path, terminal=True)
    assert "4/4" in text
    assert "\x1b" in text


_LINK = data_uri(Image.new("RGB", (4, 4)))


def test_wandb_keeps_its_run_across_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    ids, said = [], {"question": "?", "answer": "7", "references": ["7"], "score": 1.0, "images": [_LINK, _LINK]}
    for stop_after in (2, None):
        trainer = make_trainer(
            make_config(tmp_path, max_steps=4, stop_after=stop_after),
            TinyModel(),
            callbacks=[Samples(2, 4), Jsonl(), Wandb("offline", "tests"), Checkpointing(2)],
            answers=lambda: [{"source": "web", "key": "a", **said}],
        )
        trainer.train()
        ids.append((tmp_path / "wandb_id").read_text())
        (tmp_path / "wandb_id").unlink()  # the checkpoint knows it too
    assert ids[0] == ids[1]
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").open()] == [2, 4]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/table/samples*.table.json"))) == 2
    staged = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert any(content.startswith(b"\x89PNG") for content in staged)  # the pictures of a table travel as its artifact
    # of the folders, two of one second differ by a suffix after the id; the logs in them are named by the id alone
    assert {path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")} == {f"run-{ids[0]}.wandb"}


def test_a_failed_run_is_failed_in_wandb(tmp_path, monkeypatch):
    codes = []

    class Run:
        summary: dict = {}

        def finish(self, exit_code):
            codes.append(exit_code)

        def define_metric(self, *names, **options):
            pass

        def log(self, metrics):
            pass

    monkeypatch.setattr("wandb.init", lambda **options: Run())
    for broken in (False, True):
        model = TinyModel(unused=broken)
        trainer = make_trainer(
            make_config(tmp_path / str(broken), max_steps=2), model, callbacks=[Wandb("offline", "tests")]
        )
        if broken:
            with pytest.raises(TrainingError):
                trainer.train()
        else:
            trainer.train()
    assert codes == [0, 1]
