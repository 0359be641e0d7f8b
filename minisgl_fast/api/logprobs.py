"""Log-probabilities of one choice: what is asked for, and what came, token by token.

``LogprobOptions`` is what a route asks for. ``ChoiceLogprobs`` stands at a Choice: the frontend
gives it the records of LOGPROBS frames, the session takes tokens from it as their text goes out.

Rules: each token comes out once and in order, with the text that has its last byte; at the end of a
choice the rest comes. A token of which a stop string left nothing does not come at all; the token
that ended a choice (eos, stop id) does. ``offset`` counts characters of the choice's own text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minisgl_fast.errors import RequestError
from minisgl_fast.text.stream import TextStream
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import LogprobsRecord

MAX_TOP_LOGPROBS = 20
MAX_LOGPROB_IDS = 1024
# Values that one request may bring: 64 bit of a body and a good deal of JSON each.
MAX_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    """What a generation asks for; by default nothing.

    num_top      of each generated token its own and so many of the largest; -1: none of them
    prompt_from  first prompt position whose log-probability is wanted (that of position 0 does not
                 exist and never comes); -1: none
    ids          further token ids, whose log-probabilities come at each of these positions
    keeps_cut    tokens of which a stop string left nothing come all the same
    """

    num_top: int = -1
    prompt_from: int = -1
    ids: tuple[int, ...] = ()
    keeps_cut: bool = False

    @property
    def is_wanted(self) -> bool:
        return self.num_top >= 0 or self.prompt_from >= 0

    def num_values(self, num_prompt: int, max_tokens: int) -> int:
        """How many values one choice may bring."""
        num_positions = 0
        if self.prompt_from >= 0:
            num_positions += max(num_prompt - max(self.prompt_from, 1), 0)
        if self.num_top >= 0:
            num_positions += max_tokens
        return num_positions * (1 + max(self.num_top, 0) + len(self.ids))


def check_num_values(num_values: int, *, param: str) -> None:
    """RequestError if one request asks for so many values."""
    if num_values > MAX_VALUES:
        raise RequestError(
            f"{param} asks for up to {num_values} log-probabilities in one request, at most "
            f"{MAX_VALUES} are served. Lower max_tokens, n, or how many are listed.",
            param=param,
        )


NO_LOGPROBS = LogprobOptions()


class TokenLogprobs(NamedTuple):
    """One token. ``logprob`` is None for a prompt's first; ``top`` descends, lowest id first."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    of_ids: list[float]
    offset: int = 0


@dataclass(slots=True)
class ChoiceLogprobs:
    """The log-probabilities of one choice; ``stream`` is a fresh one of its tokenizer."""

    stream: TextStream
    prompt: list[TokenLogprobs] = field(default_factory=list)
    _tokens: list[TokenLogprobs] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)
    _num_out: int = 0
    _prompt_is_out: bool = False
    _num_characters: int = 0

    def add(self, record: LogprobsRecord) -> None:
        """Take one record of a LOGPROBS frame."""
        (self.prompt if record.is_prompt else self._tokens).extend(split(record))

    def take_prompt(self) -> list[TokenLogprobs] | None:
        """The tokens of the prompt, once; they are all there before the first of the choice."""
        if self._prompt_is_out:
            return None
        self._prompt_is_out = True
        return self.prompt

    def take(
        self,
        ends: Iterable[int],
        num_taken: int,
        *,
        is_end: bool = False,
        is_cut: bool = False,
    ) -> list[TokenLogprobs]:
        """The tokens whose text is out by now.

        ends: Choice.take_ends(); num_taken: TextStream.num_taken; is_end: nothing follows; is_cut:
        a stop string ended the text.
        """
        self._ends += ends
        out = []
        while self._num_out < len(self._ends):
            end = self._ends[self._num_out]
            if end > num_taken and not is_end:
                break
            start = self._ends[self._num_out - 1] if self._num_out else 0
            is_last = self._num_out + 1 == len(self._ends)
            # The last token's end is that of the cut text, however much it brought.
            if is_cut and start >= num_taken and (is_last or end > num_taken):
                break
            token = self._tokens[self._num_out]
            out.append(token._replace(offset=self._num_characters))
            self.stream.feed(token.token)
            self._num_characters += len(self.stream.take().decode())
            self._num_out += 1
        return out


def split(record: LogprobsRecord) -> list[TokenLogprobs]:
    """The tokens of a record."""
    num_tokens, num_top = len(record.tokens), record.num_top
    num_ids = len(record.id_values) // max(num_tokens, 1)
    return [
        TokenLogprobs(
            token,
            record.chosen[i],
            [
                (record.top_ids[j], record.top_values[j])
                for j in range(i * num_top, (i + 1) * num_top)
                if record.top_ids[j] >= 0
            ],
            list(record.id_values[i * num_ids : (i + 1) * num_ids]),
        )
        for i, token in enumerate(record.tokens)
    ]


def prompt_tokens(ids: Sequence[int], found: Sequence[TokenLogprobs]) -> list[TokenLogprobs]:
    """All tokens of a prompt, ``found`` being its last; those before have no log-probability."""
    num_bare = len(ids) - len(found)
    return [TokenLogprobs(token, None, [], []) for token in ids[:num_bare]] + list(found)


def text_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Where each token begins in ``text``, which they encode; in characters.

    A special token that is not written in the text, such as a bos put before it, takes no place.
    """
    offsets = []
    num_characters = 0
    stream = tokenizer.stream(skip_special_tokens=False)
    for token in ids:
        offsets.append(min(num_characters, len(text)))
        if not tokenizer.is_special(token) or text.startswith(
            tokenizer.token_bytes(token).decode("utf-8", "replace"), num_characters
        ):
            stream.feed(token)
            num_characters += len(stream.take().decode())
    return offsets
