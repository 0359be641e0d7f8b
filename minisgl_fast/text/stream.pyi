"""TextStream and TokenTable; rules and C interface stand in stream.pyx and stream.pxd."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from minisgl_fast.text.stop_regex import StopProgram

class Window(Protocol):
    """Incremental decoding of one generation for decoders that are not ByteLevel."""

    def step(self, token: int, /) -> str: ...
    def finish(self) -> str: ...
    def fresh(self) -> Window:
        """One that has decoded nothing."""

class TokenTable:
    """The bytes of every token id, and which ids are special; immutable."""

    num_tokens: int
    max_token_bytes: int

    def __init__(self, tokens: list[bytes], special: Iterable[int]) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, token: int) -> bytes:
        """The bytes of a token; empty for an id that the tokenizer does not know."""

    def is_special(self, token: int) -> bool: ...

class TextStream:
    """The text of one generation: token ids in, text that may be shown out."""

    finished: bool
    """A stop string is complete, or ``finish`` was called: further tokens are ignored."""
    num_taken: int
    """How many bytes left it, counted as they came: not as U+FFFD."""
    matched: int
    """Index of the stop that ended the text, patterns behind strings, or -1."""

    def __init__(
        self,
        table: TokenTable,
        stops: Sequence[bytes] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        window: Window | None = None,
        min_tokens: int = 0,
        patterns: StopProgram | None = None,
    ) -> None:
        """``stops``: UTF-8 of stop strings. RequestError(param="stop") if one is empty or not
        UTF-8. They and ``patterns`` count from the ``min_tokens``-th token on."""

    def fresh(self) -> TextStream:
        """A stream with the rules of this one, to which nothing was fed."""

    def feed(self, token: int) -> bool:
        """Append one token. Returns whether the text is finished."""

    def take(self) -> bytes:
        """The text that became ready since the last take, as UTF-8."""

    def take_json(self) -> bytes:
        """The same, escaped as the inside of a JSON string (no quotes around it)."""

    def finish(self) -> None:
        """No token follows: what was held back becomes ready."""

    @property
    def num_pushed(self) -> int:
        """How many bytes came, but for those that a stop cut off. ``num_taken`` counts alike."""

    @property
    def stopped(self) -> bool:
        """Whether a stop ended the text; ``matched`` is its index."""
