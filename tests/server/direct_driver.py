"""What tests of chunks straight to sockets share: an exchange on a socket that takes little."""

import contextlib
import re
import socket

from minisgl_fast.server.response import Response

SMALL_BUFFER = 4608  # what the kernel gives at least


class SocketExchange:
    """An exchange on one end of a socket pair; ``peer`` is the other. Its transport is ``unsent``,
    and holds what the socket did not take until ``drain``."""

    def __init__(self):
        self.socket, self.peer = socket.socketpair()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
        self.socket.setblocking(False)
        self.peer.setblocking(False)
        self.unsent = b""
        self.received = b""
        self.num_rests = self.num_writes = 0
        self.ending = b""

    @property
    def paused(self):
        return bool(self.unsent)

    def descriptor(self):
        return self.socket.fileno()

    def write(self, events):
        assert not self.unsent
        self.num_writes += 1
        self._send(b"%x\r\n%b\r\n" % (len(events), events))

    def write_rest(self, data):
        assert not self.unsent
        self.num_rests += 1
        self._send(data)

    def finish(self, events):
        self.ending = b"%x\r\n%b\r\n" % (len(events), events)

    def _send(self, data):
        self.unsent += data
        self.drain()

    def drain(self):
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent = b""

    def read(self, size=1 << 20):
        with contextlib.suppress(BlockingIOError):
            self.received += self.peer.recv(size)

    def close(self):
        self.socket.close()
        self.peer.close()


class SocketResponse(Response):
    def open_stream(self):
        return b"<open>"

    def close_choice(self, choice, text):
        return b"(%d:%b)" % (choice.index, text)

    def complete(self, events):
        self.exchange_.finish(events)

    def fail(self, error):
        raise error


def unchunk(data):
    """The body of whole HTTP chunks; fails where the framing is broken."""
    body = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        assert re.fullmatch(rb"[1-9a-f][0-9a-f]*", size), data[:40]
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        body += rest[:length]
        data = rest[length + 2 :]
    return body
