from collections.abc import Callable, Mapping
from typing import Any

from minisgl_fast.api.chat_output import ChatOutput
from minisgl_fast.api.generation import Generation
from minisgl_fast.api.mold import Mold
from minisgl_fast.api.response_format import ResponseFormat
from minisgl_fast.api.task import Task
from minisgl_fast.text.stream import TextStream

class Recipe:
    """What requests have in common that differ in their prompts alone; see plain_session.pyx."""

    route: str
    streams: bool
    watched: bytes | None
    def __init__(
        self,
        task: Task,
        text: TextStream,
        molds: dict[str, Mold],
        make_form: Callable[[str, bytes], ResponseFormat],
        make_output: Callable[[ResponseFormat], ChatOutput] | None = None,
        watched: bytes | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None: ...

class PlainSession(Generation):
    """One generation of one choice, of which the text alone is wanted."""
