"""Every benchmark on a few records in its public layout, from the files to the score."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from m4train import Idefics3Config, Idefics3ForConditionalGeneration
from m4train.cli import main
from m4train.errors import ConfigError, DataError
from m4train.evaluation.benchmarks import asking
from m4train.evaluation.benchmarks.questions import question
from m4train.evaluation.benchmarks.shots import ShotMaker, fitting
from m4train.evaluation.benchmarks.spec import benchmark_names, load_benchmark
from tests.helpers.models import perturb, tiny_idefics3
from tests.helpers.processing import tiny_idefics3_processor


def picture(number: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (16 + number, 12), (30 * number, 90, 10)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def ten(text: str) -> list[str]:
    return [text] * 7 + ["other"] * 3


def rows_of(name: str) -> list[dict[str, Any]]:
    """Four records in the layout of the public release."""
    return [_row(name, number) for number in range(4)]


def _row(name: str, n: int) -> dict[str, Any]:
    image, asked = {"image": picture(n)}, {"question": f"What is {n}?"}
    if name in ("vqav2", "okvqa", "vizwiz", "textvqa"):
        answers: list[Any] = ten(f"word {n}")
        if name in ("vqav2", "okvqa"):
            answers = [{"answer": text, "answer_id": place} for place, text in enumerate(answers)]
        return image | asked | {"question_id": 100 + n, "answers": answers}
    if name in ("docvqa", "infovqa"):
        return image | asked | {"questionId": str(100 + n), "answers": [f"word {n}", "w"]}
    multiple = ["a cat", "a dog", "a tree"]
    return {
        "stvqa": lambda: image | asked | {"question_id": n, "answers": [f"word {n}"]},
        "chartqa": lambda: image | asked | {"answer": "12", "type": ["human_test", "augmented_test"][n % 2]},
        "ai2d": lambda: image | asked | {"options": multiple, "answer": str(n % 3)},
        "scienceqa": lambda: (
            image
            | asked
            | {"choices": multiple, "answer": n % 3, "hint": "Look." * (n % 2), "subject": ["natural", "social"][n % 2]}
        ),
        "mmmu": lambda: {
            "id": f"validation_{n}",
            "question": "What is in <image 1> and <image 2>?",
            "question_type": "multiple-choice" if n % 2 else "open",
            "options": str(multiple) if n % 2 else "[]",
            "answer": "ABC"[n % 3] if n % 2 else "42",
            "image_1": picture(n),
            "image_2": picture(n + 1),
            "subfield": "Biology",
        },
        "mmstar": lambda: (
            image
            | {"index": n, "question": "Which?\nOptions: A: a cat, B: a dog, C: x, D: y", "answer": "ABCD"[n]}
            | {"category": "math", "l2_category": "geometry"}
        ),
        "mathvista": lambda: (
            asked
            | {"pid": str(n), "decoded_image": picture(n), "question_type": ["multi_choice", "free_form"][n % 2]}
            | {"choices": None if n % 2 else multiple, "answer": "1.2" if n % 2 else "a dog"}
        ),
        "ocrbench": lambda: image | asked | {"answer": ["WORD"], "dataset": "IIIT5K", "question_type": "Regular"},
        "coco_captions": lambda: image | {"question_id": f"c{n}.jpg", "question": "?", "answer": ["a cat", f"cat {n}"]},
        "flickr30k": lambda: image | {"img_id": str(n), "caption": ["a cat", f"cat {n}"]},
        "nocaps": lambda: image | {"image_id": n, "annotations_captions": ["a cat", f"cat {n}"]},
        "textcaps": lambda: image | {"image_id": str(n), "caption_str": ["a cat", f"cat {n}"]},
        "mme": lambda: (
            image | asked | {"question_id": f"p{n // 2}", "category": "count", "answer": ["Yes", "No"][n % 2]}
        ),
        "hallusionbench": lambda: (
            image
            | asked
            | {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": str(n), "question_id": "1"}
            | {"gt_answer": str(n % 2), "visual_input": "1"}
        ),
    }[name]()


def save_model(folder: Path) -> Path:
    """A tiny model with its processor."""
    processor = tiny_idefics3_processor(image_size=16)
    text = {"vocab_size": len(processor.tokenizer), "eos_token_id": processor.eos_id}
    config = tiny_idefics3(text_config=text, image_token_id=processor.image_token_id)
    made = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(config))
    perturb(made)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_data(folder: Path) -> Path:
    """A few records of every benchmark."""
    for name in benchmark_names():
        (folder / name).mkdir()
        pa.parquet.write_table(pa.Table.from_pylist(rows_of(name)), folder / name / "part.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


def evaluated(model: Path, data: Path, out: Path, names: str, *more: str) -> dict[str, Any]:
    asked = [f"benchmarks=[{names}]", f"model={model}", f"data={data}", f"out={out}", "device=cpu", *more]
    assert main(["evaluate", *asked]) == 0
    return json.loads((out / "evaluation.json").read_text())


def lines_of(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_benchmark_from_its_public_layout_to_its_score(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = benchmark_names()
    assert len(names) == 20
    found = evaluated(model, data, tmp_path, ",".join(names))
    table = capsys.readouterr().out
    for name in names:
        result, spec = found[name], load_benchmark(name)
        assert result["count"] == 4, name
        assert result["prompt"] == spec.prompt_hash("idefics3")
        assert result["remarks"][0] == f"4 of {spec.expected} samples"
        assert name in table
        lines = lines_of(tmp_path, name)
        assert [line["number"] for line in lines] == [0, 1, 2, 3]
        assert all("score" in line and line["prompt"] == result["prompt"] for line in lines)
    assert found["chartqa"]["groups"].keys() == {"type/human_test", "type/augmented_test"}
    for name, key in (("vqav2", "question_id"), ("docvqa", "questionId")):
        file = json.loads((tmp_path / f"{name}-submission.json").read_text())
        assert [(each[key], each["answer"]) for each in file] == [
            (100 + n, lines_of(tmp_path, name)[n]["answer"]) for n in range(4)
        ]


def test_what_is_asked_of_each_family(tmp_path: Path) -> None:
    def said(name: str, family: str, number: int = 0) -> str:
        asked = question(rows_of(name)[number], tmp_path, load_benchmark(name), family, number)
        return "".join(item.get("text", "<image>") for item in asked.messages[0]["content"])

    assert said("docvqa", "idefics2") == "<image>What is 0?\nGive a very brief answer."
    assert said("docvqa", "idefics3").endswith("without additional explanation.\nQuestion: What is 0?")
    letters = "<image>Question: What is 0?\nChoices:\nA. a cat\nB. a dog\nC. a tree\nAnswer with the letter."
    assert said("ai2d", "idefics2") == letters
    assert said("scienceqa", "smolvlm", 1).startswith("<image>Look.\nQuestion: What is 1?\nChoices:\nA. a cat\n")
    assert "Question: Which?\nChoices:\nA. a cat\nB. a dog\nC. x\nD. y\n" in said("mmstar", "idefics3")
    assert said("mmmu", "idefics3", 1).startswith(
        "Question: <image 1>:<image>\n<image 2>:<image>\nWhat is in <image 1>"
    )
    asked = question(rows_of("mmmu")[0], tmp_path, load_benchmark("mmmu"), "idefics3", 0)
    assert (asked.options, asked.references, asked.prefix) == ((), ("42",), "")
    asked = question(rows_of("mathvista")[0], tmp_path, load_benchmark("mathvista"), "idefics3", 0)
    assert (asked.references, asked.prefix, len(asked.images)) == (("B",), "Answer:", 1)


@pytest.mark.slow
def test_likelihood_is_of_the_letters_and_the_same_in_any_batch(model: Path, data: Path, tmp_path: Path) -> None:
    together = evaluated(model, data, tmp_path / "a", "ai2d,mmmu", "scoring=likelihood")
    alone = evaluated(model, data, tmp_path / "b", "ai2d,mmmu", "scoring=likelihood", "batch_size=1")
    assert together == alone
    for one, other in zip(lines_of(tmp_path / "a", "ai2d"), lines_of(tmp_path / "b", "ai2d"), strict=True):
        assert one["about"]["losses"] == pytest.approx(other["about"]["losses"], rel=1e-4)
        assert one["answer"] == "ABC"[one["about"]["losses"].index(min(one["about"]["losses"]))]
    assert "losses" not in lines_of(tmp_path / "a", "mmmu")[0]["about"]  # an open question is generated


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_scores_nothing_twice(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(model, data, tmp_path / "whole", "textvqa")
    answers = asking._answers
    place = [f"model={model}", f"data={data}", f"out={tmp_path / 'cut'}", "device=cpu"]
    stop = lambda *given: (answer for n, answer in enumerate(answers(*given)) if n < 2 or _stop())
    monkeypatch.setattr(asking, "_answers", stop)
    assert main(["evaluate", "benchmarks=[textvqa]", *place]) == 130
    assert len((tmp_path / "cut" / "textvqa.jsonl").read_text().splitlines()) == 2
    asked: list[int] = []
    monkeypatch.setattr(asking, "_answers", lambda *given: _counted(answers(*given), asked))
    assert evaluated(model, data, tmp_path / "cut", "textvqa") == whole
    assert len(asked) == 2
    assert lines_of(tmp_path / "cut", "textvqa") == lines_of(tmp_path / "whole", "textvqa")


def _stop() -> bool:
    raise KeyboardInterrupt


def _counted(answers: Any, asked: list[int]) -> Any:
    for answer in answers:
        asked.append(answer.number)
        yield answer


@pytest.mark.slow
def test_a_subset_is_chosen_by_the_hash_of_keys(model: Path, data: Path, tmp_path: Path) -> None:
    evaluated(model, data, tmp_path, "docvqa,coco_captions", "max_samples=2")
    found = [line["number"] for line in lines_of(tmp_path, "docvqa")]
    assert len(found) == 2
    assert found == [line["number"] for line in lines_of(tmp_path, "docvqa")]
    stated = json.loads((tmp_path / "evaluation.json").read_text())["coco_captions"]
    assert "not comparable" in stated["remarks"][1]


def test_other_forms_of_files_hold_the_same_questions(data: Path, tmp_path: Path) -> None:
    from m4train.evaluation.benchmarks.records import records

    rows = rows_of("textvqa")
    stored = []
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.png").write_bytes(row["image"]["bytes"])
        stored.append(row | {"image": f"{number}.png"})
    (tmp_path / "a.json").write_text(json.dumps({"data": stored}))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stored))
    spec = load_benchmark("textvqa")
    places = (data / "textvqa", tmp_path / "a.json", tmp_path / "b.jsonl")
    asked = [[question(r, f, spec, "idefics3", n) for n, (r, f) in enumerate(records(place))] for place in places]
    for other in asked[1:]:
        assert [each.messages for each in other] == [each.messages for each in asked[0]]
        assert [each.images[0].tobytes() for each in other] == [each.images[0].tobytes() for each in asked[0]]


def test_what_cannot_be_run_is_said(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="benchmarks names 'docvqb', but must name ai2d, chartqa"):
        load_benchmark("docvqb")
    (tmp_path / "mine.yaml").write_text("data: x\nmetrics: anls\n")
    with pytest.raises(ConfigError, match="holds metrics, but a benchmark has"):
        load_benchmark(str(tmp_path / "mine.yaml"))
    with pytest.raises(DataError, match="chartqa, sample 3: it has no answer under 'answer'"):
        question({"image": None, "question": "?"}, tmp_path, load_benchmark("chartqa"), "idefics3", 3)
    assert main(["evaluate", "benchmarks=[ai2d]", "model=x"]) == 2
    assert main(["evaluate", "benchmarks=[ai2d]", "model=x", "data=y", "shots=4"]) == 2
    assert main(["evaluate", "benchmarks=[ai2d]", "model=x", "data=y", "shots=no", "support=z"]) == 2


@pytest.mark.slow
def test_two_results_are_compared_by_sample(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        evaluated(model, data, tmp_path / name, "docvqa")
    lines = lines_of(tmp_path / "b", "docvqa")
    for line, score in zip(lines, (1.0, 0.5, 0.0, 0.0), strict=True):
        line["score"], line["answer"] = score, f"<said {score}>"
    (tmp_path / "b" / "docvqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = [line["score"] for line in lines_of(tmp_path / "a", "docvqa")]
    assert before == [0.0] * 4
    capsys.readouterr()
    assert main(["evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "b"), f"data={data}"]) == 0
    said = capsys.readouterr().out
    half = 196.0 * (((0.625**2) + 0.125**2 + 2 * 0.375**2) / 3 / 4) ** 0.5
    assert f"+37.50 [{37.5 - half:+.2f}, {37.5 + half:+.2f}] over 4 samples; 2 better, 0 worse" in said
    page = (tmp_path / "b" / "compared.html").read_text()
    assert page.count('<section class="answer') == 2
    assert "&lt;said 0.5&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert main(["evaluate", "compare", str(tmp_path / "a")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 2, 4])
def test_shots_are_written_before_each_question(model: Path, data: Path, tmp_path: Path, count: int) -> None:
    found = evaluated(model, data, tmp_path, "vqav2,coco_captions", f"shots={count}", f"support={data}")
    assert found["vqav2"]["prompt"].endswith(f"-{count}shots")
    lines = lines_of(tmp_path, "vqav2")
    assert [line["about"]["shots"] + line["about"]["dropped_shots"] for line in lines] == [count or 2] * 4
    evaluated(model, data, tmp_path / "again", "vqav2", f"shots={count}", f"support={data}", "batch_size=1")
    assert lines_of(tmp_path / "again", "vqav2") == lines


def test_the_prompt_of_shots_is_that_of_idefics(data: Path, tmp_path: Path) -> None:
    spec = load_benchmark("vqav2")
    ask = lambda record, folder, number: question(record, folder, spec, "idefics", number)
    maker = ShotMaker.of(spec, data / "vqav2", 2, ask)
    asked = ask(rows_of("vqav2")[3], tmp_path, 3)
    processor = tiny_idefics3_processor(image_size=16)

    def text(prompt: Any) -> str:
        return processor.apply_chat_template(prompt.messages[:-1], chat_template=prompt.template)

    shots = maker.before(asked)
    assert maker.before(asked) == shots
    whole = maker.prompt(shots, asked)
    line = "Image:<image>Question: What is {} Answer: word {}\n"
    expected = "".join(line.format(f"{shot.number}?", shot.number) for shot in shots)
    start = "Instruction: provide an answer to the question. Use the image to answer.\n"
    assert text(whole).endswith(start + expected + "Image:<image>Question: What is 3? Answer:")
    assert len(whole.images) == 3
    bare = ShotMaker.of(spec, data / "vqav2", 0, ask)
    assert (
        text(bare.prompt(bare.before(asked), asked)).count("<image>") == 1
    )  # two shots as text, the question with its image
    lengths = {2: 100, 1: 60, 0: 20}
    left = fitting(maker, asked, 70, lambda prompt: lengths[prompt.about["shots"]])
    assert (left.about["shots"], left.about["dropped_shots"]) == (1, 1)
    assert text(left).endswith(
        start + line.format(f"{shots[1].number}?", shots[1].number) + "Image:<image>Question: What is 3? Answer:"
    )
