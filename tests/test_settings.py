"""Config: every setting checked once, and the same after a trip as JSON to the engine process."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from minisgl_fast.config import Config
from minisgl_fast.errors import ConfigError

EDGES: dict[str, tuple[str, list[Any], list[Any]]] = {
    # field: (flag, accepted, refused)
    "model_source": ("--model-source", ["huggingface", "modelscope"], ["ftp", ""]),
    "dtype": ("--dtype", ["auto", "float32", "bfloat16", "float16"], ["float64", "int8"]),
    "device": ("--device", ["auto", "cpu", "cuda"], ["tpu"]),
    "generation_config": ("--generation-config", ["model", "none"], ["auto"]),
    "page_size": ("--page-size", [None, 16, 32, 64, 128, 256], [0, 8, 17, 48, 512, -16]),
    "memory_ratio": ("--memory-ratio", [0.01, 1.0], [0.0, 1.01, -0.5, float("nan")]),
    "num_pages": ("--num-pages", [None, 1], [0, -1]),
    "max_model_len": ("--max-model-len", [None, 2], [1, 0]),
    "max_running_requests": ("--max-running-requests", [None, 1], [0]),
    "max_prefill_length": ("--max-prefill-length", [None, 1], [0]),
    "default_max_tokens": ("--default-max-tokens", [None, 1], [0]),
    "max_queued_requests": ("--max-queued-requests", [1], [0]),
    "max_body": ("--max-body", [1024], [1023]),
    "cuda_graph_max_bs": ("--cuda-graph-max-bs", [0], [-1]),
    "num_threads": ("--num-threads", [None, 1], [0]),
    "frontends": ("--frontends", [1], [0]),
    "tick_us": ("--tick-us", [0], [-1]),
    "stream_interval": ("--stream-interval", [1], [0]),
    "drain_timeout_s": ("--drain-timeout", [0, 0.5], [-0.1, float("nan")]),
    "port": ("--port", [0, 65535], [-1, 65536]),
}
ACCEPTED = [(field, value) for field, (_, good, _) in EDGES.items() for value in good]
REFUSED = [(field, flag, value) for field, (flag, _, bad) in EDGES.items() for value in bad]


@pytest.mark.parametrize(("field", "value"), ACCEPTED)
def test_a_value_at_the_edge_is_kept_and_travels_as_json(field: str, value: Any) -> None:
    config = Config(**{"model": "x", field: value})
    assert getattr(config, field) == value
    assert Config(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("field", "flag", "value"), REFUSED)
def test_a_value_past_the_edge_is_one_line_that_names_the_flag(
    field: str, flag: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{"model": "x", field: value})
    assert caught.value.message.startswith(f"{flag} must be ")
    assert "\n" not in caught.value.message


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(model="x").port = 1  # type: ignore[misc]


def test_defaults_are_what_the_documentation_says() -> None:
    config = Config(model="x")
    assert (config.host, config.port) == ("127.0.0.1", 1919)
    assert config.max_body == 8 * 1024 * 1024
    assert config.default_max_tokens is None
    assert config.overlap and not config.disable_radix_cache
    assert config.drain_timeout_s == 30.0
