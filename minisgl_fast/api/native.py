"""The native route ``/generate``: SGLang's form, and Mini-SGLang's with a ``prompt``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from minisgl_fast.api.batch import Batch
from minisgl_fast.api.body import parse_json
from minisgl_fast.api.native_format import GenerateFormat, NativeFormat
from minisgl_fast.api.native_logprobs import PROMPT_ALONE
from minisgl_fast.api.native_request import (
    DEFAULT_NEW_TOKENS,
    NativePrompt,
    NativeRequest,
    parse_native,
)
from minisgl_fast.api.openai_request import DEFAULT_COMPLETION_TOKENS, parse_generate
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.api.structured import grammar_of, plain_grammar
from minisgl_fast.api.task import Ids, Task
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest

GENERATE = "/generate"


class Native:
    """The generating routes that are not OpenAI's."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    @property
    def routes(self) -> Routes:
        route = Route(
            self.generate, "Generate text behind one or more prompts", NativeRequest, streams=True
        )
        return {("POST", GENERATE): route, ("PUT", GENERATE): route}

    def generate(self, request: HttpRequest, exchange: Exchange) -> None:
        received = self._pipeline.admit(request)
        fields = parse_json(request.body)
        if "prompt" in fields and not {"text", "input_ids"} & fields.keys():
            self._generate_simply(request, exchange, received)
            return
        vocab_size = self._pipeline.frontend.check_ready().vocab_size
        body, prompts, is_batch = parse_native(fields, vocab_size)
        if is_batch:
            self._generate_batch(request, exchange, body, prompts, received)
            return
        (prompt,) = prompts
        form = self._format(prompt.rid or request.request_id, prompt, body, received)
        self._pipeline.start(self._task(request, exchange, body, prompt, form, received))

    def _generate_simply(self, request: HttpRequest, exchange: Exchange, received: float) -> None:
        """Mini-SGLang's form: a prompt in, plain text out, streamed unless told otherwise."""
        pipeline = self._pipeline
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
                grammar=plain_grammar(body, pipeline.tokenizer),
            )
        )

    def _generate_batch(
        self,
        request: HttpRequest,
        exchange: Exchange,
        body: NativeRequest,
        prompts: Sequence[NativePrompt],
        received: float,
    ) -> None:
        pipeline = self._pipeline
        n = prompts[0].asked.fields.num_choices
        pipeline.frontend.check_room(len(prompts) * n)
        limit = pipeline.frontend.check_ready().max_model_len
        for prompt in prompts:
            if isinstance(prompt.prompt, str):
                pipeline.tokenizer.check_fits(prompt.prompt, limit, param=prompt.param)

        batch = Batch(exchange, len(prompts))
        tasks = []
        for i, (prompt, part) in enumerate(zip(prompts, batch.parts, strict=True)):
            rid = prompt.rid or f"{request.request_id}_{i}"
            part.names = (rid, body.rid if isinstance(body.rid, str) else None)
            form = self._format(rid, prompt, body, received, first=i * n, is_part=True)
            tasks.append(self._task(request, part, body, prompt, form, received))

        def start(encoded: list[Ids]) -> None:
            sessions = [
                pipeline.session(task, [ids]) for task, ids in zip(tasks, encoded, strict=True)
            ]
            pipeline.frontend.check_room(len(prompts) * n)
            batch.start(sessions)

        exchange.names = [body.rid] if isinstance(body.rid, str) else body.rid or ()
        texts = [one.prompt for one in prompts]
        encode = partial(pipeline.encode, request, exchange, texts, start, add_special_tokens=True)
        pipeline.check_grammars(request, exchange, tasks, encode)

    def _format(
        self,
        rid: str,
        prompt: NativePrompt,
        body: NativeRequest,
        received: float,
        *,
        first: int = 0,
        is_part: bool = False,
    ) -> NativeFormat:
        return NativeFormat(
            rid,
            prompt.logprobs,
            self._pipeline.tokenizer,
            n=prompt.asked.fields.num_choices,
            streams=bool(body.stream),
            incremental=self._pipeline.config.incremental_streaming_output and bool(body.stream),
            received=received,
            first=first,
            is_part=is_part,
        )

    def _task(
        self,
        request: HttpRequest,
        exchange: Exchange,
        body: NativeRequest,
        prompt: NativePrompt,
        form: NativeFormat,
        received: float,
    ) -> Task:
        asked = prompt.asked
        fields = asked.fields
        if prompt.rid is not None:
            fields = msgspec.structs.replace(fields, rid=prompt.rid)
        options = prompt.logprobs.options
        if asked.max_tokens == 0 and not options.is_wanted:
            options = PROMPT_ALONE

        def make_format(prompts: Sequence[Ids]) -> NativeFormat:
            prompt.logprobs.check_start(len(prompts[0]))
            return form

        return Task(
            route=GENERATE,
            request=request,
            exchange=exchange,
            body=fields,
            prompts=[prompt.prompt],
            params=asked.params,
            make_format=make_format,
            max_tokens=asked.max_tokens,
            default_max_tokens=max(DEFAULT_NEW_TOKENS, asked.params.min_tokens),
            received=received,
            stream=bool(body.stream),
            param=prompt.param,
            extras=form,
            logprobs=options,
            logprobs_param="top_logprobs_num",
            grammar=grammar_of(asked.constraint, self._pipeline.tokenizer),
        )
