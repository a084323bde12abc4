import json

import pytest

from m4train.data.documents.sample import parse_sample
from m4train.errors import BadSample


def test_document_and_conversation_are_read_in_reading_order() -> None:
    sample = parse_sample(b'{"items": [{"image": "1.png", "alt": "a"}, {"text": "x"}, {"image": "0.png"}]}')
    assert sample.images == ["1.png", "0.png"]
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"image": "0.jpg"}]}]}
    sample = parse_sample(json.dumps(chat).encode())
    assert sample.messages is not None
    assert sample.messages[0] == {"role": "user", "content": [{"text": "hi"}]}
    assert sample.images == ["0.jpg"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"items": [', "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b"[1]", "a list where an object"),
        (b"{}", "either `items`"),
        (b'{"items": [], "messages": []}', "either `items`"),
        (b'{"items": []}', "at least one item"),
        (b'{"items": [{"text": 3}]}', "items[0]"),
        (b'{"items": [{"text": "a", "image": "0.png"}]}', "items[0]"),
        (b'{"messages": [{"role": "bot", "content": "x"}]}', "messages[0]"),
        (b'{"messages": [{"role": "user", "content": [{"video": "x"}]}]}', "messages[0].content[0]"),
        (b'{"items": [{"text": "\\ud800"}]}', "surrogate"),
        (b'{"items": [{"text": "a"}], "scores": 3}', "scores"),
    ],
)
def test_what_is_wrong_is_said(raw: bytes, said: str) -> None:
    with pytest.raises(BadSample) as error:
        parse_sample(raw)
    assert error.value.reason == "bad_json"
    assert said in error.value.detail
