"""What the server tells routers and benchmarks of itself."""

import datetime
import json

import pytest
from api_client import COMPLETIONS, request
from fake_engine import FACTS, MODEL, eventually

from minisgl_fast.server.rate import WINDOW_S, Rate


def get(server, path):
    status, _, data = request(server, "GET", path)
    assert status == 200, data
    return json.loads(data)


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_the_model_is_described(serve, path):
    server = serve(served_model_name="tiny")
    assert get(server, path) == {
        "model_path": MODEL,
        "served_model_name": "tiny",
        "tokenizer_path": MODEL,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "reasoning_parser": "qwen3",
        "tool_call_parser": "qwen25",
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": "auto",
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
    }


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_the_settings_are_told_and_no_key(serve, path):
    server = serve(admin_api_key="secret-key", max_queued_requests=77)
    info = get(server, path)
    assert "secret" not in json.dumps(info)
    expected = {
        "model_path": MODEL,
        "served_model_name": MODEL,
        "context_length": FACTS["max_model_len"],
        "max_total_num_tokens": FACTS["num_pages"] * FACTS["page_size"],
        "max_total_tokens": FACTS["num_pages"] * FACTS["page_size"],
        "max_running_requests": FACTS["max_running_requests"],
        "max_queued_requests": 77,
        "tp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "is_embedding": False,
        "disaggregation_mode": "null",
        "weight_version": "default",
        "status": "ready",
    }
    assert {name: info[name] for name in expected} == expected
    assert info["version"]
    (state,) = info["internal_states"]
    assert state["last_gen_throughput"] >= 0


def test_no_version_route_makes_routers_take_it_for_another_server(server):
    assert request(server, "GET", "/version")[0] == 404


def test_the_load_is_what_the_engine_holds(server):
    idle = get(server, "/v1/loads?include=core,disagg,queues,memory")
    assert idle["dp_rank_count"] == 1
    assert datetime.datetime.fromisoformat(idle["timestamp"]).tzinfo is not None
    (load,) = idle["loads"]
    assert (load["num_total_reqs"], load["token_usage"], load["gen_throughput"]) == (0, 0, 0)
    request(server, "POST", COMPLETIONS, {"prompt": "Hi", "max_tokens": 50, "ignore_eos": True})
    server.engine.hold = True
    stats = {"running": 3, "queued": 2, "queued_tokens": 70, "pages_used": 10}
    server.call(server.frontend.stats.update, {**stats, "prompt_tokens": 200, "cached_tokens": 50})
    (load,) = get(server, "/v1/loads")["loads"]
    assert load == {
        "dp_rank": 0,
        "num_running_reqs": 3,
        "num_waiting_reqs": 2,
        "num_total_reqs": 5,
        "num_waiting_uncached_tokens": 70,
        "num_used_tokens": 160,
        "num_total_tokens": 230,
        "max_total_num_tokens": 16_000,
        "max_running_requests": 64,
        "token_usage": 0.01,
        "gen_throughput": load["gen_throughput"],
        "cache_hit_rate": 0.25,
        "utilization": 0.0469,
    }


@pytest.mark.parametrize("path", ["/model_info", "/server_info", "/v1/loads"])
def test_while_loading_there_is_nothing_to_tell(serve, path):
    server = serve(ready=False)
    status, headers, _ = request(server, "GET", path)
    assert (status, headers["retry-after"]) == (503, "5")
    server.call(server.engine.ready)
    eventually(lambda: server.frontend.state == "ready")
    get(server, path)


def test_a_rate_is_the_growth_over_the_last_seconds():
    rate = Rate()
    assert rate.per_second(0.0) == 0.0
    rate.update(100, 1.0)
    assert rate.per_second(1.0) == 0.0
    rate.update(150, 2.0)
    assert rate.per_second(2.0) == 50.0
    rate.update(250, 3.0)
    assert rate.per_second(3.0) == 75.0
    assert rate.per_second(3.0 + WINDOW_S + 0.1) == 0.0
