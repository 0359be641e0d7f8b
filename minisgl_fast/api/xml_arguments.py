r"""Arguments as Qwen3-Coder writes them: bare values between tags, typed by the tool's schema.

    <parameter=KEY>\nVALUE\n</parameter>\n

Rules: strings stand as they are and hold none of the tags; anything else is JSON. Required
parameters come in the order of the properties, the others may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minisgl_fast.api.grammar_text import ANY_TEXT, GrammarText, Schema, choice, literal, pattern
from minisgl_fast.errors import RequestError
from minisgl_fast.parsers.qwen3_coder import (
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
    schema_types,
)

_MARKS = (PARAMETER, PARAMETER_END, FUNCTION_END)
# What is JSON, or Python, and so would not stay a string where other types are allowed too.
_LITERALS = "true|false|null|True|False|None|NaN|Infinity"


def xml_arguments(grammar: GrammarText, schema: Schema, *, strict: bool) -> str:
    """All parameters of one call."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    names = [*properties, *(key for key in required if key not in properties)]
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts = []
    for name in names:
        if not name.strip() or any(mark in name for mark in "<>\n"):
            if name in required:
                raise RequestError(
                    f"tools: the parameter {name[:100]!r} cannot be written in the model's format "
                    "of calls.",
                    param="tools",
                )
            continue
        value = _value(grammar, properties.get(name, {}), shared, strict)
        rule = grammar.rule(
            f"{literal(f'{PARAMETER}{name}>')} {literal(chr(10))} {value} "
            f"{literal(f'{chr(10)}{PARAMETER_END}{chr(10)}')}"
        )
        parts.append(rule if name in required else f"{rule}?")
    return " ".join(parts)


def _value(grammar: GrammarText, schema: Any, shared: Schema, strict: bool) -> str:
    if not isinstance(schema, Mapping):
        return _text(grammar, {})
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(allowed, list) and allowed:
        return choice(*(_constant(value) for value in allowed))
    types = schema_types(schema)
    if types == {"string"}:
        return _text(grammar, schema)
    if "string" in types and not {"$ref", "properties"} & schema.keys():
        others = [_without_strings(schema)] if types - {"string"} else []
        written = [grammar.json({**shared, **other}, strict=strict) for other in others if other]
        return choice(
            grammar.lexeme(f"/[A-Za-z_](?s:.*)/ & ~/({_LITERALS})\\s*/ & {_no_marks()}"),
            *written,
        )
    return grammar.json({**shared, **schema}, strict=strict)


def _text(grammar: GrammarText, schema: Mapping[str, Any]) -> str:
    """A bare string. Lengths are in characters; a pattern may match anywhere, as in JSON schema."""
    expressions = [ANY_TEXT, _no_marks()]
    least, most = schema.get("minLength"), schema.get("maxLength")
    if isinstance(least, int) or isinstance(most, int):
        expressions[0] = f"/(?s:.){{{least or 0},{most if isinstance(most, int) else ''}}}/"
    searched = schema.get("pattern")
    if isinstance(searched, str) and searched:
        before = "" if searched.startswith("^") else "(?s:.*)"
        after = "" if searched.endswith("$") and not searched.endswith("\\$") else "(?s:.*)"
        bare = searched.removeprefix("^")
        bare = bare if after else bare[:-1]
        expressions.append(f"/{before}({_escaped(bare)}){after}/")
    return grammar.lexeme(" & ".join(expressions))


def _no_marks() -> str:
    return f"~/(?s:.*)({'|'.join(map(pattern, _MARKS))})(?s:.*)/"


def _constant(value: Any) -> str:
    return literal(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _without_strings(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema's alternatives that are no strings; None if there are none."""
    kind = schema.get("type")
    if isinstance(kind, list):
        return {**schema, "type": [name for name in kind if name != "string"]}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            rest = [item for item in schema[key] if schema_types(item) != {"string"}]
            return {**schema, key: rest} if rest else None
    return None


def _escaped(expression: str) -> str:
    """A regular expression between slashes."""
    return expression.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n")
