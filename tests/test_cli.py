"""The command line: which flag fills which setting, and how wrong usage ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from minisgl_fast import __version__, cli
from minisgl_fast.config import Config

FLAGS: dict[str, tuple[list[str], Any]] = {
    # field: (arguments, value)
    "revision": (["--revision", "v1"], "v1"),
    "model_source": (["--model-source", "modelscope"], "modelscope"),
    "served_model_name": (["--served-model-name", "n"], "n"),
    "chat_template": (["--chat-template", "t.jinja"], "t.jinja"),
    "reasoning_parser": (["--reasoning-parser", "kimi"], "kimi"),
    "tool_call_parser": (["--tool-call-parser", "llama3"], "llama3"),
    "generation_config": (["--generation-config", "none"], "none"),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "dummy_weight": (["--dummy-weight"], True),
    "max_model_len": (["--max-model-len", "100"], 100),
    "device": (["--device", "cpu"], "cpu"),
    "page_size": (["--page-size", "32"], 32),
    "num_pages": (["--num-pages", "7"], 7),
    "memory_ratio": (["--memory-ratio", "0.5"], 0.5),
    "max_running_requests": (["--max-running-requests", "3"], 3),
    "max_prefill_length": (["--max-prefill-length", "4"], 4),
    "disable_radix_cache": (["--disable-radix-cache"], True),
    "overlap": (["--no-overlap"], False),
    "cuda_graph_max_bs": (["--cuda-graph-max-bs", "8"], 8),
    "num_threads": (["--num-threads", "2"], 2),
    "host": (["--host", "0.0.0.0"], "0.0.0.0"),
    "port": (["--port", "8080"], 8080),
    "default_max_tokens": (["--default-max-tokens", "16"], 16),
    "max_queued_requests": (["--max-queued-requests", "9"], 9),
    "max_body": (["--max-body", "2048"], 2048),
    "frontends": (["--frontends", "2"], 2),
    "fake_engine": (["--fake-engine"], True),
    "tick_us": (["--tick-us", "2000"], 2000),
    "credit_file": (["--credit-file", "f"], "f"),
    "stream_interval": (["--stream-interval", "4"], 4),
    "drain_timeout_s": (["--drain-timeout", "1.5"], 1.5),
    "incremental_streaming_output": (["--incremental-streaming-output"], True),
    "api_keys": (["--api-key", "a", "--api-key", "b"], ("a", "b")),
    "api_key_file": (["--api-key-file", "keys"], "keys"),
    "admin_api_key": (["--admin-api-key", "a"], "a"),
    "admin_api_key_file": (["--admin-api-key-file", "keys"], "keys"),
    "public_metrics": (["--public-metrics"], True),
    "cors_origins": (["--cors-origin", "http://a", "--cors-origin", "*"], ("http://a", "*")),
    "allowed_hosts": (["--allowed-host", "a.com", "--allowed-host", "b"], ("a.com", "b")),
    "ssl_certfile": (["--ssl-certfile", "c.pem"], "c.pem"),
}


@pytest.mark.parametrize("field", FLAGS)
def test_a_flag_fills_its_setting_and_no_other(field: str) -> None:
    arguments, value = FLAGS[field]
    assert cli.parse(["--model", "x", *arguments]) == dataclasses.replace(
        Config(model="x"), **{field: value}
    )


def test_the_key_of_a_certificate_may_have_a_file_of_its_own() -> None:
    config = cli.parse(["--model", "x", "--ssl-certfile", "c", "--ssl-keyfile", "k"])
    assert config == Config(model="x", ssl_certfile="c", ssl_keyfile="k")


def test_every_setting_has_a_flag() -> None:
    names = {field.name for field in dataclasses.fields(Config)}
    assert names == {"model", "ssl_keyfile", *FLAGS}


def test_without_flags_the_defaults_are_configs_own() -> None:
    assert cli.parse(["--model", "x"]) == Config(model="x")


def test_sglangs_name_of_the_model_flag_works_too() -> None:
    assert cli.parse(["--model-path", "x"]).model == "x"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model"],
        ["--model", "x", "--port", "many"],
        ["--model", "x", "--dtype", "float64"],
        ["--model", "x", "--unheard-of"],
        ["--model", "x", "stray"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "minisgl-fast: error: " in capsys.readouterr().err


def test_a_setting_out_of_range_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--model", "x", "--num-pages", "0"]) == 1
    assert (
        capsys.readouterr().err == "minisgl-fast: error: --num-pages must be at least 1, got 0.\n"
    )


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"
