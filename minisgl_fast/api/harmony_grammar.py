"""Answers in gpt-oss's harmony format, as its parser (parsers/gpt_oss.py) reads them.

    (analysis | a preamble on commentary)*, then the final message or one call

Rules: the prompt ends with ``<|start|>assistant``, so an answer begins with a channel. What is
bound is the body of the final message, or a call, with which the model stops: ends of text are the
marks behind them.
"""

from __future__ import annotations

from minisgl_fast.api.grammar_text import ANY_TEXT, GrammarText, choice, literal
from minisgl_fast.parsers.gpt_oss import CHANNEL, CONSTRAIN, END, MESSAGE, START


def final_message(grammar: GrammarText, body: str) -> str:
    """The answer for the user, with this body."""
    return _message(grammar, "final", body)


def any_final_message(grammar: GrammarText) -> str:
    return final_message(grammar, grammar.lexeme(ANY_TEXT))


def call(grammar: GrammarText, name: str, arguments: str) -> str:
    """A call of a function with these arguments."""
    marks = grammar.mark(CHANNEL), grammar.mark(CONSTRAIN), grammar.mark(MESSAGE)
    head = literal(f"commentary to=functions.{name} ")
    return f"{marks[0]} {head} {marks[1]} {literal('json')} {marks[2]} {arguments}"


def behind_thoughts(grammar: GrammarText, bound: str) -> str:
    """What is bound, with any reasoning and preambles before it."""
    body = grammar.text_up_to(END)
    thoughts = [_message(grammar, channel, body) for channel in ("analysis", "commentary")]
    thought = grammar.rule(f"{choice(*thoughts)} {grammar.mark(START)} {literal('assistant')}")
    return f"{thought}* {bound}"


def _message(grammar: GrammarText, channel: str, body: str) -> str:
    return f"{grammar.mark(CHANNEL)} {literal(channel)} {grammar.mark(MESSAGE)} {body}"
