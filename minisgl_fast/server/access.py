"""Access: who may ask for what, judged by the head of a request.

``Access.admit`` is the ``admit`` of the HTTP server: it runs before a body is read and before the
router, for every request that HTTP itself does not refuse.

Rules:
- Deny by default: with a key set, all paths need one but ``PUBLIC_PATHS``, also those that do not
  exist. The path judged is the one string that the router gets.
- A key is sent as ``Authorization: Bearer KEY`` or, as Anthropic's clients do, ``x-api-key: KEY``.
- Keys are kept as digests only. A request's key is compared with every one of them, in a time that
  depends neither on the key nor on where it differs.
- What concerns all clients needs ``request.is_admin`` (``check_admin``): the admin key where there
  is one, else any key.
- A browser's page may read answers only if its origin is on the list; the answers never allow
  credentials (cookies), so ``*`` gives nobody more than a key of his own would.
- No byte of a request gets into an answer: an allowed origin is the one of the list.
- A server without a key that only its own machine reaches trusts that machine's programs, and a
  browser is one of them: a page of any site could have its own name resolve to 127.0.0.1 and so be
  of the server's own origin (DNS rebinding). There the Host of a request must be a name that no
  public DNS gives out, or one of the operator's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from minisgl_fast.config import KEY_RULE, Config, is_key
from minisgl_fast.errors import ConfigError, ForbiddenError, MinisglError, UnauthorizedError
from minisgl_fast.server.exchange import JSON, Exchange
from minisgl_fast.server.http_rules import HttpRequest
from minisgl_fast.server.router import Handler

PUBLIC_PATHS = frozenset(("/health", "/ready"))
METRICS_PATH = "/metrics"
MAX_KEY_FILE_BYTES = 1 << 20

# "*" stands for every name but Authorization (Fetch standard, CORS protocol).
_PREFLIGHT_HEAD = (
    (b"access-control-allow-methods", b"GET, HEAD, POST, PUT, DELETE"),
    (b"access-control-allow-headers", b"authorization, content-type, x-api-key, *"),
    (b"access-control-max-age", b"7200"),
)
_ALLOW_ORIGIN = (
    b"access-control-allow-origin: %b\r\n"
    b"access-control-expose-headers: x-request-id, request-id, retry-after\r\n"
)
_VARY = b"vary: origin\r\n"

# Addresses, names of one label, and top-level domains that are kept for local use.
_LOCAL_HOST = re.compile(
    rb"\[.*\]|[0-9.]+|[^.]*|.*\.(?:localhost|local|internal|lan|home\.arpa|test)"
)
MAX_KNOWN_HOSTS = 64


class Access:
    """The rules of one server."""

    def __init__(
        self,
        keys: Iterable[str] = (),
        admin_keys: Iterable[str] = (),
        *,
        public_metrics: bool = False,
        cors_origins: Iterable[str] = (),
        hosts: Iterable[str] | None = None,
    ) -> None:
        """Without ``keys`` every client is welcome; without ``admin_keys``, each is an admin.

        ``hosts``: public names that the server goes by, of which others are refused; None for any.
        """
        self._admin_keys = [_digest(key.encode()) for key in admin_keys]
        client_keys = [_digest(key.encode()) for key in keys]
        self.needs_key = bool(client_keys)
        self._keys = client_keys + self._admin_keys
        self._hosts = None if hosts is None else {host.lower().encode() for host in hosts}
        self._known_hosts: set[bytes | None] = {None}  # HTTP/1.0 may send none
        self._public = PUBLIC_PATHS | {METRICS_PATH} if public_metrics else PUBLIC_PATHS
        self._origins = {
            origin.encode(): _ALLOW_ORIGIN % origin.encode() + (b"" if origin == "*" else _VARY)
            for origin in cors_origins
        }

    @classmethod
    def load(cls, config: Config) -> Access:
        """By the settings, with the keys of their files. ConfigError if one cannot be read."""
        keys = [*config.api_keys]
        if config.api_key_file is not None:
            keys += _read_keys("--api-key-file", config.api_key_file)
        admin_keys = [] if config.admin_api_key is None else [config.admin_api_key]
        if config.admin_api_key_file is not None:
            admin_keys += _read_keys("--admin-api-key-file", config.admin_api_key_file)
        return cls(
            keys,
            admin_keys,
            public_metrics=config.public_metrics,
            cors_origins=config.cors_origins,
            hosts=config.allowed_hosts if not keys and is_loopback(config.host) else None,
        )

    def admit(self, request: HttpRequest) -> MinisglError | None:
        """Judge a head: None, or the error to answer it with."""
        if self._origins:
            request.extra_head = self._cors_head(request)
            if _is_allowed_preflight(request):
                return None
        if self._hosts is not None and not self._is_own_host(request):
            return ForbiddenError(
                "This server has no key, so it answers only to names of its own machine. "
                "Start it with --allowed-host for this one, or with --api-key-file."
            )
        if not self._keys:
            return None
        presented = _presented_keys(request)
        if self._admin_keys:
            request.is_admin = _matches(presented, self._admin_keys)
        if not self.needs_key or request.path in self._public or _matches(presented, self._keys):
            return None
        if not presented:
            return UnauthorizedError(
                "This server needs an API key, in a header such as 'Authorization: Bearer KEY'."
            )
        return UnauthorizedError("Incorrect API key provided.")

    def guard(self, handler: Handler) -> Handler:
        """The handler, with the questions answered that browsers ask before a request."""
        if not self._origins:
            return handler

        def answer(request: HttpRequest, exchange: Exchange) -> None:
            if _is_allowed_preflight(request):
                exchange.respond(204, b"", JSON, _PREFLIGHT_HEAD)
            else:
                handler(request, exchange)

        return answer

    def _is_own_host(self, request: HttpRequest) -> bool:
        """Whether the Host is one that a page of another site cannot have."""
        field = request.headers.get(b"host")
        if field in self._known_hosts or request.path in self._public:
            return True
        assert self._hosts is not None and field is not None
        name = re.sub(rb":[0-9]*$", b"", field.strip().lower())
        name = name.removesuffix(b".")
        if name not in self._hosts and _LOCAL_HOST.fullmatch(name) is None:
            return False
        if len(self._known_hosts) < MAX_KNOWN_HOSTS:
            self._known_hosts.add(field)
        return True

    def _cors_head(self, request: HttpRequest) -> bytes:
        """What an answer says about origins. Not to depend on who asks, it names ``vary`` always:
        a cache must not give one page's answer to another."""
        origins = self._origins
        return origins.get(b"*") or origins.get(request.headers.get(b"origin", b"")) or _VARY


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches such an address."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def check_admin(request: HttpRequest) -> None:
    """ForbiddenError unless the request has what concerns all clients needs."""
    if not request.is_admin:
        raise ForbiddenError("This needs the server's admin key.")


def _is_allowed_preflight(request: HttpRequest) -> bool:
    """A CORS preflight of a page that may go on; it never carries a key."""
    return (
        request.method == "OPTIONS"
        and b"origin" in request.headers
        and b"access-control-request-method" in request.headers
        and request.extra_head not in (b"", _VARY)
    )


def _presented_keys(request: HttpRequest) -> list[bytes]:
    """The digests of the keys that a request carries."""
    keys = []
    authorization = request.headers.get(b"authorization")
    if authorization is not None:
        scheme, _, key = authorization.strip().partition(b" ")
        if scheme.lower() == b"bearer":
            keys.append(_digest(key.strip()))
    key = request.headers.get(b"x-api-key", b"").strip()
    if key:
        keys.append(_digest(key))
    return keys


def _matches(presented: list[bytes], known: list[bytes]) -> bool:
    found = False
    for key in presented:
        for digest in known:  # all of them, whatever was found
            found |= hmac.compare_digest(key, digest)
    return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read_keys(flag: str, path: str) -> list[str]:
    """One key per line; empty lines count for nothing. ConfigError, which shows no key."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"Cannot read {flag} {path}: {error.strerror}.") from None
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{flag} {path} is over {MAX_KEY_FILE_BYTES} bytes.")
    keys = []
    for number, line in enumerate(data.splitlines(), 1):
        text = line.strip().decode("ascii", "replace")
        if text and not is_key(text):
            raise ConfigError(f"{flag} {path}, line {number}: a key must be {KEY_RULE}.")
        keys += [text] if text else []
    if not keys:  # an empty file must not open the server to everybody
        raise ConfigError(f"{flag} {path} has no key in it.")
    return keys
