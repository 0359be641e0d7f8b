CHAT: int
COMPLETIONS: int
GENERATE: int
SGLANG: int
MAX_EVENTS: int

class ProtocolError(Exception):
    """What came is no HTTP response, or is over a limit."""

class ResponseReader:
    """Reads one HTTP response after another on a connection; no I/O and no clock of its own.

    api: CHAT, COMPLETIONS, GENERATE or SGLANG: where the text of an event stands.

    status: of the response, 0 before its head. keep_alive: the connection may be used again.
    done: ``data: [DONE]`` has come. num_bytes, num_events: of the response, events with text only.
    num_reads: calls of ``feed``, of all responses.
    start_s, first_s, last_s: times of the request, its first and its last event with text.
    """

    status: int
    keep_alive: bool
    done: bool
    num_bytes: int
    num_events: int
    num_reads: int
    start_s: float
    first_s: float
    last_s: float

    def __init__(self, api: int, credit: memoryview | None = None) -> None:
        """``credit``: one uint64 (format Q) to count events with text in, too."""

    def begin(self, now: float, keep_text: bool = False) -> None:
        """A request is sent now; forgets the last response."""

    def feed(self, data: bytes, now: float) -> bool:
        """Bytes that were read at ``now``; True when the response is complete. ProtocolError."""

    def feed_eof(self, now: float) -> bool:
        """The peer has closed; True if that completes the response."""

    @property
    def usage(self) -> bytes:
        """JSON of the last event with a usage object (SGLang: meta_info); empty if none had one."""

    @property
    def error(self) -> bytes:
        """The start of an error event, or of a body that is no event stream; else empty."""

    @property
    def text(self) -> str:
        """The text of all events, if it was to be kept."""

    @property
    def gaps(self) -> list[float]:
        """Seconds between events with text, in order."""
