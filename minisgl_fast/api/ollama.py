"""Ollama's routes: chat and generate, and the lists of models that its clients look at.

Rules: streamed unless told otherwise; a body is JSON whatever its content type says, for Ollama's
own examples send none; a name may end in ``:latest``.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone

import msgspec
import orjson

from minisgl_fast.api.body import Body, parse_body
from minisgl_fast.api.chat import Chat, ChatCall
from minisgl_fast.api.ollama_format import OllamaFormat, OllamaGenerateFormat
from minisgl_fast.api.ollama_request import (
    OllamaChatRequest,
    OllamaFields,
    OllamaGenerateRequest,
    chat_fields,
    common_fields,
    generate_fields,
    served_name,
)
from minisgl_fast.api.openai_logprobs import ChatLogprobs
from minisgl_fast.api.openai_request import check_chat
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.server.exchange import JSON, Exchange
from minisgl_fast.server.http_rules import HttpRequest

CHAT = "/api/chat"
NDJSON = "application/x-ndjson"
GENERATE = "/api/generate"
# The Ollama whose API this is; clients ask before they use what newer ones have.
API_VERSION = "0.12.11"
NEVER = "9999-12-31T23:59:59Z"
# What Ollama calls types of weights.
_WEIGHT_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class ShowRequest(msgspec.Struct):
    model: str | None = None
    name: str | None = None


class Ollama:
    """The routes of Ollama's API."""

    def __init__(self, pipeline: Pipeline, chat: Chat) -> None:
        self._pipeline = pipeline
        self._chat = chat
        self._started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def routes(self) -> Routes:
        return {
            ("POST", CHAT): Route(
                self.chat,
                "Answer a chat (Ollama)",
                OllamaChatRequest,
                streams=True,
                stream_type=NDJSON,
            ),
            ("POST", GENERATE): Route(
                self.generate,
                "Complete a prompt (Ollama)",
                OllamaGenerateRequest,
                streams=True,
                stream_type=NDJSON,
            ),
            ("GET", "/api/tags"): Route(self.tags, "List the served model (Ollama)"),
            ("GET", "/api/ps"): Route(self.running, "List the loaded model (Ollama)"),
            ("POST", "/api/show"): Route(self.show, "Describe the model (Ollama)", ShowRequest),
            ("GET", "/api/version"): Route(self.version, "The version of Ollama's API"),
        }

    def chat(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        received = pipeline.admit(request, any_type=True)
        asked, _ = parse_body(request.body, OllamaChatRequest)
        form = OllamaFormat(pipeline.model_name, received, self._logprobs(asked))
        if not asked.messages:
            self._answer_loaded(CHAT, asked, exchange, form)
            return
        body, messages = check_chat(chat_fields(asked))
        call = ChatCall(CHAT, request, exchange, received, form, cuts_to_context=True)
        self._chat.start(call, body, messages)

    def generate(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        received = pipeline.admit(request, any_type=True)
        asked, _ = parse_body(request.body, OllamaGenerateRequest)
        form = OllamaGenerateFormat(pipeline.model_name, received, self._logprobs(asked))
        if not asked.prompt:
            self._answer_loaded(GENERATE, asked, exchange, form)
            return
        has_template = bool(pipeline.frontend.template)
        body, messages = check_chat(generate_fields(asked, has_template=has_template))
        call = ChatCall(GENERATE, request, exchange, received, form, cuts_to_context=True)
        self._chat.start(call, body, messages)

    def tags(self, request: HttpRequest, exchange: Exchange) -> None:
        self._respond(request.path, exchange, {"models": [self._card()]})

    def running(self, request: HttpRequest, exchange: Exchange) -> None:
        facts = self._pipeline.frontend.facts
        card = self._card() | {"expires_at": NEVER, "size_vram": 0}
        if facts is not None:
            card["context_length"] = facts.max_model_len
        models = [card] if facts is not None else []
        self._respond(request.path, exchange, {"models": models})

    def show(self, request: HttpRequest, exchange: Exchange) -> None:
        asked, _ = parse_body(request.body, ShowRequest)
        pipeline = self._pipeline
        pipeline.check_model(served_name(asked.model or asked.name))
        facts = pipeline.frontend.facts
        family = self._family  # clients look for the key "{architecture}.context_length"
        model_info: Body = {
            "general.architecture": family,
            "general.basename": pipeline.model_name,
        }
        if facts is not None:
            model_info["general.parameter_count"] = facts.num_parameters
            model_info[f"{family}.context_length"] = facts.max_model_len
            model_info[f"{family}.embedding_length"] = facts.hidden_size
            model_info[f"{family}.vocab_size"] = facts.vocab_size
        answer = {
            "modelfile": f"FROM {pipeline.config.model}\n",
            "parameters": self._parameters(),
            "template": pipeline.frontend.template.source,
            "details": self._details(),
            "model_info": model_info,
            "capabilities": ["completion", *self._chat.capabilities],
            "modified_at": self._started,
        }
        self._respond(request.path, exchange, answer)

    def version(self, request: HttpRequest, exchange: Exchange) -> None:
        self._respond(request.path, exchange, {"version": API_VERSION})

    def _logprobs(self, asked: OllamaFields) -> ChatLogprobs | None:
        if not asked.logprobs:
            return None
        return ChatLogprobs(self._pipeline.tokenizer, asked.top_logprobs or 0)

    def _answer_loaded(
        self, route: str, asked: OllamaFields, exchange: Exchange, form: OllamaFormat
    ) -> None:
        """A request without a text only loads the model; its fields must be sound all the same."""
        self._pipeline.check_model(served_name(asked.model))
        check_chat(common_fields(asked) | {"messages": [{"role": "user", "content": ""}]})
        exchange.respond(200, form.loaded(), JSON)
        self._pipeline.metrics.count_request(route, 200)

    def _respond(self, route: str, exchange: Exchange, answer: Body) -> None:
        exchange.respond(200, orjson.dumps(answer), JSON)
        self._pipeline.metrics.count_request(route, 200)

    def _card(self) -> Body:
        name = self._pipeline.model_name
        return {
            "name": name,
            "model": name,
            "modified_at": self._started,
            "size": 0,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": self._details(),
        }

    @property
    def _family(self) -> str:
        facts = self._pipeline.frontend.facts
        name = facts.architecture if facts is not None else ""
        return name.removesuffix("ForCausalLM").lower() or "transformer"

    def _parameters(self) -> str:
        """The model's sampling defaults, a line each."""
        defaults = self._pipeline.frontend.defaults
        values = {
            "temperature": defaults and defaults.temperature,
            "top_p": defaults and defaults.top_p,
            "top_k": defaults and defaults.top_k,
            "min_p": defaults and defaults.min_p,
            "repeat_penalty": defaults and defaults.repetition_penalty,
        }
        return "\n".join(f"{name} {value}" for name, value in values.items() if value is not None)

    def _details(self) -> Body:
        facts = self._pipeline.frontend.facts
        return {
            "parent_model": "",
            "format": "gguf" if self._pipeline.config.model.endswith(".gguf") else "safetensors",
            "family": self._family,
            "families": [self._family],
            "parameter_size": _size(facts.num_parameters) if facts is not None else "",
            "quantization_level": (
                _WEIGHT_TYPES.get(facts.dtype, facts.dtype) if facts is not None else ""
            ),
        }


def _size(number: int) -> str:
    """A number of parameters as Ollama writes it."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f}{unit}" if unit != "B" else f"{number / size:.1f}B"
    return str(number)
