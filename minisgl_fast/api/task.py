"""Task: a checked request on its way from a route to the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from minisgl_fast.api.logprobs import NO_LOGPROBS, LogprobOptions
from minisgl_fast.api.sampling_params import cache_salt
from minisgl_fast.params import stop_program
from minisgl_fast.wire import AddTemplate
from minisgl_fast.wire import Task as EngineTask

if TYPE_CHECKING:
    from minisgl_fast.api.chat_output import ChatOutput
    from minisgl_fast.api.extras import Extras
    from minisgl_fast.api.grammar_text import RequestGrammar
    from minisgl_fast.api.openai_request import Prompt
    from minisgl_fast.api.response_format import ResponseFormat
    from minisgl_fast.api.sampling_fields import SamplingFields
    from minisgl_fast.params import SamplingParams
    from minisgl_fast.server.exchange import Exchange
    from minisgl_fast.server.http_rules import HttpRequest
    from minisgl_fast.text.stream import TextStream
    from minisgl_fast.text.tokenizer import Tokenizer
    from minisgl_fast.token_rules import ThinkingBudget

Ids: TypeAlias = Sequence[int]
GENERATE = int(EngineTask.GENERATE)


@dataclass(slots=True)
class Task:
    """A checked request on its way to a session.

    ``make_format`` gets the encoded prompts and makes what writes the answer. ``max_tokens`` is the
    client's, None if it gave none; then ``default_max_tokens`` holds, cut to what the context
    leaves (None fills it). ``logprobs_param`` names the field that asked for them; ``kind`` is what
    the engine does. ``param`` names the prompt's field. ``output`` makes what takes the text of a
    choice apart, None where all of it is content; ``extras`` are those that the format writes.
    ``grammar`` binds every choice, once ``checked`` has its text for the engine;
    ``grammar_param`` names the field at fault where an answer cannot go on. ``thinking`` bounds
    the reasoning of every choice.
    """

    route: str
    request: HttpRequest
    exchange: Exchange
    body: SamplingFields
    prompts: Sequence[Prompt]
    params: SamplingParams
    make_format: Callable[[Sequence[Ids]], ResponseFormat]
    max_tokens: int | None
    default_max_tokens: int | None
    received: float
    stream: bool
    param: str = "prompt"
    add_special_tokens: bool = True
    output: Callable[[int], ChatOutput] | None = None
    extras: Extras | None = None
    logprobs: LogprobOptions = NO_LOGPROBS
    logprobs_param: str = "logprobs"
    kind: int = GENERATE
    grammar: RequestGrammar | None = None
    checked: bytes = b""
    grammar_param: str | None = None
    thinking: ThinkingBudget | None = None

    def text_stream(self, tokenizer: Tokenizer) -> TextStream:
        """The text of a choice, before its first token."""
        params = self.params
        return tokenizer.stream(
            params.stop,
            params.include_stop_str_in_output,
            params.skip_special_tokens,
            params.min_tokens,
            stop_program(params.stop_regex),
        )

    def add_template(self) -> AddTemplate:
        """What the engine is told of every choice."""
        body, logprobs = self.body, self.logprobs
        return AddTemplate(
            self.params,
            cache_salt=cache_salt(body),
            priority=body.priority or 0,
            num_top_logprobs=logprobs.num_top,
            prompt_logprobs_from=logprobs.prompt_from,
            logprob_ids=logprobs.ids,
            task=self.kind,
            grammar=self.checked,
        )
