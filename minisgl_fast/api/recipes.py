"""Recipes of plain requests, and the molds of their answers.

A recipe comes from a request of its kind whose prompt is only a sample: what the route makes of it
on the way that all requests can go, up to its Task and its format, holds for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minisgl_fast.api.chat_output import ChatOutput
from minisgl_fast.api.logprobs import NO_LOGPROBS
from minisgl_fast.api.mold import MARKS, Mold
from minisgl_fast.api.plain_session import Recipe
from minisgl_fast.api.response_format import Answer, ResponseFormat, Usage
from minisgl_fast.api.task import GENERATE, Task
from minisgl_fast.server.exchange import EVENT_STREAM
from minisgl_fast.text.tokenizer import Tokenizer

_REQUEST_ID, _CREATED, _TEXT, _END, _USAGE = MARKS


class _MarkedAnswer(Answer):
    def end(self) -> bytes:
        return _END


class _MarkedUsage(Usage):
    def to_json(self) -> bytes:
        return _USAGE


def make_recipe(
    task: Task,
    tokenizer: Tokenizer,
    make_form: Callable[[str, bytes], ResponseFormat],
    make_output: Callable[[Any], ChatOutput] | None = None,
    watched: bytes | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> Recipe | None:
    """The Recipe of the requests that are like this one; None if they need a Session.

    The arguments are those of Recipe.
    """
    form = make_form(_REQUEST_ID.decode(), _CREATED)
    body = task.body
    if (
        len(task.prompts) != 1
        or body.num_generated != 1
        or task.extras is not None
        or task.logprobs is not NO_LOGPROBS
        or task.kind != GENERATE
        or task.grammar is not None
        or task.thinking is not None
        or task.max_tokens == 0
        or body.allowed_token_ids is not None
        or body.bad_words
        or body.truncate_prompt_tokens is not None
        or body.rid is not None
        or body.request_id is not None
        or form.text_event is not None
        or form.content_type != EVENT_STREAM
    ):
        return None
    output = None if watched is None or make_output is None else make_output(form)
    molds = _stream(form) if task.stream else _whole(form, output)
    text = task.text_stream(tokenizer)
    return Recipe(task, text, molds, make_form, make_output, watched, template_kwargs)


def _whole(form: ResponseFormat, output: ChatOutput | None) -> dict[str, Mold]:
    message = b""
    if output is not None:
        output.finish(_TEXT)
        message = output.message()
    answer = _MarkedAnswer(0, _TEXT, "stop", None, message=message)
    return {"body": Mold(form.body([answer], _MarkedUsage()))}


def _stream(form: ResponseFormat) -> dict[str, Mold]:
    usage = _MarkedUsage()
    return {
        "opening": Mold(form.opening(0, usage)),
        "prefix": Mold(form.prefix(0)),
        "suffix": Mold(form.suffix(0)),
        "closing": Mold(form.closing(_MarkedAnswer(0, b"", "stop", None))),
        "closing_text": Mold(form.closing(_MarkedAnswer(0, _TEXT, "stop", None))),
        "ending": Mold(form.ending(usage)),
    }
