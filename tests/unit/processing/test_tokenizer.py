import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from m4train.errors import ConfigError
from m4train.processing.chat import ChatTemplate
from m4train.processing.pieces import ImagePiece, text_ids
from m4train.processing.sample_encoding import Framing, encode_document, encode_messages
from m4train.processing.tokenizer import Tokenizer
from tests.helpers.processing import tokenizer_folder
from tests.parity.fixtures import make_processing_446 as made

FAKE = "<fake_token_around_image>"


def load(kind: str) -> Tokenizer:
    """A tokenizer of each kind that marks words in its own way, with the image tokens."""
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder() if kind.startswith("bytelevel") else made.FOLDER)
    state = json.loads(tokenizer.backend.to_str())
    if kind == "bytelevel with prefix":
        state["pre_tokenizer"]["add_prefix_space"] = True
    if kind == "bytelevel by pattern":  # as LLaMA 3: a pattern of its own, and words that skip the merges
        pattern = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        state["pre_tokenizer"]["use_regex"] = False
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, state["pre_tokenizer"]]}
        state["model"]["ignore_merges"] = True
    if kind.startswith("metaspace"):
        scheme = kind.split()[1]
        state["normalizer"] = None
        state["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False
        }  # fmt: skip
    tokenizer = Tokenizer(Backend.from_str(json.dumps(state)), tokenizer.config)
    tokenizer.add_special_tokens(made.MARKS)
    return tokenizer


KINDS = [
    "bytelevel",
    "bytelevel with prefix",
    "bytelevel by pattern",
    "prepend",
    "metaspace always",
    "metaspace first",
    "metaspace never",
]
TOKENIZERS = {kind: load(kind) for kind in KINDS}
words = st.text(alphabet="aIn the\n\t'.,:12é数\U0001f600▁Ġ", max_size=12)
items = st.lists(st.one_of(words.map(lambda t: {"text": t}), st.just({"image": "x"})), max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@given(text=words, place=st.sampled_from(["start", "after_token", "inside"]))
def test_ids_alone_are_those_with_ends(kind, text, place):
    ids, _ = TOKENIZERS[kind].encode_plain(text, place)
    np.testing.assert_array_equal(TOKENIZERS[kind].plain_ids(text, place), ids)


@pytest.mark.parametrize("kind", KINDS)
@given(items=items)
@settings(max_examples=120)
def test_pieces_of_documents_are_the_ids_of_the_whole_string(kind, items):
    tokenizer = TOKENIZERS[kind]
    framing = Framing(tokenizer.affixes[0], [], image="<image>", edge="<image>")
    pieces = encode_document(tokenizer, items, framing)
    image = np.asarray([tokenizer.convert_tokens_to_ids("<image>")])
    ids = text_ids(pieces, [image] * sum("image" in item for item in items))
    whole = tokenizer.backend.encode("".join(item.get("text", "<image>") for item in items)).ids
    assert ids.tolist() == [*whole, tokenizer.eos_token_id]
    assert [p.image for p in pieces if isinstance(p, ImagePiece)] == list(range(sum("image" in i for i in items)))


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(words, min_size=1, max_size=4), images=st.lists(st.booleans(), min_size=4, max_size=4))
@settings(max_examples=80)
def test_prompts_are_beginnings_of_conversations(kind, texts, images):
    """Whatever is said, the ids before an answer are those of the prompt that asks for it."""
    tokenizer = TOKENIZERS[kind]
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
        "{{ c.text if c.type == 'text' else '<image>' }}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = ChatTemplate(source, tokenizer.special_tokens_map)
    messages = []
    for turn, (text, has_image) in enumerate(zip(texts, images)):
        content = [{"type": "image"}] * has_image + [{"type": "text", "text": text}]
        messages.append({"role": "assistant" if turn % 2 else "user", "content": content})
    framing = Framing(tokenizer.affixes[0], [], image="<image>", edge="<image>")
    pieces = encode_messages(tokenizer, template, messages, framing)
    image = np.asarray([tokenizer.convert_tokens_to_ids("<image>")])
    ids = text_ids(pieces, [image] * 4).tolist()
    whole = template.render(template.prepare(messages))
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(whole, add_special_tokens=False))
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = template.render(template.prepare(messages[:turn]), add_generation_prompt=True)
            start = tokenizer.encode(prompt, add_special_tokens=False)
            assert ids[: len(start)] == start
    answers = [piece for piece in pieces if getattr(piece, "origin", "") == "assistant"]
    end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert sum(int((answer.ids == end).sum()) for answer in answers) == len(messages) // 2


def test_white_space_that_added_tokens_swallow():
    backend = Backend.from_str(TOKENIZERS["bytelevel"].backend.to_str())
    backend.add_special_tokens([AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True)])
    tokenizer = Tokenizer(backend, TOKENIZERS["bytelevel"].config)
    source = "{% for m in messages %}<right>{{ m.content[0].text }}<left>{% endfor %}"
    template = ChatTemplate(source, {})
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]} for text in (" \n a b\n", "  ", "c")]
    framing = Framing([], [], image="<image>", edge="<image>")
    ids = text_ids(encode_messages(tokenizer, template, messages, framing)).tolist()
    assert ids == backend.encode(template.render(messages), add_special_tokens=False).ids


def test_padding_on_either_side():
    tokenizer = load("bytelevel")
    for side, expected in (("left", [[9, 9, 1], [1, 2, 3]]), ("right", [[1, 9, 9], [1, 2, 3]])):
        padded = tokenizer.pad([[1], [1, 2, 3]], padding_side=side)
        mask = np.asarray(padded["attention_mask"])
        assert np.where(mask, padded["input_ids"], 9).tolist() == expected
    assert tokenizer.pad([[1], [1, 2]], "max_length", max_length=5)["input_ids"][1][:3] == [tokenizer.pad_token_id] * 3
    assert len(tokenizer.pad([[1, 2, 3]], True, pad_to_multiple_of=8)["input_ids"][0]) == 8
    assert tokenizer.pad([[1], [1, 2]], False)["attention_mask"] == [[1], [1, 1]]
    with pytest.raises(ValueError, match="padding='sometimes'"):
        tokenizer.pad([[1]], "sometimes")


def test_padding_needs_a_pad_token():
    tokenizer = load("bytelevel")
    tokenizer.pad_token = None
    assert tokenizer.pad([[1, 2], [3, 4]])["input_ids"] == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="no pad token"):
        tokenizer.pad([[1], [1, 2]])


def test_calls_return_what_is_asked_for():
    tokenizer = load("bytelevel")
    assert isinstance(tokenizer("ab")["input_ids"][0], int)
    longest = len(tokenizer("a b c")["input_ids"])
    assert tokenizer(["ab", "a b c"], padding=True, return_tensors="np").input_ids.shape == (2, longest)
    assert tokenizer("a b c", truncation=True, max_length=2)["input_ids"] == tokenizer("a b c")["input_ids"][:2]
    for off in (False, None, "do_not_truncate"):
        assert tokenizer("a b c", truncation=off, max_length=2, padding=None) == tokenizer("a b c")
    with pytest.raises(ValueError, match="truncation='sometimes' is not known"):
        tokenizer("a b c", truncation="sometimes", max_length=2)
    with pytest.raises(ValueError, match="different lengths"):
        tokenizer(["ab", "a b c"], return_tensors="np")
    with pytest.raises(ValueError, match="return_tensors='tf'"):
        tokenizer(["ab"], return_tensors="tf")
    with pytest.raises(AttributeError, match="no model input 'pixel_values' here; there are input_ids"):
        tokenizer("ab").pixel_values  # noqa: B018


def test_plain_text_survives_pickling():
    tokenizer = pickle.loads(pickle.dumps(load("bytelevel")))
    tokenizer.reserve(["<row_1_col_1>"])
    ids, ends = tokenizer.encode_plain(f"a{FAKE}<row_1_col_1>")
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert ends[-1] == len(f"a{FAKE}<row_1_col_1>")


def test_tokens_named_in_old_files_are_special(tmp_path):
    source = json.loads((made.FOLDER / "tokenizer.json").read_text())
    source["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    decoder = {"420": {"content": "<new>", **flags}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, "extra_special_tokens": {"image_token": "<image>"}})
    )
    named = {"bos_token": {"content": "<s>", **flags}, "eos_token": "</s>", "additional_special_tokens": ["<more>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.added_tokens == {"<s>": 1, "</s>": 2, "<new>": 420, "<image>": 421, "<more>": 422}
    assert tokenizer.encode("<new><more>", add_special_tokens=False) == [420, 422]


def test_added_tokens_of_the_oldest_files(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((made.FOLDER / "tokenizer.json").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": 421, FAKE: 420}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<image>", FAKE]}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids([FAKE, "<image>"]) == [420, 421]
    assert set(tokenizer.all_special_ids) >= {420, 421}


def test_files_that_disagree_on_an_id_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((made.FOLDER / "tokenizer.json").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": 32001}))
    with pytest.raises(ConfigError, match="gives '<image>' the id 32001, but"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_folders_without_a_tokenizer_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="no tokenizer rule 'new'"):
        Tokenizer.from_pretrained(made.FOLDER, rule="new")
