"""Pipeline: what every generating route does with a request once its body is parsed.

A route admits the request, parses its body, and hands over a ``Task``; here its prompts are
encoded, its lengths checked, and its session started.

Order of checks, all before the first byte of an answer: service (loading, draining, queue full),
content type, JSON, types, ranges, model name, template and encoding, context length, room in the
queue. Errors are raised as MinisglError; app.py answers them.

Rules: text that is long to encode is encoded in the tokenizer's pool while the loop goes on;
everything else runs in the call that the HTTP connection makes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

from minisgl_fast.api.body import check_content_type
from minisgl_fast.api.generation import Generation
from minisgl_fast.api.grammar_text import RequestGrammar
from minisgl_fast.api.logprobs import NO_LOGPROBS, check_num_values
from minisgl_fast.api.openai_request import Prompt
from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.api.sampling_params import (
    check_logprob_ids,
    check_spaces,
    check_token_ids,
    sampling_params,
)
from minisgl_fast.api.session import Session
from minisgl_fast.api.task import Ids, Task
from minisgl_fast.api.token_rules import banned_words, token_rules
from minisgl_fast.config import Config
from minisgl_fast.errors import MinisglError, RequestError, UnknownModelError
from minisgl_fast.params import SamplingParams
from minisgl_fast.server.exchange import JSON, Exchange
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.grammar_checker import GrammarError
from minisgl_fast.server.http_rules import HttpRequest
from minisgl_fast.server.metrics import Metrics

log = logging.getLogger("minisgl_fast.api")

MAX_KEPT_PARAMS = 4096
# Fields that do not make parameters; any other may.
_NOT_PARAMS = frozenset(
    ("model", "stream", "stream_options", "n", "cache_salt", "messages", "prompt", "max_tokens",
     "max_completion_tokens", "chat_template_kwargs", "response_format", "regex", "ebnf",
     "json_schema", "structural_tag", "structured_outputs", "tools", "tool_choice",
     "allowed_token_ids")
)  # fmt: skip
_key_fields: dict[type, Callable[[Any], tuple[Any, ...]]] = {}


def _params_key(body: SamplingFields, max_tokens: int | None) -> Hashable | None:
    """Equal for bodies that ask for equal parameters; None if that cannot be told."""
    shape = type(body)
    if shape not in _key_fields:
        names = (name for name in shape.__struct_fields__ if name not in _NOT_PARAMS)
        _key_fields[shape] = attrgetter(*names)
    key = shape, max_tokens, _key_fields[shape](body)
    try:
        hash(key)
    except TypeError:  # a list or an object
        return None
    return key


class Pipeline:
    """The way from a parsed body to the engine, shared by all generating routes."""

    def __init__(
        self,
        config: Config,
        frontend: Frontend,
        metrics: Metrics,
        fail: Callable[[HttpRequest, Exchange, MinisglError], None],
    ) -> None:
        """``fail(request, exchange, error)`` answers what goes wrong after a route returned."""
        self.config = config
        self.frontend = frontend
        self.tokenizer = frontend.tokenizer
        self.model_name = config.served_model_name or config.model
        self._model_names = {None, "", "default", self.model_name}
        self.metrics = metrics
        self.fail = fail
        self._tasks: set[asyncio.Task[None]] = set()
        # Clients ask for the same again and again; parameters do not change once they are checked.
        self._params: dict[Hashable, SamplingParams] = {}
        self._encoding: dict[Exchange, bool] = {}  # and whether the request is to be aborted

    def admit(self, request: HttpRequest, *, any_type: bool = False) -> float:
        """Refuse what can be refused without looking at the body; returns the time.

        ``any_type``: the body is JSON whatever the content type says.
        """
        self.frontend.check_ready()
        self.frontend.check_room(1)
        if not any_type:
            check_content_type(request)
        return time.perf_counter()

    def params(self, body: SamplingFields, max_tokens: int | None) -> SamplingParams:
        """Check ranges, then the model's name, in this order."""
        key = _params_key(body, max_tokens)
        params = None if key is None else self._params.get(key)
        if params is None:
            params = sampling_params(body, self.frontend.defaults, max_tokens)
            if body.bad_words:
                banned = banned_words(body.bad_words, self.tokenizer)
                single = tuple(sorted(word[0] for word in banned if len(word) == 1))
                params = replace(params, banned_token_ids=single)
            vocab_size = self.frontend.check_ready().vocab_size
            check_token_ids(params, vocab_size)
            check_logprob_ids(body.logprob_token_ids or (), vocab_size)
            if key is not None:
                if len(self._params) >= MAX_KEPT_PARAMS:
                    self._params.clear()
                self._params[key] = params
        self.check_model(body.model)
        return params

    def check_model(self, name: str | None) -> None:
        """UnknownModelError if this is not the served model."""
        if name not in self._model_names:
            raise UnknownModelError(
                f"The model '{str(name)[:200]}' does not exist. "
                f"The served model is '{self.model_name}'.",
                param="model",
            )

    def start(self, task: Task) -> None:
        """Encode the prompts, here if they are short, and run the session."""
        body = task.body
        if body.rid is not None or body.request_id is not None:
            task.exchange.names = (body.rid, body.request_id)
        if body.spaces_between_special_tokens is False:
            check_spaces(task.params, self.tokenizer)
        if body.truncate_prompt_tokens is None:
            limit = self.frontend.check_ready().max_model_len
            for prompt in task.prompts:
                if isinstance(prompt, str):
                    self.tokenizer.check_fits(prompt, limit, param=task.param)
        if task.grammar is None:
            self._encode(task)
        else:
            encode = partial(self._encode, task)
            self.check_grammars(task.request, task.exchange, [task], encode)

    def _encode(self, task: Task) -> None:
        encoded = self._encode_now(task.prompts, task.add_special_tokens)
        if encoded is not None:
            self._run(task, encoded)
        else:
            later = self._encode_later(
                task.exchange, task.prompts, partial(self._run, task), task.add_special_tokens
            )
            self.run(task.request, task.exchange, later)

    def check_grammars(
        self,
        request: HttpRequest,
        exchange: Exchange,
        tasks: Sequence[Task],
        then: Callable[[], None],
    ) -> None:
        """Call ``then`` when the grammars of all tasks are known to be good: at once, or later if
        one has to be compiled. A bad one is a RequestError that names its field."""
        unknown = [task for task in tasks if not self._knows_grammar(task)]
        if unknown:
            self.run(request, exchange, self._compile_later(exchange, unknown, then))
        else:
            then()

    def _knows_grammar(self, task: Task) -> bool:
        grammar = task.grammar
        if grammar is None:
            return True
        try:
            text = self.frontend.grammars(grammar.param).lookup(grammar.text)
        except GrammarError as error:
            raise _grammar_error(grammar, error) from None
        task.checked = b"" if text is None else text.encode()
        return text is not None

    async def _compile_later(
        self, exchange: Exchange, tasks: Sequence[Task], then: Callable[[], None]
    ) -> None:
        self._encoding[exchange] = False
        try:
            for task in tasks:
                grammar = task.grammar
                assert grammar is not None
                checker = self.frontend.grammars(grammar.param)
                future = checker.check(grammar.text)
                compiled = asyncio.wrap_future(future)
                await asyncio.wait([compiled])
                compiled.exception()  # looked at, for asyncio's peace
                try:
                    task.checked = checker.learn(grammar.text, future).encode()
                except GrammarError as error:
                    raise _grammar_error(grammar, error) from None
                if self._encoding[exchange]:
                    raise RequestError("The request was aborted.")
        finally:
            del self._encoding[exchange]
        if not exchange.closed:
            then()

    def encode(
        self,
        request: HttpRequest,
        exchange: Exchange,
        prompts: Sequence[Prompt],
        then: Callable[[list[Ids]], None],
        *,
        add_special_tokens: bool,
    ) -> None:
        """Call ``then`` with the prompts' token ids: at once, or later if they are long."""
        encoded = self._encode_now(prompts, add_special_tokens)
        if encoded is not None:
            then(encoded)
        else:
            later = self._encode_later(exchange, prompts, then, add_special_tokens)
            self.run(request, exchange, later)

    def _encode_now(self, prompts: Sequence[Prompt], add_special_tokens: bool) -> list[Ids] | None:
        """The prompts' token ids; None if that takes too long for the loop."""
        num_characters, is_ascii = 0, True
        for prompt in prompts:
            if isinstance(prompt, str):
                num_characters += len(prompt)
                is_ascii = is_ascii and prompt.isascii()
        if num_characters == 0 and "" not in prompts:
            return list(prompts)  # type: ignore[arg-type]
        tokenizer = self.tokenizer
        if not tokenizer.is_short(num_characters, is_ascii):
            return None
        return [
            tokenizer.encode_array(prompt, add_special_tokens=add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]

    async def _encode_later(
        self,
        exchange: Exchange,
        prompts: Sequence[Prompt],
        then: Callable[[list[Ids]], None],
        add_special_tokens: bool,
    ) -> None:
        encoded: list[Ids] = []
        self._encoding[exchange] = False
        try:
            for prompt in prompts:
                encoded.append(
                    await self.tokenizer.encode_async(prompt, add_special_tokens=add_special_tokens)
                    if isinstance(prompt, str)
                    else prompt
                )
                if exchange.closed:
                    return
                if self._encoding[exchange]:
                    raise RequestError("The request was aborted.")
        finally:
            del self._encoding[exchange]
        then(encoded)

    def run(
        self, request: HttpRequest, exchange: Exchange, work: Coroutine[None, None, None]
    ) -> None:
        """Answer a request later; its errors are answered as those of a handler are."""
        task = asyncio.get_running_loop().create_task(self._guard(request, exchange, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(
        self, request: HttpRequest, exchange: Exchange, work: Coroutine[None, None, None]
    ) -> None:
        try:
            await work
        except MinisglError as error:
            self.fail(request, exchange, error)
        except Exception:
            log.exception("a request to %s failed", request.path)
            self.fail(request, exchange, MinisglError("Internal server error."))

    def respond(
        self,
        request: HttpRequest,
        exchange: Exchange,
        body: bytes,
        *,
        content_type: bytes = JSON,
    ) -> None:
        """Answer 200 and count it. Only for paths that are routes, which metrics name."""
        if not exchange.closed:
            exchange.respond(200, body, content_type)
            self.metrics.count_request(request.path, 200)

    def abort(self, name: str | None) -> int:
        """End the generations of the requests with this name, of all for None, early; their
        clients get what there is. Returns how many there were."""
        num_aborted = 0
        for exchange in self._encoding:
            if _is_called(exchange, name):
                self._encoding[exchange] = True
                num_aborted += 1
        for choice in self.frontend.dispatcher.choices():
            response = choice.response
            if isinstance(response, Generation) and _is_called(response.exchange, name):
                self.frontend.cut(choice)
                num_aborted += 1
        self.metrics.count_abort("request", num_aborted)
        return num_aborted

    def _run(self, task: Task, prompts: list[Ids]) -> None:
        self.session(task, prompts).start()

    def session(self, task: Task, prompts: list[Ids]) -> Session:
        """What a task becomes once its prompts are encoded; errors are those of lengths and ids."""
        frontend = self.frontend
        vocab_size = frontend.check_ready().vocab_size
        if task.body.truncate_prompt_tokens is not None:
            prompts = [self._cut(prompt, task) for prompt in prompts]
        limits = []
        for given, prompt in zip(task.prompts, prompts, strict=True):
            # Lengths first: a prompt that is too long is not read to its end.
            room = frontend.room_for(prompt, task.max_tokens, param=task.param)
            if task.max_tokens is None and task.default_max_tokens is not None:
                room = min(room, task.default_max_tokens)
            limits.append(room)
            if not isinstance(given, str) and not (min(prompt) >= 0 and max(prompt) < vocab_size):
                raise RequestError(
                    f"{task.param} must hold token ids in [0, {vocab_size - 1}].", param=task.param
                )
        if task.logprobs is not NO_LOGPROBS:
            num_values = sum(
                task.logprobs.num_values(len(prompt), limit)
                for prompt, limit in zip(prompts, limits, strict=True)
            )
            check_num_values(num_values * task.body.num_generated, param=task.logprobs_param)
        if task.grammar is not None:
            task.grammar_param = task.grammar.param
        rules = token_rules(task.body, self.tokenizer, vocab_size, task.thinking)
        if rules is not None:
            frontend.grammars(rules[1])
            task.checked = rules[0].before(task.checked)
            task.grammar_param = task.grammar_param or rules[1]
        session = Session(frontend, self.metrics, task, task.make_format(prompts), prompts, limits)
        if task.extras is not None:
            task.extras.prompts = prompts
        return session

    def _cut(self, prompt: Ids, task: Task) -> Ids:
        """The prompt within ``truncate_prompt_tokens``."""
        most = task.body.truncate_prompt_tokens
        if most is None:
            return prompt
        if most == -1:
            most = max(self.frontend.check_ready().max_model_len - (task.max_tokens or 1), 1)
        if len(prompt) <= most:
            return prompt
        return prompt[:most] if task.body.truncation_side == "right" else prompt[-most:]


def _is_called(exchange: Exchange, name: str | None) -> bool:
    """Whether this is the name of the exchange's request, by its header or its body, or of the
    answer to it. None is every request's."""
    own = exchange.request.request_id
    answers = (prefix + own for prefix in ("chatcmpl-", "cmpl-", "msg_", "resp_"))
    return name is None or name in (own, *answers, *exchange.names)


def _grammar_error(grammar: RequestGrammar, error: GrammarError) -> RequestError:
    return RequestError(f"{grammar.param} cannot be followed: {error}.", param=grammar.param)
