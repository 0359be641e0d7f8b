"""OpenAI's routes: ``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from minisgl_fast.api.chat_output import ChatOutputs
from minisgl_fast.api.openai_request import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    Prompt,
    parse_chat,
    parse_completion,
)
from minisgl_fast.api.openai_response import ChatFormat, CompletionFormat, json_escaped
from minisgl_fast.api.pipeline import Pipeline, Task
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.errors import RequestError
from minisgl_fast.parsers.select import Formats
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


class OpenAI:
    """The generating routes of OpenAI's API."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        config, frontend = pipeline.config, pipeline.frontend
        formats = Formats.choose(
            config.reasoning_parser, config.tool_call_parser, frontend.template.source
        )
        self._outputs = ChatOutputs(formats, frontend.tokenizer)

    @property
    def routes(self) -> Routes:
        return {
            ("POST", CHAT): Route(self.chat, "Answer a chat", ChatRequest, streams=True),
            ("POST", COMPLETIONS): Route(
                self.completions, "Complete prompts", CompletionRequest, streams=True
            ),
        }

    def chat(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        received = pipeline.admit(request)
        body, messages = parse_chat(request.body)
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
        self._outputs.check(body)
        if messages:
            prompt = pipeline.frontend.template.render(
                messages,
                body.offered_tools or None,
                add_generation_prompt=body.add_generation_prompt is not False,
                chat_template_kwargs=body.template_kwargs,
            )
        else:
            prompt = body.prompt or ""
        output = self._outputs.choose(body, prompt)
        if output is not None and self._outputs.keeps_special:
            params = replace(params, skip_special_tokens=False)
        form = ChatFormat(request.request_id, pipeline.model_name, body.include_usage)
        pipeline.start(
            Task(
                route=CHAT,
                request=request,
                exchange=exchange,
                body=body,
                prompts=[prompt],
                params=params,
                make_format=lambda prompts: form,
                max_tokens=asked,
                default_max_tokens=pipeline.config.default_max_tokens,
                received=received,
                stream=bool(body.stream),
                param="messages" if messages else "prompt",
                add_special_tokens=not messages,
                output=None if output is None else partial(output, form),
            )
        )

    def completions(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        received = pipeline.admit(request)
        body, given = parse_completion(request.body)
        # 0 is checked already and needs no engine; SamplingParams knows only 1 and more.
        params = pipeline.params(body, body.max_tokens or None)
        pipeline.start(
            Task(
                route=COMPLETIONS,
                request=request,
                exchange=exchange,
                body=body,
                prompts=given,
                params=params,
                make_format=lambda prompts: CompletionFormat(
                    request.request_id,
                    pipeline.model_name,
                    body.include_usage,
                    self._echoes(body, given, prompts, params.skip_special_tokens),
                ),
                max_tokens=body.max_tokens,
                default_max_tokens=max(DEFAULT_COMPLETION_TOKENS, params.min_tokens),
                received=received,
                stream=bool(body.stream),
            )
        )

    def _echoes(
        self,
        body: CompletionRequest,
        given: list[Prompt],
        prompts: list[list[int]],
        skip_special: bool,
    ) -> list[bytes]:
        """The prompt's text before every choice, JSON-escaped; empty without ``echo``."""
        echoes: list[bytes] = []
        if body.echo:
            for prompt, ids in zip(given, prompts, strict=True):
                is_text = isinstance(prompt, str)
                text = prompt if is_text else self._pipeline.tokenizer.decode(ids, skip_special)
                echoes += [json_escaped(str(text))] * body.num_choices
        return echoes
