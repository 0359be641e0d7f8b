"""QuickTemplate: plain conversations as joined strings, some twenty times faster than jinja2.

Most chat templates say the same of a plain conversation: a header by role, the content, an end, for
each message, and a header for the answer. Here are the families of such forms that models use.

A family is used for a template only where both render the same text for every probe conversation,
which hold what such templates look at: blanks around the content, empty content, roles in odd
orders, tags of reasoning and tools in the text. What comes before the first message (a default
system prompt) and after the last (with thinking on or off) is learnt from the template.

Rules: ``render`` returns None for all that the probes did not show: then jinja2 renders. A template
that looks at a clock or at chance has no QuickTemplate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

from minisgl_fast.text.find_any import FindAny

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Render: TypeAlias = Callable[[Messages, bool, Mapping[str, Any]], str | None]

SWITCHES = ("enable_thinking", "thinking")
_SWITCHES = frozenset(SWITCHES)
_UNSTEADY = ("strftime_now", "random", "now(")
# Text that templates look for in a content: then jinja2 decides. Each with its rarest character.
_WATCHED = FindAny(
    (
        (">", "think>"),
        ("_", "tool_"),
        ("|", "<|"),
        ("|", "|>"),
        ("[", "[/"),
        ("<", "<start_of_turn>"),
        ("<", "<end_of_turn>"),
    )
)


@dataclass(frozen=True, slots=True)
class Family:
    """A form: for each message its header by role, the content, the end."""

    name: str
    user: str
    assistant: str
    end: str


FAMILIES = (
    Family("chatml", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
    Family(
        "llama3",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    Family("gemma", "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n"),
    Family("phi", "<|user|>\n", "<|assistant|>\n", "<|end|>\n"),
    Family("zephyr", "<|user|>\n", "<|assistant|>\n", "</s>\n"),
    Family("glm", "<|user|>\n", "<|assistant|>\n", ""),
)


@dataclass(frozen=True, slots=True)
class QuickTemplate:
    """One template's family, with what it says around the messages. Made by ``quick_template``.

    Renders conversations of user and assistant that take turns from user to user, with or without
    a system message before.

    start: the text before the first message
    system: the texts before and behind a system message's content, up to that of the user; None
        where system messages are left to jinja2
    strips: whether contents lose the blanks around them
    tails: the text behind the last message, by add_generation_prompt and the switches
    """

    family: Family
    start: str
    system: tuple[str, str] | None
    strips: bool
    tails: Mapping[tuple[bool | None, ...], str]

    def render(
        self, messages: Messages, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str | None:
        """The text, or None where jinja2 must render. ``variables``: the client's own."""
        tail = self._tail(add_generation_prompt, variables)
        if tail is None:
            return None
        strips = self.strips
        header, end = self.start + self.family.user, self.family.end
        role_due = "user"
        pieces: list[str] = []
        for message in messages:
            content = message.get("content")
            if type(content) is not str or len(message) != 2:
                return None
            if _has_watched(content):
                return None
            role = message.get("role")
            if strips:
                content = content.strip()
            if role == role_due:
                pieces += (header, content, end)
                if role == "user":
                    role_due, header = "assistant", self.family.assistant
                else:
                    role_due, header = "user", self.family.user
            elif role == "system" and not pieces and self.system is not None:
                pieces += (self.system[0], content)
                header = self.system[1]
            else:
                return None
        if role_due != "assistant":
            return None
        pieces.append(tail)
        return "".join(pieces)

    def _tail(self, add_generation_prompt: bool, variables: Mapping[str, Any]) -> str | None:
        if not variables:
            return self.tails.get((add_generation_prompt, None, None))
        if not variables.keys() <= _SWITCHES:
            return None
        values = [variables.get(name) for name in SWITCHES]
        if any(value is not None and type(value) is not bool for value in values):
            return None  # 0 and 1 are equal to booleans, but not to templates
        return self.tails.get((add_generation_prompt, *values))


def _has_watched(content: str) -> bool:
    try:
        return _WATCHED.found_in(content)
    except UnicodeEncodeError:
        return True


def quick_template(source: str, render: Render) -> QuickTemplate | None:
    """The QuickTemplate of a template, None if it has none.

    ``render(messages, add_generation_prompt, variables)`` is the template's own rendering, None
    where it fails.
    """
    if any(word in source for word in _UNSTEADY):
        return None
    for family in FAMILIES:
        for strips in (False, True):
            quick = _learn(family, strips, render)
            if quick is not None and _agrees(quick, render):
                return quick
    return None


_USER = ({"role": "user", "content": "Q0"},)
_SYSTEM = ({"role": "system", "content": "S0"}, *_USER)


def _learn(family: Family, strips: bool, render: Render) -> QuickTemplate | None:
    user = f"{family.user}Q0{family.end}"
    bare = render(_USER, False, {})
    if bare is None or user not in bare:
        return None
    start = bare.partition(user)[0]
    tails = {}
    for adds, *values in product((False, True), (None, False, True), (None, False, True)):
        variables = {
            name: value for name, value in zip(SWITCHES, values, strict=True) if value is not None
        }
        text = render(_USER, adds, variables)
        if text is not None and text.startswith(start + user):
            tails[(adds, *values)] = text[len(start + user) :]
    system = None
    text = render(_SYSTEM, False, {})
    closing = f"Q0{family.end}{tails[(False, None, None)]}"
    if text is not None and text.count("S0") == 1 and text.endswith(closing):
        before, _, behind = text.removesuffix(closing).partition("S0")
        system = before, behind
    return QuickTemplate(family, start, system, strips, tails)


def _agrees(quick: QuickTemplate, render: Render) -> bool:
    """Whether it renders the probes, and as the template does."""
    num_rendered = 0
    for index, messages in enumerate(_probes()):
        # Not everything with everything: that takes half a second.
        adds = index % 3 > 0
        variables = _VARIABLES[index % 5 % len(_VARIABLES)]
        text = quick.render(messages, adds, variables)
        if text is not None:
            num_rendered += 1
            if text != render(messages, adds, variables):
                return False
    return num_rendered > len(_CONTENTS)


_VARIABLES: tuple[dict[str, bool], ...] = (
    {}, {}, {"enable_thinking": False}, {"enable_thinking": True, "thinking": True},
)  # fmt: skip
_CONTENTS = (
    "Hi", "", " ", "\n", "  two blanks before and after  ", "\n\nlines\n\n", "\ttab\t", "a\n\nb",
    "{{ x }} {% if y %}", "<b>&amp;'\"</b>", "\\n \\u00e9", "你好 😀", "None", "\u00a0nbsp\u00a0",
    "\x0bcontrol\x1f", "\r\nDOS\r\n", "\u2028line\u2028", "</s> <s> <bos> <eos>", "user",
    "### Human: ", "[INST] x", "<tool>", "tool call", "<reasoning>r</reasoning>", "a <b> c",
    "/think", "/no_think", "thinking: off", "# Tools", "{\"name\": \"f\"}", "0", "False",
    "x" * 3000,
)  # fmt: skip


def _probes() -> Iterator[Messages]:
    """Conversations: every content in every place, and several turns."""

    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    for content in _CONTENTS:
        user, assistant = said("user", content), said("assistant", content)
        yield (user,)
        yield (said("user", "Q1"), assistant, said("user", "Q2"))
        yield (user, assistant, user, assistant, user)
        yield (said("system", content), said("user", "Q1"))
        yield (said("system", content), user, assistant, user)
    turns = [said(("user", "assistant")[index % 2], f"T{index}") for index in range(9)]
    yield turns
    yield (said("system", "S"), *turns)
