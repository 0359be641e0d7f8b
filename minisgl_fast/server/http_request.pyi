class HttpRequest:
    """One request: what a handler reads; see http_request.pyx."""

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    body: bytes
    request_id: str
    is_admin: bool
    extra_head: bytes
    http_1_0: bool
    keep_alive: bool
    content_length: int
    expects_continue: bool
    def __init__(
        self,
        method: str,
        path: str,
        query: str = "",
        headers: dict[bytes, bytes] | None = None,
        body: bytes = b"",
        request_id: str = "",
    ) -> None: ...
    def field(self, name: bytes) -> bytes | None: ...

def fresh_request_id() -> str: ...
