"""What a record says should not be learnt is not learnt, whatever the field is called and wherever it stands."""

import csv
from pathlib import Path
from typing import Any

import pytest

from m4train.config import SourceConfig
from m4train.data.documents.learning import LEFT_OUT, WEIGHTS
from m4train.data.source import Source, open_sources
from m4train.data.sources.fields import Reading
from m4train.data.sources.records import compose
from m4train.errors import BadSample
from tests.helpers.data import FakeProcessor, data_config
from tests.unit.data.sources.test_forms import bad, opened
from tests.unit.data.sources.test_unread import RED, _tar, _written

Q, R = "Which?", "Red."
NOT_LEARNT = {
    "weight": 0,
    "loss_mask": 0,
    "lossWeight": 0.0,
    "loss scale": "0",
    "train-on-turn": False,
    "trainable": "false",
}
NOT_LEARNT |= {"masked": True, "ignore": "true", "skip": 1, "Skipped": "yes", "isMasked": "1", "no_loss": True}
NOT_GOOD = {
    "kto_tag": False,
    "is_correct": False,
    "isCorrect": "false",
    "is_rejected": True,
    "rejected": True,
    "correct": False,
}
NOT_GOOD |= {
    "is_good": 0,
    "is_deleted": "1",
    "deleted": "true",
    "thumbs_up": False,
    "valid": False,
    "use": False,
    "drop": True,
    "keep": "false",
}
SAID_TO_BE_LEARNT = {
    "weight": 1,
    "train": True,
    "masked": False,
    "skip": 0,
    "ignore": "no",
    "kto_tag": True,
    "is_correct": 1,
}
SAID_TO_BE_LEARNT |= {"rejected": False, "loss_mask": "1", "trainable": "TRUE", "is_wrong": "false"}
ABOUT_NOTHING: dict[str, Any] = {"weight": None, "mask": None, "train": "", "loss_mask": float("nan")}
MEANS_NOTHING: dict[str, Any] = {
    "weight": -1, "loss": 2.31, "loss_weight": "high", "masked": 0.5, "skip": "yes please", "mask": 0, "train": [1, 0],
    "train_mask": True, "loss_mask": [0, 1], "sample_weight": 250, "train_detail": [{"train": False}], "label_mask": "1", "weights": [0, 1], "train_turns": [0],
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "turns": {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": R}]},
    "exchanges": {"texts": [{"user": Q, "assistant": R}]},
    "answers": {"question": Q, "answer": R},
    "captions": {"caption": R},
    "documents": {"texts": ["a", R], "images": [None, None]},
}


def outcome(record: dict[str, Any], **reading: Any) -> Any:
    """The reason why a record is not used, or how much its answers or its document are learnt."""
    try:
        found = compose(record, Reading(**reading))
        found.unread()
    except BadSample as error:
        return error.reason
    said = [message.get("weight", 1) for message in found.sample.messages or () if message["role"] == "assistant"]
    return found.sample.weight if found.sample.messages is None else said[-1]


@pytest.mark.parametrize("form", FORMS)
def test_records(form: str) -> None:
    found = {name: outcome(FORMS[form] | {name: value}) for name, value in (NOT_LEARNT | ABOUT_NOTHING).items()}
    assert found == dict.fromkeys(NOT_LEARNT, "not_learnt") | dict.fromkeys(ABOUT_NOTHING, 1)
    found = {name: outcome(FORMS[form] | {name: value}) for name, value in NOT_GOOD.items()}
    assert found == dict.fromkeys(NOT_GOOD, "not_preferred")
    found = {name: outcome(FORMS[form] | {name: value}) for name, value in SAID_TO_BE_LEARNT.items()}
    assert found == dict.fromkeys(SAID_TO_BE_LEARNT, 1)
    found = {name: outcome(FORMS[form] | {name: value}) for name, value in MEANS_NOTHING.items()}
    assert found == dict.fromkeys(MEANS_NOTHING, "bad_weight")
    assert outcome(FORMS[form] | {"weight": 0.5, "loss_weight": 0.5}) == 0.5
    assert outcome(FORMS[form] | {"weight": 0.5, "masked": False}) == 0.5
    assert outcome(FORMS[form] | {"weight": 0.5, "masked": True}) == "bad_weight"
    assert outcome(FORMS[form] | {"mask": 0}, fields={"weight": "mask"}) == "not_learnt"
    assert outcome(FORMS[form] | {"mask": 0}, fields={"masked": "mask"}) == 1
    assert outcome(FORMS[form] | {"mask": 0, "weight": 0}, ignore=("mask", "weight")) == 1
    assert outcome(FORMS[form] | {"loss": 2.31}, fields={"weight": "loss"}) == 2.31


@pytest.mark.parametrize("where", ["turn", "item", "exchange"])
def test_turns_and_items(where: str) -> None:
    def made(name: str, value: Any) -> dict[str, Any]:
        item = {"type": "text", "text": R}
        turn: dict[str, Any] = {"role": "assistant", "content": [item]}
        exchange = {"user": Q, "assistant": R}
        {"turn": turn, "item": item, "exchange": exchange}[where][name] = value
        return {"texts": [exchange]} if where == "exchange" else {"messages": [{"role": "user", "content": Q}, turn]}

    cases = NOT_LEARNT | NOT_GOOD
    assert {name: outcome(made(name, value)) for name, value in cases.items()} == dict.fromkeys(cases, 0)
    cases = SAID_TO_BE_LEARNT | ABOUT_NOTHING
    assert {name: outcome(made(name, value)) for name, value in cases.items()} == dict.fromkeys(cases, 1)
    cases = {name: value for name, value in MEANS_NOTHING.items() if name not in ("loss", "sample_weight")}
    assert {name: outcome(made(name, value)) for name, value in cases.items()} == dict.fromkeys(cases, "bad_weight")
    assert outcome(made("loss", 2.31)) == 2.31
    assert outcome(made("weight", 0.5) | {"weight": 0.5}) == 0.25
    assert outcome(made("mask", 0), ignore=("mask",)) == 1


def test_items_of_a_turn_that_differ_are_bad() -> None:
    items = [{"type": "text", "text": "No. ", "weight": 0}, {"type": "text", "text": R}]
    turns = [{"role": "user", "content": Q}, {"role": "assistant", "content": items}]
    assert outcome({"messages": turns}) == "bad_weight"
    items[1]["weight"] = 0
    assert outcome({"messages": turns}) == 0


@pytest.mark.parametrize("name", sorted(WEIGHTS | LEFT_OUT))
def test_every_name_of_the_family(name: str) -> None:
    assert outcome(FORMS["answers"] | {name: name in LEFT_OUT}) == "not_learnt"
    assert outcome(FORMS["answers"] | {name: name not in LEFT_OUT}) == 1


@pytest.mark.parametrize("label", ["bad", "negative", "-1", "wrong", "dislike", 0, -1, False, "false"])
def test_labels_of_completions(label: Any) -> None:
    assert outcome({"prompt": Q, "completion": R, "label": label}) == "not_preferred"
    expected = "not_preferred" if label is False or label == "false" else 1
    assert outcome({"question": Q, "answer": R, "label": label}) == expected


def test_a_chosen_answer_that_is_a_word_of_truth() -> None:
    assert outcome({"prompt": Q, "chosen": "True", "rejected": "False"}) == 1
    assert outcome({"prompt": Q, "chosen": "False", "rejected": "True"}) == 1


SAID = {"1": ("weight", 0, "not_learnt"), "2": ("is_correct", False, "not_preferred"), "3": ("mask", 1, "bad_weight")}


def _source(tmp_path: Path, form: str) -> Source:
    """A sample that says nothing, one of each that is left out, and one of weight a half, in a format."""
    extras: list[dict[str, Any]] = [{}, *({name: value} for name, value, _ in SAID.values()), {"weight": 0.5}]
    if form == "csv":
        with open(tmp_path / "a.csv", "w", newline="") as file:
            rows = csv.DictWriter(file, ["question", "answer", "weight", "is_correct", "mask"])
            rows.writeheader()
            rows.writerows({"question": Q, "answer": R} | extra for extra in extras)
        return opened(tmp_path / "a.csv")
    if form in ("json", "parquet"):
        return opened(_written(tmp_path, form, [FORMS["answers"] | extra for extra in extras]), form)
    layouts: dict[str, dict[str, Any]] = {
        "pairs": {"json": {"url": "u"}, "txt": R, "jpg": RED},
        "canonical": {"json": {"items": [{"text": R}]}},
        "conversations": {"json": {"messages": FORMS["turns"]["messages"]}},
        "energon": {"json": FORMS["documents"]},
        "mint1t": {"json": FORMS["documents"]},
        "mmc4": {"json": {"text_list": [R], "image_info": []}},
        "llava_onevision": {"json": {"texts": FORMS["turns"]["messages"]}},
    }
    members = {}
    for number, extra in enumerate(extras):
        members |= {f"{number}.{name}": v for name, v in layouts[form].items()}
        members[f"{number}.json"] = layouts[form]["json"] | extra
    return opened(_tar(tmp_path / "a.tar", members), "canonical" if form == "conversations" else form)


TARS = ["pairs", "canonical", "conversations", "energon", "mint1t", "mmc4", "llava_onevision"]


@pytest.mark.parametrize("form", ["csv", "json", "parquet", *TARS])
def test_every_format(tmp_path: Path, form: str) -> None:
    built = _source(tmp_path, form)
    assert bad(built) == {number: reason for number, (_, _, reason) in SAID.items()}
    assert not built.index.unread
    samples = [built.read(0), built.read(4)]
    found = [each.weight if each.messages is None else each.messages[-1].get("weight", 1) for each in samples]
    assert found == [1, 0.5]


NOTHING = ["NaN", "nan", "None", "N/A", "n/a", "null", "NULL", "<NA>", "#N/A", "NaT", " nan "]


@pytest.mark.parametrize("column", ["answer", "caption", "image"])
def test_what_programs_write_for_nothing_in_a_table_is_nothing(tmp_path: Path, column: str) -> None:
    asked = "question,answer,image\n" if column != "caption" else "caption,image\n"
    row = {"answer": 'Which?,"{}",\n', "caption": '"{}",\n', "image": 'Which?,Red.,"{}"\n'}[column]
    (tmp_path / "a.csv").write_text(asked + "".join(row.format(each) for each in NOTHING))
    rows = "".join(row.format(each) for each in ["Nancy", "none of them"]) if column != "image" else ""
    (tmp_path / "b.csv").write_text(asked + rows + (row.format("") if column == "image" else ""))
    reason = {"answer": "empty_answer", "caption": "bad_json"}.get(column)
    config = SourceConfig(path=str(tmp_path / "a.csv"), format="csv")
    [built] = open_sources({"s": config}, data_config(), FakeProcessor())
    assert bad(built) == ({str(n): reason for n in range(len(NOTHING))} if reason else {})
    assert not bad(opened(tmp_path / "b.csv"))
