"""Which parsers a model needs, and one answer's parser put together.

``--reasoning-parser`` and ``--tool-call-parser`` name the formats; ``auto`` finds them by what the
model's chat template writes, and is none where the template shows none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from minisgl_fast.parsers.events import PLAIN, Content, Event, Parser, Steady, ToolParser
from minisgl_fast.parsers.gpt_oss import ENDS, MESSAGE, STARTS, GptOssParser
from minisgl_fast.parsers.llama3 import TAG as LLAMA3_TAG
from minisgl_fast.parsers.llama3 import Llama3Parser
from minisgl_fast.parsers.mistral import TAG as MISTRAL_TAG
from minisgl_fast.parsers.mistral import MistralParser
from minisgl_fast.parsers.pythonic import END as PYTHONIC_END
from minisgl_fast.parsers.pythonic import START as PYTHONIC_START
from minisgl_fast.parsers.pythonic import PythonicParser
from minisgl_fast.parsers.qwen3_coder import Qwen3CoderParser
from minisgl_fast.parsers.qwen25 import END as QWEN_END
from minisgl_fast.parsers.qwen25 import START as QWEN_START
from minisgl_fast.parsers.qwen25 import Qwen25Parser
from minisgl_fast.parsers.reasoning import FORMATS, ReasoningParser

GPT_OSS = "gpt-oss"
MAX_TAIL = 64  # characters at a prompt's end, in which a tag is looked for
REASONING_PARSERS = (*FORMATS, GPT_OSS)
TOOL_CALL_PARSERS = ("qwen25", "qwen3_coder", "llama3", "pythonic", "mistral", GPT_OSS)

# What a template that uses the format has in it: all the texts of one row. The first row counts.
_REASONING_SIGNS = (
    (GPT_OSS, ("<|channel|>", "analysis")),
    ("kimi", ("◁think▷",)),
    ("deepseek-r1", ("</think>", "<｜Assistant｜>")),
    ("qwen3", ("</think>",)),
)
_TOOL_SIGNS = (
    (GPT_OSS, ("<|channel|>", "functions.")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("qwen25", ("<tool_call>", "tools")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("[func_name1(params_name1=",)),
    ("llama3", ("<|python_tag|>",)),
    ("llama3", ('"parameters": ', "tools")),
)
# Marks that a tokenizer may hold for special tokens and leave out of the text.
_MARKS = {
    GPT_OSS: (*STARTS, MESSAGE, *ENDS),
    "qwen25": (QWEN_START, QWEN_END),
    "qwen3_coder": (QWEN_START, QWEN_END),
    "llama3": (LLAMA3_TAG,),
    "pythonic": (PYTHONIC_START, PYTHONIC_END),
    "mistral": (MISTRAL_TAG, "[CALL_ID]", "[ARGS]"),
    **{name: (form.start, form.end) for name, form in FORMATS.items()},
}


class OpenReasoning(NamedTuple):
    """``is_open``: an answer begins within its reasoning; else the model may begin one."""

    start: str
    end: str
    is_open: bool


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of one model's answers, None where it has none."""

    reasoning: str | None
    tools: str | None

    @classmethod
    def choose(cls, reasoning: str, tools: str, template: str) -> Formats:
        """From the flags' values and the text of the chat template ("" for none)."""
        return cls(
            _chosen(reasoning, _REASONING_SIGNS, template), _chosen(tools, _TOOL_SIGNS, template)
        )

    @property
    def marks(self) -> tuple[str, ...]:
        """All markup that the text of an answer must keep."""
        return tuple(
            mark for name in (self.reasoning, self.tools) if name is not None
            for mark in _MARKS[name]
        )  # fmt: skip

    @property
    def reasoning_ends(self) -> tuple[str, ...]:
        """The tag that ends a reasoning, and the markup of a call that does so too; empty where a
        reasoning has no end of its own."""
        form = FORMATS.get(self.reasoning or "")
        return (form.end, *_MARKS.get(self.tools or "", ())[:1]) if form else ()

    def reasoning_format(self, prompt: str) -> OpenReasoning | None:
        """How an answer to the prompt begins; None if it does not reason."""
        form = FORMATS.get(self.reasoning or "")
        end = prompt[-MAX_TAIL:].rstrip()
        if form is None or end.endswith(form.end):  # where the template closed it, thinking is off
            return None
        return OpenReasoning(form.start, form.end, form.forced or end.endswith(form.start))

    def parser(
        self,
        prompt: str,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        separate_reasoning: bool = True,
        stream_reasoning: bool = True,
    ) -> Parser | None:
        """The parser of one answer to a prompt; None if all of the answer is content.

        ``tools``: those that the answer may call, in OpenAI's form. ``prompt``: the rendered text,
        whose end tells whether the model reasons at all, or does so already.
        """
        with_tools = bool(tools) and self.tools is not None
        if GPT_OSS in (self.reasoning, self.tools):
            return GptOssParser(
                reasoning=separate_reasoning and self.reasoning is not None,
                stream=stream_reasoning,
                tools=with_tools,
            )
        tool_parser = _tool_parser(self.tools, tools) if with_tools else None
        begins = self.reasoning_format(prompt) if separate_reasoning else None
        if begins is None:
            return tool_parser
        reasoning = ReasoningParser(
            FORMATS[self.reasoning or ""],
            is_open=begins.is_open,
            stream=stream_reasoning,
            tool_openers=tool_parser.openers if tool_parser else (),
        )
        return _Chain(reasoning, tool_parser)

    def watched(self, prompt: str) -> bytes | None:
        """The bytes without which a whole answer, where no tools are offered, is all content, and
        its text as it is. None where any is; no bytes where none is."""
        form = FORMATS.get(self.reasoning or "")
        if form is None:
            return b"" if GPT_OSS in (self.reasoning, self.tools) else None
        end = prompt[-MAX_TAIL:].rstrip()  # what reasoning_format tells, faster
        if end.endswith(form.end):
            return b"" if self.tools == GPT_OSS else None
        if form.forced or self.tools == GPT_OSS or end.endswith(form.start):
            return b""
        return form.start.encode()[:1]


class _Chain:
    """Reasoning first; what is content of it goes on to the tools' parser."""

    def __init__(self, reasoning: ReasoningParser, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def steady(self) -> Steady | None:
        steady = self._reasoning.steady
        return self._tools.steady if steady == PLAIN and self._tools is not None else steady

    def feed(self, text: str) -> list[Event]:
        return self._pass_on(self._reasoning.feed(text))

    def finish(self) -> list[Event]:
        events = self._pass_on(self._reasoning.finish())
        return events + self._tools.finish() if self._tools is not None else events

    def _pass_on(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        passed: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                passed += self._tools.feed(event.text)
            else:
                passed.append(event)
        return passed


def _chosen(flag: str, signs: Sequence[tuple[str, tuple[str, ...]]], template: str) -> str | None:
    if flag == "none":
        return None
    if flag != "auto":
        return flag
    for name, texts in signs:
        if all(text in template for text in texts):
            return name
    return None


def _tool_parser(name: str | None, tools: Sequence[Mapping[str, Any]]) -> ToolParser:
    functions = [tool["function"] for tool in tools]
    names = frozenset(function["name"] for function in functions)
    if name == "qwen25":
        return Qwen25Parser()
    if name == "qwen3_coder":
        return Qwen3CoderParser(
            {function["name"]: function.get("parameters") or {} for function in functions}
        )
    if name == "mistral":
        return MistralParser()
    return PythonicParser(names) if name == "pythonic" else Llama3Parser(names)
