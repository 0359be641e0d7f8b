"""ReasoningParser: ``<think>reasoning</think>content``, as Qwen3, DeepSeek-R1 and Kimi write it.

    opening --<think>--> reasoning --</think>, or a tool call--> content
       `----any other text----------------------------------------^

Rules: only white space may stand before ``<think>``, and it is dropped; a prompt may have opened
the tag already, and some models do so by training, so an answer may begin in ``reasoning``, where a
``<think>`` that comes all the same is dropped. Content never becomes reasoning again: further tags
are text. White space inside is the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from minisgl_fast.parsers.events import PLAIN, Content, Event, Reasoning, Steady
from minisgl_fast.parsers.scan import split_white, tags


class ReasoningFormat(NamedTuple):
    """``forced``: the model reasons from its first token on and may leave the first tag out."""

    start: str
    end: str
    forced: bool = False


FORMATS = {
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "deepseek-r1": ReasoningFormat("<think>", "</think>", forced=True),
    "kimi": ReasoningFormat("◁think▷", "◁/think▷"),
}


class ReasoningParser:
    """Splits one answer."""

    def __init__(
        self,
        form: ReasoningFormat,
        *,
        is_open: bool = False,
        stream: bool = True,
        tool_openers: Sequence[str] = (),
    ) -> None:
        """``is_open``: the answer begins inside the reasoning. ``stream``: False gives the
        reasoning in one event. ``tool_openers``: markup that ends a reasoning and is content."""
        self._form = form
        self._begin = tags(form.start)
        self._ends = tags(form.end, *tool_openers)
        self._stream = stream
        self._is_open = is_open or form.forced
        self._state = "opening"
        self._white = ""  # at the beginning
        self._rest = ""  # not decided yet
        self._unsent: list[str] = []  # reasoning that waits for its end

    @property
    def steady(self) -> Steady | None:
        if self._state == "content":
            return PLAIN
        is_open = self._state == "reasoning" and not self._rest and self._stream
        return Steady(Reasoning, self._ends.first) if is_open else None

    def feed(self, text: str) -> list[Event]:
        if self._state == "content":
            return [Content(text)]
        text = self._rest + text
        self._rest = ""
        if self._state == "opening":
            white, text = split_white(text)
            self._white += white
            tag = self._begin.begin(text)
            if tag == "":
                self._rest = text
                return []
            white, self._white = self._white, ""
            if tag is None and not self._is_open:
                self._state = "content"
                return [Content(white + text)]
            self._state = "reasoning"
            text = text[len(tag) :] if tag else white + text
        found = self._ends.find(text)
        if found is None:
            text, self._rest = self._ends.split_held(text)
            return self._reasoning(text)
        at, tag = found
        self._state = "content"
        events = self._reasoning(text[:at]) + self._whole()
        content = text[at + len(tag) :] if tag == self._form.end else text[at:]
        return [*events, Content(content)] if content else events

    def finish(self) -> list[Event]:
        rest = self._white + self._rest
        self._white = self._rest = ""
        if self._state == "content":
            return []
        if self._state == "opening" and not self._is_open:
            return [Content(rest)] if rest else []
        return self._reasoning(rest) + self._whole()

    def _reasoning(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._stream:
            return [Reasoning(text)]
        self._unsent.append(text)
        return []

    def _whole(self) -> list[Event]:
        if not self._unsent:
            return []
        text = "".join(self._unsent)
        self._unsent = []
        return [Reasoning(text)]
