"""Route: a handler together with what a client must know to call it.

Every surface hands out such a table, and app.py takes it for the router and for the document at
``/openapi.json``: a route without a description cannot be written, nor one that the document lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minisgl_fast.server.router import Handler


@dataclass(frozen=True, slots=True)
class Route:
    """``summary``: one line. ``body``: the Struct that checks the request's body, None where none
    is read. ``answer``: the type of a 200 answer's JSON, None where it is not JSON (``media_type``
    says what it is) or not described. ``streams``: the answer may be a stream of
    ``stream_type``. ``needs_body`` False: the body may be missing.
    """

    handler: Handler
    summary: str
    body: Any = None
    answer: Any = None
    streams: bool = False
    stream_type: str = "text/event-stream"
    media_type: str = "application/json"
    needs_body: bool = True


Routes = dict[tuple[str, str], Route]  # (method, path), as Router describes paths
