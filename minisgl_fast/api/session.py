"""Session: one HTTP generation, from prompts to the last byte of its answer.

A session has prompts x n choices; choice ``prompt * n + k`` is the k-th answer to a prompt and
runs with seed + k. It is a Generation, and so a Response of the token loop (server/response.pyx),
which calls back only where something begins or ends; the text between goes straight to the
exchange.

Rules: everything that can be refused is refused before the first byte, so a stream begins with
the engine's first token (an engine that fails before gives a plain error answer); usage counts a
prompt once and a choice's tokens up to the one that ended it.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import replace

from minisgl_fast.api.chat_output import ChatOutput
from minisgl_fast.api.extras import Extras
from minisgl_fast.api.generation import Generation
from minisgl_fast.api.logprobs import ChoiceLogprobs, TokenLogprobs
from minisgl_fast.api.placed_tokens import PlacedTokens
from minisgl_fast.api.response_format import (
    Answer,
    NewTokens,
    ResponseFormat,
    Usage,
    json_escaped,
)
from minisgl_fast.api.task import GENERATE, Ids, Task
from minisgl_fast.errors import MinisglError
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.metrics import Metrics
from minisgl_fast.server.response import Choice

# Of requests that give no seed. It is no secret, and a system call for each would be slow.
_seeds = random.Random(secrets.randbits(256))


def fresh_seed() -> int:
    """The seed of a request that gives none."""
    return _seeds.getrandbits(64)


class Session(Generation):
    """One generation request under way; made and started by pipeline.py."""

    __slots__ = (
        "_answers",
        "_extras",
        "_form",
        "_has_text_events",
        "_limits",
        "_n",
        "_outputs",
        "_placed",
        "_prompts",
        "_task",
        "_usage",
    )

    def __init__(
        self,
        frontend: Frontend,
        metrics: Metrics,
        task: Task,
        form: ResponseFormat,
        prompts: Sequence[Ids],
        limits: Sequence[int],
    ) -> None:
        """``prompts``: those of the task, encoded. ``limits``: the most tokens behind each; 0 for
        all of them answers without the engine, unless log-probabilities or embeddings are asked
        for."""
        text_event = form.text_event if task.stream else None
        super().__init__(
            frontend, metrics, task.exchange, task.route, task.received, task.stream, text_event
        )
        self._task = task
        self._extras = task.extras
        self._form = form
        self._has_text_events = text_event is not None
        self._prompts = prompts
        self._limits = limits
        self._n = task.body.num_generated
        self._answers: list[Answer | None] = [None] * (len(prompts) * self._n)
        self._outputs: list[ChatOutput] = []
        self._placed: list[PlacedTokens] = []
        self._usage = Usage(
            sum(map(len, prompts)), reasoning_tokens=None if task.output is None else 0
        )

    def start(self) -> None:
        """Send every choice to the engine. OverloadedError if they do not all fit the queue."""
        task = self._task
        if not (any(self._limits) or task.logprobs.is_wanted or task.kind != GENERATE):
            self._answer_without_engine()
            return
        num_choices = len(self._answers)
        self.frontend.check_room(num_choices)
        self.start_choices([self._choice(index) for index in range(num_choices)])
        seed = task.params.seed
        if seed is None:
            seed = fresh_seed()
        add = task.add_template()
        for choice in self.choices:
            prompt, k = divmod(choice.index, self._n)
            self.frontend.submit(
                choice,
                self._prompts[prompt],
                add,
                seed=(seed + k) % 2**64,
                max_tokens=self._limits[prompt],
            )
        self.metrics.num_prompt_tokens += self._usage.prompt_tokens

    # From the token loop

    def open_stream(self) -> bytes:
        self.exchange.start_stream(self._form.content_type)
        self._count_cached()
        return b"".join(
            self._form.opening(index, self._usage) for index in range(len(self._answers))
        )

    def parse_text(self, choice: Choice, text: bytes) -> bytes:
        if self._extras is not None:
            self._prepare_extras(self._extras, choice, text)
        if self._placed:
            return self._placed[choice.index].feed(text, self._take_logprobs(choice))
        output = self._outputs[choice.index] if self._outputs else None
        if output is None:
            events = self._plain_event(choice, text)
        elif choice.logprobs is None and self._extras is None:
            return self.feed_output(output, choice, text)
        else:
            events = output.feed(text)
        if choice.logprobs is None or not events:  # tokens wait for text that the parser holds back
            return events
        tokens = self._take_logprobs(choice)
        prompt = choice.logprobs.take_prompt()
        return self._form.with_logprobs(events, NewTokens(choice.index, tokens, prompt))

    def close_choice(self, choice: Choice, text: bytes) -> bytes:
        reason, matched, is_eos = self.end_of(
            choice, self._task.params.stops, self._task.grammar_param
        )
        self._usage.completion_tokens += choice.num_tokens
        if self._extras is not None:
            self._prepare_extras(self._extras, choice, text)
        if choice.is_parsed and not self._outputs and not self._has_text_events:
            text = json_escaped(text.decode())
        answer = Answer(
            choice.index,
            text,
            reason,
            matched,
            is_eos=is_eos,
            first_time=choice.first_time,
            last_time=choice.last_time,
            embedding=choice.embedding or (),
        )
        self._answers[choice.index] = answer
        if self._placed:
            return self._close_placed(choice, answer)
        events = self._close_output(choice, answer) if self._outputs else b""
        tokens = self._take_logprobs(choice, is_end=True)
        if not self.streaming:
            answer.logprobs = tokens
            answer.prompt_logprobs = choice.logprobs.prompt if choice.logprobs else []
            return b""
        events += self._form.closing(answer)
        if choice.logprobs is None:
            return events
        prompt = choice.logprobs.take_prompt()
        return self._form.with_logprobs(events, NewTokens(choice.index, tokens, prompt))

    def complete(self, events: bytes) -> None:
        answers = [answer for answer in self._answers if answer is not None]
        self._count_cached()
        if self.streaming:
            self.exchange.finish(events + self._form.ending(self._usage))
        else:
            if self._n != self._task.body.num_choices:  # the likeliest of so many are wanted
                answers = likeliest(answers, self._n, self._task.body.num_choices)
            self.exchange.respond(200, self._form.body(answers, self._usage))
        self.succeed(answers[0].finish_reason)

    def failure_events(self, error: MinisglError) -> bytes:
        return self._form.failure(error, self.exchange.request.request_id)

    def release(self) -> None:
        super().release()
        self._outputs = []
        self._placed = []

    # Private

    def _count_cached(self) -> None:
        self._usage.cached_tokens = sum([choice.num_cached for choice in self.choices[:: self._n]])

    def _choice(self, index: int) -> Choice:
        task = self._task
        params = task.params
        text = task.text_stream(self.frontend.tokenizer)
        writes_events = self.streaming and self._extras is None
        choice = Choice(
            self,
            index,
            text,
            self._form.prefix(index) if writes_events else b"",
            self._form.suffix(index) if writes_events else b"",
            params.include_stop_str_in_output,
            task.received,
        )
        if self._extras is not None:
            choice.is_parsed = True
            choice.keeps_tokens = self._extras.keeps_tokens
        if task.logprobs.is_wanted:
            # Its text comes through parse_text, so that each piece gets its tokens.
            choice.is_parsed = True
            choice.logprobs = ChoiceLogprobs(
                self.frontend.tokenizer.stream(skip_special_tokens=params.skip_special_tokens)
            )
        if task.output is not None:
            output = task.output(index)
            self._outputs.append(output)
            choice.is_parsed = True
            choice.mark_token, choice.mark_token_2 = output.end_tokens
            if self._form.places_tokens and task.logprobs.is_wanted:
                self._placed.append(PlacedTokens(index, output, self._form))
        return choice

    def _prepare_extras(self, extras: Extras, choice: Choice, text: bytes) -> None:
        usage = Usage(
            len(self._prompts[choice.index // self._n]),
            choice.num_tokens,
            choice.num_cached,
        )
        extras.prepare(choice.index, choice.take_tokens(), usage, text)

    def _plain_event(self, choice: Choice, text: bytes) -> bytes:
        """An event of text that nothing takes apart."""
        if self._form.text_event is not None:
            return self._form.text_event(text)
        form, index = self._form, choice.index
        return form.prefix(index) + json_escaped(text.decode()) + form.suffix(index)

    def _take_logprobs(self, choice: Choice, *, is_end: bool = False) -> list[TokenLogprobs]:
        """The tokens that the text written now brings out."""
        if choice.logprobs is None:
            return []
        is_cut = choice.stopped_by_string and not (
            choice.include_stop or self._task.logprobs.keeps_cut
        )
        found: ChoiceLogprobs = choice.logprobs
        return found.take(choice.take_ends(), choice.text.num_taken, is_end=is_end, is_cut=is_cut)

    def _close_output(self, choice: Choice, answer: Answer) -> bytes:
        """Finish what takes the text apart; gives its last events and changes the answer."""
        events = self.close_output(self._outputs[choice.index], choice, answer)
        self._usage.reasoning_tokens = (
            self._usage.reasoning_tokens or 0
        ) + answer.num_reasoning_tokens
        return events

    def _close_placed(self, choice: Choice, answer: Answer) -> bytes:
        """The last events of a choice whose tokens are placed; changes the answer."""
        placed = self._placed[choice.index]
        events = placed.feed(answer.text, self._take_logprobs(choice, is_end=True))
        answer.text = b""
        events += placed.place(self._close_output(choice, answer) + self._form.closing(answer))
        return events if self.streaming else b""

    def _answer_without_engine(self) -> None:
        self.ended = True
        answers = [Answer(index, b"", "length", None) for index in range(len(self._answers))]
        self._answers = list(answers)
        events = b""
        if self.streaming:
            events = self.open_stream() + b"".join(map(self._form.closing, answers))
        self.complete(events)


def likeliest(answers: list[Answer], n: int, number: int) -> list[Answer]:
    """Of every ``n`` answers those with the highest log-probability per token, best first."""

    def mean(answer: Answer) -> float:
        values = [token.logprob or 0.0 for token in answer.logprobs]
        return sum(values) / len(values) if values else 0.0

    kept: list[Answer] = []
    for first in range(0, len(answers), n):
        ranked = sorted(answers[first : first + n], key=mean, reverse=True)
        kept += ranked[:number]
    return [replace(answer, index=index) for index, answer in enumerate(kept)]
