"""OpenAI's routes: ``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import orjson

from minisgl_fast.api.answers import ChatCompletion, TextCompletion
from minisgl_fast.api.chat import Chat, ChatCall
from minisgl_fast.api.extras import Extras
from minisgl_fast.api.fill_in import around_middle
from minisgl_fast.api.logprobs import text_offsets
from minisgl_fast.api.openai_logprobs import ChatLogprobs, CompletionLogprobs, PromptLogprobs
from minisgl_fast.api.openai_request import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    Prompt,
    parse_chat,
    parse_completion,
    plain_chat,
    plain_completion,
)
from minisgl_fast.api.openai_response import ChatFormat, CompletionFormat, Echo, Head
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.plain_lane import PlainLane
from minisgl_fast.api.plain_session import Recipe
from minisgl_fast.api.recipes import make_recipe
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.api.structured import plain_grammar
from minisgl_fast.api.task import Ids, Task
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest
from minisgl_fast.text.template import message_text

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


class OpenAI:
    """The generating routes of OpenAI's API."""

    def __init__(self, pipeline: Pipeline, chat: Chat) -> None:
        self._pipeline = pipeline
        self._chat = chat
        self._plain_chats = PlainLane(pipeline, "messages", self._learn_chat, chat.formats)
        self._plain_completions = PlainLane(pipeline, "prompt", self._learn_completion)

    @property
    def routes(self) -> Routes:
        return {
            ("POST", CHAT): Route(
                self.chat, "Answer a chat", ChatRequest, ChatCompletion, streams=True
            ),
            ("POST", COMPLETIONS): Route(
                self.completions,
                "Complete prompts",
                CompletionRequest,
                TextCompletion,
                streams=True,
            ),
        }

    def chat(self, request: HttpRequest, exchange: Exchange) -> None:
        received = self._pipeline.admit(request)
        if self._plain_chats.take(request, exchange, received):
            return
        body, messages = parse_chat(request.body)
        extras = Extras.wanted(body)
        echo = ""
        if body.echo and messages and messages[-1]["role"] == "assistant":
            echo = message_text(messages[-1])
        logprobs = None
        if body.logprobs:
            as_ids = bool(body.return_tokens_as_token_ids)
            logprobs = ChatLogprobs(
                self._pipeline.tokenizer,
                body.top_logprobs or 0,
                as_ids=as_ids,
                ids=body.logprob_token_ids or (),
            )
        head = self._head(request.request_id, body)
        form = ChatFormat(head, extras, echo, logprobs, self._prompt_logprobs(body))
        call = ChatCall(CHAT, request, exchange, received, form, extras=extras)
        self._chat.start(call, body, messages)

    def _learn_chat(self, before: bytes, behind: bytes) -> Recipe | None:
        """The recipe of the plain chats with this around their messages."""
        sample = {"role": "user", "content": secrets.token_hex(16)}
        body = plain_chat(before + orjson.dumps([sample]) + behind)
        if body is None or not body.messages or body.messages[0].content != sample["content"]:
            return None

        def make_form(request_id: str, created: bytes) -> ChatFormat:
            return ChatFormat(self._head(request_id, body, created))

        request = HttpRequest("POST", CHAT)
        exchange = cast(Exchange, None)
        extras = Extras.wanted(body)
        call = ChatCall(CHAT, request, exchange, 0.0, make_form("", b""), extras=extras)
        task = self._chat.task(call, body, [sample])
        (prompt,) = task.prompts
        return make_recipe(
            task,
            self._pipeline.tokenizer,
            make_form,
            lambda form: self._chat.outputs.only_one(body, str(prompt), form),
            self._chat.formats.watched(str(prompt)),
            body.template_kwargs,
        )

    def _prompt_logprobs(self, body: SamplingFields) -> PromptLogprobs | None:
        if body.prompt_logprobs is None:
            return None
        as_ids = bool(body.return_tokens_as_token_ids)
        return PromptLogprobs(self._pipeline.tokenizer, body.prompt_logprobs, as_ids=as_ids)

    def _head(self, request_id: str, body: SamplingFields, created: bytes = b"") -> Head:
        return Head(
            body.request_id or request_id,
            self._pipeline.model_name,
            body.include_usage,
            body.rid,
            body.service_tier is not None,
            bool(body.stream),
            created,
        )

    def completions(self, request: HttpRequest, exchange: Exchange) -> None:
        received = self._pipeline.admit(request)
        if self._plain_completions.take(request, exchange, received):
            return
        body, given = parse_completion(request.body)
        self._pipeline.start(self._completion(request, exchange, received, body, given))

    def _learn_completion(self, before: bytes, behind: bytes) -> Recipe | None:
        """The recipe of the plain completions with this around their prompt."""
        sample = secrets.token_hex(16)
        body = plain_completion(b'%b"%b"%b' % (before, sample.encode(), behind))
        if body is None or body.prompt != sample:
            return None
        request = HttpRequest("POST", COMPLETIONS)
        return make_recipe(
            self._completion(request, cast(Exchange, None), 0.0, body, [sample]),
            self._pipeline.tokenizer,
            lambda request_id, created: CompletionFormat(self._head(request_id, body, created), []),
        )

    def _completion(
        self,
        request: HttpRequest,
        exchange: Exchange,
        received: float,
        body: CompletionRequest,
        given: list[Prompt],
    ) -> Task:
        """The request as the pipeline takes it. RequestError."""
        pipeline = self._pipeline
        asked = body.max_tokens
        if body.max_completion_tokens is not None:
            asked = body.max_completion_tokens
        # 0 is checked already and needs no engine; SamplingParams knows only 1 and more.
        params = pipeline.params(body, asked or None)
        extras = Extras.wanted(body)
        logprobs = body.logprob_options
        listed = None
        if body.num_listed >= 0:
            as_ids = bool(body.return_tokens_as_token_ids)
            listed = CompletionLogprobs(
                pipeline.tokenizer,
                body.num_listed,
                as_ids=as_ids,
                ids=body.logprob_token_ids or (),
            )
        return Task(
            route=COMPLETIONS,
            request=request,
            exchange=exchange,
            body=body,
            prompts=around_middle(given, body.suffix, pipeline.tokenizer),
            params=params,
            make_format=lambda prompts: CompletionFormat(
                self._head(request.request_id, body),
                self._echoes(body, given, prompts, params.skip_special_tokens),
                extras,
                listed,
                self._prompt_logprobs(body),
            ),
            max_tokens=asked,
            logprobs=(
                replace(logprobs, num_top=max(logprobs.num_top, 0))
                if body.num_generated > body.num_choices
                else logprobs
            ),
            logprobs_param="prompt_logprobs" if listed is None else "logprobs",
            default_max_tokens=max(DEFAULT_COMPLETION_TOKENS, params.min_tokens),
            received=received,
            stream=bool(body.stream),
            add_special_tokens=body.add_special_tokens is not False,
            extras=extras,
            grammar=plain_grammar(body, pipeline.tokenizer),
        )

    def _echoes(
        self,
        body: CompletionRequest,
        given: list[Prompt],
        prompts: Sequence[Ids],
        skip_special: bool,
    ) -> list[Echo]:
        """The prompt before every choice; empty without ``echo``."""
        echoes: list[Echo] = []
        tokenizer = self._pipeline.tokenizer
        if body.echo:
            for prompt, ids in zip(given, prompts, strict=True):
                is_text = isinstance(prompt, str) and body.truncate_prompt_tokens is None
                text = str(prompt) if is_text else tokenizer.decode(ids, skip_special)
                echo = Echo(text)
                if body.num_listed >= 0:
                    echo = Echo(text, ids, text_offsets(tokenizer, ids, text))
                echoes += [echo] * body.num_choices
        return echoes
