from typing import Protocol

from minisgl_fast.bench.reader import ResponseReader

class Watched(Protocol):
    """What a connection is told."""

    def answered(self) -> None:
        """The response is complete."""

    def read_by_transport(self) -> None:
        """The peer has closed, or the socket has an error."""

    def give_up(self, kind: str, message: str) -> None:
        """What came is no response."""

class Poller:
    """Reads the sockets of many connections in one go. OSError where there is no epoll."""

    def fileno(self) -> int:
        """Readable when a watched socket is."""

    def watch(self, descriptor: int, reader: ResponseReader, connection: Watched) -> None:
        """Read this socket from now on; its transport must not."""

    def forget(self, descriptor: int, connection: Watched) -> None:
        """Read it no more, if it is this connection's."""

    def read_ready(self) -> None:
        """Feed the readers of all sockets that have bytes; the times are time.perf_counter's."""

    def close(self) -> None:
        """Forget all."""
