"""The routes of the API: which request goes where, and in which order it is checked.

Order of checks, all before the first byte of an answer: method and path, service (loading,
draining, queue full), content type, JSON, types, ranges, model name, template and encoding,
context length, room in the queue. Errors are raised as MinisglError and answered here in one
place.

Text that is long to encode is encoded in the tokenizer's pool while the loop goes on; everything
else runs in the call that the HTTP connection makes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import unquote

import orjson

from minisgl_fast.config import Config
from minisgl_fast.errors import MinisglError, ModelError, RequestError, UnknownModelError
from minisgl_fast.params import SamplingParams
from minisgl_fast.parsers.select import Formats
from minisgl_fast.server.chat_output import ChatOutputs, OutputMaker
from minisgl_fast.server.exchange import JSON, Exchange
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.http_rules import HttpRequest
from minisgl_fast.server.metrics import METRICS_TEXT, Metrics
from minisgl_fast.server.openai_request import (
    DEFAULT_COMPLETION_TOKENS,
    Prompt,
    SamplingFields,
    cache_salt,
    check_token_ids,
    parse_chat,
    parse_completion,
    parse_generate,
    sampling_params,
)
from minisgl_fast.server.openai_response import (
    ChatFormat,
    CompletionFormat,
    GenerateFormat,
    ResponseFormat,
    json_escaped,
    model_card,
    model_list,
)
from minisgl_fast.server.router import Router
from minisgl_fast.server.session import Generation, Session
from minisgl_fast.text.tokenizer import MAX_INLINE_CHARACTERS

log = logging.getLogger("minisgl_fast.routes")

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATE = "/generate"
MODELS = "/v1/models"


@dataclass(slots=True)
class _Task:
    """A checked request on its way to a session.

    ``max_tokens`` is the client's, None if it gave none; then ``default_max_tokens`` holds, cut
    to what the context leaves (None fills it). ``param`` names the prompt's field.
    """

    route: str
    request: HttpRequest
    exchange: Exchange
    body: SamplingFields
    prompts: Sequence[Prompt]
    params: SamplingParams
    max_tokens: int | None
    default_max_tokens: int | None
    param: str
    add_special_tokens: bool
    received: float
    stream: bool
    echo: bool = False
    output: OutputMaker | None = None


class Api:
    """The handler of the HTTP server: ``HttpServer(Api(config, frontend))``."""

    def __init__(self, config: Config, frontend: Frontend) -> None:
        """ModelError if the model's own sampling defaults are out of range."""
        try:
            sampling_params(SamplingFields(), frontend.defaults, None)
        except RequestError as error:
            raise ModelError(f"The model's generation_config.json: {error.message}") from error
        self._config = config
        self._frontend = frontend
        self._tokenizer = frontend.tokenizer
        formats = Formats.choose(
            config.reasoning_parser, config.tool_call_parser, frontend.template.source
        )
        self._outputs = ChatOutputs(formats, frontend.tokenizer)
        self.metrics = Metrics(frontend)
        self.model_name = config.served_model_name or config.model
        self._model_names = {None, "", "default", self.model_name}
        self._created = int(time.time())
        self._tasks: set[asyncio.Task[None]] = set()
        self._router = Router(
            {
                ("POST", CHAT): self.chat,
                ("POST", COMPLETIONS): self.completions,
                ("POST", GENERATE): self.generate,
                ("GET", MODELS): self.models,
                ("GET", f"{MODELS}/*"): self.model,
                ("GET", "/v1"): self.root,
                ("POST", "/v1"): self.root,
                ("GET", "/health"): self.health,
                ("GET", "/ready"): self.ready,
                ("GET", "/metrics"): self.scrape,
            }
        )

    def __call__(self, request: HttpRequest, exchange: Exchange) -> None:
        """Answer one request, now or later."""
        try:
            self._router.find(request)(request, exchange)
        except MinisglError as error:
            self._fail(request, exchange, error)

    # Generation

    def chat(self, request: HttpRequest, exchange: Exchange) -> None:
        received = self._admit(request)
        body, messages = parse_chat(request.body)
        asked = body.max_tokens
        if body.max_completion_tokens is not None:
            asked = body.max_completion_tokens
        try:
            params = self._params(body, asked)
        except RequestError as error:
            if error.param == "max_tokens" and body.max_completion_tokens is not None:
                name = "max_completion_tokens"
                raise RequestError(error.message.replace("max_tokens", name), param=name) from error
            raise
        self._outputs.check(body)
        if messages:
            prompt = self._frontend.template.render(
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
        self._start(
            _Task(
                route=CHAT,
                request=request,
                exchange=exchange,
                body=body,
                prompts=[prompt],
                params=params,
                max_tokens=asked,
                default_max_tokens=self._config.default_max_tokens,
                param="messages" if messages else "prompt",
                add_special_tokens=not messages,
                received=received,
                stream=bool(body.stream),
                output=output,
            )
        )

    def completions(self, request: HttpRequest, exchange: Exchange) -> None:
        received = self._admit(request)
        body, prompts = parse_completion(request.body)
        # 0 is checked already and needs no engine; SamplingParams knows only 1 and more.
        params = self._params(body, body.max_tokens or None)
        self._start(
            _Task(
                route=COMPLETIONS,
                request=request,
                exchange=exchange,
                body=body,
                prompts=prompts,
                params=params,
                max_tokens=body.max_tokens,
                default_max_tokens=max(DEFAULT_COMPLETION_TOKENS, params.min_tokens),
                param="prompt",
                add_special_tokens=True,
                received=received,
                stream=bool(body.stream),
                echo=bool(body.echo),
            )
        )

    def generate(self, request: HttpRequest, exchange: Exchange) -> None:
        received = self._admit(request)
        body = parse_generate(request.body)
        params = self._params(body, body.max_tokens)
        self._start(
            _Task(
                route=GENERATE,
                request=request,
                exchange=exchange,
                body=body,
                prompts=[body.prompt],
                params=params,
                max_tokens=body.max_tokens,
                default_max_tokens=max(DEFAULT_COMPLETION_TOKENS, params.min_tokens),
                param="prompt",
                add_special_tokens=True,
                received=received,
                stream=body.stream is not False,
            )
        )

    def _admit(self, request: HttpRequest) -> float:
        """Refuse what can be refused without looking at the body; returns the time."""
        self._frontend.check_ready()
        self._frontend.check_room(1)
        content_type = request.headers.get(b"content-type")
        if content_type is not None:
            media_type = content_type.split(b";")[0].strip().lower()
            if media_type != b"application/json" and not media_type.endswith(b"+json"):
                raise RequestError("The content type must be application/json.")
        return time.perf_counter()

    def _params(self, body: SamplingFields, max_tokens: int | None) -> SamplingParams:
        """Check ranges, then the model's name, in this order."""
        params = sampling_params(body, self._frontend.defaults, max_tokens)
        check_token_ids(params, self._frontend.check_ready().vocab_size)
        self._check_model(body.model)
        return params

    def _check_model(self, name: str | None) -> None:
        if name not in self._model_names:
            raise UnknownModelError(
                f"The model '{str(name)[:200]}' does not exist. "
                f"The served model is '{self.model_name}'.",
                param="model",
            )

    def _start(self, task: _Task) -> None:
        """Encode the prompts, here if they are short, and run the session."""
        limit = self._frontend.check_ready().max_model_len
        num_characters = 0
        for prompt in task.prompts:
            if isinstance(prompt, str):
                num_characters += len(prompt)
                self._tokenizer.check_fits(prompt, limit, param=task.param)
        if num_characters > MAX_INLINE_CHARACTERS:
            later = asyncio.get_running_loop().create_task(self._encode_and_run(task))
            self._tasks.add(later)
            later.add_done_callback(self._tasks.discard)
            return
        encode = (
            self._tokenizer.encode_prompt if task.add_special_tokens else self._tokenizer.encode
        )
        self._run(task, [encode(p) if isinstance(p, str) else p for p in task.prompts])

    async def _encode_and_run(self, task: _Task) -> None:
        try:
            encoded = []
            for prompt in task.prompts:
                if isinstance(prompt, str):
                    prompt = await self._tokenizer.encode_async(
                        prompt, add_special_tokens=task.add_special_tokens
                    )
                encoded.append(prompt)
                if task.exchange.closed:
                    return
            self._run(task, encoded)
        except MinisglError as error:
            self._fail(task.request, task.exchange, error)
        except Exception:
            log.exception("a request failed while its prompt was encoded")
            self._fail(task.request, task.exchange, MinisglError("Internal server error."))

    def _run(self, task: _Task, prompts: list[list[int]]) -> None:
        frontend = self._frontend
        vocab_size = frontend.check_ready().vocab_size
        limits = []
        for given, prompt in zip(task.prompts, prompts, strict=True):
            # Lengths first: a prompt that is too long is not read to its end.
            room = frontend.room_for(prompt, task.max_tokens, param=task.param)
            if task.max_tokens is None and task.default_max_tokens is not None:
                room = min(room, task.default_max_tokens)
            limits.append(room)
            if given is prompt and not (min(prompt) >= 0 and max(prompt) < vocab_size):
                raise RequestError(
                    f"{task.param} must hold token ids in [0, {vocab_size - 1}].", param=task.param
                )
        form = self._format(task, prompts)
        output = None
        if task.output is not None and isinstance(form, ChatFormat):
            output = partial(task.output, form)
        session = Session(
            frontend,
            self.metrics,
            task.exchange,
            form,
            route=task.route,
            stream=task.stream,
            received=task.received,
            output=output,
        )
        session.start(
            Generation(prompts, limits, task.params, task.body.num_choices, cache_salt(task.body))
        )

    def _format(self, task: _Task, prompts: list[list[int]]) -> ResponseFormat:
        identity = (task.request.request_id, self.model_name, task.body.include_usage)
        if task.route == CHAT:
            return ChatFormat(*identity)
        if task.route == GENERATE:
            return GenerateFormat()
        echoes: list[bytes] = []
        if task.echo:
            skip = task.params.skip_special_tokens
            for given, prompt in zip(task.prompts, prompts, strict=True):
                text = given if isinstance(given, str) else self._tokenizer.decode(prompt, skip)
                echoes += [json_escaped(text)] * task.body.num_choices
        return CompletionFormat(*identity, echoes)

    # Information

    def models(self, request: HttpRequest, exchange: Exchange) -> None:
        self._answer(request, exchange, 200, model_list(*self._card()))

    def model(self, request: HttpRequest, exchange: Exchange) -> None:
        name = unquote(request.path[len(MODELS) + 1 :])
        self._check_model(name)
        self._answer(request, exchange, 200, model_card(*self._card()))

    def root(self, request: HttpRequest, exchange: Exchange) -> None:
        self._answer(request, exchange, 200, b'{"status":"ok"}')

    def health(self, request: HttpRequest, exchange: Exchange) -> None:
        """Whether the process does its work; a server that drains is healthy."""
        state = self._frontend.state
        self._answer_state(request, exchange, 200 if state in ("ready", "draining") else 503)

    def ready(self, request: HttpRequest, exchange: Exchange) -> None:
        """Whether new requests are welcome."""
        self._answer_state(request, exchange, 200 if self._frontend.state == "ready" else 503)

    def scrape(self, request: HttpRequest, exchange: Exchange) -> None:
        self._answer(request, exchange, 200, self.metrics.render(), METRICS_TEXT)

    def _card(self) -> tuple[str, str, int, int | None]:
        facts = self._frontend.facts
        limit = facts.max_model_len if facts else None
        return self.model_name, self._config.model, self._created, limit

    def _answer_state(self, request: HttpRequest, exchange: Exchange, status: int) -> None:
        frontend = self._frontend
        body: dict[str, str | float] = {"state": frontend.state}
        if frontend.state == "loading":
            body["stage"] = frontend.stage
            body["progress"] = round(frontend.progress, 3)
        self._answer(request, exchange, status, orjson.dumps(body))

    def _answer(
        self,
        request: HttpRequest,
        exchange: Exchange,
        status: int,
        body: bytes,
        content_type: bytes = JSON,
    ) -> None:
        exchange.respond(status, body, content_type)
        route = f"{MODELS}/*" if request.path.startswith(f"{MODELS}/") else request.path
        self.metrics.count_request(route, status)

    def _fail(self, request: HttpRequest, exchange: Exchange, error: MinisglError) -> None:
        if not exchange.closed:
            exchange.fail(error)
            # A path that is no route would be a label that clients choose.
            known = request.path in (CHAT, COMPLETIONS, GENERATE)
            self.metrics.count_request(request.path if known else "other", error.http_status)
