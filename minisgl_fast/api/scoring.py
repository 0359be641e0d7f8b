"""``/v1/embeddings`` and ``/v1/score``: answers of the served model that are numbers, not text.

An embedding is the hidden state behind the last norm, of a text's last token or the mean of all its
tokens, cut to ``dimensions`` if asked for and then of length 1 unless ``normalize`` is false. A
score is the probability of each label token behind query and item, or with ``apply_softmax`` its
share among the labels.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import orjson

from minisgl_fast.api.body import doc, parse_body
from minisgl_fast.api.logprobs import MAX_LOGPROB_IDS, LogprobOptions
from minisgl_fast.api.openai_request import MAX_PROMPTS, Prompt, read_prompts
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.response_format import Answer, ResponseFormat, Usage
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.api.task import Task
from minisgl_fast.errors import RequestError
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest
from minisgl_fast.wire import Task as EngineTask

EMBEDDINGS = "/v1/embeddings"
SCORE = "/v1/score"


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    input: Annotated[
        str | list[str | int | list[int]],
        doc("A text, texts, token ids, or lists of token ids."),
    ]
    model: Annotated[str | None, doc("The served model's name, or `default`.")] = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        doc("`base64`: the little-endian float32 values as text (default `float`)."),
    ] = None
    dimensions: Annotated[
        int | None, doc("Keep so many of the first values (default all).", minimum=1)
    ] = None
    pooling: Annotated[
        Literal["last", "mean"] | None,
        doc("The last token's hidden state (the default), or the mean of all."),
    ] = None
    normalize: Annotated[bool | None, doc("Scale to length 1 (default true).")] = None
    cache_salt: Annotated[
        str | None, doc("Requests with different ones share no cached prefixes.")
    ] = None
    user: Annotated[
        str | None, doc("Defined by OpenAI as a label of the end user; no part of the answer.")
    ] = None


class ScoreRequest(msgspec.Struct, kw_only=True):
    query: Annotated[str | list[int], doc("What stands before every item; a text or token ids.")]
    items: Annotated[
        str | list[str | list[int]],
        doc("What to score, all texts or all lists of token ids, as the query is.", minItems=1),
    ]
    label_token_ids: Annotated[
        list[int], doc("The tokens to score.", minItems=1, maxItems=MAX_LOGPROB_IDS)
    ]
    apply_softmax: Annotated[
        bool | None, doc("Scores of an item add up to 1 (default false: probabilities).")
    ] = None
    item_first: Annotated[bool | None, doc("The item stands before the query.")] = None
    model: Annotated[str | None, doc("The served model's name, or `default`.")] = None
    cache_salt: Annotated[
        str | None, doc("Requests with different ones share no cached prefixes.")
    ] = None


class PromptUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(msgspec.Struct):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class ScoreAnswer(msgspec.Struct):
    object: Literal["scoring"]
    scores: list[list[float]]
    model: str
    usage: PromptUsage


class Scoring:
    """The two routes."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    @property
    def routes(self) -> Routes:
        return {
            ("POST", EMBEDDINGS): Route(
                self.embed, "Embed texts", EmbeddingRequest, EmbeddingAnswer
            ),
            ("POST", SCORE): Route(
                self.score, "Score labels behind prompts", ScoreRequest, ScoreAnswer
            ),
        }

    def embed(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        received = pipeline.admit(request)
        body, _ = parse_body(request.body, EmbeddingRequest)
        prompts = read_prompts(body.input, param="input")
        num_values = pipeline.frontend.check_ready().hidden_size
        if body.dimensions is not None and not 1 <= body.dimensions <= num_values:
            raise RequestError(
                f"dimensions must be in [1, {num_values}], got {body.dimensions}.",
                param="dimensions",
            )
        fields = SamplingFields(model=body.model, cache_salt=body.cache_salt)
        pipeline.start(
            Task(
                route=EMBEDDINGS,
                request=request,
                exchange=exchange,
                body=fields,
                prompts=prompts,
                params=pipeline.params(fields, None),
                make_format=lambda _: _Embeddings(body, pipeline.model_name),
                max_tokens=0,
                default_max_tokens=None,
                received=received,
                stream=False,
                param="input",
                kind=EngineTask.EMBED_MEAN if body.pooling == "mean" else EngineTask.EMBED_LAST,
            )
        )

    def score(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        received = pipeline.admit(request)
        body, _ = parse_body(request.body, ScoreRequest)
        labels = _labels(body, pipeline.frontend.check_ready().vocab_size)
        fields = SamplingFields(model=body.model, cache_salt=body.cache_salt, temperature=0.0)
        pipeline.start(
            Task(
                route=SCORE,
                request=request,
                exchange=exchange,
                body=fields,
                prompts=_joined(body),
                params=pipeline.params(fields, 1),
                make_format=lambda _: _Scores(body, pipeline.model_name),
                max_tokens=1,
                default_max_tokens=None,
                received=received,
                stream=False,
                param="items",
                logprobs=LogprobOptions(num_top=0, ids=labels),
                logprobs_param="label_token_ids",
            )
        )


def _labels(body: ScoreRequest, vocab_size: int) -> tuple[int, ...]:
    labels = body.label_token_ids
    if not 1 <= len(labels) <= MAX_LOGPROB_IDS:
        raise RequestError(
            f"label_token_ids must hold 1 to {MAX_LOGPROB_IDS} ids, got {len(labels)}.",
            param="label_token_ids",
        )
    if min(labels) < 0 or max(labels) >= vocab_size:
        raise RequestError(
            f"label_token_ids must be in [0, {vocab_size - 1}].", param="label_token_ids"
        )
    return tuple(labels)


def _joined(body: ScoreRequest) -> list[Prompt]:
    """Query and item of every prompt."""
    items = [body.items] if isinstance(body.items, str) else body.items
    if not 1 <= len(items) <= MAX_PROMPTS:
        raise RequestError(
            f"items must hold 1 to {MAX_PROMPTS} items, got {len(items)}.", param="items"
        )
    if any(type(item) is not type(body.query) for item in items):
        raise RequestError(
            "query and items must be all texts, or all lists of token ids.", param="items"
        )
    query: Any = body.query
    return [item + query if body.item_first else query + item for item in items]


class _Embeddings(ResponseFormat):
    """The answer of ``/v1/embeddings``."""

    def __init__(self, body: EmbeddingRequest, model: str) -> None:
        self._body = body
        self._model = model

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        data = [
            {"object": "embedding", "index": answer.index, "embedding": self._value(answer)}
            for answer in answers
        ]
        return orjson.dumps(
            {"object": "list", "data": data, "model": self._model, "usage": _usage(usage)}
        )

    def _value(self, answer: Answer) -> list[float] | str:
        vector = list(answer.embedding[: self._body.dimensions])
        if self._body.normalize is not False:
            vector = _unit(vector)
        if self._body.encoding_format == "base64":
            return base64.b64encode(array("f", vector).tobytes()).decode()
        return vector


class _Scores(ResponseFormat):
    """The answer of ``/v1/score``."""

    def __init__(self, body: ScoreRequest, model: str) -> None:
        self._softmax = bool(body.apply_softmax)
        self._model = model

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        scores = []
        for answer in answers:
            (token,) = answer.logprobs
            values = [math.exp(value) for value in token.of_ids]
            if self._softmax:
                values = _shares(token.of_ids)
            scores.append(values)
        return orjson.dumps(
            {"object": "scoring", "scores": scores, "model": self._model, "usage": _usage(usage)}
        )


def _usage(usage: Usage) -> dict[str, int]:
    return {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}


def _unit(vector: Sequence[float]) -> list[float]:
    """The vector with length 1; zeros stay zeros."""
    length = math.sqrt(math.fsum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


def _shares(logprobs: Sequence[float]) -> list[float]:
    """The softmax; labels that are all impossible share alike."""
    largest = max(logprobs)
    weights = [1.0 if value == largest else math.exp(value - largest) for value in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
