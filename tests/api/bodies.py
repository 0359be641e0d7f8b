"""What tests of bodies share."""

import json

import pytest

from minisgl_fast.errors import RequestError


def refused(parse, body):
    """The error that a body, as JSON or as bytes, is refused with."""
    with pytest.raises(RequestError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.http_status == 400
    return caught.value
