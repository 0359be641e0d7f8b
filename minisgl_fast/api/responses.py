"""OpenAI's route ``/v1/responses``, without state: nothing is stored between two requests."""

from __future__ import annotations

from minisgl_fast.api.body import Body, parse_body
from minisgl_fast.api.chat import Chat, ChatCall
from minisgl_fast.api.openai_logprobs import ChatLogprobs
from minisgl_fast.api.openai_request import check_chat
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.responses_format import ResponsesFormat
from minisgl_fast.api.responses_request import ResponsesRequest, chat_fields
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest

RESPONSES = "/v1/responses"


class Responses:
    """The route of OpenAI's Responses API."""

    def __init__(self, pipeline: Pipeline, chat: Chat) -> None:
        self._pipeline = pipeline
        self._chat = chat

    @property
    def routes(self) -> Routes:
        return {
            ("POST", RESPONSES): Route(
                self.create, "Answer items (OpenAI Responses)", ResponsesRequest, streams=True
            )
        }

    def create(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        received = pipeline.admit(request)
        asked, given = parse_body(request.body, ResponsesRequest)
        body, messages = check_chat(chat_fields(asked, given))
        logprobs = None
        if body.logprobs:
            logprobs = ChatLogprobs(pipeline.tokenizer, asked.top_logprobs or 0)
        echo = _echo(asked, given)
        form = ResponsesFormat(request.request_id, pipeline.model_name, echo, logprobs)
        call = ChatCall(RESPONSES, request, exchange, received, form)
        self._chat.start(call, body, messages)


def _echo(asked: ResponsesRequest, given: Body) -> Body:
    """The fields of the request that the response repeats, as OpenAI does."""
    text = given.get("text") or {}
    reasoning = given.get("reasoning") or {}
    return {
        "background": False,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "store": False,
        "temperature": asked.temperature,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": asked.tool_choice or "auto",
        "tools": given.get("tools") or [],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": asked.top_p,
        "truncation": "disabled",
        "user": asked.user,
    }
