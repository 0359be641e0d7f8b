"""PlainBody: the bodies that most clients send, decoded and checked in one pass.

A plain body has no other fields than the common ones, each of its own type, and where there are
messages each is a role and a text. Everything else, an invalid body included, is None here: the
caller then reads it in full (body.py), so what is refused and how is decided in one place.

Rules: a field is plain only if it is named here, so one that the request gets later is not; what is
accepted here must be exactly what reading in full would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import msgspec

from minisgl_fast.api.sampling_fields import SamplingFields

PLAIN_FIELDS = frozenset(
    (
        "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
        "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop",
        "ignore_eos", "n", "stream", "stream_options", "chat_template_kwargs",
    )
)  # fmt: skip
# Past this orjson makes a float of an integer, which is then refused.
MAX_INTEGER = 2**63 - 1
MAX_DEPTH_BRACKETS = 64

Integer = Annotated[int, msgspec.Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)]

Request = TypeVar("Request", bound=SamplingFields)


class PlainMessage(msgspec.Struct, forbid_unknown_fields=True):
    """A message that is only text; the fields that it cannot have are None."""

    role: Literal["system", "user", "assistant"]
    content: str
    name: ClassVar[None] = None
    tool_calls: ClassVar[None] = None
    tool_call_id: ClassVar[None] = None
    reasoning_content: ClassVar[None] = None
    reasoning: ClassVar[None] = None


class PlainBody(Generic[Request]):
    """Reads the plain bodies of one route."""

    def __init__(self, shape: type[Request], plainer: Mapping[str, Any]) -> None:
        """``plainer``: types of fields, narrower than the shape has them."""
        fields: list[Any] = [(name, kind | None, None) for name, kind in plainer.items()]
        strict = msgspec.defstruct(
            shape.__name__, fields, bases=(shape,), forbid_unknown_fields=True, kw_only=True
        )
        plain = PLAIN_FIELDS.union(plainer)
        rest = [name for name in shape.__struct_fields__ if name not in plain]
        self._decoder = msgspec.json.Decoder(strict)
        self._rest = attrgetter(*rest)
        self._nothing = self._rest(shape(**dict.fromkeys(plainer)))

    def read(self, body: bytes) -> Request | None:
        """The request, None if the body is not plain."""
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH_BRACKETS:
            return None
        try:
            request: Any = self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        if (
            self._rest(request) != self._nothing
            or (request.n is not None and request.n != 1)
            or (request.stream_options is not None and not request.stream)
            or (request.seed is not None and abs(request.seed) > MAX_INTEGER)
            or (request.top_k is not None and abs(request.top_k) > MAX_INTEGER)
            or (request.max_tokens is not None and not 0 < request.max_tokens < MAX_INTEGER)
        ):
            return None
        return request  # type: ignore[no-any-return]
