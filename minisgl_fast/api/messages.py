"""Anthropic's routes: ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import msgspec

from minisgl_fast.api.body import parse_body
from minisgl_fast.api.chat import Chat, ChatCall
from minisgl_fast.api.messages_format import MessagesFormat
from minisgl_fast.api.messages_request import (
    CountRequest,
    MessagesRequest,
    chat_fields,
    check_messages,
)
from minisgl_fast.api.openai_request import check_chat
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.api.task import Ids
from minisgl_fast.server.error_shapes import name_request
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest

MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"


class TokenCount(msgspec.Struct):
    input_tokens: int


class Messages:
    """The routes of Anthropic's API. Its version header is not looked at."""

    def __init__(self, pipeline: Pipeline, chat: Chat) -> None:
        self._pipeline = pipeline
        self._chat = chat

    @property
    def routes(self) -> Routes:
        return {
            ("POST", MESSAGES): Route(
                self.create, "Answer a conversation (Anthropic)", MessagesRequest, streams=True
            ),
            ("POST", COUNT_TOKENS): Route(
                self.count_tokens, "Count a conversation's tokens", CountRequest, TokenCount
            ),
        }

    def create(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        name_request(request)
        received = pipeline.admit(request)
        asked, fields = parse_body(request.body, MessagesRequest)
        check_messages(asked, fields)
        body, messages = check_chat(chat_fields(asked, bounds_thinking=self._chat.bounds_thinking))
        form = MessagesFormat(request.request_id, pipeline.model_name, asked.max_tokens)
        call = ChatCall(MESSAGES, request, exchange, received, form, cuts_to_context=True)
        self._chat.start(call, body, messages)

    def count_tokens(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        name_request(request)
        pipeline.admit(request)
        asked, fields = parse_body(request.body, CountRequest)
        check_messages(asked, fields)
        body, messages = check_chat(chat_fields(asked))
        pipeline.check_model(body.model)

        def answer(encoded: list[Ids]) -> None:
            exchange.respond(200, msgspec.json.encode(TokenCount(len(encoded[0]))))
            pipeline.metrics.count_request(COUNT_TOKENS, 200)

        prompt = self._chat.render(body, messages)
        pipeline.encode(request, exchange, [prompt], answer, add_special_tokens=False)
