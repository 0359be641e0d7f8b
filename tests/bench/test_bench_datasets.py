"""What requests ask: every data set, its lengths and what its prompts share."""

import gzip
import itertools
import json

import pytest

from minisgl_fast.bench import traces
from minisgl_fast.bench.datasets import (
    Lengths,
    fixed_prompt,
    multi_turn,
    prompts_file,
    random_prompts,
    shared_prefix,
    sharegpt,
)
from minisgl_fast.bench.vocabulary import TextCounter, common_words, token_ids
from minisgl_fast.errors import ConfigError
from minisgl_fast.text.tokenizer import Tokenizer

COUNTER = TextCounter(None)


def take(samples, num):
    return list(itertools.islice(samples, num))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_random_ids_have_the_wanted_lengths():
    samples = take(random_prompts(token_ids(3000), Lengths(100, 20, 0.5), seed=1), 300)
    for sample in samples:
        assert sample.num_input == len(sample.prompt)
        assert all(100 <= token < 3000 for token in sample.prompt)
    assert {min(s.num_input for s in samples), max(s.num_input for s in samples)} <= {
        *range(50, 58),
        *range(143, 151),
    }
    assert min(s.num_output for s in samples) == 10
    assert max(s.num_output for s in samples) == 30


def test_random_prompts_may_share_a_prefix():
    first, second = take(random_prompts(token_ids(3000), Lengths(10, 5), 1, prefix_len=7), 2)
    assert first.num_input == len(first.prompt) == 17
    assert first.prompt[:7] == second.prompt[:7]
    assert first.prompt[7:] != second.prompt[7:]


def test_words_are_counted_as_tokens():
    (sample,) = take(random_prompts(common_words(), Lengths(50, 5), seed=1), 1)
    assert len(sample.prompt.split()) == sample.num_input == 50


def test_a_tokenizer_makes_lengths_exact(qwen3_folder):
    vocabulary = TextCounter(qwen3_folder).vocabulary()
    assert vocabulary.exact
    tokenizer = Tokenizer.load(qwen3_folder)
    for sample in take(random_prompts(vocabulary, Lengths(200, 5, 0.9), 1, prefix_len=10), 20):
        assert len(tokenizer.encode(sample.prompt)) == sample.num_input
    tokenizer.close()


def test_the_seed_decides():
    def made(seed):
        return take(random_prompts(common_words(), Lengths(20, 5, 0.3), seed), 5)

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_the_fixed_prompt_is_always_the_same():
    first, second = take(fixed_prompt(token_ids(3000), Lengths(30, 9), 0, None, COUNTER), 2)
    assert first == second
    assert (len(first.prompt), first.num_input, first.num_output) == (30, 30, 9)
    (given,) = take(fixed_prompt(common_words(), Lengths(30, 9), 0, "Hello, world!", COUNTER), 1)
    assert (given.prompt, given.num_input) == ("Hello, world!", 3)


def test_shared_prefixes_are_few():
    lengths = Lengths(10, 5)
    samples = take(shared_prefix(token_ids(3000), lengths, 0, prefix_len=40, num_prefixes=3), 60)
    assert {sample.num_input for sample in samples} == {50}
    assert len({tuple(sample.prompt[:40]) for sample in samples}) == 3
    assert len({tuple(sample.prompt[40:]) for sample in samples}) == 60


def test_turns_of_a_conversation_build_on_the_answers():
    first, other = take(multi_turn(common_words(), Lengths(5, 4), 0, num_turns=3, prefix_len=2), 2)
    assert first.history == []
    assert first.num_input == 7
    second = first.next_turn("answer one")
    assert second.history == [
        {"role": "user", "content": first.prompt},
        {"role": "assistant", "content": "answer one"},
    ]
    assert second.num_input == 7 + 4 + 5
    third = second.next_turn("answer two")
    assert third.history[:2] == second.history
    assert third.next_turn is None
    assert other.prompt.split()[:2] == first.prompt.split()[:2]
    assert other.prompt != first.prompt


def test_sharegpt_takes_first_questions_of_a_usable_length(tmp_path):
    def talk(*texts):
        return {"conversations": [{"from": "x", "value": text} for text in texts]}

    good = [talk("question " * 4 + str(i), "answer " * (4 + i)) for i in range(5)]
    openai = {
        "messages": [{"role": "user", "content": "m" * 40}, {"role": "a", "content": "n" * 80}]
    }
    bad = [talk("alone"), talk("no", "no"), talk("long " * 2000, "x" * 50), {"x": 1}, "text"]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([*bad, *good, openai]))
    samples = take(sharegpt(path, COUNTER, seed=0), 12)
    assert {s.prompt for s in samples[:6]} == {
        *(f"{'question ' * 4}{i}" for i in range(5)),
        "m" * 40,
    }
    assert samples[6:] == samples[:6]
    assert {s.num_output for s in samples if s.prompt == "m" * 40} == {20}
    assert {s.num_output for s in take(sharegpt(path, COUNTER, 0, num_output=7), 6)} == {7}
    assert [s.prompt for s in take(sharegpt(path, COUNTER, seed=1), 6)] != [
        s.prompt for s in samples[:6]
    ]


def test_prompts_come_from_lines_or_from_json_lines(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("one prompt here\n\ntwo\n")
    samples = take(prompts_file(text, COUNTER, 16), 3)
    assert [s.prompt for s in samples] == ["one prompt here", "two", "one prompt here"]
    assert [s.num_output for s in samples] == [16, 16, 16]
    rows = write_lines(
        tmp_path / "prompts.jsonl", [{"prompt": "a" * 8, "output_tokens": 3}, {"prompt": "b"}]
    )
    samples = take(prompts_file(rows, COUNTER, 16), 2)
    assert [(s.prompt, s.num_input, s.num_output) for s in samples] == [
        ("a" * 8, 2, 3),
        ("b", 1, 16),
    ]


MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 50, "hash_ids": [1, 2, 3]},
    {"timestamp": 3000, "input_length": 1024, "output_length": 8, "hash_ids": [1, 2]},
    {"timestamp": 4500, "input_length": 600, "output_length": 1, "hash_ids": [1, 9]},
]


def test_equal_hash_ids_of_mooncake_give_equal_blocks(tmp_path):
    path = write_lines(tmp_path / "trace.jsonl", MOONCAKE)
    for vocabulary in (token_ids(3000), common_words()):
        samples = list(traces.mooncake(path, vocabulary, seed=0, time_scale=0.5))
        assert [s.num_input for s in samples] == [1100, 1024, 600]
        assert [s.num_output for s in samples] == [50, 8, 1]
        assert [s.arrival_s for s in samples] == [0.0, 1.5, 2.25]
        a, b, c = (s.prompt if isinstance(s.prompt, list) else s.prompt.split() for s in samples)
        assert [len(a), len(b), len(c)] == [1100, 1024, 600]
        assert a[:1024] == b
        assert c[:512] == a[:512]
        assert c[512:] != a[512:600]


def test_lengths_of_a_trace_can_be_scaled(tmp_path):
    path = write_lines(tmp_path / "trace.jsonl", MOONCAKE)
    a, b, c = traces.mooncake(path, token_ids(3000), seed=0, length_scale=1 / 32)
    assert [len(s.prompt) for s in (a, b, c)] == [34, 32, 19]
    assert a.prompt[:32] == b.prompt
    assert c.prompt[:16] == a.prompt[:16]
    assert [s.num_output for s in (a, b, c)] == [2, 1, 1]


def test_a_trace_may_be_gzipped(tmp_path):
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(write_lines(tmp_path / "t", MOONCAKE).read_bytes()))
    assert traces.count_rows(path) == 3
    assert len(list(traces.mooncake(path, token_ids(3000), seed=0))) == 3


def test_azure_traces_keep_their_times_and_lengths(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
        "2023-11-16 18:18:03.9799600,110,27\n"
    )
    assert traces.count_rows(path) == 3
    samples = list(traces.azure(path, token_ids(3000), seed=0, time_scale=2.0, length_scale=0.1))
    assert [s.arrival_s for s in samples] == pytest.approx([0.0, 0.104, 120.0], abs=1e-5)
    assert [(len(s.prompt), s.num_output) for s in samples] == [(481, 1), (318, 1), (11, 3)]


@pytest.mark.parametrize(
    ("name", "content", "make"),
    [
        ("a.json", "[1,", lambda path: sharegpt(path, COUNTER, 0)),
        ("a.json", "{}", lambda path: sharegpt(path, COUNTER, 0)),
        ("a.json", "[]", lambda path: sharegpt(path, COUNTER, 0)),
        ("a.txt", "\n\n", lambda path: prompts_file(path, COUNTER, 1)),
        ("a.jsonl", '{"prompt":3}', lambda path: prompts_file(path, COUNTER, 1)),
        ("a.jsonl", '{"prompt":"a","output_tokens":0}', lambda p: prompts_file(p, COUNTER, 1)),
        ("a.jsonl", '{"timestamp":1}', lambda path: traces.mooncake(path, token_ids(99), 0)),
        ("a.csv", "TIMESTAMP,ContextTokens\nx,1\n", lambda p: traces.azure(p, token_ids(99), 0)),
    ],
)
def test_files_that_are_no_data_set_are_refused(tmp_path, name, content, make):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        next(iter(make(tmp_path / name)))
    with pytest.raises(ConfigError, match="missing"):
        next(iter(make(tmp_path / "missing")))
