from array import array
from collections.abc import Callable
from typing import Any

from minisgl_fast.errors import MinisglError
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.text.stream import TextStream

STOPPED_BY_STRING: int

class Choice:
    """One generation: one rid in the engine, one entry of ``choices`` in the answer."""

    response: Response
    text: TextStream
    index: int
    rid: int
    num_tokens: int
    num_cached: int
    last_token: int
    reason: int
    include_stop: bool
    is_parsed: bool
    keeps_tokens: bool
    logprobs: Any
    embedding: array[float] | None
    mark_token: int
    mark_token_2: int
    num_at_mark: int
    first_time: float
    last_time: float
    stopped_by_string: bool
    def __init__(
        self,
        response: Response,
        index: int,
        text: TextStream,
        prefix: bytes,
        suffix: bytes,
        include_stop: bool,
        now: float,
    ) -> None: ...
    def take_tokens(self) -> list[int]: ...
    def take_ends(self) -> list[int]: ...
    def set_lane(self, prefix: bytes, suffix: bytes, watched: bytes) -> None: ...

class Response:
    """One answer under way: its choices, and where their text goes. Subclassed by Generation."""

    exchange: Exchange
    streaming: bool
    num_open: int
    is_open: bool
    ended: bool
    def __init__(
        self,
        exchange: Exchange,
        streaming: bool,
        text_event: Callable[[bytes], bytes] | None = None,
    ) -> None: ...
    def open_stream(self) -> bytes: ...
    def parse_text(self, choice: Choice, text: bytes) -> bytes: ...
    def close_choice(self, choice: Choice, text: bytes) -> bytes: ...
    def complete(self, events: bytes) -> None: ...
    def fail(self, error: MinisglError) -> None: ...
    def write_ready(self) -> None: ...
    def forget(self) -> None: ...
