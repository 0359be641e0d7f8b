"""The native route ``/generate``."""

from __future__ import annotations

from minisgl_fast.api.openai_request import (
    DEFAULT_COMPLETION_TOKENS,
    GenerateRequest,
    parse_generate,
)
from minisgl_fast.api.openai_response import GenerateFormat
from minisgl_fast.api.pipeline import Pipeline, Task
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest

GENERATE = "/generate"


class Native:
    """The generating routes that are not OpenAI's."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    @property
    def routes(self) -> Routes:
        return {
            ("POST", GENERATE): Route(
                self.generate, "Generate text behind a prompt", GenerateRequest, streams=True
            )
        }

    def generate(self, request: HttpRequest, exchange: Exchange) -> None:
        """Mini-SGLang's form: a prompt in, plain text out, streamed unless told otherwise."""
        pipeline = self._pipeline
        received = pipeline.admit(request)
        body = parse_generate(request.body)
        params = pipeline.params(body, body.max_tokens)
        pipeline.start(
            Task(
                route=GENERATE,
                request=request,
                exchange=exchange,
                body=body,
                prompts=[body.prompt],
                params=params,
                make_format=lambda prompts: GenerateFormat(),
                max_tokens=body.max_tokens,
                default_max_tokens=max(DEFAULT_COMPLETION_TOKENS, params.min_tokens),
                received=received,
                stream=body.stream is not False,
            )
        )
