"""What is asked, what of it belongs together, which choices there are and which of them are right."""

import json
from pathlib import Path
from typing import Any

import pytest

from m4train.data.sources.fields import Reading
from m4train.data.sources.records import compose
from m4train.errors import BadSample
from tests.unit.data.sources.test_forms import bad, opened
from tests.unit.data.sources.test_unread import _written

Q = "Which?"
LINES = ["red", "blue", "green"]
SHOWN = f"{Q}\nA. red\nB. blue\nC. green"


def asked(record: dict[str, Any], **reading: Any) -> Any:
    """Question and answer of a record, or why it is not used."""
    try:
        found = compose(record, Reading(**reading))
        found.unread()
    except BadSample as error:
        return error.reason
    return tuple("".join(item["text"] for item in message["content"]) for message in found.sample.messages or ())


LETTERED = {
    "plain": LINES,
    "A. x": ["A. red", "B. blue", "C. green"],
    "(A) x": ["(A) red", "(B) blue", "(C) green"],
    "a) x": ["a) red", "b) blue", "c) green"],
    "A: x": ["A: red", "B: blue", "C: green"],
    "object": {"A": "red", "B": "blue", "C": "green"},
    "object with letters": {"A": "A. red", "B": "B. blue", "C": "C. green"},
    "ARC": {"label": ["A", "B", "C"], "text": LINES},
    "JSON": json.dumps(LINES),
}
RIGHT = ["B", "b", "(B)", "B.", "blue", "B. blue", "(B) blue", 1, 1.0, "1", ["B"], ["blue", "blue"]]


@pytest.mark.parametrize("name", LETTERED)
def test_choices_get_one_letter_each(name: str) -> None:
    for right in RIGHT:
        assert asked({"question": Q, "options": LETTERED[name], "answer": right}) == (SHOWN, "B. blue"), right


@pytest.mark.parametrize("options", [["A. red", "x", "C. y"], ["B. red", "A. blue"], ["I. am", "You. are"]])
def test_texts_that_only_look_as_if_they_had_letters_are_kept(options: list[str]) -> None:
    question, answer = asked({"question": Q, "options": options, "answer": 0})
    assert answer == f"A. {options[0]}"
    assert question.splitlines()[1:] == [f"{letter}. {text}" for letter, text in zip("ABC", options)]


COLUMNS = [
    "{A}",
    "option_{A}",
    "option_{a}",
    "Option {A}",
    "option{A}",
    "choice_{a}",
    "op{a}",
    "option_{n}",
    "choice{n}",
]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("form", ["json", "csv", "parquet"])
def test_choices_in_columns(tmp_path: Path, column: str, form: str) -> None:
    names = [column.format(A=letter, a=letter.lower(), n=n) for n, letter in enumerate("ABCD", start=1)]
    row = dict(zip(names, [*LINES, ""])) | {"question": Q, "answer": "B", "hint": "Look.", "category": "colours"}
    rows = [row, row | {"answer": "D"}, row | {names[2]: "", "hint": ""}]
    if form == "csv":
        lines = [",".join(row)] + [",".join(map(str, each.values())) for each in rows]
        (tmp_path / "a.csv").write_text("\n".join(lines))
        built = opened(tmp_path / "a.csv")
    else:
        built = opened(_written(tmp_path, form, rows), form)
    assert bad(built) == {"1": "not_a_choice"}
    texts = ["".join(item["text"] for item in message["content"]) for n in (0, 2) for message in built.read(n).messages]
    assert texts == ["Look.\n" + SHOWN, "B. blue", SHOWN.removesuffix("\nC. green"), "B. blue"]
    assert built.index.unread == {"category": 2}


def test_single_letters_that_are_no_choices() -> None:
    assert asked({"question": Q, "answer": "Red.", "A": "x", "C": "y"}) == (Q, "Red.")
    assert compose({"question": Q, "answer": "Red.", "A": "x"}, Reading()).unread() == ("A",)
    assert asked({"question": Q, "answer": "Red.", "A": "x", "B": "y"}, ignore=("A", "B")) == (Q, "Red.")


SEVERAL = [["A", "C"], ["C", "A"], "A, C", "A,C", "A;C", "AC", "A and C", ["red", "green"], [0, 2], ["red", "C. green"]]


@pytest.mark.parametrize("answer", SEVERAL, ids=range(len(SEVERAL)))
@pytest.mark.parametrize("name", ["answer", "answers"])
def test_several_right_choices_are_all_learnt(answer: Any, name: str) -> None:
    assert asked({"question": Q, "options": LINES, name: answer}) == (SHOWN, "A. red\nC. green")


def test_of_answers_that_many_gave_the_most_frequent_is_learnt() -> None:
    assert asked({"question": Q, "options": LINES, "answers": ["A", "B", "B"]}) == (SHOWN, "B. blue")
    assert asked({"question": Q, "answers": ["red", "blue", "blue"]}) == (Q, "blue")


@pytest.mark.parametrize("answer", ["D", 3, "purple", ["A", "D"], "CA", "A. blue", "-1", True, 1.5])
def test_answers_that_are_none_of_the_choices(answer: Any) -> None:
    assert asked({"question": Q, "options": LINES, "answer": answer}) == "not_a_choice"


KEYS = [
    "answer_idx",
    "answer_index",
    "answer_label",
    "answer_letter",
    "answerKey",
    "correct_option",
    "correct_answer",
    "cop",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_second_field_that_says_which_choice_is_right(key: str) -> None:
    record = {"question": Q, "options": LINES}
    for same in ("B", 1, "blue"):
        assert asked(record | {"answer": "blue", key: same}) == (SHOWN, "B. blue")
        assert asked(record | {key: same}) == (SHOWN, "B. blue")
    for other in ("A", 2, "green"):
        assert asked(record | {"answer": "blue", key: other}) == "conflicting_answers"
    assert asked(record | {"answer": "blue", key: "A"}, ignore=(key,)) == (SHOWN, "B. blue")


TOGETHER: dict[str, tuple[dict[str, Any], Any]] = {
    "instruction": ({"instruction": "In a word.", "question": Q}, f"In a word.\n{Q}"),
    "input": ({"instruction": "Name it.", "input": "The sky."}, "Name it.\nThe sky."),
    "context": ({"context": "The sky is red.", "question": Q}, f"The sky is red.\n{Q}"),
    "passage": ({"passage": "The sky is red.", "query": Q}, f"The sky is red.\n{Q}"),
    "hint": ({"hint": "Look up.", "question": Q}, f"Look up.\n{Q}"),
    "hints": ({"hint": ["Look up.", "Then down."], "question": Q}, f"Look up.\nThen down.\n{Q}"),
    "all": ({"instruction": "I", "context": "C", "passage": "P", "hint": "H", "question": Q}, f"I\nC\nP\nH\n{Q}"),
    "empty": ({"instruction": "", "context": None, "hint": " ", "question": Q}, Q),
    "the same twice": ({"prompt": Q, "question": Q}, Q),
    "in a longer one": ({"prompt": f"Answer: {Q}", "question": Q}, f"Answer: {Q}"),
    "two": ({"prompt": "Draw.", "question": Q}, "conflicting_questions"),
    "query": ({"query": "Draw.", "question": Q}, "conflicting_questions"),
    "problem": ({"problem": "Draw.", "question": Q}, "conflicting_questions"),
    "input alone": ({"input": "Draw.", "question": Q}, "conflicting_questions"),
    "three": ({"instruction": "I", "prompt": "Draw.", "question": Q}, "conflicting_questions"),
    "an object": ({"context": {"title": "x"}, "question": Q}, "bad_json"),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_belongs_to_a_question(name: str) -> None:
    record, expected = TOGETHER[name]
    found = asked(record | {"answer": "Red."})
    assert found == (expected if "_" in expected else (expected, "Red."))


SHOWN_ONCE = [SHOWN, f"{Q}\n(A) red (B) blue (C) green", f"{Q} A) red\nB) blue\nC) green"]


@pytest.mark.parametrize("question", SHOWN_ONCE)
def test_choices_that_a_question_lists_already_are_not_listed_again(question: str) -> None:
    assert asked({"question": question, "options": LINES, "answer": "B"}) == (question, "B. blue")
    other = question.replace("blue", "pink")
    assert asked({"question": other, "options": LINES, "answer": "B"}) == (other + SHOWN.removeprefix(Q), "B. blue")


@pytest.mark.parametrize("name", ["choices", "answer_choices", "mc_options", "multiple_choices", "candidates"])
def test_names_of_choices(name: str) -> None:
    assert asked({"question": Q, name: LINES, "correct_choice_idx": 1}) == (SHOWN, "B. blue")


@pytest.mark.parametrize("nothing", ["", "<noinput>", "N/A", "nan", None])
def test_an_instruction_without_input(nothing: Any) -> None:
    assert asked({"instruction": Q, "input": nothing, "output": "Red."}) == (Q, "Red.")


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_names_of_what_the_system_says(name: str) -> None:
    assert asked({name: "Be kind.", "question": Q, "answer": "Red."}) == ("Be kind.", Q, "Red.")


def test_ways_out_of_conflicts() -> None:
    record = {"prompt": "Draw.", "question": Q, "answer": "Red."}
    assert asked(record, ignore=("prompt",)) == (Q, "Red.")
    assert asked(record, fields={"question": "prompt"}) == ("Draw.", "Red.")
    assert asked({"context": {"t": "x"}, "question": Q, "answer": "Red."}, ignore=("context",)) == (Q, "Red.")


@pytest.mark.parametrize(
    ("answer", "learnt"),
    [
        ("A", None),
        ("B", None),
        ("(B)", "B. A"),
        ("a", "A. B"),
        ("C", "C. D"),
        ("D", "C. D"),
        (0, "A. B"),
        ("A. B", "A. B"),
    ],
)
def test_an_answer_that_is_the_letter_of_one_choice_and_the_text_of_another(answer: Any, learnt: str | None) -> None:
    found = asked({"question": Q, "options": ["B", "A", "D"], "answer": answer})
    assert found == "not_a_choice" if learnt is None else found[1] == learnt
