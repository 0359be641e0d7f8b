"""Facts about the model, the settings and the load, in SGLang's words.

Rules: no key, and nothing else of the settings about access, is among them; what this server does
not have (parallel ranks, disaggregation) is told as a server without it tells it.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

import msgspec
import orjson

from minisgl_fast import __version__
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.parsers.select import Formats
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest


class ModelInfo(msgspec.Struct):
    """The served model."""

    model_path: str
    served_model_name: str
    tokenizer_path: str
    model_type: str
    architectures: list[str]
    reasoning_parser: str | None
    tool_call_parser: str | None
    is_generation: bool = True
    preferred_sampling_params: str | None = None
    weight_version: str = "default"
    load_format: str = "auto"
    disaggregation_mode: str = "null"
    has_image_understanding: bool = False
    has_audio_understanding: bool = False


class Load(msgspec.Struct):
    """The load of the engine; ``token_usage`` and ``utilization`` are shares of what it can hold,
    ``cache_hit_rate`` of all prompt tokens since the start."""

    dp_rank: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    num_waiting_uncached_tokens: int  # an upper bound: the cache is not asked for them
    num_used_tokens: int
    num_total_tokens: int
    max_total_num_tokens: int
    max_running_requests: int
    token_usage: float
    gen_throughput: float
    cache_hit_rate: float
    utilization: float


class Loads(msgspec.Struct):
    """``timestamp`` of the answer, in ISO 8601."""

    timestamp: str
    version: str
    dp_rank_count: int
    loads: list[Load]


class ServerInfo:
    """The routes that routers and benchmarks ask before they use a server."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._started = time.time()

    @property
    def routes(self) -> Routes:
        model = Route(self.model_info, "Describe the model", answer=ModelInfo)
        server = Route(self.server_info, "Tell settings and state", answer=dict[str, Any])
        return {
            ("GET", "/model_info"): model,
            ("GET", "/get_model_info"): model,
            ("GET", "/server_info"): server,
            ("GET", "/get_server_info"): server,
            ("GET", "/v1/loads"): Route(self.loads, "Tell the load", answer=Loads),
        }

    def model_info(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        config, architecture = pipeline.config, pipeline.frontend.check_ready().architecture
        formats = Formats.choose(
            config.reasoning_parser, config.tool_call_parser, pipeline.frontend.template.source
        )
        info = ModelInfo(
            model_path=config.model,
            served_model_name=pipeline.model_name,
            tokenizer_path=config.model,
            # transformers names its models so, for all that are served here.
            model_type=architecture.removesuffix("ForCausalLM").lower(),
            architectures=[architecture],
            reasoning_parser=formats.reasoning,
            tool_call_parser=formats.tools,
        )
        pipeline.respond(request, exchange, msgspec.json.encode(info))

    def server_info(self, request: HttpRequest, exchange: Exchange) -> None:
        pipeline = self._pipeline
        facts = pipeline.frontend.check_ready()
        load = self._load()
        info: dict[str, Any] = {
            **pipeline.config.to_dict(),
            "model_path": pipeline.config.model,
            "served_model_name": pipeline.model_name,
            "tokenizer_path": pipeline.config.model,
            "version": __version__,
            "status": pipeline.frontend.state,
            "startup_time": self._started,
            "dtype": facts.dtype,
            "device": facts.device,
            "page_size": facts.page_size,
            "num_pages": facts.num_pages,
            "context_length": facts.max_model_len,
            "max_model_len": facts.max_model_len,
            "max_total_num_tokens": load.max_total_num_tokens,
            "max_total_tokens": load.max_total_num_tokens,
            "max_running_requests": facts.max_running_requests,
            "is_embedding": False,
            "tp_size": 1,
            "dp_size": 1,
            "pp_size": 1,
            "load_balance_method": "round_robin",
            "disaggregation_mode": "null",
            "weight_version": "default",
            "internal_states": [
                {
                    "last_gen_throughput": load.gen_throughput,
                    "effective_max_running_requests_per_dp": facts.max_running_requests,
                    **msgspec.structs.asdict(load),
                }
            ],
        }
        pipeline.respond(request, exchange, orjson.dumps(info))

    def loads(self, request: HttpRequest, exchange: Exchange) -> None:
        """``include`` and other queries of routers change nothing: it is all in the answer."""
        self._pipeline.frontend.check_ready()
        answer = Loads(datetime.now(timezone.utc).isoformat(), __version__, 1, [self._load()])
        self._pipeline.respond(request, exchange, msgspec.json.encode(answer))

    def _load(self) -> Load:
        frontend = self._pipeline.frontend
        facts = frontend.check_ready()
        stats = frontend.stats
        running, waiting = stats.get("running", 0), stats.get("queued", 0)
        queued_tokens = stats.get("queued_tokens", 0)
        used = stats.get("pages_used", 0) * facts.page_size
        total = facts.num_pages * facts.page_size
        return Load(
            dp_rank=0,
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_total_reqs=running + waiting,
            num_waiting_uncached_tokens=queued_tokens,
            num_used_tokens=used,
            num_total_tokens=used + queued_tokens,
            max_total_num_tokens=total,
            max_running_requests=facts.max_running_requests,
            token_usage=round(used / total, 4),
            gen_throughput=round(frontend.generation_rate.per_second(time.monotonic()), 2),
            cache_hit_rate=round(
                stats.get("cached_tokens", 0) / max(stats.get("prompt_tokens", 0), 1), 4
            ),
            utilization=round(max(used / total, running / facts.max_running_requests), 4),
        )
