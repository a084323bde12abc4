"""Where in a rendered conversation the assistant speaks, found in time that grows with the conversation and not with its square."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from m4train.errors import ConfigError

MARKER = re.compile("\ue000([0-9]+)\ue001")  # stands for a text of a message

Gap = tuple[str, str]  # the role of the message before an answer, and what the template writes between their texts


class Answers:
    """The answers of a conversation that `template` has rendered, with markers for its texts.

    An answer begins where the prompt for it ends, so the template is asked for that prompt. That takes time by the length
    of what comes before: it is asked for the first and the last answer behind each kind of gap, and if the prompts of
    both end at the same place in the gap, those of all between are taken to do so, too.
    """

    def __init__(
        self,
        template: Any,
        messages: list[dict],
        texts: list[tuple[str, int]],
        rendered: str,
        special: Callable[[str], re.Match | None],
        variables: dict[str, Any],
    ) -> None:
        self._template, self._messages, self._rendered = template, messages, rendered
        self._special, self._variables = special, variables
        markers = [(match.start(), match.end(), texts[int(match.group(1))][1]) for match in MARKER.finditer(rendered)]
        self._starts, self._ends = [start for start, _, _ in markers], [end for _, end, _ in markers]
        self._of_turn: dict[int, list[int]] = {}  # the markers of each message
        for number, (_, _, turn) in enumerate(markers):
            self._of_turn.setdefault(turn, []).append(number)

    def found(self) -> list[tuple[int, int, int]]:
        """The number of each message of the assistant, and where it begins and ends, closing token included.

        Raises ConfigError if a prompt is not the beginning of the conversation, or nothing closes a message.
        """
        turns = [turn for turn, message in enumerate(self._messages) if message["role"] == "assistant"]
        gaps = {turn: self._gap(turn) for turn in turns}
        alike: dict[Gap, list[int]] = {}
        for turn, found in gaps.items():
            if found is not None:
                alike.setdefault(found[0], []).append(turn)
        begins: dict[int, int] = {}
        for same in alike.values():
            first = self._prompt_end(same[0])
            last = first if len(same) == 1 else self._prompt_end(same[-1])
            offset = first - self._before(same[0])
            if last - self._before(same[-1]) == offset:
                begins |= {turn: self._before(turn) + offset for turn in same}
        return [self._spoken(turn, begins[turn] if turn in begins else self._prompt_end(turn)) for turn in turns]

    def _gap(self, turn: int) -> tuple[Gap, int] | None:
        """What stands between the text of an answer and the text before it; None if one of them has no text."""
        mine, before = self._of_turn.get(turn), self._of_turn.get(turn - 1)
        if not mine or not before or mine[0] != before[-1] + 1:
            return None
        start = self._ends[before[-1]]
        return (self._messages[turn - 1]["role"], self._rendered[start : self._starts[mine[0]]]), start

    def _before(self, turn: int) -> int:
        return self._ends[self._of_turn[turn - 1][-1]]

    def _prompt_end(self, turn: int) -> int:
        """Where the prompt for a message ends."""
        before = self._template.prepare(self._messages[:turn])
        prompt = self._template.render(before, add_generation_prompt=True, **self._variables)
        if not self._rendered.startswith(prompt):
            raise ConfigError(
                f"With this chat template the prompt for message {turn} is not the beginning of the conversation "
                f"({prompt[-40:]!r} does not lead to it), so what the assistant says cannot be told apart: use a "
                "template that renders a conversation as its prompt followed by the answer."
            )
        return len(prompt)

    def _spoken(self, turn: int, start: int) -> tuple[int, int, int]:
        said = [self._ends[number] for number in self._of_turn.get(turn, ()) if self._starts[number] >= start]
        end = max(said, default=start)
        following = bisect_left(self._starts, end)
        until = self._starts[following] if following < len(self._starts) else len(self._rendered)
        while (closing := self._special(self._rendered[end:until])) is not None:
            end += closing.end()
            if closing.group() != "<image>":
                return turn, start, end
        raise ConfigError(
            "The chat template closes the assistant's message with no special token, so generation would never stop: end "
            "messages with one, such as <end_of_utterance>."
        )
