import io
import json
import re
from dataclasses import replace

from rich.console import Console as RichConsole

from m4train.training.callbacks import Console, cursors, default_callbacks
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


def test_default_callbacks_follow_the_configuration(tmp_path):
    config = make_config(tmp_path, eval_every=3)
    config.logging.console, config.logging.trackers = True, ["wandb"]
    names = [type(callback).__name__ for callback in default_callbacks(config)]
    assert names == [
        "Startup",
        "Evaluation",
        "Samples",
        "Console",
        "Jsonl",
        "Wandb",
        "Cursors",
        "FirstPacks",
        "Checkpointing",
    ]
    config.evaluation.shown = 0
    assert "Samples" not in [type(callback).__name__ for callback in default_callbacks(config)]
    plain = [type(callback).__name__ for callback in default_callbacks(make_config(tmp_path))]
    assert plain == ["Startup", "Jsonl", "Cursors", "FirstPacks", "Checkpointing"]


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
