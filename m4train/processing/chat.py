"""Chat templates: rendering them in a sandbox, and telling who says which part of the rendered text.

A template gives one string. To know which of its characters are data and which the template wrote, the conversation is
rendered once with a marker instead of every text, so that what a message says is never searched for special tokens.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols

from m4train.errors import BadSample, ConfigError
from m4train.processing.chat_answers import MARKER, Answers
from m4train.processing.template_sandbox import BoundedEnvironment, TemplateLimit, compiled

# Idefics3 and, with bos instead of <|im_start|>, SmolVLM.
IDEFICS3_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'] and message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for item in message['content'] %}"
    "{{ item['text'] if item['type'] == 'text' else '<image>' }}"
    "{% endfor %}"
    "<end_of_utterance>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
IDEFICS2_TEMPLATE = IDEFICS3_TEMPLATE.removeprefix("{{ bos_token }}")

# The dialogues of the instructed Idefics models: as Idefics2, with newlines between messages instead of after them.
IDEFICS_TEMPLATE = (
    IDEFICS2_TEMPLATE.replace("{{ message['role']", "{{ '' if loop.first else '\n' }}{{ message['role']")
    .replace("<end_of_utterance>\n", "<end_of_utterance>")
    .replace("Assistant:", "{{ '\n' if messages else '' }}Assistant:")
)


@dataclass(frozen=True)
class TextSpan:
    """Consecutive characters of a rendered conversation.

    `literal` marks text of a message, in which special tokens mean nothing. `cut` says that tokens must not reach over
    the start of this span: it is where a prompt ends and what the assistant says begins.
    """

    text: str
    origin: str
    turn: int
    literal: bool = False
    cut: bool = False


class ChatTemplate:
    """A jinja2 chat template. `special_tokens` (such as bos_token) are variables of it.

    Raises ConfigError if the source does not parse.
    """

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})

    def __reduce__(self) -> tuple:
        return (ChatTemplate, (self.source, self.special_tokens))

    @cached_property
    def _template(self) -> Any:
        environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            return compiled(environment, self.source)
        except (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError) as error:
            raise ConfigError(f"The chat template cannot be parsed: {error}.") from error

    def render(self, messages: list[dict], add_generation_prompt: bool = False, **variables: Any) -> str:
        """The conversation as one string; with `add_generation_prompt`, up to where the assistant speaks next.

        Raises BadSample if the template refuses the conversation.
        """
        values = {"tools": None, "documents": None} | self.special_tokens | variables
        try:
            values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
            return self._template.environment.rendered(self._template, values)
        except ConfigError:
            raise  # the template does not parse
        except TemplateLimit as error:
            raise ConfigError(f"The chat template was stopped: {error}; use another one.") from error
        except Exception as error:  # whatever the code of a template raises
            raise BadSample("chat_template", f"The chat template refuses the conversation: {error}.") from error

    @cached_property
    def variables(self) -> set[str]:
        """The names that the template reads and does not set."""
        return meta.find_undeclared_variables(self._template.environment.parse(self.source))

    @cached_property
    def takes_items(self) -> bool:
        """Whether message contents reach the template as lists of items, as they must if they hold images."""
        try:
            probe = self.render([{"role": "user", "content": [{"type": "text", "text": "x"}]}])
        except BadSample:
            return False
        return "'type'" not in probe and '"type"' not in probe

    def prepare(self, messages: list[dict]) -> list[dict]:
        """Messages in the form the template takes: contents as lists of typed items, or as strings."""
        prepared = []
        for message in messages:
            items = content_items(message)
            if message.get("content") is None:  # the calls of tools, which say nothing
                prepared.append(message)
                continue
            content: Any = items
            if not self.takes_items:
                content = "".join(item["text"] if item["type"] == "text" else "<image>" for item in items)
            prepared.append(message | {"content": content})
        return prepared

    def split(
        self,
        messages: list[dict],
        special: Callable[[str], re.Match | None],
        prompt: bool = False,
        **variables: Any,
    ) -> list[TextSpan]:
        """The rendered conversation, cut by who says what.

        `special` finds the first special token in a string of the template. A `prompt` is what the assistant is asked with,
        for which it does not matter where its earlier answers begin. Raises BadSample if the template changes what the
        messages say, and ConfigError if prompts are not beginnings of the conversations they belong to.
        """
        messages = [
            message if message.get("content") is None else message | {"content": content_items(message)}
            for message in messages
        ]
        marked, texts = _mark(messages)
        rendered = self.render(self.prepare(marked), prompt, **variables)
        original = self.render(self.prepare(messages), prompt, **variables)
        for told in (texts, _strip_messages(texts, marked), [(text.strip(), turn) for text, turn in texts]):
            if _fill(rendered, told) == original:
                break
        else:
            raise BadSample("chat_template", "The chat template changes the text of the messages.")
        try:
            spoken = Answers(self, marked, texts, rendered, special, variables).found()
        except ConfigError:
            if not prompt:
                raise
            spoken = []
        return list(_text_spans(rendered, told, marked, spoken))


def content_items(message: dict) -> list[dict]:
    """The content of a message as items {"type": "text", "text": ...} and {"type": "image", ...}.

    Strings and items without a type are understood. Raises BadSample for anything else.
    """
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return []
    if not isinstance(message.get("role"), str) or not isinstance(content, (str, list)):
        raise BadSample("bad_message", "A message needs a role and a content that is a string or a list of items.")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    items = []
    for item in content:
        fields = item if isinstance(item, dict) else {}
        kind = fields.get("type") or next((k for k in ("text", "image") if fields.get(k) is not None), None)
        if kind == "text" and isinstance(fields.get("text"), str):
            items.append({"type": "text", "text": fields["text"]})
        elif kind in ("image", "image_url"):
            items.append(fields | {"type": "image"})
        else:
            raise BadSample("bad_message", f"A content item is neither text nor image: {str(item)[:80]}.")
    return items


def _mark(messages: list[dict]) -> tuple[list[dict], list[tuple[str, int]]]:
    """The messages with marker number i instead of text number i, and those texts with the message they are in."""
    texts: list[tuple[str, int]] = []
    marked = []
    for turn, message in enumerate(messages):
        items = []
        for item in message.get("content") or []:
            if item["type"] == "text":
                texts.append((item["text"], turn))
                item = {"type": "text", "text": f"\ue000{len(texts) - 1}\ue001"}
            items.append(item)
        marked.append(message if message.get("content") is None else message | {"content": items})
    return marked, texts


def _strip_messages(texts: list[tuple[str, int]], marked: list[dict]) -> list[tuple[str, int]]:
    """The texts as they are if each message is stripped as a whole."""
    stripped, number = [], 0
    for message in marked:
        for place, item in enumerate(message.get("content") or []):
            if item["type"] == "text":
                text, turn = texts[number]
                text = text.lstrip() if place == 0 else text
                text = text.rstrip() if place == len(message["content"]) - 1 else text
                stripped.append((text, turn))
                number += 1
    return stripped


def _fill(rendered: str, texts: list[tuple[str, int]]) -> str:
    return MARKER.sub(lambda match: texts[int(match.group(1))][0], rendered)


def _text_spans(rendered: str, texts: list[tuple[str, int]], messages: list[dict], spoken: list[tuple[int, int, int]]):
    """Yields the spans of a rendered conversation between markers and the borders of what the assistant says."""
    begins = [start for _, start, _ in spoken]
    starts = set(begins)
    borders = starts | {end for _, _, end in spoken} | {0, len(rendered)}
    markers = {match.start(): match for match in MARKER.finditer(rendered)}
    borders |= set(markers) | {match.end() for match in markers.values()}
    edges = sorted(borders)
    for start, end in pairwise(edges):
        number = bisect_right(begins, start) - 1
        speaker = spoken[number][0] if number >= 0 and start < spoken[number][2] else None
        match = markers.get(start)
        cut = start in starts
        if match is None:
            origin = "template" if speaker is None else "assistant"
            yield TextSpan(rendered[start:end], origin, -1 if speaker is None else speaker, cut=cut)
            continue
        text, turn = texts[int(match.group(1))]
        role = messages[turn]["role"]
        origin = role if role in ("user", "assistant") else "system"
        yield TextSpan(text, origin, turn, literal=True, cut=cut)


class _Generation(Extension):
    """Lets templates hold {% generation %} ... {% endgeneration %}: the tags change nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)
