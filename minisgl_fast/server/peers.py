"""Peers: what the frontends of one server ask each other.

The links make a star: every extra frontend has one to the main frontend, which passes a question on
to all the others. A question is a word and an argument that JSON can hold; each frontend answers
with what ``answers[word](argument)`` returns.

Rules: a question is answered by every frontend once, or not at all by one that is gone, still
loading or slower than ``TIMEOUT_S``; ``then`` gets what there is, exactly once. Without links it is
called at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import orjson

TIMEOUT_S = 1.0
ASK, REPLY = 1, 2  # kinds of frames; the rest of a link's kinds are others' business

Then = Callable[[list[Any]], None]


class Link(Protocol):
    """What is needed of a channel to another frontend."""

    def send(self, kind: int, payload: bytes) -> None: ...


class Peers:
    """One frontend's side of all its links."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[Any], Any]] = {}
        self._links: list[Link] = []
        self._asked: dict[int, _Question] = {}
        self._next_id = 0

    def add(self, link: Link) -> None:
        """From now on ask this one too; its frames must come to ``on_frame``."""
        self._links.append(link)

    def remove(self, link: Link) -> None:
        """The other end is gone."""
        if link in self._links:
            self._links.remove(link)
            for question in tuple(self._asked.values()):
                question.take(link, [])

    def ask(self, word: str, argument: Any, then: Then) -> None:
        """Give ``then`` the answers of all other frontends."""
        self._ask(word, argument, then, None, TIMEOUT_S)

    def on_frame(self, link: Link, kind: int, payload: bytes) -> None:
        """Take an ASK or a REPLY that came over a link."""
        message = orjson.loads(payload)
        if kind == REPLY:
            question = self._asked.get(message["id"])
            if question is not None:  # else it came too late
                question.take(link, message["answers"])
            return
        answer = self.answers.get(message["word"])
        own = [] if answer is None else [answer(message["argument"])]

        def reply(others: list[Any]) -> None:
            body = {"id": message["id"], "answers": own + others}
            link.send(REPLY, orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS))

        # Sooner than who asks gives up on this one.
        self._ask(message["word"], message["argument"], reply, link, TIMEOUT_S / 2)

    def _ask(
        self, word: str, argument: Any, then: Then, besides: Link | None, timeout_s: float
    ) -> None:
        links = [link for link in self._links if link is not besides]
        if not links:
            then([])
            return
        number = self._next_id
        self._next_id += 1

        def done(answers: list[Any]) -> None:
            del self._asked[number]
            then(answers)

        self._asked[number] = _Question(set(links), done, timeout_s)
        message = orjson.dumps({"id": number, "word": word, "argument": argument})
        for link in links:
            link.send(ASK, message)


class _Question:
    """A question that is not fully answered yet."""

    def __init__(self, links: set[Link], done: Then, timeout_s: float) -> None:
        self._missing = links
        self._answers: list[Any] = []
        self._done = done
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._end)

    def take(self, link: Link, answers: list[Any]) -> None:
        if link in self._missing:
            self._missing.remove(link)
            self._answers += answers
            if not self._missing:
                self._end()

    def _end(self) -> None:
        self._timer.cancel()
        self._missing = set()
        self._done(self._answers)
