"""Api: the handler of the HTTP server, made of one class per surface.

Each surface (openai.py, native.py, info.py) brings its table of routes; this file joins them and
answers every error in one place.
"""

from __future__ import annotations

from minisgl_fast.api.chat import Chat
from minisgl_fast.api.control import Control
from minisgl_fast.api.info import Info
from minisgl_fast.api.messages import Messages
from minisgl_fast.api.native import Native
from minisgl_fast.api.ollama import Ollama
from minisgl_fast.api.openai import OpenAI
from minisgl_fast.api.openapi import OpenApi
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.responses import Responses
from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.api.sampling_params import sampling_params
from minisgl_fast.api.scoring import Scoring
from minisgl_fast.api.server_info import ServerInfo
from minisgl_fast.api.text_tools import TextTools
from minisgl_fast.config import Config
from minisgl_fast.errors import MinisglError, ModelError, RequestError
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.http_rules import HttpRequest
from minisgl_fast.server.metrics import Metrics
from minisgl_fast.server.router import Router


class Api:
    """The handler of the HTTP server: ``HttpServer(Api(config, frontend))``."""

    def __init__(self, config: Config, frontend: Frontend) -> None:
        """ModelError if the model's own sampling defaults are out of range."""
        try:
            sampling_params(SamplingFields(), frontend.defaults, None)
        except RequestError as error:
            raise ModelError(f"The model's generation_config.json: {error.message}") from error
        self.metrics = Metrics(frontend)
        frontend.peers.answers["metrics"] = lambda _: self.metrics.snapshot()
        pipeline = Pipeline(config, frontend, self.metrics, self._fail)
        frontend.peers.answers["abort"] = pipeline.abort
        self.model_name = pipeline.model_name
        self.chat = Chat(pipeline)
        surfaces = (
            OpenAI(pipeline, self.chat),
            Responses(pipeline, self.chat),
            Messages(pipeline, self.chat),
            Ollama(pipeline, self.chat),
            Scoring(pipeline),
            Native(pipeline),
            Info(pipeline, self.metrics),
            ServerInfo(pipeline),
            Control(pipeline),
            TextTools(pipeline, self.chat),
        )
        document = OpenApi()
        self.routes = {
            key: route for surface in (*surfaces, document) for key, route in surface.routes.items()
        }
        document.describe(self.routes)
        self._router = Router({key: route.handler for key, route in self.routes.items()})
        # An unknown path would be a label that clients choose.
        self._known_paths = {path for _, path in self.routes}

    def __call__(self, request: HttpRequest, exchange: Exchange) -> None:
        """Answer one request, now or later."""
        try:
            self._router.find(request)(request, exchange)
        except MinisglError as error:
            self._fail(request, exchange, error)

    def _fail(self, request: HttpRequest, exchange: Exchange, error: MinisglError) -> None:
        if not exchange.closed:
            exchange.fail(error)
            route = request.path if request.path in self._known_paths else "other"
            self.metrics.count_request(route, error.http_status)
