MAX_FRAME_BYTES: int

class FrameReader:
    """Cuts a byte stream into frames; see frames.pyx."""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]: ...
