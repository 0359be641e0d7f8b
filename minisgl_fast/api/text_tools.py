"""The tokenizer and the parsers by themselves: text in, their view of it out.

They use what generation uses, so a client can count a prompt's tokens, or take an answer apart that
it got from ``/generate``, with the same result as the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from minisgl_fast.api.body import doc, read_body, type_error
from minisgl_fast.api.chat import Chat
from minisgl_fast.api.chat_fields import check_tools
from minisgl_fast.api.openai_request import MAX_PROMPTS, parse_chat
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.refused import unsupported
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.api.task import Ids
from minisgl_fast.errors import RequestError
from minisgl_fast.parsers.events import CallArguments, CallStart, Content, Event, Parser, Reasoning
from minisgl_fast.parsers.reasoning import FORMATS
from minisgl_fast.parsers.select import REASONING_PARSERS, TOOL_CALL_PARSERS, Formats
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest

# What SGLang calls formats that have one name here.
_OTHER_NAMES = {"qwen": "qwen25", "hermes": "qwen25", "qwen3-thinking": "qwen3"}


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """A ``prompt``, or several, or ``messages`` and what else of a chat makes its prompt."""

    model: str | None = None
    prompt: Annotated[str | list[str] | None, doc("A text, or several.")] = None
    messages: Annotated[
        list[Any] | None,
        doc(
            "A chat, whose other fields count as they do there: `tools`, "
            "`add_generation_prompt`, `continue_final_message`, `chat_template_kwargs` and more."
        ),
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        doc("Put what the tokenizer puts around a text (default: not around a chat)."),
    ] = None
    return_token_strs: Annotated[bool | None, doc("Add the text of each token.")] = None


class Tokens(msgspec.Struct, omit_defaults=True):
    """Lists of lists, and of counts, where several prompts were given."""

    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int
    token_strs: list[str | list[str]] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Token ids, or several lists of them."""

    model: str | None = None
    tokens: list[int | list[int]]
    skip_special_tokens: bool | None = None


class Texts(msgspec.Struct):
    """SGLang's key and vLLM's; lists where several lists of ids were given."""

    text: str | list[str]
    prompt: str | list[str]


class ParseCallsRequest(msgspec.Struct, kw_only=True):
    """``tool_call_parser``: by default the served model's."""

    text: str
    tools: list[dict[str, Any]]
    tool_call_parser: str | None = None


class ParsedCall(msgspec.Struct):
    """``parameters``: JSON text, as the model wrote it."""

    tool_index: int
    name: str
    parameters: str


class ParsedCalls(msgspec.Struct):
    normal_text: str
    calls: list[ParsedCall]


class SeparateReasoningRequest(msgspec.Struct, kw_only=True):
    """``reasoning_parser``: by default the served model's."""

    text: str
    reasoning_parser: str | None = None
    return_blocks: Annotated[bool | None, doc("True is refused.")] = None


class SeparatedReasoning(msgspec.Struct):
    reasoning_text: str
    text: str


class TextTools:
    """The routes of tokenizer and parsers."""

    def __init__(self, pipeline: Pipeline, chat: Chat) -> None:
        self._pipeline = pipeline
        self._chat = chat
        config = pipeline.config
        self._formats = Formats.choose(
            config.reasoning_parser, config.tool_call_parser, pipeline.frontend.template.source
        )

    @property
    def routes(self) -> Routes:
        tokenize = Route(self.tokenize, "Text to token ids", TokenizeRequest, Tokens)
        detokenize = Route(self.detokenize, "Token ids to text", DetokenizeRequest, Texts)
        return {
            ("POST", "/tokenize"): tokenize,
            ("POST", "/v1/tokenize"): tokenize,
            ("POST", "/detokenize"): detokenize,
            ("POST", "/v1/detokenize"): detokenize,
            ("POST", "/parse_function_call"): Route(
                self.parse_calls, "Take tool calls out of a text", ParseCallsRequest, ParsedCalls
            ),
            ("POST", "/separate_reasoning"): Route(
                self.separate_reasoning,
                "Take the reasoning out of a text",
                SeparateReasoningRequest,
                SeparatedReasoning,
            ),
        }

    def tokenize(self, request: HttpRequest, exchange: Exchange) -> None:
        """Text longer than the context is tokenized, too: to learn how much longer it is."""
        pipeline = self._pipeline
        facts = pipeline.frontend.check_ready()
        body = read_body(request, TokenizeRequest)
        pipeline.check_model(body.model)
        if body.messages is not None:
            chat, messages = parse_chat(request.body)
            prompts = [self._chat.render(chat, messages)]
        elif body.prompt is None:
            raise RequestError("Give a prompt or messages.", param="prompt")
        else:
            prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
            _check_number("prompt", prompts)
        # A template writes its special tokens itself.
        add_special = body.messages is None
        if body.add_special_tokens is not None:
            add_special = body.add_special_tokens
        is_batch = isinstance(body.prompt, list)

        def answer(found_ids: list[Ids]) -> None:
            encoded = [list(ids) for ids in found_ids]
            strings = [[self._token_text(token) for token in ids] for ids in encoded]
            ids: Any = encoded if is_batch else encoded[0]
            found: Any = strings if is_batch else strings[0]
            tokens = Tokens(
                ids,
                [len(part) for part in ids] if is_batch else len(ids),
                facts.max_model_len,
                found if body.return_token_strs else None,
            )
            pipeline.respond(request, exchange, msgspec.json.encode(tokens))

        pipeline.encode(request, exchange, prompts, answer, add_special_tokens=add_special)

    def detokenize(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        vocab_size = pipeline.frontend.check_ready().vocab_size
        body = read_body(request, DetokenizeRequest)
        pipeline.check_model(body.model)
        kinds = set(map(type, body.tokens))
        if len(kinds) > 1:
            raise RequestError("tokens must hold token ids, or lists of them.", param="tokens")
        is_batch = kinds == {list}
        given: Any = body.tokens
        lists: list[list[int]] = given if is_batch else [given]
        _check_number("tokens", lists)
        for ids in lists:
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                raise RequestError(
                    f"tokens must hold token ids in [0, {vocab_size - 1}].", param="tokens"
                )
        skip = body.skip_special_tokens is not False
        texts = [pipeline.tokenizer.decode(ids, skip) for ids in lists]
        found: Any = texts if is_batch else texts[0]
        pipeline.respond(request, exchange, msgspec.json.encode(Texts(found, found)))

    def parse_calls(self, request: HttpRequest, exchange: Exchange) -> None:
        body = read_body(request, ParseCallsRequest)
        try:
            check_tools(body.tools, None)
        except msgspec.ValidationError as error:
            raise type_error(str(error)) from None
        name = _chosen(
            "tool_call_parser", body.tool_call_parser, self._formats.tools, TOOL_CALL_PARSERS
        )
        parser = Formats(None, name).parser("", body.tools)
        normal: list[str] = []
        calls: list[ParsedCall] = []
        for event in _events(parser, body.text):
            if isinstance(event, CallStart):
                calls.append(ParsedCall(event.index, event.name, ""))
            elif isinstance(event, CallArguments):
                calls[event.index].parameters += event.text
            elif isinstance(event, Content):
                normal.append(event.text)
        answer = ParsedCalls("".join(normal), calls)
        self._pipeline.respond(request, exchange, msgspec.json.encode(answer))

    def separate_reasoning(self, request: HttpRequest, exchange: Exchange) -> None:
        body = read_body(request, SeparateReasoningRequest)
        if body.return_blocks:
            raise unsupported("return_blocks", "the answer is two texts")
        name = _chosen(
            "reasoning_parser", body.reasoning_parser, self._formats.reasoning, REASONING_PARSERS
        )
        # Where the end comes first, the prompt had opened the reasoning.
        form, prompt = FORMATS.get(name), ""
        if form is not None and form.end in body.text.split(form.start, 1)[0]:
            prompt = form.start
        reasoning: list[str] = []
        content: list[str] = []
        for event in _events(Formats(name, None).parser(prompt), body.text):
            if isinstance(event, Reasoning):
                reasoning.append(event.text)
            elif isinstance(event, Content):
                content.append(event.text)
        answer = SeparatedReasoning("".join(reasoning), "".join(content))
        self._pipeline.respond(request, exchange, msgspec.json.encode(answer))

    def _token_text(self, token: int) -> str:
        return self._pipeline.tokenizer.token_bytes(token).decode("utf-8", "replace")


def _events(parser: Parser | None, text: str) -> list[Event]:
    if parser is None:
        return [Content(text)]
    return parser.feed(text) + parser.finish()


def _chosen(param: str, asked: str | None, served: str | None, known: Sequence[str]) -> str:
    """The name of the parser to use."""
    name = served if asked in (None, "auto") else _OTHER_NAMES.get(str(asked), asked)
    if name is None:
        raise RequestError(
            f"The served model has no such format: {param} must name one of {', '.join(known)}.",
            param=param,
        )
    if name not in known:
        raise RequestError(f"{param} must be one of {', '.join(known)}.", param=param)
    return name


def _check_number(param: str, items: Sequence[object]) -> None:
    if not 1 <= len(items) <= MAX_PROMPTS:
        raise RequestError(
            f"{param} must hold 1 to {MAX_PROMPTS} entries, got {len(items)}.", param=param
        )
