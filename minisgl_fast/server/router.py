"""Router: finds the handler of a request by its method and path.

Rules: the path is compared as the string that the parser made, byte for byte, and nothing else is
(authorisation must look at the same string); a known path with another method is 405 with
``Allow``, an unknown path 404; HEAD goes to the GET handler (the exchange leaves the body out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minisgl_fast.errors import MethodNotAllowedError, NotFoundError
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest

Handler = Callable[[HttpRequest, Exchange], None]


class Router:
    """A fixed table of routes.

    ``table`` maps (method, path) to a handler. A path ending in ``/*`` matches every longer path
    with that beginning (``/v1/models/*`` matches ``/v1/models/org/name``); an exact path comes
    first, then the longest such pattern.
    """

    def __init__(self, table: Mapping[tuple[str, str], Handler]) -> None:
        self._whole = {key: handler for key, handler in table.items() if key[1][-2:] != "/*"}
        self._exact: dict[str, dict[str, Handler]] = {}
        self._prefixes: dict[str, dict[str, Handler]] = {}
        for (method, path), handler in table.items():
            if path.endswith("/*"):
                self._prefixes.setdefault(path[:-1], {})[method] = handler
            else:
                self._exact.setdefault(path, {})[method] = handler

    def find(self, request: HttpRequest) -> Handler:
        """The handler, or NotFoundError, or MethodNotAllowedError."""
        found = self._whole.get((request.method, request.path))
        if found is not None:  # as most requests ask
            return found
        methods = self._exact.get(request.path)
        if methods is None:
            methods = self._find_prefix(request.path)
        method = request.method
        if methods is None and method != "CONNECT":
            raise NotFoundError(f"No such route: {request.path[:200]}")
        handler = methods and (
            methods.get(method) or (methods.get("GET") if method == "HEAD" else None)
        )
        if not handler:
            allow = set(methods or ("GET", "POST"))
            if "GET" in allow:
                allow.add("HEAD")
            allowed = ", ".join(sorted(allow))
            raise MethodNotAllowedError(
                f"{method} is not allowed here, only {allowed}.", allow=allowed
            )
        return handler

    def _find_prefix(self, path: str) -> dict[str, Handler] | None:
        best = ""
        for prefix in self._prefixes:
            if len(prefix) > len(best) and len(path) > len(prefix) and path.startswith(prefix):
                best = prefix
        return self._prefixes[best] if best else None
