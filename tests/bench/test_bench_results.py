"""The metrics of answers whose times are known, and the report made of them."""

import json
import re

import numpy as np
import pytest

from minisgl_fast.bench.compare import number_text
from minisgl_fast.bench.limits import ClientCost
from minisgl_fast.bench.reader import CHAT, ResponseReader
from minisgl_fast.bench.report import make_report, make_table, warnings
from minisgl_fast.bench.results import Results

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
TEXT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
VLLM_KEYS = {
    *("date", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_output_tokens_per_s", "max_concurrent_requests", "rtfx"),
    *(f"{s}_{m}_ms" for s in ("mean", "median", "std", "p99") for m in ("ttft", "tpot", "itl")),
    *(f"{s}_e2el_ms" for s in ("mean", "median", "std", "p99")),
    *("label", "backend", "endpoint_type", "model_id", "num_prompts"),
}
ARRAYS = {
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times"),
    "errors",
}
SETTINGS = dict.fromkeys(("label", "backend", "endpoint_type", "model_id", "num_prompts"), "x")


def answer(start, times, usage=None):
    reader = ResponseReader(CHAT)
    reader.begin(start)
    reader.feed(HEAD, start)
    for time in times:
        reader.feed(TEXT, time)
    if usage is not None:
        data = {"choices": [], "usage": usage}
        reader.feed(b"data: %b\n\n" % json.dumps(data).encode(), times[-1] + 9)
    reader.feed(b"data: [DONE]\n\n", times[-1] + 9)
    reader.feed_eof(times[-1] + 9)
    return reader


@pytest.fixture
def results():
    """Three answers and one failure:

    A  starts 100, events 100.5 101 101.25 (3 tokens of 10)
    B  starts 100.25, events 100.5 102.5   (2 events, but 5 tokens by usage; 20 prompt tokens)
    C  starts 102, one event at 102.125    (1 token)
    """
    results = Results(detailed=True)
    a = results.begin(10, 100.0, 0.0)
    b = results.begin(10, 100.25, 0.25)
    failed = results.begin(10, 101.0, 0.0)
    c = results.begin(10, 102.0, 1.0)
    results.succeed(a, answer(100.0, [100.5, 101.0, 101.25]))
    results.fail(failed, "HTTP 503", "busy" * 1000)
    usage = {
        "prompt_tokens": 20,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 16},
    }
    results.succeed(b, answer(100.25, [100.5, 102.5], usage))
    results.succeed(c, answer(102.0, [102.125]))
    return results


def report(results, **options):
    options = {"settings": SETTINGS, "objectives_ms": {}, "percentiles": (90, 99), **options}
    return make_report(results, ClientCost(num_reads=6), 4.0, **options)


def test_times_are_defined_as_by_vllm(results):
    found = report(results)
    expected = {
        "ttft": [0.5, 0.25, 0.125],
        "tpot": [0.75 / 2, 2.0 / 4],  # C has one token: left out
        "itl": [0.5, 0.25, 2.0],  # pooled
        "e2el": [1.25, 2.25, 0.125],  # up to the last event with text, not to [DONE]
    }
    for name, values in expected.items():
        assert found[f"mean_{name}_ms"] == pytest.approx(np.mean(values) * 1e3)
        assert found[f"median_{name}_ms"] == pytest.approx(np.median(values) * 1e3)
        assert found[f"std_{name}_ms"] == pytest.approx(np.std(values) * 1e3)
        assert found[f"p90_{name}_ms"] == pytest.approx(np.percentile(values, 90) * 1e3)
        assert found[f"p99_{name}_ms"] == pytest.approx(np.percentile(values, 99) * 1e3)


def test_counts_and_rates(results):
    found = report(results)
    assert (found["completed"], found["failed"]) == (3, 1)
    assert found["total_input_tokens"] == 10 + 20 + 10
    assert found["total_output_tokens"] == 3 + 5 + 1
    assert found["request_throughput"] == 3 / 4
    assert found["output_throughput"] == 9 / 4
    assert found["total_token_throughput"] == 49 / 4
    # Two events in the best second: 100.5 twice; 101 and 101.25; 102.125 and 102.5.
    assert found["max_output_tokens_per_s"] == 2 * 9 / 6
    assert found["max_concurrent_requests"] == 2
    own = found["minisgl_fast"]
    assert own["tokens_per_event"] == 9 / 6
    assert own["events_per_read"] == 1.0
    assert own["cached_tokens"] == 16
    assert own["output_tokens_from"] == "usage and events"
    assert own["input_tokens_from"] == "usage and dataset"
    assert own["errors"] == {"HTTP 503": 1}
    assert own["error_messages"] == {"HTTP 503": ("busy" * 1000)[:300]}


@pytest.mark.parametrize(
    ("objectives", "num_good"),
    [
        ({"ttft": 250}, 2),
        ({"tpot": 375}, 2),  # C counts as 0
        ({"e2el": 1250}, 2),
        ({"ttft": 500, "tpot": 499}, 2),
        ({"ttft": 499, "tpot": 499}, 1),
        ({"ttft": 100}, 0),
        ({"ttft": 9999, "tpot": 9999, "e2el": 9999}, 3),
    ],
)
def test_goodput_counts_requests_that_meet_every_objective(results, objectives, num_good):
    assert report(results, objectives_ms=objectives)["request_goodput"] == num_good / 4


def test_the_keys_are_vllms(results):
    found = report(results)
    assert set(found) >= VLLM_KEYS | ARRAYS
    assert found["request_goodput"] is None
    assert found["output_lens"] == [3, 5, 0, 1]
    assert found["input_lens"] == [10, 20, 10, 10]
    assert found["ttfts"] == [0.5, 0.25, 0.0, 0.125]
    assert found["itls"] == [[0.5, 0.25], [2.0], [], []]
    assert found["queue_times"] == [0.0, 0.25, 0.0, 1.0]
    assert found["errors"][2].startswith("HTTP 503: busy")
    assert [bool(error) for error in found["errors"]] == [False, False, True, False]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_arrays_and_queue_times_stand_there_on_request_only(results):
    assert "mean_client_queue_time_ms" not in report(results)
    queued = report(results, max_concurrency=2)
    assert queued["mean_client_queue_time_ms"] == pytest.approx(np.mean([0, 0.25, 1]) * 1e3)
    assert not any("including_client_queue" in name for name in queued)
    paced = report(results, max_concurrency=2, settings={**SETTINGS, "request_rate": 3.0})
    waits = [0 + 1.25, 0.25 + 2.25, 1 + 0.125]  # A, B, C
    assert paced["mean_e2el_including_client_queue_ms"] == pytest.approx(np.mean(waits) * 1e3)
    assert paced["p99_e2el_including_client_queue_ms"] == pytest.approx(
        np.percentile(waits, 99) * 1e3
    )
    plain = Results()
    plain.succeed(plain.begin(1, 0.0, 0.0), answer(0.0, [1.0, 2.0]))
    assert set(report(plain)).isdisjoint(ARRAYS)


def test_series_over_time(results):
    own = report(results)["minisgl_fast"]
    timeline = own["timeline"]
    assert timeline["interval_s"] == pytest.approx(0.1)
    total = sum(rate * timeline["interval_s"] for rate in timeline["tokens_per_s"])
    assert total == pytest.approx(9)  # tokens, of six events
    assert timeline["running"][3] == 2
    assert timeline["running"][-1] == 0
    assert {name: bins["count"] for name, bins in own["distributions"].items()} == {
        "ttft": 3,
        "tpot": 2,
        "itl": 3,
        "e2el": 3,
    }


def test_usage_that_is_no_usage_is_ignored():
    results = Results()
    for usage in ({"completion_tokens": "3"}, {"completion_tokens": -1}, {}):
        results.succeed(results.begin(4, 0.0, 0.0), answer(0.0, [1.0, 2.0], usage))
    assert (results.total_input, results.total_output, results.num_from_usage) == (12, 6, 0)


def test_a_run_without_an_answer_has_a_report():
    results = Results()
    results.fail(results.begin(4, 0.0, 0.0), "connect", "refused")
    found = report(results, objectives_ms={"ttft": 5})
    assert (found["completed"], found["failed"], found["mean_ttft_ms"]) == (0, 1, 0.0)
    assert "Error: connect: 1 requests, first: refused" in make_table(found)


def test_the_table_says_where_tokens_come_from_and_what_limits(results):
    cost = ClientCost(cpu_share=0.97, lag_p99_s=0.05)
    found = make_report(
        results,
        cost,
        4.0,
        settings=SETTINGS,
        objectives_ms={"ttft": 250},
        notes=["approximate"],
    )
    table = make_table(found)
    assert "from usage and events" in table
    assert "ttft 250 ms" in table
    assert re.search(r"CPU \(% of a core\) +97\.00\n", table)
    assert re.search(r"Event loop late, p99 \(ms\) +50\.00\n", table)
    assert warnings(found) == [
        "approximate",
        "this client may have been the limit: it used 97% of a core",
        "this client may have been the limit: its loop ran 50 ms late (p99)",
    ]
    assert all(f"Note: {warning}" in table for warning in warnings(found))
    assert ClientCost(cpu_share=0.5, lag_p99_s=0.001).limits() == []


def test_values_beyond_the_room_are_said_to_be_approximate(results):
    found = report(results)
    found["minisgl_fast"]["distributions"]["itl"]["exact"] = False
    assert warnings(found) == ["too many values to keep: percentiles of ITL within 1.2 %"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (5.031, "5.03"), (42.28, "42.3"), (1036.2, "1,036"), (16297.3, "16.3k"),
     (1234567, "1,234.6k"), (None, "-"), ("x", "-"), (True, "-")],
)  # fmt: skip
def test_numbers_at_a_glance(value, text):
    assert number_text(value) == text
