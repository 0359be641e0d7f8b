from collections.abc import Callable

from minisgl_fast.api.chat_output import ChatOutput
from minisgl_fast.api.response_format import Answer
from minisgl_fast.errors import MinisglError
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.metrics import Metrics
from minisgl_fast.server.response import Choice, Response

class Generation(Response):
    """One generation request under way: its choices in the engine, and how it can end."""

    frontend: Frontend
    metrics: Metrics
    route: str
    received: float
    choices: list[Choice]
    def __init__(
        self,
        frontend: Frontend,
        metrics: Metrics,
        exchange: Exchange,
        route: str,
        received: float,
        streaming: bool,
        text_event: Callable[[bytes], bytes] | None = None,
    ) -> None: ...
    def start_choices(self, choices: list[Choice]) -> None: ...
    def end_of(
        self, choice: Choice, stops: tuple[str, ...], grammar_param: str | None
    ) -> tuple[str, str | int | None, bool]: ...
    def feed_output(self, output: ChatOutput, choice: Choice, text: bytes) -> bytes: ...
    def close_output(self, output: ChatOutput, choice: Choice, answer: Answer) -> bytes: ...
    def succeed(self, finish_reason: str) -> None: ...
    def failure_events(self, error: MinisglError) -> bytes: ...
    def release(self) -> None: ...
