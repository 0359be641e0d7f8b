"""The grammar of a whole chat answer: reasoning, then what is bound: text, or calls.

    tool_choice required, or a function    calls alone
    a field of structured.py               that text; or calls, where tools are offered
    strict tools                           free text whose calls obey their schemas

Rules: a model that reasons may do so freely: what binds the answer begins behind the end of its
reasoning. Where the model decides whether it reasons, so it does here.
"""

from __future__ import annotations

from minisgl_fast.api import harmony_grammar
from minisgl_fast.api.call_grammar import calls, strict_calls
from minisgl_fast.api.chat_fields import bound_tools
from minisgl_fast.api.grammar_text import GrammarText, RequestGrammar, choice
from minisgl_fast.api.openai_request import ChatRequest
from minisgl_fast.api.structured import constraint_of
from minisgl_fast.errors import RequestError
from minisgl_fast.parsers.select import GPT_OSS, Formats
from minisgl_fast.text.tokenizer import Tokenizer

# What models write between the end of a reasoning and an answer in which it means nothing.
_LINES = r"/\n{0,2}/"


def chat_grammar(
    body: ChatRequest, formats: Formats, tokenizer: Tokenizer, prompt: str
) -> RequestGrammar | None:
    """The grammar of an answer to ``prompt``; None if any text will do. RequestError."""
    constraint = constraint_of(body)
    if constraint is None and not body.tools:
        return None
    tools = bound_tools(body.offered_tools, body.tool_choice)
    offered = body.offered_tools if formats.tools is not None else []
    grammar = GrammarText(tokenizer)
    # A final message that is continued has its marks behind it already.
    is_harmony = GPT_OSS in (formats.reasoning, formats.tools) and not body.continue_final_message
    only_one = body.parallel_tool_calls is False or isinstance(body.tool_choice, dict)
    lines = ""
    if tools:
        if constraint is not None:
            raise RequestError(
                f"{constraint.param} cannot bind an answer that tool_choice binds to calls.",
                param=constraint.param,
            )
        assert formats.tools is not None, "a model without a format of calls was refused"
        param, lines = "tool_choice", _LINES
        bound = calls(formats.tools, tools, grammar, only_one=only_one)
    elif constraint is not None:
        param, lines = constraint.param, _LINES if constraint.is_json else ""
        bound = constraint.write(grammar)
        if is_harmony:
            bound = harmony_grammar.final_message(grammar, bound)
        if offered:
            bound = choice(bound, calls(formats.tools or "", offered, grammar, only_one=only_one))
    else:
        strict = [tool for tool in offered if tool["function"].get("strict")]
        if not strict:
            return None
        param = "tools"
        if is_harmony:
            bound = calls(GPT_OSS, offered, grammar, only_one=True)
            bound = choice(harmony_grammar.any_final_message(grammar), bound)
        else:
            free = strict_calls(formats.tools or "", offered, grammar)
            if free is None:
                return None
            bound = free
    if is_harmony:
        start = harmony_grammar.behind_thoughts(grammar, bound)
    else:
        start = _behind_reasoning(grammar, formats, prompt, bound, lines)
    return RequestGrammar.of(grammar, start, param)


def _behind_reasoning(
    grammar: GrammarText, formats: Formats, prompt: str, bound: str, lines: str
) -> str:
    form = formats.reasoning_format(prompt)
    if form is None:
        return bound
    rest = grammar.text_up_to(form.end)
    if lines:
        rest = f"{rest} {grammar.lexeme(lines)}"
    if form.is_open:
        return f"{rest} {bound}"
    return f"({grammar.mark(form.start)} {rest})? {bound}"
