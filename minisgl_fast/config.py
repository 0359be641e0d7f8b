"""Config: every setting of the server, checked once, then frozen.

The command line (cli.py) and the Python API (llm.py) fill it; the engine process gets it as JSON.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from minisgl_fast.errors import ConfigError
from minisgl_fast.parsers.select import GPT_OSS, REASONING_PARSERS, TOOL_CALL_PARSERS

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL_SOURCES = ("huggingface", "modelscope")
# The model of an engine that has none.
FAKE_MODEL = "fake"

ACCESS = (
    "api_keys",
    "api_key_file",
    "admin_api_key",
    "admin_api_key_file",
    "public_metrics",
    "cors_origins",
    "allowed_hosts",
    "ssl_certfile",
    "ssl_keyfile",
)
KEY_RULE = "1 to 512 visible ASCII characters"
# Scheme, host and port; no path, no upper case, no user.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")


def is_key(text: str) -> bool:
    """Whether a text can be a key: it must fit a header field and survive a log of it."""
    return re.fullmatch(r"[!-~]{1,512}", text) is not None


@dataclass(frozen=True, slots=True)
class Config:
    """All settings. None means: chosen at start from the model and the machine."""

    # model
    model: str
    revision: str | None = None
    model_source: str = "huggingface"
    served_model_name: str | None = None
    chat_template: str | None = None
    reasoning_parser: str = "auto"
    tool_call_parser: str = "auto"
    generation_config: str = "model"
    dtype: str = "auto"
    dummy_weight: bool = False
    max_model_len: int | None = None
    # engine
    device: str = "auto"
    page_size: int | None = None
    num_pages: int | None = None
    memory_ratio: float = 0.9
    max_running_requests: int | None = None
    max_prefill_length: int | None = None
    disable_radix_cache: bool = False
    overlap: bool = True
    cuda_graph_max_bs: int = 256
    num_threads: int | None = None
    # server
    host: str = "127.0.0.1"
    port: int = 1919
    default_max_tokens: int | None = None
    max_queued_requests: int = 4096
    max_body: int = 8 * 1024 * 1024
    drain_timeout_s: float = 30.0
    stream_interval: int = 1
    frontends: int = 1
    # measuring the frontend, without a model
    fake_engine: bool = False
    tick_us: int = 0
    credit_file: str | None = None
    incremental_streaming_output: bool = False
    # access
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str | None = None
    admin_api_key: str | None = field(default=None, repr=False)
    admin_api_key_file: str | None = None
    public_metrics: bool = False
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        _one_of("--model-source", self.model_source, MODEL_SOURCES)
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--device", self.device, DEVICES)
        _one_of("--generation-config", self.generation_config, ("model", "none"))
        _one_of("--reasoning-parser", self.reasoning_parser, ("auto", "none", *REASONING_PARSERS))
        _one_of("--tool-call-parser", self.tool_call_parser, ("auto", "none", *TOOL_CALL_PARSERS))
        parsers = {self.reasoning_parser, self.tool_call_parser}
        if GPT_OSS in parsers and parsers - {GPT_OSS, "auto", "none"}:
            raise ConfigError(
                f"--reasoning-parser and --tool-call-parser must both be {GPT_OSS}, "
                "which is one format for both."
            )
        if self.page_size is not None and self.page_size not in (16, 32, 64, 128, 256):
            raise ConfigError(
                f"--page-size must be a power of two from 16 to 256, got {self.page_size}."
            )
        if not 0.0 < self.memory_ratio <= 1.0:
            raise ConfigError(f"--memory-ratio must be in (0, 1], got {self.memory_ratio:g}.")
        for flag, value, low in (
            ("--num-pages", self.num_pages, 1),
            ("--max-model-len", self.max_model_len, 2),
            ("--max-running-requests", self.max_running_requests, 1),
            ("--max-prefill-length", self.max_prefill_length, 1),
            ("--default-max-tokens", self.default_max_tokens, 1),
            ("--max-queued-requests", self.max_queued_requests, 1),
            ("--max-body", self.max_body, 1024),
            ("--cuda-graph-max-bs", self.cuda_graph_max_bs, 0),
            ("--num-threads", self.num_threads, 1),
            ("--stream-interval", self.stream_interval, 1),
            ("--frontends", self.frontends, 1),
            ("--tick-us", self.tick_us, 0),
            ("--drain-timeout", self.drain_timeout_s, 0),
        ):
            if value is not None and not value >= low:  # a NaN is not
                raise ConfigError(f"{flag} must be at least {low}, got {value}.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be in [0, 65535], got {self.port}.")
        self._check_access()

    def to_dict(self) -> dict[str, Any]:
        """What the engine process may know, JSON-ready; ``Config(**d)`` is the way back.

        Who may use the server is not its business, and whoever looks at settings must see no key.
        """
        return {name: value for name, value in asdict(self).items() if name not in ACCESS}

    def _check_access(self) -> None:
        # A key that is refused is not repeated: the message may end in a log.
        for flag, keys in (
            ("--api-key", self.api_keys),
            ("--admin-api-key", () if self.admin_api_key is None else (self.admin_api_key,)),
        ):
            if not all(map(is_key, keys)):
                raise ConfigError(f"{flag} must be {KEY_RULE}.")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "--cors-origin must be * or an origin as browsers send it, such as "
                    f"https://app.example.com or http://localhost:3000, got {origin!r}."
                )
        for host in self.allowed_hosts:
            if not _HOST_NAME.fullmatch(host):
                raise ConfigError(f"--allowed-host must be a name without a port, got {host!r}.")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile.")


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}.")
