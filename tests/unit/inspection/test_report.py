"""The report shows what the files of a run hold, and nothing where they hold nothing."""

import json

from m4train.config.compose import load_config, save_config
from m4train.inspection.report import write_report
from m4train.run_files import lineage, read_run

PICTURE = "data:image/png;base64,AAAA"


def _run(folder, *overrides):
    folder.mkdir()
    config = load_config(["experiment=digits_sft", f"run_dir={folder}", *overrides])
    save_config(config, folder / "config.yaml")
    return config


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _metrics(step):
    norms = {"grad_norm": 2.0, "grad_norm/text": 1.5, "grad_norm/connector": 0.5}
    losses = {"loss": 3.0 / step, "loss/single": 2.0 / step, "loss/multi": 4.0 / step, "eval/loss/single": 1.0 / step}
    counts = {"tokens": 100, "images": 4, "skipped_steps": step // 2, "quarantined": 3 * (step // 2)}
    return {"step": step, **losses, **norms, **counts, "tokens_per_second": 10.0 * step}


def test_every_file_of_a_run_has_its_place(tmp_path):
    config = _run(tmp_path / "run")
    run = tmp_path / "run"
    _lines(run / "metrics.jsonl", [_metrics(step) for step in range(1, 9)])
    dropped = [{"step": 1, "source": "multi", "key": f"k{n}", "reason": "unreadable_image"} for n in range(9)]
    _lines(run / "quarantine.jsonl", [*dropped, {"step": 2, "source": "single", "key": "x", "reason": "bad_json"}])
    said = {"source": "single", "key": "a", "question": "Which <digit>?", "references": ["2", "two"], "metric": "anls"}
    _lines(run / "answers.jsonl", [{**said, "answer": "tw", "score": 0.67, "images": [PICTURE]}])
    samples = [
        {**said, "step": step, "answer": f"said {step}", "score": 0.0, "images": [PICTURE]} for step in range(1, 9)
    ]
    _lines(run / "samples.jsonl", samples)
    scores = {"single": {"loss": 1.25, "loss_tokens": 9, "metric": "anls", "anls": 0.67, "count": 1, "unreadable": 2}}
    (run / "evaluation.json").write_text(json.dumps({**scores, "multi": {"loss": 2.5, "loss_tokens": 9}}))
    page = write_report(config).read_text()
    assert page.count('class="chart"') == 5
    for name in ("loss by source", "gradient norm before clipping", "connector", "skipped steps", "tokens per second"):
        assert name in page
    assert "Which &lt;digit&gt;?" in page
    assert "should be 2 or two (scores 0.67)" in page
    assert [f"said {step}" in page for step in range(1, 9)] == [True, False, True, False, False, True, False, True]
    assert "unreadable image" in page
    assert "multi: k0, multi: k1, multi: k2, multi: k3, multi: k4, multi: k5 and 3 more" in page
    assert '<td>single</td><td class="number">1.2500</td><td>anls</td><td class="number">67.0%</td>' in page
    assert "2.5000" in page


def test_a_run_that_has_only_begun(tmp_path):
    page = write_report(_run(tmp_path / "run")).read_text()
    assert "<svg" not in page
    assert "Samples that were dropped" not in page
    assert "What it answered" not in page


def test_a_run_follows_the_one_it_started_from(tmp_path):
    _run(tmp_path / "first")
    checkpoint = tmp_path / "first" / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    for number, start in enumerate((tmp_path / "first", checkpoint)):
        _run(tmp_path / f"next{number}", f"model.pretrained={start}", "name=next")
        assert [run.folder.name for run in lineage(tmp_path / f"next{number}")] == ["first", f"next{number}"]
    assert read_run(tmp_path / "first").samples == []


def test_what_was_expected_is_shown_next_to_what_was_measured(tmp_path):
    _run(tmp_path / "run")
    more = {"expected/memory_gib": 2.0, "measured/memory_gib": 2.1, "expected/seconds_per_step": 4.0}
    _lines(
        tmp_path / "run" / "metrics.jsonl", [{**_metrics(1), **more}, {**_metrics(2), "measured/seconds_per_step": 3.0}]
    )
    page = write_report(load_config(["experiment=digits_sft", f"run_dir={tmp_path / 'run'}"])).read_text()
    assert "2.1 GiB of tensors per rank at the peak, +5.0% of what was expected" in page
    assert "3 s per step, -25.0% of what was expected" in page
