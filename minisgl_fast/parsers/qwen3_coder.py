r"""Qwen3CoderParser: calls in XML form, as Qwen3-Coder and Qwen3.5 write them.

    <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>

Rules: the call starts at ``<function=NAME>`` (models leave ``<tool_call>`` out at times). Values
are bare text; what they become in JSON depends on the tool's schema: a string goes out as it comes,
anything else when it is complete, and as a string if it is not what the schema says. One line end
on each side of a value is markup. An end tag within a line ends a value only if more markup
follows, else it is text of the value; on a line of its own it always does. A forgotten end tag is
made up for by the next tag on a line of its own. Text between the parameters, where none belongs,
is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from minisgl_fast.parsers.call_parser import CallParser
from minisgl_fast.parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Steady
from minisgl_fast.parsers.scan import (
    MAX_HEAD,
    WHITE_SPACE,
    Tags,
    split_white,
)

START = "<tool_call>"
END = "</tool_call>"
FUNCTION = "<function="
FUNCTION_END = "</function>"
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"

_OPENERS = Tags(START, FUNCTION)
_FUNCTION = Tags(FUNCTION)
_IN_CALL = Tags(PARAMETER, FUNCTION_END, END)
_VALUE_ENDS = Tags("\n" + PARAMETER_END, PARAMETER_END, "\n" + PARAMETER, "\n" + FUNCTION_END)
_END = Tags(END)
_NAME_END = re.compile(r"[>\n<]")

# Schemas of tools by their names, as ``tool_schemas`` gives them.
Schemas = Mapping[str, Mapping[str, Any]]


class Qwen3CoderParser(CallParser):
    """Calls in one answer's content."""

    openers = (START, FUNCTION)

    def __init__(self, schemas: Schemas) -> None:
        """``schemas``: JSON schema of the arguments, for every tool."""
        super().__init__()
        self._schemas = schemas
        self._step = self._read_text
        self._properties: Mapping[str, Any] = {}
        self._num_arguments = 0
        self._types: frozenset[str] = frozenset()
        self._value: list[str] = []
        self._is_first = False  # the value's first character is to come

    @property
    def steady(self) -> Steady | None:
        if self._step != self._read_text or self._rest or not self._gate.is_open:
            return None
        return Steady(Content, _OPENERS.first)

    def finish(self) -> list[Event]:
        rest, self._rest = self._rest, ""
        events: list[Event] = []
        if self._step == self._read_value and rest.startswith(PARAMETER_END):
            self._end_value(events)
            rest = rest[len(PARAMETER_END) :].lstrip(WHITE_SPACE)
        if self._step == self._read_value:
            self._take_value(rest, events)
            if self._types != {"string"} and self._value:
                events.append(CallArguments(self._index, "".join(self._value)))
        elif self._step == self._read_call:
            if rest.strip(WHITE_SPACE):
                events += self._gate.text(rest)
        else:
            events += self._gate.text(self._head + rest)
        return events + self._gate.finish()

    @property
    def _index(self) -> int:
        return self._num_calls - 1

    # States: use up some of the rest; False if it has to wait for more

    def _read_text(self, events: list[Event]) -> bool:
        tag = self._take_text(_OPENERS, events)
        if tag is None:
            return False
        self._head = tag
        self._rest = self._rest[len(tag) :]
        self._step = self._read_opening if tag == START else self._read_name
        return True

    def _read_opening(self, events: list[Event]) -> bool:
        """Behind ``<tool_call>``."""
        white, self._rest = split_white(self._rest)
        self._head += white
        tag = _FUNCTION.begin(self._rest)
        if tag == "":
            return False
        if tag is None:
            return self._give_up(events)
        self._head += tag
        self._rest = self._rest[len(tag) :]
        self._step = self._read_name
        return True

    def _read_name(self, events: list[Event]) -> bool:
        """Behind ``<function=``."""
        match = _NAME_END.search(self._rest, 0, MAX_HEAD)
        if match is None and len(self._rest) < MAX_HEAD:
            return False
        name = self._rest[: match.start()].strip() if match else ""
        if match is None or match.group() != ">" or not name:
            return self._give_up(events)
        self._rest = self._rest[match.end() :]
        self._start_call()
        self._num_arguments = 0
        properties = self._schemas.get(name, {}).get("properties")
        self._properties = properties if isinstance(properties, Mapping) else {}
        events.append(CallStart(self._index, name))
        self._step = self._read_call
        return True

    def _read_call(self, events: list[Event]) -> bool:
        """Between parameters."""
        text = self._rest = self._rest.lstrip(WHITE_SPACE)
        tag = _IN_CALL.begin(text)
        if tag == "":
            return False
        if tag is None:
            events += self._gate.text(text[0])
            self._rest = text[1:]
            self._step = self._read_stray
            return True
        if tag == PARAMETER:
            match = _NAME_END.search(text, len(tag), MAX_HEAD)
            if match is None and len(text) < MAX_HEAD:
                return False
            key = text[len(tag) : match.start()].strip() if match else ""
            if match is None or match.group() != ">" or not key:
                events += self._gate.text(tag)
                self._rest = text[len(tag) :]
                self._step = self._read_stray
                return True
            self._rest = text[match.end() :]
            self._begin_value(key, events)
            return True
        events.append(CallArguments(self._index, "}" if self._num_arguments else "{}"))
        events.append(CallEnd(self._index))
        self._rest = text[len(tag) :]
        self._step = self._read_text if tag == END else self._read_end
        return True

    def _read_stray(self, events: list[Event]) -> bool:
        """Text where a parameter should begin, up to what may be markup again."""
        end = self._rest.find("<")
        events += self._gate.text(self._rest if end < 0 else self._rest[:end])
        self._rest = "" if end < 0 else self._rest[end:]
        self._step = self._read_stray if end < 0 else self._read_call
        return end >= 0

    def _read_end(self, events: list[Event]) -> bool:
        """Behind ``</function>``."""
        if not self._take_end(_END, events):
            return False
        self._step = self._read_text
        return True

    def _read_value(self, events: list[Event]) -> bool:
        found = _VALUE_ENDS.find(self._rest)
        if found is None:
            text, self._rest = _VALUE_ENDS.split_held(self._rest)
            self._take_value(text, events)
            return False
        at, tag = found
        behind = at + len(tag)
        if tag == PARAMETER_END:
            follows = _IN_CALL.begin(self._rest[behind:].lstrip(WHITE_SPACE))
            if follows is None:
                self._take_value(self._rest[:behind], events)
                self._rest = self._rest[behind:]
                return True
            if not follows:
                self._take_value(self._rest[:at], events)
                self._rest = self._rest[at:]
                return False
        self._take_value(self._rest[:at], events)
        self._rest = self._rest[behind if tag.endswith(PARAMETER_END) else at :]
        self._end_value(events)
        return True

    # Parts of them

    def _end_value(self, events: list[Event]) -> None:
        """Its end tag has come."""
        if self._types == {"string"}:
            events.append(CallArguments(self._index, '"'))
        else:
            value = _typed("".join(self._value), self._types)
            events.append(CallArguments(self._index, value))
        self._step = self._read_call

    def _give_up(self, events: list[Event]) -> bool:
        """What looked like a call is text."""
        events += self._gate.text(self._head)
        self._head = ""
        self._step = self._read_text
        return True

    def _begin_value(self, key: str, events: list[Event]) -> None:
        self._types = schema_types(self._properties.get(key))
        self._value = []
        self._is_first = True
        start = (", " if self._num_arguments else "{") + _quoted(key) + ": "
        self._num_arguments += 1
        events.append(CallArguments(self._index, start + '"' * (self._types == {"string"})))
        self._step = self._read_value

    def _take_value(self, text: str, events: list[Event]) -> None:
        if text and self._is_first:
            self._is_first = False
            text = text.removeprefix("\n")
        if not text:
            return
        if self._types == {"string"}:
            events.append(CallArguments(self._index, _quoted(text)[1:-1]))
        else:
            self._value.append(text)


def schema_types(schema: Any) -> frozenset[str]:
    """The types that a schema allows; what it does not say is a string."""
    if isinstance(schema, Mapping):
        kind = schema.get("type")
        if isinstance(kind, str):
            return frozenset((kind,))
        if isinstance(kind, (list, tuple)):
            return frozenset(name for name in kind if isinstance(name, str))
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), (list, tuple)):
                return frozenset[str]().union(*map(schema_types, schema[key]))
        if "$ref" in schema or "properties" in schema:
            return frozenset(("object", "array", "number", "boolean", "null", "string"))
    return frozenset(("string",))


def _typed(text: str, types: frozenset[str]) -> str:
    """The value as JSON text of one of the types, else as a string."""
    bare = text.strip()
    # Python's spelling of constants is what some models know better.
    bare = {"True": "true", "False": "false", "None": "null"}.get(bare, bare)
    try:
        value = json.loads(bare, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _quoted(text)
    kinds = {
        dict: {"object"},
        list: {"array"},
        str: {"string"},
        int: {"integer", "number"},
        float: {"number"},
        bool: {"boolean"},
        type(None): {"null", "object", "array", "number", "integer", "boolean"},
    }[type(value)]
    if isinstance(value, str) or not kinds & types:
        return _quoted(text)
    return bare


def _no_constant(name: str) -> None:
    """Python's NaN and Infinity, which are no JSON."""
    raise ValueError(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
