"""The load client beside the server that it loads: both must have seen the same."""

import json

import pytest
from server_process import ServerProcess

from minisgl_fast.bench.cli import main

NUM_STREAMS, NUM_TOKENS, TICK_MS = 8, 60, 20


@pytest.fixture(scope="module")
def server():
    server = ServerProcess("--fake-engine", "--tick-us", str(TICK_MS * 1000))
    try:
        yield server.wait_ready()
    finally:
        server.end()


def totals(server, name):
    """(sum, count) of a histogram."""
    return server.metric(f"minisgl_{name}_sum"), server.metric(f"minisgl_{name}_count")


@pytest.mark.parametrize("api", ["chat", "completions", "sglang"])
def test_times_and_counts_are_those_of_the_servers_metrics(server, api, tmp_path):
    names = ("time_to_first_token_seconds", "inter_token_seconds")
    before = {name: totals(server, name) for name in names}
    generated = server.metric("minisgl_generated_tokens_total")
    credit = tmp_path / "credit"
    credit.write_bytes(bytes(8))
    options = ["--base-url", f"http://127.0.0.1:{server.port}", "--api", api, "--warm-up", "0"]
    options += ["--num-prompts", str(NUM_STREAMS), "--max-concurrency", str(NUM_STREAMS)]
    options += ["--output-len", str(NUM_TOKENS), "--input-len", "20", "--quiet"]
    options += ["--vocab-size", "1000"]
    options += ["--credit-file", str(credit), "--json", str(tmp_path / "run.json")]
    assert main(options) == 0
    report = json.loads((tmp_path / "run.json").read_text())
    num_tokens = NUM_STREAMS * NUM_TOKENS
    assert report["completed"] == NUM_STREAMS and report["failed"] == 0
    assert report["total_output_tokens"] == num_tokens
    assert server.metric("minisgl_generated_tokens_total") - generated == num_tokens
    assert report["minisgl_fast"]["distributions"]["ttft"]["count"] == NUM_STREAMS
    means_ms = {}
    for name in names:
        total_s, count = (a - b for a, b in zip(totals(server, name), before[name], strict=True))
        means_ms[name] = total_s / count * 1e3
    # The server's clock starts later and ends earlier than the client's: on a machine with other
    # work by a few time slices of its scheduler (tools/bench_front.py compares on a quiet one).
    ttft_ms, gap_ms = (means_ms[name] for name in names)
    assert 0 < report["mean_ttft_ms"] - ttft_ms < 200
    num_events = int.from_bytes(credit.read_bytes(), "little")
    if num_events == num_tokens:  # else a busy machine made it merge some
        assert report["mean_itl_ms"] == pytest.approx(gap_ms, rel=0.02)
    assert report["mean_tpot_ms"] == pytest.approx(gap_ms, rel=0.02)
    assert num_events * report["minisgl_fast"]["tokens_per_event"] == pytest.approx(num_tokens)
