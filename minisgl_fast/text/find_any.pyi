from collections.abc import Iterable

class FindAny:
    """Whether a text has any of some short marks, by a character of each that is rare."""

    def __init__(self, marks: Iterable[tuple[str, str]]) -> None:
        """``marks``: pairs of a rare ASCII character and a mark that has it."""

    def found_in(self, text: str) -> bool:
        """UnicodeEncodeError for half of a surrogate pair."""
