"""Structured output: the fields that bind the text of an answer, as grammars.

OpenAI's ``response_format``, SGLang's ``regex``, ``ebnf``, ``json_schema`` and ``structural_tag``,
vLLM's ``structured_outputs``: one of them, whatever its form, becomes an expression of a
``GrammarText``. Reasoning and calls are put around it by chat_grammar.py.

Rules: what is wrong with a field's form is found here, what is wrong with a grammar in
engine/grammar_check.py; both are a RequestError that names the field. A schema is strict where its
field has no other word for it: a keyword that cannot be enforced is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import orjson

from minisgl_fast.api.body import check_depth
from minisgl_fast.api.grammar_text import (
    ANY_OBJECT,
    GrammarText,
    RequestGrammar,
    choice,
    literal,
    regex,
)
from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.api.structural_tag import structural_tag
from minisgl_fast.errors import RequestError
from minisgl_fast.text.tokenizer import Tokenizer

_binding_fields = attrgetter(
    "response_format", "json_schema", "regex", "ebnf", "structural_tag", "structured_outputs"
)
_NOTHING = (None,) * 6
_OUTPUTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a field asks for.

    param: the field. write: adds it to a grammar and gives the expression. is_json: white space
    before it means nothing.
    """

    param: str
    write: Callable[[GrammarText], str]
    is_json: bool = False


def constraint_of(body: SamplingFields) -> Constraint | None:
    """What binds the text of an answer; None if nothing does. RequestError if two things do."""
    if _binding_fields(body) == _NOTHING:  # as of most requests
        return None
    found = [
        made
        for made in (
            _response_format(body.response_format),
            _json(body.json_schema, "json_schema"),
            _regex(body.regex, "regex"),
            _ebnf(body.ebnf, "ebnf"),
            _tags(body.structural_tag, "structural_tag"),
            _structured_outputs(body.structured_outputs),
        )
        if made is not None
    ]
    if len(found) > 1:
        raise RequestError(
            f"{found[0].param} and {found[1].param} cannot both bind the answer.",
            param=found[1].param,
        )
    return found[0] if found else None


def _response_format(form: Mapping[str, Any] | None) -> Constraint | None:
    if form is None:
        return None
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint(
            "response_format", lambda grammar: grammar.json(ANY_OBJECT, strict=True), is_json=True
        )
    if kind == "structural_tag":
        return _tags(form, "response_format")
    if kind != "json_schema":
        raise RequestError(
            "response_format.type must be text, json_object, json_schema or structural_tag.",
            param="response_format.type",
        )
    param = "response_format.json_schema"
    outer = form.get("json_schema")
    if not isinstance(outer, dict):
        raise RequestError(f"Missing required field: {param}.", param=param)
    schema = outer.get("schema", outer.get("schema_", {}))
    strict = outer.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{param}.strict must be a boolean.", param=f"{param}.strict")
    return _json(schema, f"{param}.schema", strict=bool(strict))


def _structured_outputs(options: Mapping[str, Any] | None) -> Constraint | None:
    if options is None:
        return None
    name = "structured_outputs"
    given = [key for key in _OUTPUTS if options.get(key) is not None]
    others = [key for key, value in options.items() if key not in _OUTPUTS and value]
    if others:
        param = f"{name}.{others[0][:100]}"
        raise RequestError(f"This server does not support {param}.", param=param)
    if len(given) != 1:
        raise RequestError(f"{name} must have one of {', '.join(_OUTPUTS)}.", param=name)
    param = f"{name}.{given[0]}"
    value = options[given[0]]
    if given[0] == "json":
        return _json(value, param)
    if given[0] == "regex":
        return _regex(_string(value, param), param)
    if given[0] == "grammar":
        return _ebnf(_string(value, param), param)
    if given[0] == "choice":
        return _choice(value, param)
    if given[0] == "structural_tag":
        return _tags(value, param)
    if value is not True:
        raise RequestError(f"{param} must be true.", param=param)
    return Constraint(param, lambda grammar: grammar.json(ANY_OBJECT, strict=True), is_json=True)


def _json(value: object, param: str, *, strict: bool = True) -> Constraint | None:
    if value is None:
        return None
    schema = parsed(value, param)
    if not isinstance(schema, (dict, bool)):
        raise RequestError(f"{param} must be a JSON schema.", param=param)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return Constraint(param, lambda grammar: grammar.json(schema, strict=strict), is_json=True)


def _regex(value: str | None, param: str) -> Constraint | None:
    if value is None:
        return None
    expression = regex(value, param)
    return Constraint(param, lambda grammar: grammar.lexeme(expression))


def _ebnf(value: str | None, param: str) -> Constraint | None:
    if value is None:
        return None
    if not value.strip():
        raise RequestError(f"{param} must not be empty.", param=param)
    return Constraint(param, lambda grammar: grammar.ebnf(value))


def _choice(value: object, param: str) -> Constraint:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise RequestError(f"{param} must be a list of strings, not empty.", param=param)
    expression = choice(*map(literal, value))
    return Constraint(param, lambda grammar: expression)


def _tags(value: object, param: str) -> Constraint | None:
    if value is None:
        return None
    tags = parsed(value, param)
    if not isinstance(tags, dict):
        raise RequestError(f"{param} must be an object.", param=param)
    write = structural_tag(tags, param)
    return Constraint(param, write)


def parsed(value: object, param: str) -> Any:
    """A value that may also come as JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        read = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"{param} is not valid JSON: {error.msg}.", param=param) from None
    check_depth(read, param)
    return read


def _string(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a string.", param=param)
    return value


def plain_grammar(body: SamplingFields, tokenizer: Tokenizer) -> RequestGrammar | None:
    """The grammar of a text that is all content; None if any will do."""
    return grammar_of(constraint_of(body), tokenizer)


def grammar_of(constraint: Constraint | None, tokenizer: Tokenizer) -> RequestGrammar | None:
    """The grammar of a text that the constraint alone binds."""
    if constraint is None:
        return None
    grammar = GrammarText(tokenizer)
    return RequestGrammar.of(grammar, constraint.write(grammar), constraint.param)
