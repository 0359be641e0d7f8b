"""Chat: the step from messages to a session that all routes with messages share.

A route turns its own body into a ``ChatRequest`` and messages in OpenAI's form; here they go
through the model's template, and the answer through the model's parsers into the route's format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minisgl_fast.api.chat_grammar import chat_grammar
from minisgl_fast.api.chat_output import ChatOutputs, MessageFormat
from minisgl_fast.api.extras import Extras
from minisgl_fast.api.openai_request import ChatRequest
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.task import Task
from minisgl_fast.api.token_rules import ThinkingForm
from minisgl_fast.errors import RequestError
from minisgl_fast.parsers.select import Formats
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One request on one route: where it came in, when, and what writes its answer, with which
    extras.

    cuts_to_context: more tokens than the context has room for may be asked for.
    """

    route: str
    request: HttpRequest
    exchange: Exchange
    received: float
    form: MessageFormat
    cuts_to_context: bool = False
    extras: Extras | None = None


class Chat:
    """Runs chat requests. ``bounds_thinking``: a thinking_token_budget can be kept."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        config, frontend = pipeline.config, pipeline.frontend
        formats = Formats.choose(
            config.reasoning_parser, config.tool_call_parser, frontend.template.source
        )
        self.formats = formats
        self.outputs = ChatOutputs(formats, frontend.tokenizer)
        self._thinking = ThinkingForm(formats, frontend.tokenizer)
        self.bounds_thinking = not self._thinking.why_not
        found = {"tools": formats.tools, "thinking": formats.reasoning}
        self.capabilities = [name for name, form in found.items() if form is not None]

    def render(self, body: ChatRequest, messages: Messages) -> str:
        """The prompt's text. RequestError if the model has no place for what is in the request."""
        self.outputs.check(body)
        if not messages:
            if body.input_ids is None:
                return body.prompt or ""
            # Only whether the model reasons already is looked up in it.
            end = [token for token in body.input_ids[-64:] if 0 <= token < 2**31]
            return self._pipeline.tokenizer.decode(end, skip_special_tokens=False)
        return self._pipeline.frontend.template.render(
            messages,
            body.offered_tools or None,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            documents=body.documents or None,
            chat_template_kwargs=body.template_kwargs,
        )

    def start(self, call: ChatCall, body: ChatRequest, messages: Messages) -> None:
        """Answer the request. Without messages its ``prompt`` is the text as it is."""
        self._pipeline.start(self.task(call, body, messages))

    def task(self, call: ChatCall, body: ChatRequest, messages: Messages) -> Task:
        """The request as the pipeline takes it. RequestError."""
        pipeline = self._pipeline
        asked = body.max_tokens
        if body.max_completion_tokens is not None:
            asked = body.max_completion_tokens
        try:
            params = pipeline.params(body, asked)
        except RequestError as error:
            if error.param == "max_tokens" and body.max_completion_tokens is not None:
                name = "max_completion_tokens"
                raise RequestError(error.message.replace("max_tokens", name), param=name) from error
            raise
        prompt = self.render(body, messages)
        output = self.outputs.choose(body, prompt, call.form)
        grammar = chat_grammar(body, self.formats, pipeline.tokenizer, prompt)
        thinking = None
        if body.thinking_token_budget is not None:
            thinking = self._thinking.budget(
                body.thinking_token_budget,
                prompt,
                has_tools=bool(body.offered_tools),
                param="thinking_token_budget",
            )
        if output is not None and self.outputs.keeps_special:
            params = replace(params, skip_special_tokens=False)
        return Task(
            route=call.route,
            request=call.request,
            exchange=call.exchange,
            body=body,
            prompts=[prompt if body.input_ids is None else body.input_ids],
            params=params,
            make_format=lambda prompts: call.form,
            max_tokens=None if call.cuts_to_context else asked,
            default_max_tokens=asked or pipeline.config.default_max_tokens,
            received=call.received,
            stream=bool(body.stream),
            param=_prompt_field(body),
            add_special_tokens=(
                not messages if body.add_special_tokens is None else body.add_special_tokens
            ),
            output=output,
            grammar=grammar,
            extras=call.extras,
            logprobs=body.logprob_options,
            logprobs_param=body.logprobs_param,
            thinking=thinking,
        )


def _prompt_field(body: ChatRequest) -> str:
    if body.input_ids is not None:
        return "input_ids"
    return "prompt" if body.messages is None else "messages"
