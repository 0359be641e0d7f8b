import asyncio
from collections.abc import Callable

from minisgl_fast.errors import MinisglError
from minisgl_fast.server.connection import HttpConnection
from minisgl_fast.server.head_cache import HeadCache
from minisgl_fast.server.http_request import HttpRequest
from minisgl_fast.server.http_rules import HttpLimits
from minisgl_fast.server.router import Handler

class HttpState:
    """What the connections of a server share; see http_state.pyx."""

    handler: Handler
    admit: Callable[[HttpRequest], MinisglError | None] | None
    limits: HttpLimits
    heads: HeadCache
    connections: set[HttpConnection]
    refusals: dict[int, int]
    num_exchanges: int
    num_stalled: int
    num_buffered_body_bytes: int
    draining: bool
    date_line: bytes
    def __init__(
        self,
        handler: Handler,
        limits: HttpLimits,
        admit: Callable[[HttpRequest], MinisglError | None] | None,
    ) -> None: ...
    def use_loop(self, loop: asyncio.AbstractEventLoop) -> None: ...
