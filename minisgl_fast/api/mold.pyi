MARKS: tuple[bytes, ...]
"""What stands for a request id, the time, a text, a choice's end, and the usage."""

class Mold:
    """Bytes that are the same for many answers, with gaps for what is not."""

    def __init__(self, written: bytes) -> None:
        """``written``: by a format, from values that are MARKS."""
