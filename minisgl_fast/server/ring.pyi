from collections.abc import Sequence

class SendRing:
    """Many sends as one system call; see ring.pyx."""

    works: bool
    def send_all(self, pairs: Sequence[tuple[int, bytes]]) -> list[int]: ...
