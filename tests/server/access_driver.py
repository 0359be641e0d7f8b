"""What tests of access share: requests that are only a head, and what becomes of them."""

from minisgl_fast.server.http import HttpRequest

PAGE = b"https://app.example.com"


def head(path="/v1/models", method="GET", **headers):
    fields = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return HttpRequest(method, path, headers=fields)


def status(access, request):
    error = access.admit(request)
    return 200 if error is None else error.http_status
