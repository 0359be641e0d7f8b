"""What the server tells about itself: models, health, metrics."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import unquote

import orjson

from minisgl_fast.api.answers import ModelCard, ModelList, State, Status
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.server.exchange import JSON, Exchange
from minisgl_fast.server.http_rules import HttpRequest
from minisgl_fast.server.metrics import METRICS_TEXT, Metrics

MODELS = "/v1/models"


class Info:
    """The routes that only answer from what this process knows."""

    def __init__(self, pipeline: Pipeline, metrics: Metrics) -> None:
        self._pipeline = pipeline
        self._frontend = pipeline.frontend
        self._metrics = metrics
        self._created = int(time.time())

    @property
    def routes(self) -> Routes:
        return {
            ("GET", MODELS): Route(self.models, "List the served model", answer=ModelList),
            ("GET", f"{MODELS}/*"): Route(
                self.model, "Describe the served model", answer=ModelCard
            ),
            ("GET", "/v1"): Route(self.root, "Tell that the API is there", answer=Status),
            ("POST", "/v1"): Route(self.root, "Tell that the API is there", answer=Status),
            ("GET", "/health"): Route(
                self.health, "Tell whether the server does its work", answer=State
            ),
            ("GET", "/ready"): Route(
                self.ready, "Tell whether new requests are welcome", answer=State
            ),
            ("GET", "/metrics"): Route(
                self.scrape, "Counters and gauges in Prometheus text", media_type="text/plain"
            ),
        }

    def models(self, request: HttpRequest, exchange: Exchange) -> None:
        self._answer(request, exchange, 200, _model_list(*self._card()))

    def model(self, request: HttpRequest, exchange: Exchange) -> None:
        name = unquote(request.path[len(MODELS) + 1 :])
        self._pipeline.check_model(name)
        self._answer(request, exchange, 200, _model_card(*self._card()))

    def root(self, request: HttpRequest, exchange: Exchange) -> None:
        self._answer(request, exchange, 200, b'{"status":"ok"}')

    def health(self, request: HttpRequest, exchange: Exchange) -> None:
        """Whether the process does its work; a server that drains is healthy."""
        state = self._frontend.state
        self._answer_state(request, exchange, 200 if state in ("ready", "draining") else 503)

    def ready(self, request: HttpRequest, exchange: Exchange) -> None:
        """Whether new requests are welcome."""
        self._answer_state(request, exchange, 200 if self._frontend.state == "ready" else 503)

    def scrape(self, request: HttpRequest, exchange: Exchange) -> None:
        """The sum of all frontends of this server."""

        def answer(others: list[dict[str, Any]]) -> None:
            if not exchange.closed:
                self._answer(request, exchange, 200, self._metrics.render(others), METRICS_TEXT)

        self._frontend.peers.ask("metrics", None, answer)

    def _card(self) -> tuple[str, str, int, int | None]:
        facts = self._frontend.facts
        limit = facts.max_model_len if facts else None
        return self._pipeline.model_name, self._pipeline.config.model, self._created, limit

    def _answer_state(self, request: HttpRequest, exchange: Exchange, status: int) -> None:
        frontend = self._frontend
        body: dict[str, str | float] = {"state": frontend.state}
        if frontend.state == "loading":
            body["stage"] = frontend.stage
            body["progress"] = round(frontend.progress, 3)
        self._answer(request, exchange, status, orjson.dumps(body))

    def _answer(
        self,
        request: HttpRequest,
        exchange: Exchange,
        status: int,
        body: bytes,
        content_type: bytes = JSON,
    ) -> None:
        exchange.respond(status, body, content_type)
        route = f"{MODELS}/*" if request.path.startswith(f"{MODELS}/") else request.path
        self._metrics.count_request(route, status)


def _model_list(name: str, root: str, created: int, max_model_len: int | None) -> bytes:
    return b'{"object":"list","data":[%b]}' % _model_card(name, root, created, max_model_len)


def _model_card(name: str, root: str, created: int, max_model_len: int | None) -> bytes:
    """``max_model_len`` in tokens, ``created`` in Unix seconds."""
    return orjson.dumps(
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "mini-sglang",
            "root": root,
            "parent": None,
            "max_model_len": max_model_len,
        }
    )
