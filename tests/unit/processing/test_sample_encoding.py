import itertools
import pickle

import numpy as np
import pytest

from m4train.errors import BadSample, ConfigError
from m4train.processing.pieces import ImagePiece, TextPiece, text_ids
from tests.helpers.processing import tiny_idefics3_processor

SPELLED = "an <image>, a <row_1_col_2>, <global-img>, <fake_token_around_image>, <end_of_utterance>, <|end_of_text|>"


@pytest.fixture(scope="module")
def processor():
    return tiny_idefics3_processor(split=True)


def spoken(processor, pieces):
    """Origin, turn and text of each piece; a space between user and template may be a token of either."""
    said = []
    for piece in pieces:
        if isinstance(piece, ImagePiece):
            said.append(("image", piece.image, ""))
        else:
            text = processor.decode(piece.ids)
            said.append(
                (piece.origin, piece.turn, text.strip(" ") if piece.origin in ("user", "template", "system") else text)
            )
    return said


def test_document_pieces(processor):
    items = [{"text": "one"}, {"text": " two"}, {"image": "0.jpg"}, {"image": "1.jpg"}, {"text": "three"}]
    assert spoken(processor, processor.encode_document(items)) == [
        ("template", -1, "<|begin_of_text|>"),
        ("document", 0, "one"),
        ("document", 1, " two"),
        ("image", 0, ""),
        ("image", 1, ""),
        ("document", 4, "three"),
        ("document", -1, "<|end_of_text|>"),
    ]


def test_chat_pieces_say_who_speaks(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"image": "0.jpg"}, {"text": "What is it?"}]},
        {"role": "assistant", "content": [{"text": "A digit"}]},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "seven"},
    ]
    assert spoken(processor, processor.encode_messages(messages)) == [
        ("template", -1, "<|begin_of_text|>System:"),
        ("system", 0, "Be brief."),
        ("template", -1, "<end_of_utterance>\nUser:"),
        ("image", 0, ""),
        ("user", 1, "What is it?"),
        ("template", -1, "<end_of_utterance>\nAssistant:"),
        ("assistant", 2, " A digit<end_of_utterance>"),
        ("template", -1, "\nUser:"),
        ("user", 3, "Which?"),
        ("template", -1, "<end_of_utterance>\nAssistant:"),
        ("assistant", 4, " seven<end_of_utterance>"),
        ("template", -1, "\n"),
    ]


def test_text_that_spells_a_special_token_stays_text(processor):
    special = set(processor.tokenizer.all_special_ids) - {processor.eos_id, processor.bos_id}
    pieces = processor.encode_document([{"text": SPELLED}])
    assert not special & set(pieces[1].ids.tolist())
    assert processor.decode(pieces[1].ids) == SPELLED
    messages = [{"role": "user", "content": SPELLED}, {"role": "assistant", "content": SPELLED}]
    answers = [p for p in processor.encode_messages(messages) if isinstance(p, TextPiece) and p.origin == "assistant"]
    assert processor.decode(answers[0].ids) == f" {SPELLED}<end_of_utterance>"
    assert np.isin(answers[0].ids, processor.tokenizer.all_special_ids).sum() == 1
    assert not any(isinstance(p, ImagePiece) for p in processor.encode_messages(messages))


def test_a_prompt_is_the_beginning_of_its_conversation_in_ids(processor):
    openings = ["seven", "\n\nseven", " seven", "", "'s", "7", "\t"]
    for opening in openings:
        messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": opening}]
        ids = text_ids(processor.encode_messages(messages))
        prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=True)
        assert ids[: len(prompt)].tolist() == prompt
        answer = [p for p in processor.encode_messages(messages) if p.origin == "assistant"]
        assert ids[len(prompt) :].tolist()[: len(answer[0].ids)] == answer[0].ids.tolist()


def test_images_of_the_assistant_keep_their_place(processor):
    messages = [
        {"role": "user", "content": "Draw."},
        {"role": "assistant", "content": [{"text": "Here "}, {"image": "0.jpg"}, {"text": "it is"}]},
    ]
    assert spoken(processor, processor.encode_messages(messages))[3:] == [
        ("assistant", 1, " Here "),
        ("image", 0, ""),
        ("assistant", 1, "it is<end_of_utterance>"),
        ("template", -1, "\n"),
    ]


def test_pieces_survive_pickling_of_the_processor(processor):
    again = pickle.loads(pickle.dumps(processor))
    for left, right in itertools.zip_longest(
        processor.encode_document([{"text": SPELLED}]), again.encode_document([{"text": SPELLED}])
    ):
        np.testing.assert_array_equal(left.ids, right.ids)
    assert again.fingerprint() == processor.fingerprint()


@pytest.mark.parametrize(
    "items",
    [[{"video": "x"}], [{"text": None}], [{"text": 3}]],
    ids=str,
)
def test_bad_items_are_bad_samples(processor, items):
    with pytest.raises(BadSample, match="Item 0"):
        processor.encode_document(items)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"content": "x"},
        {"content": "x", "role": None},
        {"role": "user", "content": [{"type": "audio"}]},
        {"role": "user", "content": ["x"]},
        {"role": "user", "content": [{"text": None}]},
    ],
    ids=str,
)
def test_bad_messages_are_bad_samples(processor, message):
    with pytest.raises(BadSample, match=r"message|content item"):
        processor.encode_messages([message])


CHATML = (
    "{% for m in messages %}<end_of_utterance>{{ m.role }}\n{{ m.content | trim }}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}<end_of_utterance>assistant\n{% endif %}"
)


def test_template_that_takes_strings_and_trims_them():
    processor = tiny_idefics3_processor()
    processor.chat_template = CHATML
    messages = [
        {"role": "user", "content": [{"image": "0.jpg"}, {"text": " which? "}]},
        {"role": "assistant", "content": " seven\n"},
    ]
    assert [p for p in spoken(processor, processor.encode_messages(messages)) if p[0] != "template"] == [
        ("image", 0, ""),
        ("user", 0, "which?"),
        ("assistant", 1, "seven<end_of_utterance>"),
    ]


def test_template_without_the_prefix_property_is_refused():
    processor = tiny_idefics3_processor()
    processor.chat_template = "{{ messages | length }}" + CHATML
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ConfigError, match="not the beginning of the conversation"):
        processor.encode_messages(messages)


def test_template_that_never_closes_the_answer_is_refused():
    processor = tiny_idefics3_processor()
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ConfigError, match="never stop"):
        processor.encode_messages(messages)


def test_template_that_closes_only_the_questions_is_refused():
    processor = tiny_idefics3_processor()
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'user' %}<end_of_utterance>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ConfigError, match="never stop"):
        processor.encode_messages(turns)


def test_special_tokens_inside_an_answer_belong_to_it():
    processor = tiny_idefics3_processor()
    processor.chat_template = CHATML.replace("{{ m.content | trim }}", "<global-img>{{ m.content }}<global-img>\n")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    answers = [p for p in spoken(processor, processor.encode_messages(messages)) if p[0] == "assistant"]
    assert answers == [("assistant", 1, "<global-img>b<global-img>")]


def test_template_that_changes_the_text_is_a_bad_sample():
    processor = tiny_idefics3_processor()
    processor.chat_template = CHATML.replace("trim", "upper")
    with pytest.raises(BadSample, match="changes the text"):
        processor.encode_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_template_that_leaves_an_image_out_is_a_bad_sample():
    processor = tiny_idefics3_processor()
    processor.chat_template = processor.chat_template.replace("'<image>'", "''")
    with pytest.raises(BadSample, match="0 images"):
        processor.encode_messages(
            [{"role": "user", "content": [{"image": "0"}]}, {"role": "assistant", "content": "b"}]
        )


def test_a_message_that_spells_bos_does_not_stand_for_it():
    processor = tiny_idefics3_processor()
    processor.chat_template = "{% for m in messages %}{{ m.content[0].text }}<end_of_utterance>{% endfor %}"
    pieces = processor.encode_messages([{"role": "user", "content": "<|begin_of_text|>a"}])
    assert pieces[0].ids.tolist() == [processor.bos_id]
    assert sum((piece.ids == processor.bos_id).sum() for piece in pieces) == 1
