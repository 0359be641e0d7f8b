"""What the options of a run make: each data set and each way to arrive, exactly as asked."""

import argparse
import itertools
import json
import math

import pytest

from minisgl_fast.bench.options import Workload, add_options, check

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0,40,6\n"
AZURE += "2023-11-16 18:17:05.0,20,4\n"
MOONCAKE = [
    {"timestamp": 0, "input_length": 1024, "output_length": 8, "hash_ids": [7, 8]},
    {"timestamp": 3000, "input_length": 1024, "output_length": 4, "hash_ids": [7, 9]},
]


@pytest.fixture
def load(tmp_path):
    """The (sample, due_s) and the Load of a command line; FILE stands for a file's content."""

    def make(*arguments, content=None, seed=3):
        if content is not None:
            path = tmp_path / "data.jsonl" if content[:1] == "{" else tmp_path / "data"
            path.write_text(content)
            arguments = (*arguments, "--dataset-path", str(path))
        parser = argparse.ArgumentParser()
        add_options(parser)
        options = parser.parse_args(["--api", "completions", "--num-prompts", "5", *arguments])
        check(options)
        made = Workload(options).load(seed)
        return list(made.samples), made

    return make


def lengths(timed):
    return [len(sample.prompt) for sample, _ in timed]


def test_random_lengths_stay_within_their_range(load):
    timed, made = load("--input-len", "100", "--output-len", "10", "--range-ratio", "0.2")
    assert made.num_samples == len(timed) == 5
    assert all(80 <= length <= 120 for length in lengths(timed))
    assert all(8 <= sample.num_output <= 12 for sample, _ in timed)
    assert len({tuple(sample.prompt) for sample, _ in timed}) == 5
    exact, _ = load("--input-len", "100", "--prefix-len", "7", "--output-len", "10")
    assert lengths(exact) == [107] * 5
    assert len({tuple(sample.prompt[:7]) for sample, _ in exact}) == 1
    assert {sample.num_output for sample, _ in exact} == {10}


def test_a_fixed_prompt_is_the_text_or_of_the_length(load):
    timed, _ = load("--dataset", "fixed", "--prompt", "Say hi.", "--output-len", "3")
    assert [(sample.prompt, sample.num_output) for sample, _ in timed] == [("Say hi.", 3)] * 5
    timed, _ = load("--dataset", "fixed", "--input-len", "9")
    assert lengths(timed) == [9] * 5
    assert len({tuple(sample.prompt) for sample, _ in timed}) == 1


def test_shared_prefixes_are_as_many_and_as_long(load):
    words = ("--dataset", "shared-prefix", "--prefix-len", "50", "--num-prefixes", "2")
    timed, _ = load(*words, "--input-len", "10", "--num-prompts", "40")
    assert lengths(timed) == [60] * 40
    assert len({tuple(sample.prompt[:50]) for sample, _ in timed}) == 2
    assert len({tuple(sample.prompt[50:]) for sample, _ in timed}) == 40


def test_conversations_have_their_turns_and_time_to_think(load):
    words = ("--dataset", "multi-turn", "--num-turns", "3", "--think-time", "1.5")
    timed, made = load(*words, "--api", "chat", "--input-len", "4")
    assert made.think_time_s == 1.5
    for sample, _ in timed:
        num_turns = 1
        while sample.next_turn is not None:
            sample, num_turns = sample.next_turn("an answer"), num_turns + 1
        assert num_turns == 3


def test_files_of_prompts_and_conversations(load):
    timed, _ = load("--dataset", "prompts", "--output-len", "6", content="one\ntwo\n")
    assert [sample.prompt for sample, _ in timed] == ["one", "two", "one", "two", "one"]
    turns = [{"from": "human", "value": "q" * 40}, {"from": "gpt", "value": "a" * 80}]
    content = json.dumps([{"conversations": turns}])
    timed, _ = load("--dataset", "sharegpt", content=content)
    assert [(s.prompt, s.num_output) for s, _ in timed] == [("q" * 40, 20)] * 5
    timed, _ = load("--dataset", "sharegpt", "--output-len", "7", content=content)
    assert {sample.num_output for sample, _ in timed} == {7}


@pytest.mark.parametrize(("scale", "times"), [("1", [0, 3]), ("0.5", [0, 1.5]), ("4", [0, 12])])
def test_a_mooncake_trace_keeps_its_times_and_its_shared_blocks(load, scale, times):
    content = "".join(json.dumps(row) + "\n" for row in MOONCAKE)
    timed, made = load("--dataset", "mooncake", "--time-scale", scale, content=content)
    assert made.num_samples == 2  # no more than there are
    assert [due_s for _, due_s in timed] == pytest.approx(times)
    (first, _), (second, _) = timed
    assert lengths(timed) == [1024, 1024]
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:] != second.prompt[512:]
    assert [sample.num_output for sample, _ in timed] == [8, 4]


def test_an_azure_trace_keeps_its_times_and_lengths(load):
    words = ("--dataset", "azure", "--time-scale", "0.25", "--length-scale", "0.5")
    timed, _ = load(*words, content=AZURE)
    assert [due_s for _, due_s in timed] == pytest.approx([0, 0.5])
    assert [(len(s.prompt), s.num_output) for s, _ in timed] == [(20, 3), (10, 2)]
    timed, made = load(*words, "--num-prompts", "1", content=AZURE)
    assert made.num_samples == len(timed) == 1


def gaps(timed):
    times = [due_s for _, due_s in timed]
    assert times == sorted(times)
    return [later - due_s for due_s, later in itertools.pairwise(times)]


def test_without_a_rate_all_are_due_at_once(load):
    timed, made = load("--max-concurrency", "2", "--timeout", "9")
    assert [due_s for _, due_s in timed] == [0.0] * 5
    assert (made.max_concurrency, made.timeout_s) == (2, 9.0)


@pytest.mark.parametrize(("words", "variation"), [((), 1.0), (("--burstiness", "4"), 0.5),
                                                  (("--burstiness", "0.25"), 2.0)])  # fmt: skip
def test_arrivals_have_the_rate_and_the_burstiness_asked(load, words, variation):
    small = ("--input-len", "1", "--num-prompts", "4000", "--request-rate", "20")
    timed, _ = load(*small, *words)
    found = gaps(timed)
    mean = sum(found) / len(found)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in found) / len(found))
    assert mean == pytest.approx(1 / 20, rel=0.1)
    assert deviation / mean == pytest.approx(variation, rel=0.15)


def test_infinite_burstiness_is_a_metronome(load):
    timed, _ = load("--request-rate", "4", "--burstiness", "inf")
    assert gaps(timed) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 50.5), ("exponential", 10.0)])
def test_a_ramp_begins_and_ends_at_its_rates(load, strategy, middle):
    ends = ("--ramp-up-start-rps", "1", "--ramp-up-end-rps", "100", "--burstiness", "inf")
    small = ("--input-len", "1", "--num-prompts", "1001")
    timed, _ = load("--ramp-up-strategy", strategy, *ends, *small)
    rates = [1 / gap for gap in gaps(timed)]
    assert rates[0] == pytest.approx(1, rel=0.1)
    assert rates[500] == pytest.approx(middle, rel=0.02)
    assert rates[-1] == pytest.approx(100, rel=0.01)


def test_the_seed_decides_prompts_and_times(load):
    words = ("--request-rate", "5", "--range-ratio", "0.5")
    one, again, other = (load(*words, seed=seed)[0] for seed in (1, 1, 2))

    def said(timed):
        return [(sample.prompt, sample.num_output, due_s) for sample, due_s in timed]

    assert said(one) == said(again)
    assert all(a[0] != b[0] for a, b in zip(said(one), said(other), strict=True))
