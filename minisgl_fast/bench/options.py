"""The options of ``minisgl-fast bench`` and what they mean as objects."""

from __future__ import annotations

import argparse
import itertools
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from minisgl_fast.bench import traces
from minisgl_fast.bench.arrivals import Ramp, arrival_times
from minisgl_fast.bench.client import Load
from minisgl_fast.bench.datasets import (
    Lengths,
    Sample,
    fixed_prompt,
    multi_turn,
    prompts_file,
    random_prompts,
    shared_prefix,
    sharegpt,
)
from minisgl_fast.bench.endpoint import NATIVE, PATHS, Endpoint
from minisgl_fast.bench.vocabulary import TextCounter, Vocabulary, common_words, token_ids
from minisgl_fast.errors import ConfigError

TRACES = {"mooncake": traces.mooncake, "azure": traces.azure}
FROM_FILE = ("sharegpt", "prompts", *TRACES)
DATASETS = ("random", "fixed", "shared-prefix", "multi-turn", *FROM_FILE)
DEFAULT_NUM_PROMPTS = 1000
WARM_UP_SEED = 1 << 32
OBJECTIVES = ("ttft", "tpot", "e2el")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that a run and a sweep share."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", default="http://127.0.0.1:1919", help="(default: %(default)s)"
    )
    server.add_argument("--api", choices=PATHS, default="chat", help="(default: %(default)s)")
    server.add_argument("--endpoint", metavar="PATH", help="of the requests (default: by --api)")
    server.add_argument("--model", metavar="NAME", help="(default: the first in /v1/models)")
    server.add_argument(
        "--header", action="append", default=[], metavar="NAME=VALUE", help="may be repeated"
    )
    server.add_argument("--api-key", metavar="KEY", help="(default: $OPENAI_API_KEY if set)")
    server.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="keys of every body"
    )
    server.add_argument(
        "--no-ignore-eos", action="store_true", help="let answers end before their length"
    )
    server.add_argument(
        "--timeout", type=_positive, default=600.0, metavar="SECONDS", help="of one request"
    )

    data = parser.add_argument_group("requests")
    data.add_argument("--dataset", choices=DATASETS, default="random", help="(default: random)")
    data.add_argument("--dataset-path", type=Path, metavar="FILE", help="may be gzipped")
    data.add_argument(
        "--num-prompts",
        type=_count,
        metavar="N",
        help=f"conversations, if multi-turn (default: {DEFAULT_NUM_PROMPTS}; all of a trace)",
    )
    data.add_argument(
        "--input-len", type=_count, default=1024, metavar="TOKENS", help="(default: %(default)s)"
    )
    data.add_argument("--output-len", type=_count, metavar="TOKENS", help="(default: 128)")
    data.add_argument(
        "--range-ratio", type=_share, default=0.0, metavar="R", help="lengths vary by this share"
    )
    data.add_argument(
        "--prefix-len", type=int, metavar="TOKENS", help="shared by prompts (default: 0)"
    )
    data.add_argument("--num-prefixes", type=_count, default=10, metavar="N", help="(default: 10)")
    data.add_argument("--num-turns", type=_count, default=4, metavar="N", help="(default: 4)")
    data.add_argument("--think-time", type=_positive, default=0.0, metavar="SECONDS")
    data.add_argument("--prompt", metavar="TEXT", help="of --dataset fixed")
    data.add_argument("--time-scale", type=_positive, default=1.0, metavar="F", help="of a trace")
    data.add_argument("--length-scale", type=_positive, default=1.0, metavar="F", help="of a trace")
    data.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="to make and count prompts exactly"
    )
    data.add_argument(
        "--vocab-size",
        type=_count,
        default=30000,
        metavar="N",
        help="of random token ids, for completions without a tokenizer (default: %(default)s)",
    )
    data.add_argument("--seed", type=int, default=0, metavar="N")

    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate", type=_rate, default=math.inf, metavar="RPS", help="(default: inf)"
    )
    load.add_argument(
        "--burstiness", type=_rate, default=1.0, metavar="B", help="1 is Poisson (default)"
    )
    load.add_argument("--max-concurrency", type=_count, metavar="N", help="requests at once")
    load.add_argument("--ramp-up-strategy", choices=("linear", "exponential"))
    load.add_argument("--ramp-up-start-rps", type=_positive, metavar="RPS")
    load.add_argument("--ramp-up-end-rps", type=_positive, metavar="RPS")
    load.add_argument("--warm-up", type=int, default=1, metavar="N", help="requests (default: 1)")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--goodput", nargs="+", type=_objective, default=[], metavar="NAME:MS", help="ttft:200"
    )
    output.add_argument(
        "--percentiles", type=_percentiles, default=(90.0, 99.0), metavar="P,P", help="90,99"
    )
    output.add_argument("--label", metavar="NAME", help="of the run, in reports")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    output.add_argument(
        "--save-detailed", action="store_true", help="put every request into the JSON"
    )
    # For an engine that must not run ahead of its reader (docs/benchmarks.md), so not in the help.
    output.add_argument("--credit-file", type=Path, help=argparse.SUPPRESS)
    output.add_argument("--quiet", action="store_true", help="no progress")


def check(options: argparse.Namespace) -> None:
    """ConfigError where options do not fit each other."""
    if options.dataset in FROM_FILE and options.dataset_path is None:
        raise ConfigError(f"--dataset {options.dataset} needs --dataset-path")
    ramp = (options.ramp_up_strategy, options.ramp_up_start_rps, options.ramp_up_end_rps)
    if any(ramp) and not all(ramp):
        raise ConfigError("a ramp-up needs its strategy, its start and its end")
    if any(ramp) and (options.dataset in TRACES or not math.isinf(options.request_rate)):
        raise ConfigError("--ramp-up-strategy excludes --request-rate and traces")
    if options.dataset in TRACES and not math.isinf(options.request_rate):
        raise ConfigError("a trace has its own times: leave --request-rate out, use --time-scale")


def make_endpoint(options: argparse.Namespace) -> Endpoint:
    """ConfigError for what cannot be sent, or if the server must name its model and does not."""
    headers = {}
    for header in options.header:
        name, separator, value = header.partition("=")
        if not separator or not name:
            raise ConfigError(f"--header {header}: not NAME=VALUE")
        headers[name] = value
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    if key and not any(name.lower() == "authorization" for name in headers):
        headers["Authorization"] = f"Bearer {key}"
    settings: dict[str, Any] = {
        "base_url": options.base_url,
        "api": options.api,
        "path": options.endpoint,
        "headers": headers,
        "extra_body": options.extra_body,
        "ignore_eos": not options.no_ignore_eos,
    }
    model = options.model
    if model is None and options.api not in NATIVE:
        model = Endpoint(**settings).first_model()
    return Endpoint(model=model, **settings)


class Workload:
    """What a run sends, and how well its lengths are known."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._counter = TextCounter(options.tokenizer)
        self._vocabulary = self._make_vocabulary()
        self._credit = None if options.credit_file is None else _mapped(options.credit_file)
        self._lengths = Lengths(options.input_len, options.output_len or 128, options.range_ratio)

    def _make_vocabulary(self) -> Vocabulary:
        if self._counter.exact:
            return self._counter.vocabulary()
        is_text = self._options.api != "completions" or self._options.dataset == "multi-turn"
        return common_words() if is_text else token_ids(self._options.vocab_size)

    def notes(self) -> list[str]:
        """What must be said about the prompts."""
        if self._options.dataset in ("sharegpt", "prompts") or self._options.prompt:
            exact, how = self._counter.exact, "by characters / 4"
        else:
            exact, how = self._vocabulary.exact, "as one token a word"
        note = f"prompts were measured {how}, for want of a --tokenizer"
        return [] if exact else [note]

    def load(self, seed: int) -> Load:
        """The load of a run. ConfigError for files that cannot be read."""
        options = self._options
        num_prompts = options.num_prompts or DEFAULT_NUM_PROMPTS
        if options.dataset in TRACES:
            num_rows = traces.count_rows(options.dataset_path)
            num_prompts = min(options.num_prompts or num_rows, num_rows)
            timed = ((sample, sample.arrival_s or 0.0) for sample in self.samples(seed))
            samples: Iterator[tuple[Sample, float]] = itertools.islice(timed, num_prompts)
        else:
            ramp = None
            if options.ramp_up_strategy:
                ramp = Ramp(
                    options.ramp_up_strategy, options.ramp_up_start_rps, options.ramp_up_end_rps
                )
            times = arrival_times(num_prompts, options.request_rate, options.burstiness, ramp, seed)
            samples = zip(self.samples(seed), times, strict=False)
        return Load(
            samples,
            num_prompts,
            options.max_concurrency,
            options.timeout,
            options.think_time,
            self._credit,
        )

    def warm_up(self) -> Load | None:
        """Requests of the same kind, all at once, that are not measured."""
        options = self._options
        num = options.warm_up
        if num < 1:
            return None
        samples = itertools.islice(self.samples(options.seed + WARM_UP_SEED), num)
        limit = min(num, options.max_concurrency or num)
        untimed = ((sample, 0.0) for sample in samples)
        return Load(untimed, num, limit, options.timeout, credit=self._credit)

    def samples(self, seed: int) -> Iterator[Sample]:
        """The samples of the data set, in their order."""
        options, vocabulary, lengths = self._options, self._vocabulary, self._lengths
        prefix_len = max(0, options.prefix_len or 0)
        if options.dataset == "random":
            return random_prompts(vocabulary, lengths, seed, prefix_len)
        if options.dataset == "fixed":
            return fixed_prompt(vocabulary, lengths, seed, options.prompt, self._counter)
        if options.dataset == "shared-prefix":
            return shared_prefix(vocabulary, lengths, seed, prefix_len, options.num_prefixes)
        if options.dataset == "multi-turn":
            return multi_turn(vocabulary, lengths, seed, options.num_turns, prefix_len)
        if options.dataset == "sharegpt":
            return sharegpt(options.dataset_path, self._counter, seed, options.output_len)
        if options.dataset == "prompts":
            return prompts_file(options.dataset_path, self._counter, lengths.num_output)
        replay = TRACES[options.dataset]
        scales = (options.time_scale, options.length_scale)
        return replay(options.dataset_path, vocabulary, seed, *scales)


def _mapped(path: Path) -> memoryview:
    """The uint64 that a file of eight bytes holds."""
    try:
        with path.open("r+b") as file:
            return memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a file of eight bytes") from error


# Types of options


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be a positive number")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be positive, or inf")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


def _objective(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in OBJECTIVES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(OBJECTIVES)}, as ttft:200")
    return name, _positive(limit)


def _percentiles(text: str) -> Sequence[float]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError("must be between 0 and 100")
    return values


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise argparse.ArgumentTypeError("not JSON") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value
