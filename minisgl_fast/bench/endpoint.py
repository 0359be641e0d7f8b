"""A server's URL, and a sample as the bytes of a request to it.

Four APIs: ``chat`` (/v1/chat/completions), ``completions`` (/v1/completions), and ``/generate`` as
Mini-SGLang (``generate``) and as SGLang (``sglang``) have it. Every request streams; the first two
ask for usage at the end.
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

from minisgl_fast.bench import reader
from minisgl_fast.bench.datasets import Sample
from minisgl_fast.errors import ConfigError

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "generate": "/generate",
    "sglang": "/generate",
}
# These name no model and tell no usage unless asked for.
NATIVE = ("generate", "sglang")
READER_API = {
    "chat": reader.CHAT,
    "completions": reader.COMPLETIONS,
    "generate": reader.GENERATE,
    "sglang": reader.SGLANG,
}
MODELS_TIMEOUT_S = 30.0
MAX_MODELS_BYTES = 1 << 20


@dataclass(frozen=True)
class Endpoint:
    """Where requests go and what all of them say.

    base_url: scheme, host, port and maybe a path, with or without /v1 at its end.
    extra_body: keys that are put into every body, over ours.
    """

    base_url: str
    api: str = "chat"
    model: str | None = None
    path: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        """ConfigError if the URL or a header cannot be sent."""
        url = urlsplit(self.base_url)
        try:
            valid = (
                url.scheme in ("http", "https")
                and bool(url.hostname)
                and url.port != 0
                and not url.username
            )
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(f"--base-url: {self.base_url} is not an http or https URL")
        for text in (self.base_url, self.path or "", *self.headers, *self.headers.values()):
            if not text.isascii() or not text.isprintable():
                raise ConfigError(f"{text!r} cannot stand in a URL or header")

    @property
    def is_tls(self) -> bool:
        return urlsplit(self.base_url).scheme == "https"

    @property
    def host(self) -> str:
        return urlsplit(self.base_url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.base_url).port or (443 if self.is_tls else 80)

    @property
    def reader_api(self) -> int:
        """The api of the ResponseReader."""
        return READER_API[self.api]

    @property
    def target(self) -> str:
        """The path of the requests."""
        return self.path or self._join(PATHS[self.api])

    def _join(self, path: str) -> str:
        prefix = urlsplit(self.base_url).path.rstrip("/")
        if prefix.endswith("/v1") and path.startswith("/v1/"):
            prefix = prefix.removesuffix("/v1")
        return prefix + path

    def encode(self, sample: Sample) -> bytes:
        """The whole HTTP request."""
        body = orjson.dumps(self._body(sample))
        lines = [
            f"POST {self.target} HTTP/1.1",
            f"Host: {urlsplit(self.base_url).netloc}",
            "User-Agent: minisgl-fast-bench",
            "Accept: text/event-stream",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    def _body(self, sample: Sample) -> dict[str, Any]:
        if self.api == "sglang":
            return {**self._sglang_body(sample), **self.extra_body}
        body: dict[str, Any] = {"max_tokens": sample.num_output, "stream": True}
        if self.model is not None:
            body["model"] = self.model
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.api == "chat":
            body["messages"] = [*sample.history, {"role": "user", "content": sample.prompt}]
        else:
            body["prompt"] = sample.prompt
            if sample.history:
                said = "".join(message["content"] for message in sample.history)
                body["prompt"] = f"{said}{sample.prompt}"
        if self.api != "generate":
            body["stream_options"] = {"include_usage": True}
        return {**body, **self.extra_body}

    def _sglang_body(self, sample: Sample) -> dict[str, Any]:
        params: dict[str, Any] = {"max_new_tokens": sample.num_output}
        if self.ignore_eos:
            params["ignore_eos"] = True
        said = "".join(message["content"] for message in sample.history)
        prompt = (
            {"text": f"{said}{sample.prompt}"}
            if isinstance(sample.prompt, str)
            else {"input_ids": sample.prompt}
        )
        return {**prompt, "sampling_params": params, "stream": True}

    def first_model(self) -> str:
        """The first name in the server's /v1/models. ConfigError if it does not tell."""
        make = http.client.HTTPSConnection if self.is_tls else http.client.HTTPConnection
        connection = make(self.host, self.port, timeout=MODELS_TIMEOUT_S)
        path = self._join("/v1/models")
        try:
            connection.request("GET", path, headers=dict(self.headers))
            response = connection.getresponse()
            body = response.read(MAX_MODELS_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"no answer from {self.base_url}{path}: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise ConfigError(f"{path} answered {response.status}; name the model with --model")
        try:
            return str(orjson.loads(body)["data"][0]["id"])
        except (orjson.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(f"{path} names no model; name it with --model") from error
