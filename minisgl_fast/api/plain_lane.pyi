from collections.abc import Callable

from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.plain_session import Recipe
from minisgl_fast.parsers.select import Formats
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_request import HttpRequest

class PlainLane:
    """The short way for one route's plain requests; see plain_lane.pyx."""

    def __init__(
        self,
        pipeline: Pipeline,
        field: str,
        learn: Callable[[bytes, bytes], Recipe | None],
        formats: Formats | None = None,
    ) -> None: ...
    def take(self, request: HttpRequest, exchange: Exchange, received: float) -> bool: ...
