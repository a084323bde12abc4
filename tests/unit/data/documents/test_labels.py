import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m4train.config import ConversationOptions, SourceConfig
from m4train.data.documents.labels import trained_tokens
from m4train.data.documents.rendering import Rendered, Renderer, encode_view, expand
from m4train.data.documents.sample import sample_from_dict
from m4train.errors import BadSample
from tests.helpers.data import FakeProcessor
from tests.helpers.processing import tiny_idefics2_processor, tiny_idefics3_processor, tiny_smolvlm_processor

PROCESSOR = FakeProcessor()
texts = st.text(min_size=1, max_size=12).filter(lambda text: text.encode("utf-8", "ignore").decode() == text)
items = st.lists(st.one_of(texts.map(lambda t: {"text": t}), st.just({"image": "0.png"})), min_size=1, max_size=6)
roles = st.sampled_from(["user", "assistant", "system"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": items}), min_size=1, max_size=5)


def rendered(content: dict) -> Rendered:
    sample = sample_from_dict(content)
    prepared = Renderer(PROCESSOR, SourceConfig()).prepare(sample, "key", [(20, 30)] * len(sample.images))
    image = Image.new("RGB", (20, 30))
    encoded = {number: encode_view(image, view, PROCESSOR) for number, view in prepared.views.items()}
    return expand(prepared.pieces, encoded, prepared.planned)


def said(conversation: list[dict], role: str) -> list[str]:
    return ["".join(i.get("text", "") for i in m["content"]) for m in conversation if m["role"] == role]


@settings(max_examples=60)
@given(messages)
def test_trained_text_is_exactly_what_the_assistant_says(conversation: list[dict]) -> None:
    result = rendered({"messages": conversation})
    answers = said(conversation, "assistant")
    if not answers:
        with pytest.raises(BadSample) as error:
            trained_tokens(result, "auto")
        assert error.value.reason == "no_label"
        return
    mask = trained_tokens(result, "auto")
    assert PROCESSOR.decode(result.ids[mask]) == "".join(answers)
    assert (result.ids[mask] == PROCESSOR.end_of_utterance_id).sum() == len(answers)
    assert not mask[0]
    assert not (mask & result.feature_mask).any()
    last = trained_tokens(result, "last_turn")
    assert PROCESSOR.decode(result.ids[last]) == answers[-1]
    everything = trained_tokens(result, "all")
    assert PROCESSOR.decode(result.ids[everything]) == "".join(
        i.get("text", "") for m in conversation for i in m["content"]
    )


@settings(max_examples=60)
@given(items)
def test_documents_train_on_all_their_text_and_never_on_images(content: list[dict]) -> None:
    result = rendered({"items": content})
    mask = trained_tokens(result, "auto")
    assert PROCESSOR.decode(result.ids[mask]) == "".join(item.get("text", "") for item in content)
    assert not (mask & (result.kinds == 5)).any()
    assert result.ids[mask][-1] == PROCESSOR.eos_id
    assert (result.feature_mask.sum()) == 2 * sum(len(frames) for frames in result.frames)


def test_the_first_token_is_never_a_target() -> None:
    result = rendered({"items": [{"text": "abc"}]})
    without_bos = Rendered(
        *(column[1:] for column in (result.ids, result.kinds, result.turns, result.feature_mask)), []
    )
    assert np.flatnonzero(trained_tokens(without_bos, "auto")).tolist() == [1, 2, 3]


CONVERSATION = [
    {"role": "system", "content": [{"text": "Answer briefly."}]},
    {"role": "user", "content": [{"image": "0.png"}, {"text": "Which digit is this?"}]},
    {"role": "assistant", "content": [{"text": "The digit is seven."}]},
    {"role": "user", "content": [{"text": "And"}, {"image": "1.png"}, {"text": "this one?"}]},
    {"role": "assistant", "content": [{"text": "Assistant: a 0,\n\nUser: or a 9."}]},
    {"role": "user", "content": [{"text": "Sure?"}]},
    {"role": "assistant", "content": [{"text": "Yes"}]},
]


def trained_runs(processor, rendered: Rendered, loss: str) -> list[list[int]]:
    """The ids of every unbroken stretch of trained tokens."""
    places = np.flatnonzero(trained_tokens(rendered, loss))
    return [rendered.ids[run].tolist() for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)]


@pytest.mark.parametrize("family", ["idefics2", "idefics3", "smolvlm"])
@pytest.mark.parametrize("system", ["stored", "added"])
def test_every_trained_run_of_a_real_template_is_one_answer_with_its_end(family: str, system: str) -> None:
    make = {"idefics2": tiny_idefics2_processor, "idefics3": tiny_idefics3_processor, "smolvlm": tiny_smolvlm_processor}
    processor = make[family]() if family == "smolvlm" else make[family](split=True)
    messages = CONVERSATION if system == "stored" else CONVERSATION[1:]
    options = ConversationOptions(shuffle_turns=True, newline_probability=0.5, system_prompt="Be kind.")
    sample = sample_from_dict({"messages": messages})
    renderer = Renderer(processor, SourceConfig(conversations=options))
    sizes = [(40, 30), (20, 60)]
    answers = said(CONVERSATION, "assistant")
    questions = ["Which digit is this?", "this one?", "Sure?"]
    orders = set()
    for variant in range(renderer.variants):
        prepared = renderer.prepare(sample, "key", sizes, variant)
        images = {n: Image.new("RGB", sizes[n]) for n in prepared.views}
        encoded = {n: encode_view(images[n], view, processor) for n, view in prepared.views.items()}
        result = expand(prepared.pieces, encoded, prepared.planned)
        text = processor.decode(result.ids.tolist())
        asked = sorted(range(3), key=lambda number: text.index(questions[number]))
        orders.add(tuple(asked))
        runs = trained_runs(processor, result, "auto")
        assert [run.count(processor.end_of_utterance_id) for run in runs] == [1, 1, 1]
        assert [run[-1] for run in runs] == [processor.end_of_utterance_id] * 3
        assert [processor.decode(run[:-1]).removeprefix(" ") for run in runs] == [answers[number] for number in asked]
        assert ("Answer briefly." if system == "stored" else "Be kind.") in text
        assert trained_runs(processor, result, "last_turn") == runs[-1:]
    assert len(orders) > 1
