"""Types of stop_regex.pyx."""

from collections.abc import Sequence

class StopProgram:
    """The automaton of some patterns, shared by all streams that look for them."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """RequestError(param="stop_regex") if one is not valid, or asks for too much."""

class StopRegex:
    """The search in one text, byte by byte."""

    matched: int
    """The pattern that is complete, or -1."""

    def __init__(self, program: StopProgram) -> None: ...
    def feed(self, data: bytes) -> int:
        """Read on; returns how many bytes were read, fewer than given if a match ends there."""

    @property
    def held(self) -> int:
        """How many of the bytes read, at their end, may belong to a match."""

    @property
    def start(self) -> int:
        """Offset of the match's first byte, once one is complete."""
