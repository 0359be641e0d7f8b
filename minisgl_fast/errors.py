"""Every error that this project raises on purpose.

    MinisglError                500  something of ours failed
    |- ConfigError              a flag, a file or a machine that cannot work: one line, exit code 1
    |  `- ModelError            a checkpoint, tokenizer or template that cannot be served
    |- RequestError             400  the client's request; ``param`` names the field
    |  |- ContextLengthError    400  prompt (and max_tokens) longer than the context
    |  |- UnauthorizedError     401
    |  |- ForbiddenError        403
    |  |- UnknownModelError     404
    |  |- NotFoundError         404
    |  |- MethodNotAllowedError 405
    |  |- RequestTimeoutError   408
    |  |- PayloadTooLargeError  413
    |  |- UriTooLongError       414
    |  |- HeadersTooLargeError  431
    |  |- NotImplementedByServerError 501
    |  `- HttpVersionError     505
    |- OverloadedError          503  queue full, loading or draining; carries Retry-After
    `- EngineError              500  the engine process failed or died

Rules: user input never meets an ``assert``; an error that reaches a client carries a message
written for that client, never the text of a foreign exception.
"""

from __future__ import annotations


class MinisglError(Exception):
    """Base class. ``http_status``, ``type`` and ``code`` are what a client gets to see."""

    http_status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(MinisglError):
    """A flag, a file or a machine that cannot work; printed as one line, exit code 1."""

    code = "config_error"


class ModelError(ConfigError):
    """A checkpoint, tokenizer or template that cannot be served."""

    code = "model_error"


class RequestError(MinisglError):
    """The request is at fault; ``param`` names the field."""

    http_status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthError(RequestError):
    """The prompt, or prompt plus ``max_tokens``, is longer than the model's context."""

    code = "context_length_exceeded"


class UnauthorizedError(RequestError):
    """No key, or none that is known here."""

    http_status = 401
    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """Whoever asks is known, or need not be, but may not do this."""

    http_status = 403
    code = "forbidden"


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""

    http_status = 404
    code = "model_not_found"


class NotFoundError(RequestError):
    """No such route."""

    http_status = 404
    code = "not_found"


class MethodNotAllowedError(RequestError):
    """The route exists, for other methods; ``allow`` lists them."""

    http_status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimeoutError(RequestError):
    """The client took too long to send its headers or its body."""

    http_status = 408
    code = "request_timeout"


class PayloadTooLargeError(RequestError):
    """The body is over ``--max-body``."""

    http_status = 413
    code = "payload_too_large"


class UriTooLongError(RequestError):
    """The request line is over its limit."""

    http_status = 414
    code = "uri_too_long"


class HeadersTooLargeError(RequestError):
    """The header block is over its limit, in bytes or in fields."""

    http_status = 431
    code = "headers_too_large"


class NotImplementedByServerError(RequestError):
    """Valid HTTP that this server does not speak, such as ``Transfer-Encoding: gzip``."""

    http_status = 501
    code = "not_implemented"


class HttpVersionError(RequestError):
    """An HTTP version other than 1.0 and 1.1."""

    http_status = 505
    code = "http_version_not_supported"


class OverloadedError(MinisglError):
    """Loading, draining, or more work queued than allowed; worth a retry."""

    http_status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(MinisglError):
    """The engine process failed or died."""

    code = "engine_error"
