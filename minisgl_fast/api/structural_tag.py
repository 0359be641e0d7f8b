"""Structural tags: free text in which certain markup, once begun, has a form to keep.

SGLang's and vLLM's older form is ``structures`` (begin, schema, end) with ``triggers``; the newer
one is a tree in ``format``, whose nodes are const_string, json_schema, regex, grammar, any_text,
sequence, or, tag, triggered_tags and tags_with_separator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minisgl_fast.api.grammar_text import (
    ANY_TEXT,
    GrammarText,
    choice,
    literal,
    pattern,
    regex,
)
from minisgl_fast.errors import RequestError

Write = Callable[[GrammarText], str]


class Tag(NamedTuple):
    begin: str
    content: Write
    end: str

    def written(self, grammar: GrammarText, skipped: int = 0) -> str:
        """The tag without the first characters of its beginning."""
        parts = [self.begin[skipped:], self.end]
        before, after = (f"{literal(part)} " if part else "" for part in parts)
        return f"{before}{self.content(grammar)} {after}".strip()


def structural_tag(form: Mapping[str, Any], param: str) -> Write:
    """What writes a structural tag. RequestError if it has no such form."""
    if "format" in form:
        return _node(form["format"], f"{param}.format")
    structures, triggers = form.get("structures"), form.get("triggers")
    if not isinstance(structures, list) or not structures:
        raise _missing(f"{param}.structures")
    tags = []
    for index, item in enumerate(structures):
        where = f"{param}.structures[{index}]"
        if not isinstance(item, dict):
            raise _missing(where)
        tags.append(
            Tag(
                _text(item.get("begin"), f"{where}.begin"),
                _schema(item.get("schema", {}), f"{where}.schema"),
                _text(item.get("end", ""), f"{where}.end", may_be_empty=True),
            )
        )
    return triggered(_texts(triggers, f"{param}.triggers"), tags, f"{param}.triggers")


def triggered(
    triggers: Sequence[str], tags: Sequence[Tag], param: str, *, at_least: int = 0, at_most: int = 0
) -> Write:
    """Free text in which a trigger is always the beginning of one of the tags.

    ``at_most`` 0: any number.
    """
    for tag in tags:
        if not any(tag.begin.startswith(trigger) for trigger in triggers):
            raise RequestError(f"{param}: none of them begins {tag.begin[:100]!r}.", param=param)

    def write(grammar: GrammarText) -> str:
        branches = []
        for trigger in triggers:
            own = [tag for tag in tags if tag.begin.startswith(trigger)]
            if own:
                rest = choice(*(tag.written(grammar, len(trigger)) for tag in own))
                branches.append(f"{_up_to(grammar, trigger, triggers)} {rest}")
        call = grammar.rule(choice(*branches))
        end = grammar.text_without(*triggers)
        count = f"{{{at_least},{at_most}}}" if at_most else f"{{{at_least},}}"
        return f"{call}{count} {end}"

    return write


def _up_to(grammar: GrammarText, trigger: str, triggers: Sequence[str]) -> str:
    """Text up to the first of the triggers, which is this one."""
    end = grammar.mark(trigger)
    if end.startswith("<["):
        return f"{grammar.lexeme(ANY_TEXT)} {end}"
    return grammar.rule(f"/(?s:.*){pattern(trigger)}/", "[lazy]")


def _node(node: object, where: str) -> Write:
    if not isinstance(node, dict):
        raise _missing(where)
    kind = node.get("type")
    if kind == "const_string":
        text = literal(_text(node.get("value"), f"{where}.value"))
        return lambda grammar: text
    if kind == "json_schema":
        return _schema(node.get("json_schema"), f"{where}.json_schema")
    if kind == "regex":
        expression = regex(_text(node.get("pattern"), f"{where}.pattern"), f"{where}.pattern")
        return lambda grammar: grammar.lexeme(expression)
    if kind == "grammar":
        text = _text(node.get("grammar"), f"{where}.grammar")
        return lambda grammar: grammar.ebnf(text)
    if kind == "any_text":
        excluded = _texts(node.get("excludes") or [], f"{where}.excludes", may_be_empty=True)
        return lambda grammar: grammar.text_without(*excluded)
    if kind in ("sequence", "or"):
        return _list(node, where)
    if kind == "tag":
        tag = _tag(node, where)
        return tag.written
    if kind in ("triggered_tags", "tags_with_separator"):
        return _several(node, where)
    raise RequestError(f"{where}.type: {str(kind)[:40]!r} is not supported.", param=f"{where}.type")


def _list(node: Mapping[str, Any], where: str) -> Write:
    elements = node.get("elements")
    if not isinstance(elements, list) or not elements:
        raise _missing(f"{where}.elements")
    writers = [_node(item, f"{where}.elements[{i}]") for i, item in enumerate(elements)]
    if node["type"] == "or":
        return lambda grammar: choice(*(write(grammar) for write in writers))
    return lambda grammar: f"({' '.join(write(grammar) for write in writers)})"


def _tag(node: object, where: str) -> Tag:
    if not isinstance(node, dict):
        raise _missing(where)
    end = node.get("end", "")
    if isinstance(end, list) and len(end) == 1:
        end = end[0]
    return Tag(
        _text(node.get("begin"), f"{where}.begin"),
        _node(node.get("content"), f"{where}.content"),
        _text(end, f"{where}.end", may_be_empty=True),
    )


def _several(node: Mapping[str, Any], where: str) -> Write:
    given = node.get("tags")
    if not isinstance(given, list) or not given:
        raise _missing(f"{where}.tags")
    tags = [_tag(item, f"{where}.tags[{i}]") for i, item in enumerate(given)]
    at_least = int(bool(node.get("at_least_one")))
    at_most = int(bool(node.get("stop_after_first")))
    if node["type"] == "triggered_tags":
        triggers = _texts(node.get("triggers"), f"{where}.triggers")
        return triggered(triggers, tags, f"{where}.triggers", at_least=at_least, at_most=at_most)
    separator = literal(_text(node.get("separator"), f"{where}.separator", may_be_empty=True))

    def write(grammar: GrammarText) -> str:
        one = grammar.rule(choice(*(tag.written(grammar) for tag in tags)))
        several = one if at_most else f"{one} ({separator} {one})*"
        return several if at_least else f"({several})?"

    return write


def _schema(value: object, where: str) -> Write:
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be a JSON schema.", param=where)
    schema: dict[str, Any] = value
    return lambda grammar: grammar.json(schema, strict=True)


def _text(value: object, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or may_be_empty):
        raise RequestError(f"{where} must be a string.", param=where)
    return value


def _texts(value: object, where: str, *, may_be_empty: bool = False) -> list[str]:
    if not isinstance(value, list) or not (value or may_be_empty):
        raise _missing(where)
    return [_text(item, f"{where}[{i}]") for i, item in enumerate(value)]


def _missing(where: str) -> RequestError:
    return RequestError(f"Missing required field: {where}.", param=where)
