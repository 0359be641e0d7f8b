"""A process that compiles grammars of clients and tells what is wrong with them.

    python -m minisgl_fast.engine.grammar_check FD

FD is one end of a socketpair. The first frame is JSON {"vocab_size", "special_ids"}, each further
one a grammar (api/grammar_text.py); each is answered by one frame: JSON {"grammar"} with the text
for the engine, or {"error"}. A frame is u32 length, payload.

Rules: whoever asks sets the time and kills the process if it takes longer; memory is limited; a
grammar that recurses too deeply ends the process, on a stack half as large as the engine's.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import sys
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from minisgl_fast.engine.grammar import (
    COMPILE_STACK_BYTES,
    limits,
    make_pool,
    make_tokenizer,
)
from minisgl_fast.vocabulary import Vocabulary

MEMORY_BYTES = 2 << 30
# The engine's main thread, which goes through masks, has 8 MiB.
MASK_STACK_BYTES = 4 << 20
MAX_ERROR_CHARACTERS = 300


def main(descriptor: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel = socket.socket(fileno=int(descriptor))
    settings = receive(channel)
    if settings is None:
        return
    checker = Checker(**json.loads(settings))
    send(channel, b"ready")
    while (grammar := receive(channel)) is not None:
        send(channel, json.dumps(checker.check(grammar.decode())).encode())


class Checker:
    """Compiles over a vocabulary of single bytes and the model's special tokens."""

    def __init__(self, vocab_size: int, special_ids: list[int]) -> None:
        size = max(vocab_size, 257)
        tokens = [bytes((i,)) for i in range(256)] + [b""] * (size - 256)
        special = {i for i in special_ids if i >= 256} | {size - 1}
        for i in special:
            tokens[i] = b"<|%d|>" % i
        vocabulary = Vocabulary(tokens, frozenset(special))
        self._tokenizer = make_tokenizer(vocabulary, [size - 1], slices=[])
        self._limits = limits()
        self._compiler = make_pool(1, COMPILE_STACK_BYTES // 2, "compile")
        self._masker = make_pool(1, MASK_STACK_BYTES, "mask")

    def check(self, text: str) -> dict[str, str]:
        """{"grammar": text} or {"error": why}."""
        return self._compiler.submit(self._check, text).result()

    def _check(self, text: str) -> dict[str, str]:
        try:
            grammar = _translated(json.loads(text))
        except Exception as error:  # whatever the translation meets
            return {"error": _first_line(str(error))}
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            self._masker.submit(matcher.compute_bitmask).result()
        if matcher.is_error():
            return {"error": _first_line(matcher.get_error())}
        return {"grammar": grammar}


def _translated(document: dict[str, Any]) -> str:
    """The text with every EBNF grammar in llguidance's notation."""
    for part in document["grammars"]:
        if "ebnf" in part:
            part["lark_grammar"] = any_to_lark(part.pop("ebnf"))
    return json.dumps(document, ensure_ascii=False)


def _first_line(error: str) -> str:
    lines = error.strip().splitlines() or [""]
    inner = [line for line in lines if line.startswith("error: ")]
    line = inner[0].removeprefix("error: ") if inner else lines[0]
    for prefix in ("at ", "failed to compile JSON schema: "):
        if line.startswith(prefix):
            line = line[len(prefix) :] if prefix != "at " else line.partition("): ")[2] or line
    return line[:MAX_ERROR_CHARACTERS] or "it cannot be compiled"


def send(channel: socket.socket, payload: bytes) -> None:
    channel.sendall(len(payload).to_bytes(4, "little") + payload)


def receive(channel: socket.socket) -> bytes | None:
    """One frame; None at the end."""
    head = _exactly(channel, 4)
    return None if head is None else _exactly(channel, int.from_bytes(head, "little"))


def _exactly(channel: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        more = channel.recv(count - len(data))
        if not more:
            return None
        data += more
    return data


if __name__ == "__main__":
    main(sys.argv[1])
