"""Somebody with 300 photos and a table of questions trains in three commands."""

import csv
import json

import pytest

from tests.helpers.data import digit_pictures

pytestmark = pytest.mark.slow


@pytest.fixture
def table(tmp_path):
    """photos/*.jpg and photos.csv, as a spreadsheet writes it."""
    folder = tmp_path / "mine"
    (folder / "photos").mkdir(parents=True)
    pictures, digits = digit_pictures()
    with open(folder / "photos.csv", "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Filename", "question", "answer", "taken_on"])
        for number in range(300):
            pictures[number].convert("RGB").save(folder / "photos" / f"{number}.JPG", "jpeg")
            rows.writerow([f"photos/{number}.JPG", "Which digit, please?", f"A {digits[number]}.", "2026-11-30"])
    return folder / "photos.csv"


def test_three_commands_from_photos_and_a_table_to_a_model(m4train, table, tmp_path):
    mine = ("data=own", f"data.sources={{photos: {{path: {table}, format: auto}}}}")
    checked = m4train("validate --workers 1 --json", *mine)
    report = json.loads(checked.stdout)
    assert report["failed"] == []
    assert (report["sources"]["photos"]["samples"], report["sources"]["photos"]["bad"]) == (300, 0)
    assert "format auto takes it for csv" in checked.stderr
    assert "taken_on (300 of 300)" in checked.stdout + checked.stderr

    m4train("train", *mine, "trainer.max_steps=8")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["images"] > 0 and line["loss_tokens"] > 0 for line in lines)
    assert lines[-1]["quarantined"] == lines[-1]["too_long/photos"] == 0

    m4train("export", *mine)
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_a_run_that_would_lose_too_much_for_its_length_stops_before_training(m4train, table, tmp_path):
    table.write_text(
        table.read_text(encoding="utf-8-sig").replace("Which digit", "Which digit " + "or which letter " * 40, 60)
    )
    refused = m4train("train", "data=own", f"data.sources={{photos: {{path: {table}, format: csv}}}}", check=False)
    assert refused.returncode != 0
    assert "photos: 60 of 300 samples (20.0%) are left out as too long" in refused.stderr
    assert "data.max_dropped_fraction=0.1" in refused.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
