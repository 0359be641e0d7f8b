"""PlacedTokens: which of a choice's tokens belong to which of its events.

A route whose answers have log-probabilities in some of their parts alone (ResponseFormat
.places_tokens) has to know which tokens a part is made of. So the parser gets the text token by
token, and each event the tokens that led to it.

Rules: a token whose text the parser holds back belongs to the next event; one that is markup, and
so has no part in the text of the event, to none. Whole and streamed, with the text cut anyhow, the
same tokens go to the same event.
"""

from __future__ import annotations

from collections.abc import Sequence

from minisgl_fast.api.chat_output import ChatOutput
from minisgl_fast.api.logprobs import TokenLogprobs
from minisgl_fast.api.response_format import NewTokens, ResponseFormat


class PlacedTokens:
    """The tokens of one choice."""

    def __init__(self, index: int, output: ChatOutput, form: ResponseFormat) -> None:
        self._index = index
        self._output = output
        self._form = form
        self._num_fed = 0  # characters
        self._num_content = 0  # characters of the events so far
        self._waiting: list[tuple[TokenLogprobs, int]] = []  # and how many characters each has

    def feed(self, data: bytes, tokens: Sequence[TokenLogprobs]) -> bytes:
        """The events of the next text (UTF-8), which brings out these tokens."""
        text = data.decode()
        starts = [token.offset - self._num_fed for token in tokens]
        events = b""
        start = 0
        for token, end in zip(tokens, [*starts, len(text)][1:], strict=True):
            self._waiting.append((token, max(end - start, 0)))
            if end > start:
                events += self.place(self._output.feed(text[start:end].encode()))
                start = end
        if start < len(text):  # its token is to come
            events += self.place(self._output.feed(text[start:].encode()))
        self._num_fed += len(text)
        return events

    def place(self, events: bytes) -> bytes:
        """Events together with the tokens that made their content."""
        if not events:
            return b""
        room = self._output.num_content - self._num_content
        self._num_content += room
        waiting, self._waiting = self._waiting, []
        while waiting and not waiting[-1][1]:  # the end of the text, which is none of it
            waiting.pop()
        tokens: list[TokenLogprobs] = []
        for token, num_characters in reversed(waiting if room else []):
            if tokens and num_characters > room:
                break
            tokens.append(token)
            room -= num_characters
        return self._form.with_logprobs(events, NewTokens(self._index, tokens[::-1], None))
