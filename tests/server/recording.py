"""What tests of the token loop share: a response that keeps what is done to it."""

from minisgl_fast.server.response import Response


class RecordingExchange:
    """Keeps what a response writes."""

    def __init__(self):
        self.paused = False
        self.written = []

    def write(self, data):
        self.written.append(data)

    def descriptor(self):
        return -1

    def take(self):
        written, self.written = self.written, []
        return written


class RecordingResponse(Response):
    """Writes its life as readable text."""

    def __init__(self, exchange, streaming=True):
        super().__init__(exchange, streaming)
        self.log = []
        self.whole = b""

    def open_stream(self):
        return b"<open>"

    def close_choice(self, choice, text):
        end = b"<%d:%b%d>" % (choice.index, text, choice.reason)
        if self.streaming:
            return end
        self.whole += end
        return b""

    def complete(self, events):
        self.log.append(self.whole + events)

    def fail(self, error):
        self.ended = True
        self.log.append(error)
