"""`m4train generate`: every way to name a model, to ask it, and to say how it answers."""

import io
import json

import pytest
import torch
from PIL import Image

from m4train import AutoProcessor
from m4train.cli import main
from m4train.commands.answerer import Answerer, Pieces, load
from m4train.commands.export import export_checkpoint
from tests.helpers.checkpoints import saved_run

QUESTION = ["What is it?"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run with an adapter, its checkpoint, its export, and its adapter apart; and a picture."""
    root = tmp_path_factory.mktemp("generate")
    config, _ = saved_run(root / "run", "adapter=lora", "adapter.rank=4")
    found = {"run": root / "run", "checkpoint": root / "run" / "checkpoints" / "step-000003"}
    for name in ("merge", "apart"):
        config.export.adapters, config.export.folder = name, str(root / name)
        config.export.verify = False
        found[name] = export_checkpoint(config).folder
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(root / "p.png")
    return found | {"picture": root / "p.png", "root": root}


def _said(capsys, *arguments):
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out.rstrip("\n")


def test_every_form_of_a_model_gives_the_same_answer(models, capsys):
    asked = [*QUESTION, models["picture"], "--max-new-tokens", "6"]
    answers = {name: _said(capsys, models[name], *asked) for name in ("run", "checkpoint", "merge", "apart")}
    assert len(set(answers.values())) == 1, answers
    assert answers["merge"] == _said(capsys, models["merge"], *asked, "--no-stream")
    for model in ("run", "merge"):
        loaded, _ = load(str(models[model]), torch.float32)
        assert not [name for name, _ in loaded.named_parameters() if "lora" in name]


def test_a_file_of_questions_becomes_a_file_of_answers(models, capsys):
    root, picture = models["root"], models["picture"]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]}]
    records = [
        {"question": "What is it?", "images": ["p.png"], "id": 7},
        {"question": "Nothing?"},
        {"messages": messages, "images": [str(picture)]},
        {"question": "Two?", "images": ["p.png", "p.png"], "system": "Be short."},
    ]
    (root / "q.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    given = [models["merge"], "--questions", root / "q.jsonl", "--max-new-tokens", "5"]
    _said(capsys, *given, "--answers", root / "a.jsonl", "--batch-size", "3")
    lines = [json.loads(line) for line in (root / "a.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "answer"} for line in lines] == records
    alone = [json.loads(line) for line in _said(capsys, *given, "--batch-size", "1").splitlines()]
    assert alone == lines
    first = _said(capsys, models["merge"], "What is it?", picture, "--max-new-tokens", "5")
    assert lines[0]["answer"] == first.strip()


def test_drawn_answers_depend_on_the_seed(models, capsys):
    asked = [models["merge"], *QUESTION, "--max-new-tokens", "12", "--sample", "--temperature", "3"]
    answers = [_said(capsys, *asked, "--seed", seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_chat_remembers_its_turns(models, capsys, monkeypatch):
    said = ["Hello?", f"/image {models['picture']}", "/image nowhere.png", "And this?", "", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(said)))
    asked = []
    monkeypatch.setattr(Answerer, "answers", lambda self, given, *rest: asked.append(self._inputs(given)) or ["so"])
    out = _said(capsys, models["merge"], "--chat", "--no-stream", "--system", "Be kind.")
    assert [line for line in out.splitlines() if "nowhere" not in line] == ["so", "so"]
    assert "nowhere.png is not a picture" in out
    processor = AutoProcessor.from_pretrained(models["merge"])
    last = processor.decode(asked[-1]["input_ids"][0])
    assert all(text in last for text in ("Be kind.", "Hello?", "so<end_of_utterance>", "And this?"))
    assert "pixel_values" in asked[-1]
    assert "pixel_values" not in asked[0]


def test_streamed_pieces_are_the_text(models):
    processor, pieces = AutoProcessor.from_pretrained(models["merge"]), []
    stream = Pieces(processor, pieces.append)
    ids = processor.tokenizer.encode("A naïve 日本 answer, in pieces.", add_special_tokens=False)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == processor.decode(ids).strip()
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing argument"),
        (["{merge}"], "needs one of QUESTION"),
        (["{merge}", "a", "--chat"], "needs one of QUESTION"),
        (["{merge}", "a", "--temperature", "2"], "give --sample too"),
        (["{merge}", "a", "--answers", "x"], "give --questions too"),
        (["{merge}", "a", "--max-new-tokens", "0"], "x>=1"),
        (["{merge}", "a", "--max-new-token", "3"], "--max-new-token"),
        (["{merge}", "a", "--device", "warp"], "--device warp"),
        (["{merge}", "a", "nowhere.png"], "nowhere.png is not a picture"),
        (["{merge}", "a", "{root}"], "is not a picture"),
        (["{picture}", "a"], "p.png"),
        (["{root}", "a"], "holds no model"),
        (["nowhere", "a"], "nowhere"),
        (["{merge}", "--questions", "nowhere"], "nowhere"),
        (["{merge}", "--questions", "{picture}"], "cannot be read as text"),
        (["{merge}", "--questions", "{merge}/config.json"], "line 1 is not JSON"),
    ],
)
def test_a_wrong_request_is_one_sentence(arguments, said, models, capsys):
    code = main(["generate", *(argument.format(**models) for argument in arguments)])
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert said in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
