"""The command as people run it: options, files it writes, exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest
from sse_server import CUT, KEEP, STREAM_HEAD, SseServer, in_thread, plain, talk

from minisgl_fast.bench.page import make_page
from minisgl_fast.cli import main

SVG = "{http://www.w3.org/2000/svg}svg"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with in_thread(SseServer()) as server:
        yield server


def bench(server, *arguments, num_prompts="6"):
    small = ("--input-len", "5", "--output-len", "4", "--num-prompts", num_prompts)
    return main(["bench", *arguments, "--base-url", server.url, *small])


def check_page(path):
    """Well-formed, self-contained, no script; the page's text."""
    text = path.read_text()
    document = ElementTree.fromstring(text.partition("\n")[2])
    tags = {element.tag.rpartition("}")[2] for element in document.iter()}
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "image", "use"})
    for element in document.iter():
        assert {"src", "href", "style"}.isdisjoint(element.attrib)
    assert not re.search(r"url\(|@import", text)
    addresses = set(re.findall(r"https?://[^\"'<> ]+", text)) - {"http://www.w3.org/2000/svg"}
    assert all(address.startswith("http://127.0.0.1:") for address in addresses)  # as text
    return document, "".join(document.itertext())


def test_a_run_prints_a_table_and_writes_its_files(server, tmp_path, capsys):
    files = tmp_path / "run.json", tmp_path / "run.html"
    code = bench(
        server,
        *("--json", str(files[0]), "--html", str(files[1]), "--label", "mine <&>"),
        *("--goodput", "ttft:5000", "tpot:5000", "--max-concurrency", "2", "--warm-up", "3"),
    )
    assert code == 0
    assert len(server.requests) == 9
    printed = capsys.readouterr()
    assert re.search(r"Completed requests +6\b", printed.out)
    assert re.search(r"Goodput, requests per second +\d", printed.out)
    assert "bench: 6/6 done, 0 running" in printed.err
    report = json.loads(files[0].read_text())
    assert report["completed"] == 6
    assert report["model_id"] == "served-name"
    assert report["total_output_tokens"] == 24
    assert report["num_prompts"] == 6
    assert report["max_concurrency"] == 2
    assert report["request_rate"] == "inf"
    assert report["minisgl_fast"]["output_tokens_from"] == "usage"
    assert "ttfts" not in report
    document, text = check_page(files[1])
    assert len(list(document.iter(SVG))) == 6
    assert "mine <&>" in text


def test_every_request_can_be_saved(server, tmp_path):
    path = tmp_path / "run.json"
    assert bench(server, "--json", str(path), "--save-detailed", "--quiet") == 0
    report = json.loads(path.read_text())
    assert report["output_lens"] == [4] * 6
    assert [len(gaps) for gaps in report["itls"]] == [3] * 6


def test_the_file_has_the_keys_of_vllm_bench_serve(server, tmp_path):
    """Those of vLLM with --save-detailed, but the texts of the answers."""
    path = tmp_path / "run.json"
    shape = ("--max-concurrency", "2", "--request-rate", "500", "--percentiles", "50,99.9")
    assert bench(server, "--json", str(path), "--save-detailed", "--quiet", *shape) == 0
    report = json.loads(path.read_text())
    statistics = ("mean", "median", "std", "p50", "p99.9")
    times = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
    assert set(report) == {
        *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"),
        *("request_rate", "burstiness", "max_concurrency"),
        *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
        *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
        *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times"),
        *("errors", "max_output_tokens_per_s", "max_concurrent_requests", "rtfx"),
        *(f"{statistic}_{name}_ms" for statistic in statistics for name in times),
        *("base_url", "dataset", "seed", "minisgl_fast"),  # ours
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("--request-rate", "200"),
        ("--request-rate", "200", "--burstiness", "0.5"),
        ("--request-rate", "200", "--burstiness", "inf"),
        ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "50", "--ramp-up-end-rps", "500"),
        ("--dataset", "fixed", "--prompt", "Hello"),
        ("--dataset", "shared-prefix", "--prefix-len", "9", "--num-prefixes", "2"),
        ("--dataset", "multi-turn", "--num-turns", "2"),
        ("--api", "completions", "--dataset", "shared-prefix", "--prefix-len", "9"),
        ("--api", "completions", "--dataset", "multi-turn", "--num-turns", "2"),
        ("--api", "generate"),
        ("--range-ratio", "0.5", "--prefix-len", "3", "--seed", "7"),
        ("--header", "X-A=b=c", "--api-key", "secret", "--extra-body", '{"top_p":0.5}'),
    ],
)
def test_options_work_together(server, arguments, tmp_path):
    path = tmp_path / "run.json"
    assert bench(server, "--quiet", "--json", str(path), *arguments) == 0
    report = json.loads(path.read_text())
    assert report["failed"] == 0
    assert report["completed"] == (12 if "--num-turns" in arguments else 6)
    assert report.get("ramp_up_strategy") == ("linear" if "linear" in arguments else None)
    assert report.get("ramp_up_end_rps") == (500 if "linear" in arguments else None)
    if "secret" in arguments:
        assert {r.headers["authorization"] for r in server.requests} == {"Bearer secret"}
        assert {r.headers["x-a"] for r in server.requests} == {"b=c"}
        assert {r.body["top_p"] for r in server.requests} == {0.5}
        assert "secret" not in path.read_text()


def test_files_of_prompts_and_traces(server, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("first prompt\nsecond prompt\n")
    share = tmp_path / "s.json"
    turns = [{"from": "human", "value": "q" * 40}, {"from": "gpt", "value": "a" * 40}]
    share.write_text(json.dumps([{"conversations": turns}]))
    trace = tmp_path / "t.jsonl"
    row = {"timestamp": 100, "input_length": 30, "output_length": 2, "hash_ids": [1]}
    trace.write_text("".join(json.dumps({**row, "timestamp": t}) + "\n" for t in (0, 100, 200)))
    azure = tmp_path / "a.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9,48,3\n"
        "2023-11-16 18:17:04.0,20,3\n"
    )
    files = {"prompts": prompts, "sharegpt": share, "mooncake": trace, "azure": azure}
    for (dataset, path), completed in zip(files.items(), (6, 6, 3, 2), strict=True):
        out = tmp_path / "out.json"
        arguments = ["--dataset", dataset, "--dataset-path", str(path), "--json", str(out)]
        assert bench(server, "--quiet", *arguments) == 0
        assert json.loads(out.read_text())["completed"] == completed
    arguments = ["--dataset", "mooncake", "--dataset-path", str(trace), "--json", str(out)]
    server_of = ["--quiet", "--base-url", server.url]
    assert main(["bench", *server_of, *arguments, "--time-scale", "0.1"]) == 0
    assert json.loads(out.read_text())["num_prompts"] == 3


def test_errors_are_shown_and_a_run_without_an_answer_fails(tmp_path, capsys):
    def sometimes(request):
        if request.body["max_tokens"] == 4 and len(server.requests) % 2:
            return plain(b"503 Busy", b"full"), 0
        return talk(request)

    server = SseServer(sometimes)
    html = tmp_path / "run.html"
    with in_thread(server):
        code = bench(server, "--quiet", "--warm-up", "0", "--html", str(html),
                     "--max-concurrency", "1")  # fmt: skip
    assert code == 0
    assert "Error: HTTP 503: 3 requests, first: full" in capsys.readouterr().out
    assert "3 failed requests: HTTP 503 full" in check_page(html)[1]
    server = SseServer(lambda request: (STREAM_HEAD, CUT))
    with in_thread(server):
        assert bench(server, "--quiet", "--warm-up", "0") == 1
        assert bench(server, "--quiet") == 1
    assert "the warm-up failed: cut" in capsys.readouterr().err


def test_runs_are_set_side_by_side(server, tmp_path, capsys):
    for name in ("a", "b"):
        bench(server, "--quiet", "--json", str(tmp_path / f"{name}.json"))
    # vLLM's results lack our own keys.
    theirs = json.loads((tmp_path / "a.json").read_text())
    del theirs["minisgl_fast"], theirs["label"], theirs["p90_itl_ms"]
    (tmp_path / "vllm.json").write_text(json.dumps(theirs))
    capsys.readouterr()
    files = [str(tmp_path / f"{name}.json") for name in ("a", "b", "vllm")]
    page = tmp_path / "both.html"
    assert main(["bench", "compare", *files, "--html", str(page)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["a", "b", "vllm"]
    assert next(line for line in printed if line.startswith("Completed")).split()[1:] == ["6"] * 3
    assert next(line for line in printed if line.startswith("P90 ITL")).split()[-1] == "-"
    document, text = check_page(page)
    assert len(list(document.iter(SVG))) == 6
    assert "vllm" in text


@pytest.mark.parametrize(
    "points", [("--request-rates", "100,400"), ("--concurrencies", "1,3")], ids=["rates", "limits"]
)
def test_a_sweep_draws_the_curve(server, tmp_path, points, capsys):
    files = tmp_path / "sweep.json", tmp_path / "sweep.html"
    outputs = ("--json", str(files[0]), "--html", str(files[1]), "--quiet")
    assert bench(server, "sweep", *points, *outputs) == 0
    reports = json.loads(files[0].read_text())
    key = "request_rate" if "rates" in points[0] else "max_concurrency"
    assert [report[key] for report in reports] == [float(p) for p in points[1].split(",")]
    document, text = check_page(files[1])
    assert len(list(document.iter(SVG))) == 9
    assert "Throughput and TTFT" in text
    # Every point has prompts of its own: none is found in the server's cache.
    asked = [request.body["messages"][0]["content"] for request in server.requests]
    assert len(set(asked)) == 6 * 2 + 1  # and those of the warm-up
    assert main(["bench", "compare", str(files[0])]) == 0
    assert reports[1]["label"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dataset", "mooncake"),
        ("--base-url", "nonsense"),
        ("--header", "novalue"),
        ("--ramp-up-strategy", "linear"),
        ("--base-url", "http://127.0.0.1:9"),
        ("--model", "m", "--dataset", "prompts", "--dataset-path", "/nonexistent"),
        ("compare", "/nonexistent.json"),
        ("sweep", "--request-rates", "1,x"),
        ("sweep", "--concurrencies", "0"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_1(arguments, capsys):
    assert main(["bench", *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("minisgl-fast: error: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--goodput", "speed:3"),
        ("--goodput", "ttft:x"),
        ("--num-prompts", "0"),
        ("--extra-body", "[1]"),
        ("--extra-body", "{"),
        ("--request-rate", "nan"),
        ("--percentiles", "101"),
        ("--range-ratio", "2"),
        ("sweep",),
    ],
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_file_that_is_no_result_is_refused(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text('{"a":1}')
    assert main(["bench", "compare", str(path)]) == 1
    assert "not the result of a benchmark" in capsys.readouterr().err


def test_a_page_of_nothing_is_still_a_page(tmp_path):
    path = tmp_path / "x.html"
    path.write_text(make_page([{"output_throughput": 0.0}]))
    assert check_page(path)[1].count("no data") == 6


def test_ctrl_c_ends_a_run_and_reports_what_was_done(tmp_path):
    def one_then_silence(request):
        first, *rest = talk(request)
        return [first, *rest] if request.connection == 0 and not request.number else [first, KEEP]

    path = tmp_path / "run.json"
    with in_thread(SseServer(one_then_silence)) as server:
        command = [sys.executable, "-m", "minisgl_fast", "bench", "--base-url", server.url]
        command += ["--model", "m", "--num-prompts", "5", "--warm-up", "0", "--json", str(path)]
        command += ["--input-len", "3", "--output-len", "2", "--max-concurrency", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len(server.requests) < 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    report = json.loads(path.read_text())
    assert report["interrupted"] is True
    assert (report["completed"], report["minisgl_fast"]["errors"]) == (1, {"cancelled": 1})


def test_a_reader_that_leaves_ends_the_command_quietly_but_costs_no_file(server, tmp_path):
    def run_unread(*arguments):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "minisgl_fast", "bench", *arguments]
        try:
            return subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
        finally:
            os.close(writer)

    path, page = tmp_path / "run.json", tmp_path / "both.html"
    small = ("--model", "m", "--num-prompts", "3", "--input-len", "3", "--output-len", "2")
    for arguments in (
        ("--base-url", server.url, "--quiet", *small, "--json", str(path)),
        ("compare", str(path), "--html", str(page)),
    ):
        done = run_unread(*arguments)
        assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")
    assert json.loads(path.read_text())["completed"] == 3
    check_page(page)
