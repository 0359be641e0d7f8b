"""PlainBody: the bodies that most clients send, decoded and checked in one pass.

A plain body has no other fields than the common ones, each of its own type, and where there are
messages each is a role and a text. Everything else, an invalid body included, is None here: the
caller then reads it in full (body.py), so what is refused and how is decided in one place.

Rules: a field is plain only if it is named here, so one that the request gets later is not; what is
accepted here must be exactly what reading in full would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_type_hints

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


def _plain_shape(shape: type[SamplingFields], plainer: Mapping[str, Any]) -> type:
    """A Struct that has only the plain fields, and so is made fast, but reads like ``shape``: the
    other fields are None for all its objects; properties and methods are those of ``shape``."""
    kinds = get_type_hints(shape, include_extras=True)
    fields: list[Any] = []
    shared: dict[str, Any] = {}
    for base in reversed(shape.__mro__):
        shared |= {
            name: value
            for name, value in vars(base).items()
            if isinstance(value, (property, FunctionType)) and not name.startswith("__")
        }
    for name in shape.__struct_fields__:
        if name in plainer:
            fields.append((name, plainer[name] | None, None))
        elif name in PLAIN_FIELDS:
            fields.append((name, kinds[name], None))
        else:
            shared[name] = None
    return msgspec.defstruct(
        f"Plain{shape.__name__}", fields, namespace=shared, forbid_unknown_fields=True, kw_only=True
    )


class PlainBody(Generic[Request]):
    """Reads the plain bodies of one route."""

    def __init__(self, shape: type[Request], plainer: Mapping[str, Any]) -> None:
        """``plainer``: types of fields, narrower than the shape has them."""
        self._decoder: Any = msgspec.json.Decoder(_plain_shape(shape, plainer))

    def read(self, body: bytes) -> Request | None:
        """The request, None if the body is not plain."""
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH_BRACKETS:
            return None
        try:
            request: Any = self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        if (
            (request.n is not None and request.n != 1)
            or (request.stream_options is not None and not request.stream)
            or (request.seed is not None and abs(request.seed) > MAX_INTEGER)
            or (request.top_k is not None and abs(request.top_k) > MAX_INTEGER)
            or (request.max_tokens is not None and not 0 < request.max_tokens < MAX_INTEGER)
        ):
            return None
        return request  # type: ignore[no-any-return]
