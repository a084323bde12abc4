"""The forms of records that people have: the sample each of them is, and what makes one bad."""

import json
from typing import Any

import pytest

from m4train.config import SourceConfig
from m4train.data.sources.fields import READABLE, Reading
from m4train.data.sources.records import Composed, compose
from m4train.errors import BadSample, ConfigError

A, B = "a.png", "b.png"
Q, R = "Which?", "Red."
ASKED = [("user", [A, Q]), ("assistant", [R])]
PLAIN = [("user", [Q]), ("assistant", [R])]


class Pic(str):
    """A picture in an expected sample, to be told from a text."""


PA, PB = Pic(A), Pic(B)
SEEN = [("user", [PA, Q]), ("assistant", [R])]


def composed(record: Any, **options: Any) -> Composed:
    return compose(record, Reading.of(SourceConfig(**options)))


def said(found: Composed) -> list:
    """The texts, and the pictures in their places, of a document; (role, such a list) of each turn of a conversation."""

    def shown(items: list[dict]) -> list:
        return [item["text"] if "text" in item else Pic(found.pictures[int(item["image"])]) for item in items]

    if found.sample.items is not None:
        return shown(found.sample.items)
    return [(message["role"], shown(message["content"])) for message in found.sample.messages]


def same(found: list, expected: list) -> bool:
    """Whether they are equal, a picture never taken for the text of its name."""

    def flat(said: list) -> list:
        return [(type(x), x) if isinstance(x, str) else (x[0], [(type(y), y) for y in x[1]]) for x in said]

    return flat(found) == flat(expected)


def turns(*texts: str, role: str = "role", content: str = "content", names: tuple = ("user", "assistant")) -> list:
    return [{role: names[number % 2], content: text} for number, text in enumerate(texts)]


SHAREGPT = turns(Q, R, role="from", content="value", names=("human", "gpt"))
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": A}}
FORMS: dict[str, tuple[dict, list]] = {
    "llava": ({"image": A, "conversations": SHAREGPT}, SEEN),
    "sharegpt with a system": (
        {"system": "Be short.", "conversations": SHAREGPT},
        [("system", ["Be short."]), *PLAIN],
    ),
    "json string": ({"image": A, "conversations": json.dumps(SHAREGPT)}, SEEN),
    "openai": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": A}}, {"type": "text", "text": Q}],
                },
                {"role": "assistant", "content": R},
            ]
        },
        SEEN,
    ),
    "anthropic": (
        {
            "messages": [
                {"role": "user", "content": [PICTURE, {"type": "text", "text": Q}]},
                {"role": "assistant", "content": [{"type": "text", "text": R}]},
            ]
        },
        SEEN,
    ),
    "input_image": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": A}, {"type": "input_text", "text": Q}],
                },
                {"role": "assistant", "content": [{"type": "output_text", "text": R}]},
            ]
        },
        SEEN,
    ),
    "own items": (
        {
            "messages": [
                {"role": "user", "content": [{"image": A}, {"text": Q}]},
                {"role": "assistant", "content": [{"text": R}]},
            ]
        },
        SEEN,
    ),
    "llama-factory v1": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "value": A}, {"type": "text", "value": Q}],
                    "loss_weight": 0.0,
                },
                {"role": "assistant", "content": [{"type": "text", "value": R}], "loss_weight": 1.0},
            ]
        },
        SEEN,
    ),
    "hf items with the pictures listed": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": Q, "index": None},
                        {"type": "image", "index": 1, "text": None},
                    ],
                },
                {"role": "user", "content": [{"type": "image", "index": 0, "text": None}]},
                {"role": "assistant", "content": [{"type": "text", "text": R, "index": None}]},
            ],
            "images": [A, B],
        },
        [("user", [Q, PB]), ("user", [PA]), ("assistant", [R])],
    ),
    "pictures of a turn": (
        {"messages": [{"role": "user", "content": Q, "images": [A, B]}, {"role": "assistant", "content": R}]},
        [("user", [PA, PB, Q]), ("assistant", [R])],
    ),
    "places in a turn with pictures": (
        {
            "messages": [
                {"role": "user", "content": "1 <image> 2 <image>", "images": [A, B]},
                {"role": "assistant", "content": R},
            ]
        },
        [("user", ["1 ", PA, " 2 ", PB]), ("assistant", [R])],
    ),
    "cauldron": ({"images": [A], "texts": [{"user": Q, "assistant": R, "source": "v"}]}, SEEN),
    "alpaca": (
        {"instruction": "Look.", "input": Q, "output": R, "image": A, "system": "S"},
        [("system", ["S"]), ("user", [PA, "Look.\nWhich?"]), ("assistant", [R])],
    ),
    "alpaca with history": (
        {"instruction": Q, "input": "", "output": R, "history": [["1?", "1."], ["2?", "2."]]},
        [("user", ["1?"]), ("assistant", ["1."]), ("user", ["2?"]), ("assistant", ["2."]), *PLAIN],
    ),
    "query and response": ({"query": "<image>Which?", "response": R, "images": [A]}, SEEN),
    "prompt and completion": ({"prompt": Q, "completion": R, "image": A}, SEEN),
    "prompt and completion as turns": (
        {
            "prompt": [{"role": "user", "content": Q}],
            "completion": [{"role": "assistant", "content": R}],
            "images": [A],
        },
        SEEN,
    ),
    "preference": ({"prompt": Q, "chosen": R, "rejected": "Blue.", "images": [A]}, SEEN),
    "preference of conversations": (
        {"prompt": Q, "chosen": turns(Q, R), "rejected": turns(Q, "Blue."), "images": [A]},
        SEEN,
    ),
    "preference without a prompt": ({"chosen": turns(Q, R), "rejected": turns(Q, "Blue.")}, PLAIN),
    "preference after turns": (
        {
            "conversations": SHAREGPT[:1],
            "chosen": {"from": "gpt", "value": R},
            "rejected": {"from": "gpt", "value": "B"},
        },
        PLAIN,
    ),
    "input and output": ({"instruction": "", "input": Q, "output": R}, PLAIN),
    "a query and another's answer": ({"query": Q, "answer": R, "image": A}, SEEN),
    "choices of ARC": (
        {"question": Q, "choices": {"label": ["1", "2"], "text": ["Blue.", R]}, "answer": "2"},
        [("user", ["Which?\n1. Blue.\n2. Red."]), ("assistant", ["2. Red."])],
    ),
    "choices as Python writes them": (
        {"question": Q, "options": "['Blue.', 'Red.']", "answer": "B"},
        [("user", ["Which?\nA. Blue.\nB. Red."]), ("assistant", ["B. Red."])],
    ),
    "pictures as a string of json": (
        {"images": '["a.png", "b.png"]', "question": Q, "answer": R},
        [("user", [PA, PB, Q]), ("assistant", [R])],
    ),
    "question and answer": ({"image": A, "question": Q, "answer": R}, SEEN),
    "a number as an answer": ({"question": Q, "answer": 0}, [("user", [Q]), ("assistant", ["0"])]),
    "answers": ({"image": A, "question": Q, "answers": ["Blue.", R, R]}, SEEN),
    "answers of people": ({"image": A, "question": Q, "answers": [{"answer": R, "answer_id": 1}]}, SEEN),
    "choices by number": (
        {"question": Q, "choices": ["Blue.", R], "answer": 1},
        [("user", ["Which?\nA. Blue.\nB. Red."]), ("assistant", ["B. Red."])],
    ),
    "choices by letter": (
        {"question": Q, "options": {"A": R, "B": "Blue."}, "answer": "A"},
        [("user", ["Which?\nA. Red.\nB. Blue."]), ("assistant", ["A. Red."])],
    ),
    "choices by text": (
        {"question": Q, "choices": '["Blue.", "Red."]', "answer": R},
        [("user", ["Which?\nA. Blue.\nB. Red."]), ("assistant", ["B. Red."])],
    ),
    "problem and solution": ({"problem": "<image>Which?", "solution": R, "image": A}, SEEN),
    "caption": ({"image": A, "caption": "A cat."}, [PA, "A cat."]),
    "caption as text": ({"image": A, "text": "A cat."}, [PA, "A cat."]),
    "captions of one picture": ({"image": A, "captions": ["A cat.", "Fur."]}, [PA, "A cat.\nFur."]),
    "captions of each picture": ({"images": [A, B], "captions": ["A cat.", "A dog."]}, [PA, "A cat.", PB, "A dog."]),
    "numbered pictures": (
        {"image_1": A, "image_2": B, "image_3": None, "question": Q, "answer": R},
        [("user", [PA, PB, Q]), ("assistant", [R])],
    ),
    "pictures by their placeholders": (
        {"images": {"<pic-a>": A, "<pic-b>": B}, "question": "<pic-b> or <pic-a>?", "answer": R},
        [("user", [PB, " or ", PA, "?"]), ("assistant", [R])],
    ),
    "bytes and path": ({"image": {"bytes": None, "path": A}, "question": Q, "answer": R}, SEEN),
    "text": ({"text": "Only text."}, ["Only text."]),
    "text with an empty picture": ({"image": "", "conversations": SHAREGPT}, PLAIN),
    "text with a null picture": ({"image": None, "conversations": SHAREGPT}, PLAIN),
    "text with empty pictures": ({"images": [], "image": None, "conversations": SHAREGPT}, PLAIN),
    "an empty picture next to a filled one": ({"image": "", "images": [A], "conversations": SHAREGPT}, SEEN),
    "a filled picture next to an empty list": ({"image": A, "images": [], "conversations": SHAREGPT}, SEEN),
    "the same picture twice": ({"image": A, "images": [A], "conversations": SHAREGPT}, SEEN),
    "documents": ({"texts": ["One.", None, "Two."], "images": [None, A, None]}, ["One.", PA, "Two."]),
    "numbered places": (
        {"images": [A, B], "conversations": turns("<image_2> after <image_1>?", R)},
        [("user", [PB, " after ", PA, "?"]), ("assistant", [R])],
    ),
    "a place named twice": (
        {"images": [A], "conversations": turns("<image_1> and <image_1>?", R)},
        [("user", [PA, " and ", PA, "?"]), ("assistant", [R])],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    record, expected = FORMS[name]
    found = composed(record)
    assert same(said(found), expected), said(found)
    assert set(found.unread()) <= {"rejected"}
    assert ("rejected" in found.unread()) == ("rejected" in record)


ROLES = {
    "user": ["human", "user", "Human", "USER", "prompter"],
    "assistant": ["gpt", "assistant", "model", "bot", "chatgpt", "GPT", "Model"],
    "system": ["system", "System", "developer"],
    "tool": ["tool", "observation", "Tool", "OBSERVATION", "function"],
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in ROLES.items() for name in names])
def test_roles_in_any_case(role: str, name: str) -> None:
    record = {"messages": [{"role": name, "content": "x"}, *turns(Q, R)]}
    assert said(composed(record))[0] == (role, ["x"])


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(BadSample, match="'narrator'"):
        composed({"messages": [{"role": "narrator", "content": "x"}, *turns(Q, R)]})


def test_what_tools_say_and_are_told_is_context() -> None:
    talk = [
        {"from": "human", "value": Q},
        {"from": "function_call", "value": '{"name": "look"}'},
        {"from": "observation", "value": "red"},
        {"from": "gpt", "value": R},
    ]
    messages = composed({"conversations": talk}).sample.messages
    assert [(message["role"], message.get("weight", 1)) for message in messages] == [
        ("user", 1),
        ("assistant", 0),
        ("tool", 0),
        ("assistant", 1),
    ]


@pytest.mark.parametrize(
    ("field", "value", "weight"),
    [
        ("weight", 0, 0),
        ("weight", 0.5, 0.5),
        ("loss", False, 0),
        ("loss", True, 1),
        ("train", False, 0),
        ("train", None, 1),
    ]
    + [
        ("loss_weight", 2.0, 2.0),
        ("loss_scale", 0.0, 0),
        ("trainable", False, 0),
        ("learn", False, 0),
        ("training", False, 0),
    ],
)
@pytest.mark.parametrize("form", ["turns", "exchanges"])
def test_weights_of_answers(form: str, field: str, value: Any, weight: float) -> None:
    record: dict[str, Any] = {"messages": turns(Q, R)} if form == "turns" else {"texts": [{"user": Q, "assistant": R}]}
    next(iter(record.values()))[-1][field] = value
    found = composed(record)
    assert found.sample.messages[-1].get("weight", 1.0) == weight
    assert not found.unread()


BAD: dict[str, tuple[dict, str]] = {
    "an object that is no picture": ({"image": {"a": A}, "conversations": SHAREGPT}, "bad_json"),
    "two pictures that differ": ({"image": A, "images": [B], "conversations": SHAREGPT}, "conflicting_images"),
    "a numbered one that differs": ({"image": B, "image_1": A, "conversations": SHAREGPT}, "conflicting_images"),
    "a null in the list": ({"images": [A, None], "conversations": turns("<image><image>?", R)}, "missing_image"),
    "a null of question and answer": ({"images": [None], "texts": [{"user": Q, "assistant": R}]}, "missing_image"),
    "an empty name next to one": ({"images": ["", A], "conversations": turns("<image><image>?", R)}, "missing_image"),
    "a place without a picture": ({"images": [""], "conversations": turns("<image>?", R)}, "image_count"),
    "a null picture of a turn": (
        {"messages": [{"role": "user", "content": Q, "images": [None]}, {"role": "assistant", "content": R}]},
        "missing_image",
    ),
    "a null of captions": ({"images": [None], "caption": "A cat."}, "missing_image"),
    "too few pictures": ({"images": [A], "conversations": turns("<image><image>?", R)}, "image_count"),
    "a number that is none": ({"images": [A], "conversations": turns("<image_2>?", R)}, "image_count"),
    "a picture that no number names": ({"images": [A, B], "conversations": turns("<image_2>?", R)}, "image_count"),
    "numbers and none": ({"images": [A, B], "conversations": turns("<image_2><image>?", R)}, "image_count"),
    "an index that is none": (
        {
            "images": [A],
            "messages": [
                {"role": "user", "content": [{"type": "image", "index": 3}, {"type": "text", "text": Q}]},
                {"role": "assistant", "content": R},
            ],
        },
        "image_count",
    ),
    "a label that is false": ({"prompt": Q, "completion": R, "label": False}, "not_preferred"),
    "a label in letters": ({"prompt": Q, "completion": R, "label": " False"}, "not_preferred"),
    "a label of the rejected": ({"question": Q, "answer": R, "label": "rejected"}, "not_preferred"),
    "a label in digits": ({"prompt": Q, "completion": R, "label": "0"}, "not_preferred"),
    "a label of zero": ({"prompt": Q, "completion": R, "label": 0}, "not_preferred"),
    "a label below zero": ({"prompt": Q, "completion": R, "label": -1.0}, "not_preferred"),
    "an answer that is not a number": ({"question": Q, "answer": float("nan")}, "empty_answer"),
    "a caption that is not a number": ({"images": [A], "caption": float("nan")}, "bad_json"),
    "an item of picture and text": (
        {"messages": [{"role": "user", "content": [{"image": A, "text": Q}]}, {"role": "assistant", "content": R}]},
        "bad_json",
    ),
    "a picture item with text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": A}, "text": Q}]},
                {"role": "assistant", "content": R},
            ]
        },
        "bad_json",
    ),
    "a weight that is none": (
        {"messages": [*turns(Q, R)[:1], {"role": "assistant", "content": R, "weight": "high"}]},
        "bad_weight",
    ),
    "weights that differ": (
        {"messages": [*turns(Q, R)[:1], {"role": "assistant", "content": R, "weight": 1, "loss": False}]},
        "bad_weight",
    ),
    "an answer that is no choice": ({"question": Q, "choices": ["x", "y"], "answer": "z"}, "not_a_choice"),
    "grounding": (
        {"images": [A], "messages": turns("<image>Find <ref-object>.", "<bbox>"), "objects": {"ref": ["x"]}},
        "stray_placeholder",
    ),
    "nothing that is known": ({"topic": "x"}, "bad_json"),
    "a question without an answer": ({"question": Q}, "empty_answer"),
    "a video item": (
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}, *turns(Q, R)[1:]]},
        "unknown_item",
    ),
}
EMPTY = ["", " ", "\n", [], None, [{"type": "text", "text": " "}]]
for number, empty in enumerate(EMPTY):
    BAD[f"an empty answer {number}"] = (
        {"messages": [*turns(Q, R)[:1], {"role": "assistant", "content": empty}]},
        "empty_answer",
    )
    BAD[f"no first answer {number}"] = (
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": empty}, *SHAREGPT]},
        "empty_answer",
    )
for number, empty in enumerate(EMPTY[:3] + [None]):
    BAD[f"no answer of a pair {number}"] = ({"texts": [{"user": Q, "assistant": empty}]}, "empty_answer")
    BAD[f"no output {number}"] = ({"instruction": Q, "output": empty}, "empty_answer")
BAD["a call without content"] = (
    {"messages": [*turns(Q, R)[:1], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
    "empty_answer",
)
BAD["a call as an item"] = (
    {"messages": [*turns(Q, R)[:1], {"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}]},
    "empty_answer",
)


@pytest.mark.parametrize("name", BAD)
def test_what_makes_a_record_bad(name: str) -> None:
    record, reason = BAD[name]
    with pytest.raises(BadSample) as error:
        composed(record).unread()
    assert error.value.reason == reason, error.value.detail


def test_an_empty_answer_that_is_not_learnt_is_context() -> None:
    talk = [*turns(Q, R)[:1], {"role": "assistant", "content": "", "weight": 0}, *turns(Q, R)]
    assert len(composed({"messages": talk}).sample.messages) == 4


STRAY = [
    "<image><image>",  # of one picture
    "<|image|>",
    "<image 1>",
    "[IMG]",
    "<img>a.png</img>",
    "<ImageHere>",
    "<video>",
    "<audio>",
    "<|vision_start|>",
]


@pytest.mark.parametrize("text", STRAY)
@pytest.mark.parametrize(
    "record",
    [
        {"texts": [{"user": "X {}", "assistant": R}], "images": [A]},
        {"texts": [{"user": Q, "assistant": "X {}"}], "images": [A]},
        {"texts": ["X {}", None], "images": [None, A]},
        {"caption": "X {}", "image": A},
        {"text": "X {}"},
        {"messages": turns(Q, R), "system": "X {}"},
    ],
)
def test_a_stray_placeholder_is_never_text_by_accident(record: dict, text: str) -> None:
    filled = json.loads(json.dumps(record).replace("{}", text))
    with pytest.raises(BadSample) as error:
        composed(filled)
    assert error.value.reason == "stray_placeholder"
    assert "placeholder" in error.value.detail
    kept = composed(filled, placeholder="literal")
    assert f"X {text}" in str(said(kept))


@pytest.mark.parametrize(
    ("placeholder", "texts"),
    [
        ("<ImageHere>", ("<ImageHere>", "<ImageHere>")),
        (["<one>", "[IMG]"], ("<one>", "[IMG]")),
        ("/<img>.*?</img>/", ("<img>a.png</img>", "<img>b.png</img>")),
        ("<image {n}>", ("<image 1>", "<image 2>")),
        (["<image 1>", "<image 2>"], ("<image 1>", "<image 2>")),
        (r"/<\|image_(\d+)\|>/", ("<|image_1|>", "<|image_2|>")),
    ],
)
@pytest.mark.parametrize("form", ["turns", "exchanges", "answers", "caption"])
def test_a_placeholder_puts_the_pictures_there(form: str, placeholder: Any, texts: tuple[str, str]) -> None:
    text = f"1 {texts[0]} 2 {texts[1]} 3"
    record = {
        "turns": {"messages": turns(text, R)},
        "exchanges": {"texts": [{"user": text, "assistant": R}]},
        "answers": {"question": text, "answer": R},
        "caption": {"caption": text},
    }[form]
    expected = ["1 ", PA, " 2 ", PB, " 3"]
    found = composed(record | {"images": [A, B]}, placeholder=placeholder)
    assert same(said(found), expected if form == "caption" else [("user", expected), ("assistant", [R])])
    if "2" in texts[1] and placeholder != "/<img>.*?</img>/":
        text = text.replace(texts[0], "#").replace(texts[1], texts[0]).replace("#", texts[1])
        turned = composed({"messages": turns(text, R), "images": [A, B]}, placeholder=placeholder)
        assert same(said(turned)[0][1], ["1 ", PB, " 2 ", PA, " 3"])


def test_fields_say_which_column_is_what() -> None:
    record = {"photo": A, "query_text": Q, "label": R, "topic": "t"}
    fields = {"image": "photo", "question": "query_text", "answer": "label"}
    found = composed(record, fields=fields)
    assert same(said(found), SEEN)
    assert found.unread() == ("topic",)
    for value, text in (("No.", "No."), (False, "no")):
        found = composed({"query": Q, "label": value}, fields={"question": "query", "answer": "label"})
        assert said(found) == [("user", [Q]), ("assistant", [text])]
    talk = {"chat": [{"speaker": "human", "body": Q}, {"speaker": "gpt", "body": R}], "photo": A}
    fields = {"messages": "chat", "role": "speaker", "content": "body", "image": "photo"}
    assert same(said(composed(talk, fields=fields)), SEEN)
    assert composed({"conversations": SHAREGPT}, fields={"image": "photo"}).unread() == ("(no field photo)",)


@pytest.mark.parametrize(
    "options",
    [
        {"fields": {"picture": "photo"}},
        {"where": "len(1, 2) > 0"},
        {"where": "__import__('os')"},
        {"where": "x ="},
        {"where": "3 > 2"},
        {"placeholder": []},
        {"placeholder": 5},
        {"placeholder": ["literal", "<x>"]},
        {"placeholder": "/(/"},
        {"placeholder": "/x*/"},
        {"missing_images": "drop"},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Reading.of(SourceConfig(**options))


RATED = {"texts": [{"user": Q, "assistant": R}], "relevance_ratings": [3, 4], "source": "v", "scores": {"clip": 0.3}}


@pytest.mark.parametrize(
    ("where", "used"),
    [
        ("relevance_ratings >= 3", True),
        ("relevance_ratings >= 4", False),
        ("max(relevance_ratings) >= 4", True),
        ("mean(relevance_ratings) > 3.5", False),
        ("scores.clip > 0.2 and source == 'v'", True),
        ("source in ['w', 'x'] or not scores.clip < 0.5", False),
        ("0.1 < scores.clip <= 0.3", True),
        ("quality > 1", False),
        ("quality == None", True),
        ("len(relevance_ratings) == 1 + 1", True),
    ],
)
def test_where(where: str, used: bool) -> None:
    if used:
        assert not composed(RATED, where=where).unread() or "relevance" not in where
        return
    with pytest.raises(BadSample, match="leaves it out") as error:
        composed(RATED, where=where)
    assert error.value.reason == "skipped"


def test_where_cannot_compare_what_cannot_be_compared() -> None:
    with pytest.raises(BadSample) as error:
        composed(RATED, where="source > 3")
    assert error.value.reason == "bad_where"


LOST = {"texts": ["One.", None, None, "Two."], "images": [None, None, A, None]}


def test_missing_images_of_documents() -> None:
    with pytest.raises(BadSample) as error:
        composed(LOST)
    assert error.value.reason == "bad_json"
    with pytest.raises(BadSample) as error:
        composed(LOST, missing_images="drop_sample")
    assert error.value.reason == "skipped"
    assert same(said(composed(LOST, missing_images="drop_image")), ["One.", PA, "Two."])
    with pytest.raises(BadSample) as error:  # a conversation does not train without its picture
        composed({"images": [None], "conversations": SHAREGPT}, missing_images="drop_image")
    assert error.value.reason == "missing_image"


ODD: list[Any] = [
    None,
    5,
    True,
    "x",
    "",
    [],
    {},
    [1],
    [None],
    {"a": 1},
    [{"a": 1}],
    b"x",
    [[1, 2]],
    {"bytes": 5},
    {"path": ["x"]},
]
ODD += [float("nan"), "\ud800", {"label": 1, "text": "x"}, {"": A}, "[", "{", [[]], {"<a>": None}]


@pytest.mark.parametrize("name", sorted(READABLE | {"image_1"}))
def test_odd_values_cost_their_record_alone(name: str) -> None:
    """Whatever a field holds, the record is a sample or a bad one; no other error ends the reading of all others."""
    bases: list[dict] = [
        {"messages": turns(Q, R)},
        {"question": Q, "answer": R, "image": A},
        {"texts": [{"user": Q, "assistant": R}]},
    ]
    bases += [
        {"caption": R, "image": A},
        {"texts": [R, None], "images": [None, A]},
        {"prompt": Q, "chosen": turns(Q, R)},
        {},
    ]
    outcomes = set()
    for base in bases:
        for odd in ODD:
            try:
                composed(base | {name: odd}).unread()
                outcomes.add("read")
            except BadSample as error:
                outcomes.add(error.reason)
    assert outcomes - {"read"}


@pytest.mark.parametrize(
    "name", ["role", "from", "content", "value", "weight", "loss", "images", "image", "index", "type", "text"]
)
def test_odd_values_in_turns_and_items(name: str) -> None:
    outcomes = set()
    for odd in ODD:
        places: list[dict] = [{"role": "user", "content": Q, name: odd}]
        places += [{"role": "user", "content": [{"type": "image", "image": A, name: odd}, {"type": "text", "text": Q}]}]
        for turn in places:
            try:
                composed({"messages": [turn, turns(Q, R)[1]]}).unread()
                outcomes.add("read")
            except BadSample as error:
                outcomes.add(error.reason)
    assert "read" in outcomes


BYTES = b"\x89PNG\r\n\x1a\n" * 40
HOLD_BYTES: list[Any] = [
    BYTES,
    [BYTES],
    {"bytes": BYTES},
    {"a": BYTES},
    [{"a": [BYTES]}],
    [[BYTES]],
    {"a\nb": "x" * 5000},
]


@pytest.mark.parametrize(
    "name", sorted(READABLE | {"image_1", "photo", "A", "answer_idx", "skip", "loss", "kto_tag", "topic"})
)
def test_no_message_shows_bytes_or_goes_on_for_pages(name: str) -> None:
    """Whatever is wrong with a record, it is said in a line, with the bytes of a picture counted and not shown."""
    bases: list[dict] = [{"messages": turns(Q, R)}, {"question": Q, "answer": R, "choices": ["x", "Red."]}, {}]
    bases += [
        {"texts": [{"user": Q, "assistant": R}]},
        {"caption": R, "image": A},
        {"texts": [R, None], "images": [None, A]},
    ]
    records = [base | {name: odd} for base in bases for odd in HOLD_BYTES]
    records += [{"messages": [{"role": "user", "content": Q, name: odd}, turns(Q, R)[1]]} for odd in HOLD_BYTES]
    records += [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q, name: odd}]}]} for odd in HOLD_BYTES
    ]
    found = [
        detail
        for record in records
        for options in ({}, {"where": f"{name} > 3"})
        if (detail := refusal(record, options))
    ]
    assert found
    wrong = [detail for detail in found if "b'" in detail or "\\x" in detail or "\n" in detail or len(detail) > 1500]
    assert not wrong


def refusal(record: dict, options: dict) -> str:
    """Why a record is bad; empty if it is not."""
    try:
        composed(record, **options).unread()
    except BadSample as error:
        return error.detail
    return ""
