"""Which handler a request reaches."""

import pytest

from minisgl_fast.errors import MethodNotAllowedError, NotFoundError
from minisgl_fast.server.http import HttpRequest, Router


def _named(name: str):
    def handler(request, exchange) -> None:
        raise AssertionError(name)

    handler.__name__ = name
    return handler


ROUTER = Router(
    {
        ("GET", "/a"): _named("get a"),
        ("POST", "/a"): _named("post a"),
        ("DELETE", "/b"): _named("delete b"),
        ("GET", "/m/*"): _named("get m"),
        ("GET", "/m/deep/*"): _named("get deep"),
        ("GET", "/m/exact"): _named("get exact"),
        ("HEAD", "/h"): _named("head h"),
        ("GET", "/h"): _named("get h"),
    }
)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/a", "get a"),
        ("POST", "/a", "post a"),
        ("HEAD", "/a", "get a"),
        ("HEAD", "/h", "head h"),
        ("GET", "/m/org/name", "get m"),
        ("HEAD", "/m/org/name", "get m"),
        ("GET", "/m/deep/x", "get deep"),
        ("GET", "/m/deep/", "get m"),
        ("GET", "/m/exact", "get exact"),
    ],
)
def test_found(method: str, path: str, expected: str):
    assert ROUTER.find(HttpRequest(method, path)).__name__ == expected


@pytest.mark.parametrize("path", ["/", "/A", "/a/", "//a", "/a%20", "/m", "/m/", "/%61", "*"])
def test_not_found(path: str):
    with pytest.raises(NotFoundError):
        ROUTER.find(HttpRequest("GET", path))


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/a", "GET, HEAD, POST"),
        ("OPTIONS", "/a", "GET, HEAD, POST"),
        ("GET", "/b", "DELETE"),
        ("HEAD", "/b", "DELETE"),
        ("POST", "/m/x", "GET, HEAD"),
        ("POST", "/h", "GET, HEAD"),
        ("CONNECT", "a:80", "GET, POST, HEAD"),
    ],
)
def test_method_not_allowed(method: str, path: str, allow: str):
    with pytest.raises(MethodNotAllowedError) as caught:
        ROUTER.find(HttpRequest(method, path))
    assert sorted(caught.value.allow.split(", ")) == sorted(allow.split(", "))


def test_a_long_path_is_not_repeated_whole():
    with pytest.raises(NotFoundError) as caught:
        ROUTER.find(HttpRequest("GET", "/" + "x" * 8000))
    assert len(caught.value.message) < 300
