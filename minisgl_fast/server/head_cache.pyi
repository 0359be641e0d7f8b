from minisgl_fast.server.http_request import HttpRequest
from minisgl_fast.server.http_rules import HttpLimits

MAX_HEADS: int
MAX_HEAD_BYTES: int

class HeadCache:
    """Parses heads for all connections of a server; see head_cache.pyx."""

    def __init__(self, limits: HttpLimits) -> None: ...
    def __len__(self) -> int: ...
    def parse(self, head: bytes) -> HttpRequest: ...
