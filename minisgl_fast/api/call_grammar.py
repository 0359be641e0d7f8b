"""Grammars of tool calls, in exactly the form that the parser of a format reads.

One function per format writes one call; ``calls`` puts them together. What it allows is what
parsers/ turns into calls whose arguments satisfy the tool's schema.

Rules: a tool with ``strict`` is compiled strictly; of others, schema keywords that cannot be
enforced are left to the model. A tool whose name or parameters have no form in the model's format
is a RequestError.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minisgl_fast.api import harmony_grammar
from minisgl_fast.api.grammar_text import GrammarText, Schema, choice, literal
from minisgl_fast.api.xml_arguments import xml_arguments
from minisgl_fast.errors import RequestError
from minisgl_fast.parsers.mistral import TAG as MISTRAL_TAG
from minisgl_fast.parsers.qwen3_coder import FUNCTION, FUNCTION_END
from minisgl_fast.parsers.qwen25 import END, START

_NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
_PYTHON_NAME = re.compile(r"[A-Za-z_][\w.]*")
# Escapes that mean the same in Python and JSON.
_PYTHON_ESCAPES = '"\\nrt'
_MISTRAL_NAME = re.compile(r"[\w.\-/:]+")


class ToolForm(NamedTuple):
    """A tool as a grammar sees it."""

    name: str
    schema: Schema
    strict: bool

    @classmethod
    def of(cls, tool: Mapping[str, Any]) -> ToolForm:
        function = tool["function"]
        schema = function.get("parameters")
        schema = _NO_ARGUMENTS if schema is None else {"type": "object", **schema}
        return cls(function["name"], schema, bool(function.get("strict")))

    def arguments(self, grammar: GrammarText) -> str:
        return grammar.json(self.schema, strict=self.strict)


class CallForm(NamedTuple):
    """How a format writes calls: expressions ``before`` and ``after`` them all, text between.

    trigger: the markup that begins a call in the middle of a text; empty where there is none.
    has_one: an answer ends with its first call.
    """

    call: Callable[[GrammarText, ToolForm], str]
    before: Callable[[GrammarText], str] = lambda grammar: ""
    between: str = ""
    after: str = ""
    trigger: str = ""
    has_one: bool = False


def calls(
    name: str, tools: Sequence[Mapping[str, Any]], grammar: GrammarText, *, only_one: bool
) -> str:
    """One or more calls of the tools (OpenAI's form) in format ``name``."""
    form = _form(name, grammar)
    one = grammar.rule(choice(*(form.call(grammar, ToolForm.of(tool)) for tool in tools)))
    if only_one or form.has_one:
        several = one
    elif form.between:
        several = f"{one} ({literal(form.between)} {one})*"
    else:
        several = f"{one}+"
    return f"({form.before(grammar)} {several} {form.after})"


def strict_calls(name: str, tools: Sequence[Mapping[str, Any]], grammar: GrammarText) -> str | None:
    """Free text whose calls, if it has any, are calls of the tools; None where the format has no
    markup that begins one."""
    form = _form(name, grammar)
    if not form.trigger:
        return None
    one = choice(*(form.call(grammar, ToolForm.of(tool)) for tool in tools))
    if form.after:
        call = grammar.rule(one)
        between = literal(form.between)
        one = f"{form.before(grammar)} {call} ({between} {call})* {form.after}"
    text = grammar.text_without(form.trigger)
    trigger = grammar.mark(form.trigger)
    if trigger.startswith("<["):
        return f"({text} {grammar.rule(one)})* {text}"
    # The text and the markup behind it are one lexeme, which ends with the markup.
    head = grammar.text_up_to(form.trigger)
    return f"({head} {grammar.rule(one.replace(f'{trigger} ', ''))})* {text}"


def _form(name: str, grammar: GrammarText) -> CallForm:
    if name == "qwen25":
        return CallForm(_qwen25, between="\n", trigger=START)
    if name == "qwen3_coder":
        return CallForm(_qwen3_coder, between="\n", trigger=START)
    if name == "llama3":
        return CallForm(_llama3, between="; ")
    if name == "pythonic":
        return CallForm(_pythonic, lambda grammar: literal("["), ", ", literal("]"))
    if name == "mistral":
        if grammar.mark("[ARGS]").startswith("<["):
            return CallForm(_mistral_named, trigger=MISTRAL_TAG)
        return CallForm(_mistral_object, _mistral_array, ", ", literal("]"), MISTRAL_TAG)
    return CallForm(_gpt_oss, has_one=True)


def _object(grammar: GrammarText, tool: ToolForm, key: str) -> str:
    head = f'{{"name": {literal(tool.name)}, "{key}": '
    return f"{literal(head)} {tool.arguments(grammar)} {literal('}')}"


def _qwen25(grammar: GrammarText, tool: ToolForm) -> str:
    call = _object(grammar, tool, "arguments")
    line = literal("\n")
    return f"{grammar.mark(START)} {line} {call} {line} {grammar.mark(END)}"


def _llama3(grammar: GrammarText, tool: ToolForm) -> str:
    return _object(grammar, tool, "parameters")


def _mistral_array(grammar: GrammarText) -> str:
    return f"{grammar.mark(MISTRAL_TAG)} {literal(' [')}"


def _mistral_object(grammar: GrammarText, tool: ToolForm) -> str:
    return _object(grammar, tool, "arguments")


def _mistral_named(grammar: GrammarText, tool: ToolForm) -> str:
    _check_name(tool.name, _MISTRAL_NAME)
    marks = grammar.mark(MISTRAL_TAG), grammar.mark("[ARGS]")
    return f"{marks[0]} {literal(tool.name)} {marks[1]} {tool.arguments(grammar)}"


def _gpt_oss(grammar: GrammarText, tool: ToolForm) -> str:
    _check_name(tool.name, re.compile(r"[^\s<]+"))
    return harmony_grammar.call(grammar, tool.name, tool.arguments(grammar))


def _qwen3_coder(grammar: GrammarText, tool: ToolForm) -> str:
    _check_name(tool.name, re.compile(r"[^<>\n]*[^<>\n\s][^<>\n]*"))
    head = literal(f"\n{FUNCTION}{tool.name}>\n")
    arguments = xml_arguments(grammar, tool.schema, strict=tool.strict)
    foot = literal(f"{FUNCTION_END}\n")
    return f"{grammar.mark(START)} {head} {arguments} {foot} {grammar.mark(END)}"


def _pythonic(grammar: GrammarText, tool: ToolForm) -> str:
    """Required arguments first: keywords may stand in any order."""
    _check_name(tool.name, _PYTHON_NAME)
    schema = tool.schema
    properties = schema.get("properties") or {}
    required = [key for key in schema.get("required") or () if isinstance(key, str)]
    for key in required:
        if not _is_keyword_name(key):
            raise RequestError(
                f"tools: {tool.name[:100]} requires the parameter {key[:100]!r}, which cannot be "
                "written in the model's format of calls.",
                param="tools",
            )
    optional = [key for key in properties if key not in required and _is_keyword_name(key)]
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def argument(key: str) -> str:
        value = properties.get(key, {})
        inner = {**shared, **value} if isinstance(value, Mapping) else shared
        value_text = grammar.json(inner, strict=tool.strict, escapes=_PYTHON_ESCAPES)
        return f"{literal(f'{key}=')} {value_text}"

    comma = literal(", ")
    written = [argument(key) for key in required]
    # Any of the optional ones, in their order: a rule for what may follow each of them.
    tail = ""
    alternatives = []
    for key in reversed(optional):
        one = grammar.rule(argument(key))
        alternatives.append(f"{one} {tail}".strip())
        tail = grammar.rule(f"({comma} {one})? {tail}".strip())
    if written:
        arguments = f"{f' {comma} '.join(written)} {tail}"
    else:
        arguments = f"{choice(*alternatives)}?" if alternatives else ""
    return f"{literal(f'{tool.name}(')} {arguments} {literal(')')}"


def _is_keyword_name(key: str) -> bool:
    return key.isidentifier() and key.isascii() and not keyword.iskeyword(key)


def _check_name(name: str, allowed: re.Pattern[str]) -> None:
    if not allowed.fullmatch(name):
        raise RequestError(
            f"tools: the name {name[:100]!r} cannot be written in the model's format of calls.",
            param="tools",
        )
