"""GrammarText: one llguidance grammar put together from literals, lexemes, schemas and grammars.

The top is in llguidance's Lark, whose rules refer to the others by name; all of it travels as one
JSON text. An EBNF grammar stays as it came until engine/grammar_check.py translates it.

Rules: text of clients only ever stands in quoted literals, in JSON schemas, or in grammars of its
own. ``no_forcing`` leaves every spelling of a forced text to the model, so nobody has to tokenize.
White space in JSON is bounded, or a model could go on with it for ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from minisgl_fast.errors import RequestError
from minisgl_fast.text.tokenizer import Tokenizer

Schema: TypeAlias = Mapping[str, Any]

MAX_GRAMMAR_CHARACTERS = 256 << 10
ANY_OBJECT: Schema = {"type": "object"}
ANY_TEXT = r"/(?s:.*)/"
_WHITE_SPACE = r"[ \t\n\r]{1,64}"
_HEAD = '%llguidance {"no_forcing": true}\n'


class RequestGrammar(NamedTuple):
    """``text``: as GrammarText makes it. ``param``: the field that asks for it."""

    text: str
    param: str

    @classmethod
    def of(cls, grammar: GrammarText, start: str, param: str) -> RequestGrammar:
        """RequestError if the grammar is too long."""
        text = grammar.text(start)
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"{param} is too long: its grammar has {len(text)} characters, at most "
                f"{MAX_GRAMMAR_CHARACTERS} are compiled.",
                param=param,
            )
        return cls(text, param)


class GrammarText:
    """Gathers rules; every method that adds one returns how to refer to it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: list[str] = []
        self._parts: list[dict[str, Any]] = []

    def text(self, start: str) -> str:
        """The whole grammar, whose texts are those of the expression ``start``."""
        lark = _HEAD + "\n".join([f"start: {start}", *self._rules])
        return json.dumps({"grammars": [{"lark_grammar": lark}, *self._parts]}, ensure_ascii=False)

    def rule(self, expression: str, attributes: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {expression}")
        return name

    def lexeme(self, expression: str) -> str:
        """A regular language: regular expressions, ``&``, ``~`` and literals."""
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {expression}")
        return name

    def json(self, schema: Schema, *, strict: bool, escapes: str | None = None) -> str:
        """JSON by a schema. ``strict``: keywords that cannot be enforced are an error, not ignored.

        ``escapes``: the letters that may follow a backslash, None for all of JSON's.
        """
        options: dict[str, Any] = {"whitespace_pattern": _WHITE_SPACE}
        if not strict:
            options |= {"lenient": True, "coerce_one_of": True}
        if escapes is not None:
            options["json_allowed_escapes"] = escapes
        return self._part({"json_schema": {**schema, "x-guidance": options}})

    def ebnf(self, text: str) -> str:
        """A grammar in Lark's, llama.cpp's or SGLang's notation."""
        return self._part({"ebnf": text})

    def mark(self, text: str) -> str:
        """Markup: a special token if the tokenizer has it as one, else its text."""
        ids = self._tokenizer.encode(text)
        if len(ids) == 1 and self._tokenizer.is_special(ids[0]):
            return f"<[{ids[0]}]>"
        return literal(text)

    def text_up_to(self, mark: str) -> str:
        """Any text that has the mark at its end and nowhere before."""
        end = self.mark(mark)
        if end.startswith("<["):
            return self.rule(f"{ANY_TEXT} {end}")
        return self.rule(f"/(?s:.*){pattern(mark)}/", "[lazy]")

    def text_without(self, *marks: str) -> str:
        """Any text that has none of the marks in it."""
        found = [mark for mark in marks if not self.mark(mark).startswith("<[")]
        if not found:
            return self.lexeme(ANY_TEXT)
        return self.lexeme(f"{ANY_TEXT} & ~/(?s:.*)({'|'.join(map(pattern, found))})(?s:.*)/")

    def _part(self, part: dict[str, Any]) -> str:
        name = f"p{len(self._parts)}"
        self._parts.append({"name": name, **part})
        return f"@{name}"


def literal(text: str) -> str:
    """Exactly this text."""
    return json.dumps(text, ensure_ascii=False)


def choice(*expressions: str) -> str:
    return f"({' | '.join(expressions)})"


def regex(text: str, param: str) -> str:
    """A client's regular expression as a whole lexeme. RequestError if it is empty.

    Digits are those of ASCII, as elsewhere where answers are bound, and not of every script.
    """
    if not text:
        raise RequestError(f"{param} must not be empty.", param=param)
    escaped = []
    is_escaped = is_in_class = False
    for character in text:
        if is_escaped:
            is_escaped = False
            known = {
                "d": "0-9" if is_in_class else "[0-9]",
                "D": r"\P{Nd}" if is_in_class else "[^0-9]",
            }
            escaped.append(known.get(character, f"\\{character}"))
            continue
        if character == "\\":
            is_escaped = True
            continue
        if character in "[]":
            is_in_class = character == "["
        escaped.append({"/": "\\/", "\n": "\\n", "\r": "\\r"}.get(character, character))
    return f"/{''.join(escaped)}{chr(92) * is_escaped}/"


def pattern(text: str) -> str:
    """A regular expression, without its slashes, of exactly this text."""
    return "".join(
        character if character.isalnum() or character in " _" else f"\\x{{{ord(character):x}}}"
        for character in text
    )
