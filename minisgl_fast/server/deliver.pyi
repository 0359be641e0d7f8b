from array import array
from collections.abc import Callable, Sequence
from typing import Any

from minisgl_fast.errors import MinisglError
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.text.stream import TextStream

STOPPED_BY_STRING: int

class Histogram:
    """Counts of observed seconds between fixed bounds, for /metrics."""

    total: float
    def __init__(self, bounds: Sequence[float]) -> None: ...
    def observe(self, value: float) -> None: ...
    def buckets(self) -> list[tuple[str, int]]: ...

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
    """One answer under way: its choices, and where their text goes. Subclassed by Session."""

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

class Dispatcher:
    """Routes the rows of STEP frames to choices; see deliver.pyx."""

    time_to_first_token: Histogram
    inter_token: Histogram
    num_generated: int
    num_cached: int
    def __init__(
        self,
        send_abort: Callable[[int], None],
        time_to_first_token: Sequence[float],
        inter_token: Sequence[float],
        stream_interval: int = 1,
    ) -> None: ...
    def __len__(self) -> int: ...
    def open_choice(self, choice: Choice) -> int: ...
    def close(self, choice: Choice) -> bool: ...
    def find(self, rid: int) -> Choice | None: ...
    def choices(self) -> list[Choice]: ...
    def deliver(self, payload: bytes, now: float) -> None: ...
    def flush(self) -> None: ...
