"""Where answers begin: as if the template were asked for every prompt, in time that grows with the conversation."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m4train.errors import ConfigError
from m4train.processing.chat import IDEFICS2_TEMPLATE, IDEFICS3_TEMPLATE, IDEFICS_TEMPLATE, ChatTemplate
from m4train.processing.chat_answers import Answers

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for item in message.content %}"
    "{{ item.text if item.type == 'text' else '<image>' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTED = CHATML.replace("{{ message.role }}", "{{ loop.index }} {{ message.role }}").replace(
    "<|im_start|>assistant", "<|im_start|>{{ messages | length + 1 }} assistant"
)
# The prompt ends at another place from the third message on, while what stands between the texts is always the same.
UNEVEN = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>{{ 'assistant\n' if messages | length < 3 else '' }}{% endif %}"
)
TEMPLATES = [IDEFICS3_TEMPLATE, IDEFICS2_TEMPLATE, IDEFICS_TEMPLATE, CHATML, COUNTED, UNEVEN]
SPECIAL = re.compile(r"<end_of_utterance>|<image>|<\|im_start\|>|<\|im_end\|>")

CONTENTS = st.lists(st.sampled_from(["text", "text", "image"]), min_size=1, max_size=3)
MESSAGES = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "assistant", "system"]), CONTENTS), min_size=1, max_size=12
)


def talk(roles: list[tuple[str, list[str]]]) -> list[dict]:
    item = lambda kind: {"type": "image"} if kind == "image" else {"type": "text", "text": "said"}
    return [{"role": role, "content": [item(kind) for kind in kinds]} for role, kinds in roles]


def found(template: ChatTemplate, messages: list[dict]) -> object:
    try:
        return template.split(messages, SPECIAL.search)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("source", TEMPLATES, ids=range(len(TEMPLATES)))
@given(MESSAGES)
def test_answers_begin_where_their_prompts_end(source, roles) -> None:
    template, messages = ChatTemplate(source), talk(roles)
    quick = found(template, messages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answers, "_gap", lambda self, turn: None)  # asks for every prompt
        assert found(template, messages) == quick


def test_the_time_grows_with_the_turns_and_not_with_their_square(monkeypatch) -> None:
    rendered = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda self, messages, *rest, **more: (
        rendered.append(len(messages)), render(self, messages, *rest, **more))[1])  # fmt: skip
    for turns in (100, 400, 1600):
        template = ChatTemplate(IDEFICS3_TEMPLATE)
        assert template.takes_items
        rendered.clear()
        messages = talk([("user", ["image", "text"]), ("assistant", ["text"])] * (turns // 2))
        spans = template.split(messages, SPECIAL.search)
        assert sum(span.origin == "assistant" and span.literal for span in spans) == turns // 2
        assert sum(rendered) <= 4 * turns
