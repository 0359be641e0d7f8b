"""The token loop without sockets: frames in, calls on a recording exchange out."""

import json
import random
import struct

import pytest
from fake_engine import EOS
from recording import RecordingExchange, RecordingResponse

from minisgl_fast.errors import EngineError
from minisgl_fast.server.deliver import Dispatcher
from minisgl_fast.server.histogram import Histogram
from minisgl_fast.server.response import Choice
from minisgl_fast.text.stream import TextStream
from minisgl_fast.wire import FinishReason, pack_step

RUNNING, END_EOS, LENGTH = FinishReason.RUNNING, FinishReason.EOS, FinishReason.LENGTH
ABORTED, STOP_TOKEN = FinishReason.ABORTED, FinishReason.STOP_TOKEN


class Bench:
    """A dispatcher whose choices are built by hand."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.aborted = []
        self.dispatcher = Dispatcher(self.aborted.append, [0.1, 1.0], [0.1, 1.0])
        self.now = 0.0

    def response(self, num_choices=1, streaming=True, stops=(), include_stop=False):
        exchange = RecordingExchange()
        response = RecordingResponse(exchange, streaming)
        choices = []
        for index in range(num_choices):
            text = self.tokenizer.stream(stops, include_stop)
            prefix = b"[%d:" % index
            choices.append(Choice(response, index, text, prefix, b"]", include_stop, self.now))
            self.dispatcher.open_choice(choices[-1])
        return response, exchange, choices

    def step(self, *rows, first=(), flush=True):
        self.now += 0.01
        rows = [(choice.rid, token, reason) for choice, token, reason in rows]
        self.dispatcher.deliver(pack_step(rows, first), self.now)
        if flush:
            self.dispatcher.flush()


@pytest.fixture
def bench(tokenizer):
    return Bench(tokenizer)


def ids(tokenizer, text):
    return tokenizer.encode(text)


def test_tokens_become_events_and_the_last_one_completes(bench, tokenizer):
    response, exchange, (choice,) = bench.response()
    one, two = ids(tokenizer, "Hello world")
    bench.step((choice, one, RUNNING), first=[(choice.rid, 7)])
    assert exchange.take() == [b"<open>[0:Hello]"]
    bench.step((choice, two, RUNNING))
    assert exchange.take() == [b"[0: world]"]
    bench.step((choice, EOS, END_EOS))
    assert exchange.take() == []
    assert response.log == [b"<0:%d>" % END_EOS]
    assert (choice.num_tokens, choice.num_cached, choice.last_token) == (3, 7, EOS)
    assert (len(bench.dispatcher), response.ended) == (0, True)


def test_frames_delivered_together_are_written_once(bench, tokenizer):
    _, exchange, choices = bench.response(2)
    tokens = ids(tokenizer, "a b c d")
    for token in tokens:
        bench.step(*((choice, token, RUNNING) for choice in choices), flush=False)
    bench.dispatcher.flush()
    assert exchange.take() == [b"<open>[0:a b c d][1:a b c d]"]
    bench.dispatcher.flush()
    assert exchange.take() == []


def test_half_a_character_writes_nothing(bench, tokenizer):
    _, exchange, (choice,) = bench.response()
    pieces = ids(tokenizer, "ᚠ")
    assert len(pieces) > 1
    for token in pieces[:-1]:
        bench.step((choice, token, RUNNING))
    assert b"".join(exchange.take()) == b"<open>"
    bench.step((choice, pieces[-1], RUNNING))
    assert exchange.take() == ["[0:ᚠ]".encode()]


def test_a_paused_response_keeps_its_text_for_one_event(bench, tokenizer):
    response, exchange, (choice,) = bench.response()
    a, b, c = ids(tokenizer, "a b c")
    bench.step((choice, a, RUNNING))
    exchange.take()
    exchange.paused = True
    bench.step((choice, b, RUNNING))
    bench.step((choice, c, LENGTH))
    assert (exchange.take(), response.log) == ([], [])
    exchange.paused = False
    response.write_ready()
    assert response.log == [b"<0: b c%d>" % LENGTH]


def test_a_stop_string_ends_the_choice_and_the_engine_is_told(bench, tokenizer):
    response, exchange, (choice,) = bench.response(stops=["b c"])
    a, b, c = ids(tokenizer, "a b c")
    bench.step(
        (choice, a, RUNNING), (choice, b, RUNNING), (choice, c, RUNNING), (choice, a, RUNNING)
    )
    assert exchange.take() == []
    assert choice.stopped_by_string
    assert choice.num_tokens == 3
    assert bench.aborted == [choice.rid]
    assert response.log == [b"<open><0:a %d>" % choice.reason]
    bench.step((choice, a, RUNNING), (choice, -1, ABORTED))
    assert choice.num_tokens == 3


def test_a_stop_string_complete_on_the_last_token_needs_no_abort(bench, tokenizer):
    _, _, (choice,) = bench.response(stops=["b"])
    a, b = ids(tokenizer, "a b")
    bench.step((choice, a, RUNNING), (choice, b, LENGTH))
    assert choice.stopped_by_string
    assert bench.aborted == []


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("reason", [END_EOS, STOP_TOKEN])
def test_the_stopping_token_is_counted_and_shown_on_request(bench, tokenizer, include, reason):
    response, _, (choice,) = bench.response(include_stop=include)
    a, b = ids(tokenizer, "a b")
    bench.step((choice, a, RUNNING), (choice, b, reason))
    assert choice.num_tokens == 2
    assert response.log == [b"<open><0:%b%d>" % (b"a b" if include else b"a", reason)]


def test_a_whole_answer_is_touched_only_at_its_end(bench, tokenizer):
    response, exchange, choices = bench.response(2, streaming=False)
    a, b = ids(tokenizer, "a b")
    bench.step(*((choice, a, RUNNING) for choice in choices))
    bench.step((choices[1], b, LENGTH))
    assert response.num_open == 1
    bench.step((choices[0], b, LENGTH))
    assert exchange.take() == []
    assert response.log == [b"<1:a b%d><0:a b%d>" % (LENGTH, LENGTH)]


def test_rows_of_unknown_rids_are_dropped(bench):
    bench.dispatcher.deliver(pack_step([(5, 1, RUNNING)], [(6, 1)]), 1.0)
    bench.dispatcher.flush()


def test_a_closed_choice_gets_nothing_more(bench, tokenizer):
    _, exchange, (choice,) = bench.response()
    assert bench.dispatcher.close(choice) is True
    assert bench.dispatcher.close(choice) is False
    bench.step((choice, 5, RUNNING))
    assert (choice.num_tokens, exchange.take()) == (0, [])


def test_one_response_that_breaks_leaves_the_others_alone(bench, tokenizer):
    broken, _, (first,) = bench.response()
    _, exchange, (second,) = bench.response()
    broken.open_stream = None
    (a,) = ids(tokenizer, "a")
    bench.step((first, a, RUNNING), (second, a, RUNNING))
    (error,) = broken.log
    assert isinstance(error, EngineError)
    assert exchange.take() == [b"<open>[0:a]"]


def test_a_token_without_text_fails_its_own_response_only(bench, tokenizer):
    class BrokenWindow:
        def step(self, token):
            raise ValueError("a bug")

    broken = RecordingResponse(RecordingExchange())
    text = TextStream(tokenizer.table, window=BrokenWindow())
    first = Choice(broken, 0, text, b"", b"", False, 0.0)
    bench.dispatcher.open_choice(first)
    _, exchange, (second,) = bench.response()
    (a,) = ids(tokenizer, "a")
    bench.step((first, a, RUNNING), (second, a, RUNNING))
    (error,) = broken.log
    assert isinstance(error, EngineError)
    assert exchange.take() == [b"<open>[0:a]"]


@pytest.mark.parametrize("size", [0, 7, 8, 16, 18])
def test_a_malformed_frame_is_an_error_and_not_a_crash(bench, size):
    payload = pack_step([(0, 1, RUNNING)])
    assert len(payload) == 17
    with pytest.raises(EngineError):
        bench.dispatcher.deliver((payload + b"\0")[:size], 0.0)
    with pytest.raises(EngineError):
        bench.dispatcher.deliver(struct.pack("<II", 2**32 - 1, 2**32 - 1), 0.0)


def test_rids_of_open_choices_are_never_given_again(bench):
    _, _, choices = bench.response(3)
    assert len({choice.rid for choice in choices}) == 3
    bench.dispatcher.close(choices[0])
    _, _, more = bench.response(3)
    live = {choice.rid for choice in [*choices[1:], *more]}
    assert len(live) == 5
    assert set(bench.dispatcher.choices()) == {*choices[1:], *more}


def test_histograms_count_as_prometheus_reads_them():
    histogram = Histogram([0.1, 1.0])
    for value in (0.05, 0.1, 0.5, 3.0):
        histogram.observe(value)
    assert histogram.buckets() == [("0.1", 2), ("1.0", 3), ("+Inf", 4)]
    assert histogram.total == pytest.approx(3.65)


@pytest.mark.parametrize("seed", range(20))
def test_any_interleaving_gives_every_choice_its_own_text(bench, tokenizer, seed):
    """Random steps, merges, pauses and ends, against the text decoded at once."""
    rng = random.Random(seed)
    vocabulary = tokenizer.encode('Some plain words, ᚠ🥐 你好 and "quotes" \\ to be cut anywhere.')
    live, written, sent = [], {}, {}
    for _ in range(rng.randint(1, 6)):
        response, exchange, choices = bench.response(rng.randint(1, 3), rng.random() < 0.8)
        written[id(response)] = (response, exchange, choices)
        live += choices
    sent = {choice.rid: [] for choice in live}
    everything = list(live)
    while live:
        rows = []
        for choice in rng.sample(live, rng.randint(1, len(live))):
            token = rng.choice(vocabulary)
            ends = rng.random() < 0.05
            rows.append((choice, token, LENGTH if ends else RUNNING))
            sent[choice.rid].append(token)
            if ends:
                live.remove(choice)
        bench.step(*rows, flush=rng.random() < 0.6)
        for response, exchange, _ in written.values():
            if rng.random() < 0.2:
                exchange.paused = not exchange.paused
                response.write_ready()
    for response, exchange, _ in written.values():
        exchange.paused = False
        response.write_ready()
    bench.dispatcher.flush()
    assert len(bench.dispatcher) == 0
    for response, exchange, choices in written.values():
        (last,) = response.log
        data = b"".join([*exchange.written, last]).decode()
        for choice in choices:
            expected = tokenizer.decode(sent[choice.rid])
            assert choice.num_tokens == len(sent[choice.rid])
            assert _text_of(data, choice) == expected
    assert bench.dispatcher.num_generated == sum(map(len, sent.values()))
    assert {choice.reason for choice in everything} == {LENGTH}


def _text_of(data, choice):
    """The text of one choice from ``[0:text]`` events and its ``<0:text2>`` end."""
    text, position = "", 0
    while position < len(data):
        if data.startswith("<open>", position):
            position += len("<open>")
            continue
        closing = "]" if data[position] == "[" else f"{int(LENGTH)}>"
        end = data.index(closing, position)
        index, _, piece = data[position + 1 : end].partition(":")
        if int(index) == choice.index:
            text += json.loads(f'"{piece}"')
        position = end + len(closing)
    return text
