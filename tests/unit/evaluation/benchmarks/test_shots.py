"""Shots by similarity, from stored embeddings or the model's own tower; the prompts of Idefics; whole shots dropped, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m4train.cli import main
from m4train.evaluation.benchmarks.questions import question
from m4train.evaluation.benchmarks.shots import ShotMaker
from m4train.evaluation.benchmarks.spec import load_benchmark
from tests.unit.evaluation.benchmarks.test_run import evaluated, lines_of, rows_of, save_data, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


def shots_asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The numbers of the shots of each question, as they are chosen."""
    seen: dict[int, list[int]] = {}
    before = ShotMaker.before

    def noted(self: ShotMaker, asked: Any, seed: int = 42) -> list[Any]:
        shots = before(self, asked, seed)
        seen[asked.number] = [shot.number for shot in shots]
        return shots

    monkeypatch.setattr(ShotMaker, "before", noted)
    return seen


@pytest.mark.slow
def test_the_most_similar_by_stored_embeddings_stand_last(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support = np.array([[1.0, 0.0], [0.9, 0.5], [0.0, 1.0], [-1.0, 0.1]])
    np.savez(tmp_path / "vqav2.npz", support=5 * support, queries=support)  # lengths do not count
    seen = shots_asked(monkeypatch)
    place = (f"embeddings={tmp_path}", "shots=2", f"support={data}", "shots_by=rices")
    found = evaluated(model, data, tmp_path / "out", "vqav2", *place)
    assert seen == {0: [1, 0], 1: [0, 1], 2: [1, 2], 3: [2, 3]}
    assert found["vqav2"]["prompt"].endswith("-2shots-rices")
    assert [line["about"]["shots"] for line in lines_of(tmp_path / "out", "vqav2")] == [2] * 4


@pytest.mark.slow
def test_the_own_tower_finds_the_same_picture_and_keeps_its_embeddings(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shots_asked(monkeypatch)
    place = ("shots=2", f"support={data}", "shots_by=rices", "max_samples=2")
    evaluated(model, data, tmp_path, "vqav2", *place)
    kept = tmp_path / "embeddings" / "vqav2.npz"
    assert all(
        shots[-1] == number for number, shots in seen.items()
    )  # the question's own picture is in the support set
    written = kept.stat().st_mtime_ns
    evaluated(model, data, tmp_path, "vqav2", *place)
    assert kept.stat().st_mtime_ns == written  # made once
    with np.load(kept) as file:
        stored = dict(file)
    stored["own tower"] = np.array("another model")
    np.savez(kept, **stored)
    evaluated(model, data, tmp_path, "vqav2", *place)
    with np.load(kept) as file:
        assert str(file["own tower"]) == str(model.resolve())  # another model's are made again


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"queries": np.ones((4, 2))}, "must hold queries and support"),
        (
            {"queries": np.ones((3, 2)), "support": np.ones((4, 2))},
            "holds queries of shape (3, 2), but there are 4 records",
        ),
        ({"queries": np.ones((4, 2)), "support": np.ones((4, 3))}, "holds embeddings of 2 and 3 values"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    model: Path, data: Path, tmp_path: Path, stored: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "vqav2.npz", **stored)
    asked = ["benchmarks=[vqav2]", f"model={model}", f"data={data}", "device=cpu", "shots=2", f"support={data}"]
    assert main(["evaluate", *asked, "shots_by=rices", f"embeddings={tmp_path}", f"out={tmp_path / 'out'}"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["shots_by=clip"], "shots_by is clip, but must be random or rices"),
        (["embeddings=x"], "embeddings are what shots_by=rices chooses by"),
        (["shots_by=rices"], "set shots to 4, 8, 16 or 32"),
        (["engine=dpp"], "engine is dpp, but must be one of single, ddp"),
        (["launch.processes=2"], "launch.processes is 2, but engine is single"),
        (["engine=ddp", "device=cpu"], "device=cpu goes with engine=single"),
        (["launch.processes=no"], "launch.processes is no, but must be a whole number"),
    ],
)
def test_what_does_not_go_together_is_refused(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "benchmarks=[ai2d]", "model=x", "data=y", *more]) == 2
    assert said in capsys.readouterr().err


def test_prompts_are_the_templates_of_idefics(tmp_path: Path) -> None:
    def text(name: str) -> str:
        spec = load_benchmark(name)
        ask = lambda record, folder, number: question(record, folder, spec, "idefics", number)
        rows = rows_of(name)
        maker = ShotMaker(spec, [(row, tmp_path) for row in rows], 1, ask, lambda number, count: [0])
        prompt = maker.prompt(maker.before(ask(rows[1], tmp_path, 1)), ask(rows[1], tmp_path, 1))
        items = prompt.messages[0]["content"]
        return "".join("<image>" if item["type"] == "image" else item["text"] for item in items)

    shot = "Image:<image>Question: What is 0? Answer: word 0\nImage:<image>Question: What is 1? Answer:"
    assert text("vqav2") == f"Instruction: provide an answer to the question. Use the image to answer.\n{shot}"
    unanswerable = "Task: Answer the questions based on the image when possible, otherwise say unanswerable.\n"
    assert text("vizwiz") == unanswerable + shot
    assert text("flickr30k") in (f"Image:<image>Caption: {said}\nImage:<image>Caption:" for said in ("a cat", "cat 0"))
