"""The response parser: what counts as an event, and when, however the bytes are cut."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl_fast.bench.reader import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    SGLANG,
    ProtocolError,
    ResponseReader,
)

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def delta(body):
    return b'data: {"choices":[{"index":0,"delta":' + body + b"}]}\n\n"


def read(data, api=CHAT, step=None, keep_text=True):
    reader = ResponseReader(api)
    reader.begin(0.0, keep_text)
    step = step or len(data)
    complete = False
    for now, i in enumerate(range(0, len(data), step), 1):
        assert not complete
        complete = reader.feed(data[i : i + step], float(now))
    return reader, complete


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
STREAM = [
    delta(b'{"role":"assistant","content":""}'),
    b": a comment, as proxies send them\n\n",
    delta(b'{"content":"one"}'),
    delta(b'{"content": "say \\"content\\":\\"x\\" \\\\"}'),
    delta(b'{"content":null,"reasoning_content":"hm"}'),
    delta(b"{}"),
    USAGE,
    b"data: [DONE]\n\n",
]
WHOLE = HEAD + b"".join(map(chunk, STREAM)) + b"0\r\n\r\n"


@pytest.mark.parametrize("step", [*range(1, 40), 100, len(WHOLE)])
def test_events_do_not_depend_on_how_the_bytes_are_cut(step):
    reader, complete = read(WHOLE, step=step)
    assert complete
    assert (reader.status, reader.keep_alive, reader.done) == (200, True, True)
    assert reader.num_events == 3
    assert reader.num_bytes == len(WHOLE)
    assert reader.num_reads == -(-len(WHOLE) // step)
    assert reader.usage == USAGE[6:-2]
    assert reader.text == 'onesay "content":"x" \\hm'
    assert reader.error == b""


def test_every_event_has_the_time_of_its_read():
    reader = ResponseReader(CHAT)
    reader.begin(10.0)
    reader.feed(HEAD + chunk(STREAM[0]), 10.5)
    reader.feed(chunk(STREAM[2]), 11.0)
    reader.feed(chunk(STREAM[2] * 2), 11.25)
    reader.feed(chunk(STREAM[2][:-1]), 12.0)
    reader.feed(chunk(b"\n"), 12.25)  # the blank line ends the event
    assert reader.feed(chunk(USAGE + STREAM[-1]) + b"0\r\n\r\n", 13.0)
    assert (reader.start_s, reader.first_s, reader.last_s) == (10.0, 11.0, 12.25)
    assert reader.gaps == [0.25, 0.0, 1.0]


def test_a_reader_forgets_the_last_response():
    reader, _ = read(WHOLE)
    reader.begin(50.0)
    assert reader.feed(HEAD + chunk(STREAM[2]) + b"0\r\n\r\n", 51.0)
    assert (reader.num_events, reader.gaps, reader.usage, reader.done) == (1, [], b"", False)
    assert reader.text == ""


@pytest.mark.parametrize(
    ("api", "data", "num_events", "text"),
    [
        (CHAT, delta(b'{"reasoning":"why","content":null}'), 1, "why"),
        (CHAT, b'data: {"logprobs":{"content":[]},"delta":{"content":"a"}}\n\n', 1, "a"),
        (CHAT, b'data:{"delta":{"content":"\\u00e9\\n"}}\r\n\r\n', 1, "é\n"),
        (CHAT, b'event: x\nid: 3\ndata: {"content":"a"}\n\n', 1, "a"),
        (CHAT, b'data: {"content":"a"}\n', 1, "a"),  # no blank line before the end
        (COMPLETIONS, b'data: {"choices":[{"text":" fox"}]}\n\n', 1, " fox"),
        (COMPLETIONS, b'data: {"choices":[{"text":""}]}\n\n', 0, ""),
        (COMPLETIONS, b'data: {"delta":{"content":"a"}}\n\n', 0, ""),
        (GENERATE, b"data: {text}\n\ndata:  two\n\n", 2, "{text} two"),
        (GENERATE, b"data: line\ndata: \ndata: end\n\n", 1, "line\n\nend"),
        (GENERATE, b"data: \ndata: \n\n", 1, "\n"),
        (GENERATE, b"data: \n\n", 0, ""),
    ],
)
def test_an_event_counts_if_it_has_text(api, data, num_events, text):
    reader, complete = read(HEAD + chunk(data) + b"0\r\n\r\n", api)
    assert complete
    assert (reader.num_events, reader.text) == (num_events, text)


@pytest.mark.parametrize(
    "data",
    [
        b'{"error":{"message":"out of memory","code":500}}',
        b'{"error": {"message": "x"}}',
        b'{"object":"error","message":"x"}',
    ],
)
def test_an_error_event_is_kept(data):
    reader, _ = read(HEAD + chunk(STREAM[2] + b"data: " + data + b"\n\n") + b"0\r\n\r\n")
    assert reader.error == data


def test_text_about_errors_and_usage_is_no_error_and_no_usage():
    said = b'{"content":"{\\"error\\":{\\"usage\\":{"}'
    reader, _ = read(HEAD + chunk(delta(said)) + b"0\r\n\r\n")
    assert (reader.error, reader.usage, reader.num_events) == (b"", b"", 1)


def test_a_body_with_a_length_ends_there():
    body = b'{"error":{"message":"busy"}}'
    head = b"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for step in range(1, 20):
        reader, complete = read(head % len(body) + body, step=step)
        assert complete
        assert (reader.status, reader.error, reader.keep_alive) == (503, body, True)
    reader, complete = read(head % 0)
    assert complete


def test_a_body_without_a_length_ends_with_the_connection():
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    reader, complete = read(head + STREAM[2] + STREAM[-1])
    assert not complete
    assert reader.feed_eof(9.0)
    assert (reader.num_events, reader.done, reader.keep_alive) == (1, True, False)


@pytest.mark.parametrize("size", [0, 10, len(HEAD), len(HEAD) + 3, len(WHOLE) - 2])
def test_the_end_of_the_connection_completes_nothing_else(size):
    reader = ResponseReader(CHAT)
    reader.begin(0.0)
    assert not reader.feed(WHOLE[:size], 1.0)
    assert not reader.feed_eof(2.0)


def test_interim_responses_and_chunk_extensions_and_trailers_are_skipped():
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD
    event = STREAM[2]
    data += b"%X;name=value\r\n%b\r\n0\r\nTrailer: x\r\nOther: y\r\n\r\n" % (len(event), event)
    reader, complete = read(data)
    assert complete
    assert (reader.status, reader.num_events) == (200, 1)


def test_a_connection_that_closes_is_not_kept():
    reader, complete = read(HEAD[:-2] + b"Connection: close\r\n\r\n0\r\n\r\n")
    assert complete
    assert not reader.keep_alive


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        HEAD + b"xyz\r\n",
        HEAD + b"\r\n",
        HEAD + b"1" * 17 + b"\r\n",
        HEAD + b"3\r\nabcd\r\n",
        HEAD + b"1" * 5000,
        WHOLE + b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (70 << 10),
        HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n",
        HEAD + chunk(b"data: " + b"x" * (5 << 20)),
    ],
)
def test_what_is_no_response_is_refused(data):
    with pytest.raises(ProtocolError):
        read(data)


def test_kept_errors_are_bounded():
    body = b"e" * 100_000
    head = b"HTTP/1.1 500 Oops\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert len(read(head + body)[0].error) == 500


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2**32))
def test_random_bytes_end_in_an_answer_or_a_protocol_error(noise, seed):
    rng = random.Random(seed)
    data = bytearray(WHOLE)
    at = rng.randrange(len(data))
    data[at : at + rng.randrange(40)] = noise
    reader = ResponseReader(rng.choice((CHAT, COMPLETIONS, GENERATE)))
    reader.begin(0.0, True)
    try:
        while data:
            size = rng.randrange(1, 80)
            if reader.feed(bytes(data[:size]), 1.0):
                break
            del data[:size]
        reader.feed_eof(2.0)
        assert reader.text is not None
    except ProtocolError:
        pass
    assert reader.num_events <= len(STREAM) + len(noise)


TEXTS = (
    "one",
    " two",
    "",
    r"a \" quote",
    r"\\",
    "usage",
    r"x\\",
    r"\"",
    r"\u00e9",
    "é",
    r"\\\"",
    "\\",
)
SHAPES = (
    '{"choices":[{"index":0,"delta":{"content":"%s"}}]}',
    '{"choices":[{"index":0,"delta":{"content":"%s"}}],"usage":null}',
    '{"choices":[{"index":0,"delta":{"content":"%s"}}],"usage":{  }}',
    '{"choices":[{"index":0,"delta":{"content":"%s"}}],"usage":{"completion_tokens":2}}',
    '{"choices":[{"index":1,"delta":{"content":"%s"}}]}',
    '{"choices":[{"delta":{"content":"","reasoning_content":"%s"}}]}',
    '{"choices":[{"delta":{"reasoning":"%s","content":null}}]}',
    '{"choices":[{"delta":{"content":"%s"}}]}',
    '{"choices":[{"text":"%s"}]}',
    '{"error":{"message":"%s"}}',
    '{"choices":[{"delta":{"content":"%s":{}}}]}',  # no JSON
    '{"choices":[{"delta":{"content":"%s","content":"more"}}]}',
    '"content":"%s"',
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(SHAPES), st.lists(st.sampled_from(TEXTS), max_size=4))),
    st.sampled_from((CHAT, COMPLETIONS)),
    st.integers(1, 200),
)
def test_what_an_event_says_does_not_depend_on_the_one_before(runs, api, step):
    """A reader that knows the last event must find what one finds that knows none."""
    events = [shape % text for shape, texts in runs for text in texts]
    events = [f"data: {event}\n\n".encode() for event in events]
    together, _ = read(HEAD + b"".join(map(chunk, events)) + b"0\r\n\r\n", api, step)
    alone = [read(HEAD + chunk(event) + b"0\r\n\r\n", api)[0] for event in events]
    assert together.num_events == sum(reader.num_events for reader in alone)
    assert together.text == "".join(reader.text for reader in alone)
    assert together.usage == next((r.usage for r in reversed(alone) if r.usage), b"")
    assert together.error == next((r.error for r in alone if r.error), b"")


def test_a_long_chunk_line_is_refused_in_one_read_or_in_several():
    for step in (1, 1 << 20):
        with pytest.raises(ProtocolError, match="too long"):
            read(HEAD + b"1;" + b"x" * 5000 + b"\r\nx\r\n", step=step)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_events_of_sglang_hold_all_the_text_so_far(step):
    first = b'data: {"text":"one","meta_info":{"prompt_tokens":3,"completion_tokens":1}}\n\n'
    last = (
        b'data: {"text":"one \\"two\\"","meta_info":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
    )
    done = b"data: [DONE]\n\n"
    whole = HEAD + b"".join(map(chunk, (first, last, done))) + b"0\r\n\r\n"
    reader, complete = read(whole, api=SGLANG, step=step)
    assert complete and reader.done
    assert (reader.num_events, reader.text) == (2, 'one "two"')
    assert reader.usage == last.removeprefix(b"data: ").strip()


def test_events_are_counted_for_somebody_else_too():
    count = memoryview(bytearray(8)).cast("Q")
    for _ in range(2):
        reader = ResponseReader(CHAT, count)
        reader.begin(0.0)
        reader.feed(WHOLE, 1.0)
    assert count[0] == 6
