"""What tests of one connection share: requests to send it, and a handler that keeps what it got."""

from http_cases import HOST, read_answers

from minisgl_fast.server.http import Exchange, HttpRequest

GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"


class Keep:
    """A handler that answers nothing and keeps what it got."""

    def __init__(self) -> None:
        self.requests: list[HttpRequest] = []
        self.exchanges: list[Exchange] = []
        self.gone: list[str] = []
        self.resumed = 0

    def __call__(self, request: HttpRequest, exchange: Exchange) -> None:
        self.requests.append(request)
        self.exchanges.append(exchange)
        exchange.on_disconnect = lambda: self.gone.append(request.path)
        exchange.on_resume = self._on_resume

    def _on_resume(self) -> None:
        self.resumed += 1


def get(path: str, *fields: bytes) -> bytes:
    lines = b"".join(field + b"\r\n" for field in fields)
    return b"GET %b HTTP/1.1\r\n" % path.encode() + HOST + lines + b"\r\n"


def post(size: int, body: bytes = b"", *fields: bytes) -> bytes:
    lines = b"".join(field + b"\r\n" for field in (*fields, b"Content-Length: %d" % size))
    return b"POST / HTTP/1.1\r\n" + HOST + lines + b"\r\n" + body


def only_answer(transport, method="GET"):
    (answer,) = read_answers(bytes(transport.written), [method])
    return answer
