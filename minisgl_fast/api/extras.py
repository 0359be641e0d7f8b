"""Extras: what a request wants in its answer beside the text of its choices.

Token ids of the prompt and of the answer, usage in every event, padding that hides the length of
a text. A session whose request wants none of them has no Extras and pays nothing; with one, each
event of its stream is made in Python: ``prepare`` takes what came, the route's format asks for the
keys.

Rules: every token id of a choice is written once, in the first event behind it; a parser that holds
text back delays the ids with it, until the choice's end at the latest.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

import orjson

from minisgl_fast.api.sampling_fields import SamplingFields

if TYPE_CHECKING:
    from minisgl_fast.api.response_format import Usage

PADDED_TO = 32  # bytes: the text and padding of an event together are a multiple
_LETTERS = string.ascii_letters + string.digits


class Extras:
    """The extras of one answer.

    keeps_tokens   the tokens of every choice are wanted
    prompts        the token ids of the prompts, to be set before anything is written
    """

    def __init__(
        self,
        *,
        token_ids: bool,
        prompt_ids: bool,
        usage: bool,
        padding: bool,
        n: int,
        streams: bool,
    ) -> None:
        """``n``: choices per prompt."""
        self.keeps_tokens = token_ids
        self._prompt_ids = prompt_ids
        self._usage = usage
        self._padding = padding
        self._n = n
        self._streams = streams
        self.prompts: Sequence[Sequence[int]] = ()
        self._tokens: dict[int, list[int]] = {}
        self._shown: set[int] = set()  # choices (or -1 for the whole) that have shown their prompt
        self._usage_now = b""
        self._num_padding = 0

    @classmethod
    def wanted(cls, body: SamplingFields) -> Extras | None:
        """The extras of a request, None if it wants none."""
        options = body.stream_options
        usage = options is not None and bool(options.continuous_usage_stats)
        padding = options is not None and bool(options.include_obfuscation)
        if not (usage or padding or body.wants_prompt_ids):
            return None
        return cls(
            token_ids=bool(body.return_token_ids),
            prompt_ids=body.wants_prompt_ids,
            usage=usage,
            padding=padding,
            n=body.num_choices,
            streams=bool(body.stream),
        )

    def prepare(self, index: int, tokens: list[int], usage: Usage, text: bytes) -> None:
        """The next events are of this choice, whose ``tokens`` came with this text; ``usage`` is
        the choice's own."""
        if self.keeps_tokens:
            self._tokens.setdefault(index, []).extend(tokens)
        self._usage_now = usage.to_json() if self._usage else b""
        self._num_padding = -len(text) % PADDED_TO

    def choice_keys(self, index: int, *, with_prompt: bool, is_event: bool) -> bytes:
        """Keys of a choice, each after a comma; ``with_prompt`` its prompt's ids, once.

        Formats make events of parsed answers that are not streamed too: they get nothing.
        """
        keys = b""
        if is_event != self._streams:
            return keys
        if with_prompt and self._prompt_ids and index not in self._shown:
            self._shown.add(index)
            keys = b',"prompt_token_ids":' + orjson.dumps(list(self.prompts[index // self._n]))
        if self.keeps_tokens:
            tokens = self._tokens.pop(index, [])
            keys += b',"token_ids":' + orjson.dumps(tokens)
        return keys

    def prompt_key(self) -> bytes:
        """The prompt's ids as a key of the whole answer, the first time."""
        if not self._prompt_ids or -1 in self._shown:
            return b""
        self._shown.add(-1)
        return b',"prompt_token_ids":' + orjson.dumps(list(self.prompts[0]))

    def event_keys(self, *, nulls_usage: bool) -> bytes:
        """Keys of an event, each after a comma."""
        keys = b""
        if self._usage_now or nulls_usage:
            keys = b',"usage":' + (self._usage_now or b"null")
        if self._padding:
            padding = "".join(secrets.choice(_LETTERS) for _ in range(self._num_padding))
            keys += b',"obfuscation":"%b"' % padding.encode()
        return keys
