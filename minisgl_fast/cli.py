"""The command line: ``minisgl-fast --model X --port 1919``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from minisgl_fast import __version__
from minisgl_fast.config import DEVICES, DTYPES, FAKE_MODEL, MODEL_SOURCES, Config
from minisgl_fast.errors import ConfigError
from minisgl_fast.parsers.select import REASONING_PARSERS, TOOL_CALL_PARSERS

EXIT_CONFIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and serve; the process's exit code (docs in launch.py).

    ``bench`` as the first argument loads a server instead (docs in bench/cli.py).
    """
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["bench"]:
            from minisgl_fast.bench.cli import main as bench

            return bench(arguments[1:])
        config = parse(arguments)
        from minisgl_fast.launch import serve

        return serve(config)
    except ConfigError as error:
        print(f"minisgl-fast: error: {error.message}", file=sys.stderr)
        return EXIT_CONFIG


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The Config of a command line. Exits with code 2 on a usage error."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    if options["model"] is None:
        if not options["fake_engine"]:
            parser.error("the following arguments are required: --model/--model-path")
        options["model"] = FAKE_MODEL
    options["overlap"] = not options.pop("no_overlap")
    for name in ("api_keys", "cors_origins", "allowed_hosts"):
        options[name] = tuple(options[name])
    return Config(**options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minisgl-fast",
        description="Serve a language model over an OpenAI-compatible HTTP API.",
    )
    parser.add_argument("--version", action="version", version=__version__)

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        "--model-path",
        metavar="MODEL",
        help="Hub id such as Qwen/Qwen3-0.6B, a local folder, or a .gguf file",
    )
    model.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    model.add_argument(
        "--model-source",
        choices=MODEL_SOURCES,
        default="huggingface",
        help="where a Hub id is downloaded from (default: %(default)s)",
    )
    model.add_argument("--served-model-name", metavar="NAME", help="name of the model in the API")
    model.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template, in place of the model's own"
    )
    model.add_argument(
        "--reasoning-parser",
        choices=("auto", "none", *REASONING_PARSERS),
        default="auto",
        help="format of the model's reasoning (default: auto, by the chat template)",
    )
    model.add_argument(
        "--tool-call-parser",
        choices=("auto", "none", *TOOL_CALL_PARSERS),
        default="auto",
        help="format of the model's tool calls (default: auto, by the chat template)",
    )
    model.add_argument(
        "--generation-config",
        choices=("model", "none"),
        default="model",
        help="take sampling defaults from the model's generation_config.json (default), or not",
    )
    model.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of weights and KV cache (default: auto)"
    )
    model.add_argument(
        "--dummy-weight", action="store_true", help="random weights; only the config is read"
    )
    model.add_argument(
        "--max-model-len", type=int, metavar="TOKENS", help="context length (default: the model's)"
    )

    engine = parser.add_argument_group("engine")
    engine.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
    engine.add_argument(
        "--page-size", type=int, metavar="TOKENS", help="16 to 256 (default: 64 on GPU, 16 on CPU)"
    )
    engine.add_argument("--num-pages", type=int, metavar="N", help="KV pages (default: by memory)")
    engine.add_argument(
        "--memory-ratio",
        type=float,
        default=0.9,
        metavar="R",
        help="share of GPU memory to use in all (default: %(default)s)",
    )
    engine.add_argument(
        "--max-running-requests", type=int, metavar="N", help="(default: 256 on GPU, 32 on CPU)"
    )
    engine.add_argument(
        "--max-prefill-length",
        type=int,
        metavar="TOKENS",
        help="token budget of one step (default: 8192 on GPU, 256 on CPU)",
    )
    engine.add_argument(
        "--disable-radix-cache", action="store_true", help="compute every prompt from its start"
    )
    engine.add_argument(
        "--no-overlap", action="store_true", help="commit each step before the next is scheduled"
    )
    engine.add_argument(
        "--cuda-graph-max-bs",
        type=int,
        default=256,
        metavar="N",
        help="largest decode batch captured in a CUDA graph; 0 for none (default: %(default)s)",
    )
    engine.add_argument(
        "--num-threads", type=int, metavar="N", help="CPU threads of the model (default: all cores)"
    )

    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    server.add_argument("--port", type=int, default=1919, help="(default: %(default)s)")
    server.add_argument(
        "--default-max-tokens",
        type=int,
        metavar="N",
        help="for chat requests that give none (default: fill the context; Mini-SGLang has 16)",
    )
    server.add_argument(
        "--max-queued-requests",
        type=int,
        default=4096,
        metavar="N",
        help="unfinished requests beyond which new ones get 503 (default: %(default)s)",
    )
    server.add_argument(
        "--max-body", type=int, default=8 << 20, metavar="BYTES", help="(default: 8 MiB)"
    )
    server.add_argument(
        "--frontends",
        type=int,
        default=1,
        metavar="N",
        help="processes that serve HTTP, before one engine (default: %(default)s)",
    )
    server.add_argument(
        "--stream-interval",
        type=int,
        default=1,
        metavar="N",
        help="tokens in an event of a stream, after its first (default: %(default)s)",
    )
    server.add_argument(
        "--drain-timeout",
        dest="drain_timeout_s",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long SIGTERM lets streams finish (default: %(default)g)",
    )
    server.add_argument(
        "--incremental-streaming-output",
        "--stream-output",
        action="store_true",
        help="events of /generate hold what is new, not all from the beginning",
    )
    _add_access(parser)
    # For measuring the frontend (docs/benchmarks.md), so not in the help.
    parser.add_argument("--fake-engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tick-us", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--credit-file", help=argparse.SUPPRESS)
    return parser


def _add_access(parser: argparse.ArgumentParser) -> None:
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key",
        dest="api_keys",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that clients must send; may be repeated. Other users of the machine see it in "
        "the list of processes: prefer a file",
    )
    access.add_argument("--api-key-file", metavar="FILE", help="keys for clients, one per line")
    access.add_argument(
        "--admin-api-key",
        metavar="KEY",
        help="key of the routes that concern all clients, such as /flush_cache (default: those "
        "of the clients)",
    )
    access.add_argument(
        "--admin-api-key-file", metavar="FILE", help="the same from a file, one per line"
    )
    access.add_argument(
        "--public-metrics", action="store_true", help="answer /metrics without a key, too"
    )
    access.add_argument(
        "--cors-origin",
        dest="cors_origins",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin use the API from a browser, * for all pages; may be "
        "repeated (default: none)",
    )
    access.add_argument(
        "--allowed-host",
        dest="allowed_hosts",
        action="append",
        default=[],
        metavar="NAME",
        help="public name of a server on 127.0.0.1 without a key, as a proxy before it passes it "
        "on; may be repeated (default: local names)",
    )
    access.add_argument(
        "--ssl-certfile", metavar="FILE", help="serve HTTPS with this certificate chain (PEM)"
    )
    access.add_argument(
        "--ssl-keyfile", metavar="FILE", help="its private key, if not in the same file (PEM)"
    )
