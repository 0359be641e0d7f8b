"""TextStream against bytes.decode, tokenizer.decode, json and a brute-force search for stops."""

import functools
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from minisgl_fast.errors import RequestError
from minisgl_fast.text.stream import TextStream, TokenTable
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.text.tokenizer_config import TokenizerConfig

BYTES = TokenTable([bytes([byte]) for byte in range(256)], [])


def feed_all(stream, tokens):
    """All pieces, the flushed tail last."""
    pieces = []
    for token in tokens:
        stream.feed(token)
        pieces.append(stream.take())
    stream.finish()
    pieces.append(stream.take())
    return pieces


def is_text(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


# UTF-8

# Bytes that complete any character: E0 wants A0 next and F0 wants 90, ED and F4 want 80.
COMPLETIONS = [
    bytes(rest) for n in (1, 2, 3) for rest in itertools.product((0x80, 0x90, 0xA0), repeat=n)
]


@functools.cache
def may_become_a_character(tail):
    return any(is_text(tail + rest) and len((tail + rest).decode()) == 1 for rest in COMPLETIONS)


def certain_text(data):
    """The text without the bytes at its end that a later byte could still complete."""
    # (codecs' incremental decoder is no oracle: it holds ED A0 back, which nothing completes.)
    tails = range(1, min(3, len(data)) + 1)
    held = max((n for n in tails if may_become_a_character(data[-n:])), default=0)
    return data[: len(data) - held].decode("utf-8", "replace")


# Every class of bytes that the well-formedness table of Unicode tells apart, and its edges.
TRICKY = bytes.fromhex(
    "00 22 41 5c 7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 ff"
)


@pytest.mark.parametrize("lead", [0xC2, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xC0, 0x80])
def test_every_short_byte_sequence_shows_all_that_no_later_byte_can_change(lead):
    for rest in itertools.product(TRICKY, repeat=3):
        check_every_prefix(bytes([lead, *rest]))


@given(st.lists(st.sampled_from(TRICKY), max_size=40).map(bytes) | st.text().map(str.encode))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_bytes_show_all_that_no_later_byte_can_change(data):
    check_every_prefix(data)


def check_every_prefix(data):
    stream = TextStream(BYTES)
    text = ""
    for end in range(1, len(data) + 1):
        stream.feed(data[end - 1])
        text += stream.take().decode()
        assert text == certain_text(data[:end])
    stream.finish()
    assert text + stream.take().decode() == data.decode("utf-8", "replace")


def test_half_a_character_is_held_until_it_is_whole_or_lost():
    stream = TextStream(BYTES)
    for byte in "€".encode()[:2]:
        stream.feed(byte)
        assert stream.take() == b""
    stream.feed("€".encode()[2])
    assert stream.take() == "€".encode()
    stream.feed(0xF0)
    assert stream.take() == b""
    stream.finish()
    assert stream.take() == "\ufffd".encode()


@given(st.text(), st.lists(st.sampled_from(TRICKY), max_size=20).map(bytes))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_json_pieces_read_back_as_the_text(text, junk):
    data = text.encode() + junk
    stream = TextStream(BYTES)
    pieces = []
    for byte in data:
        stream.feed(byte)
        pieces.append(stream.take_json())
    stream.finish()
    pieces.append(stream.take_json())
    whole = b'"' + b"".join(pieces) + b'"'
    assert json.loads(whole) == data.decode("utf-8", "replace")
    for piece in pieces:
        json.loads(b'"' + piece + b'"')


def test_json_escapes_only_what_json_must():
    stream = TextStream(BYTES)
    every = bytes(range(0x80)) + "é€😀\u2028".encode()
    for byte in every:
        stream.feed(byte)
    expected = json.dumps(every.decode(), ensure_ascii=False)[1:-1]
    assert stream.take_json().decode() == expected


# Stop strings


def expected_steps(data, stops, include_stop):
    """(what shows after each byte, index of the stop or -1), by looking at every prefix again."""
    shown = []
    for end in range(1, len(data) + 1):
        complete = [i for i, stop in enumerate(stops) if data[:end].endswith(stop)]
        if complete:
            index = max(complete, key=lambda i: len(stops[i]))
            kept = data[: end if include_stop else end - len(stops[index])]
            return [*shown, kept.decode("utf-8", "replace")], index
        held = 0
        if not include_stop:
            held = max(
                (n for stop in stops for n in range(len(stop)) if data[:end].endswith(stop[:n])),
                default=0,
            )
        visible = data[: end - held]
        shown.append(visible.decode("utf-8", "replace") if held else certain_text(visible))
    return [*shown, data.decode("utf-8", "replace")], -1


@pytest.mark.parametrize("alphabet", ["ab", "abc", "aé€", "€₭😀😁", '"\\\n'])
@pytest.mark.parametrize("include_stop", [False, True])
def test_stop_strings_match_and_hold_back_as_a_brute_force_search_says(alphabet, include_stop):
    rng = random.Random(f"{alphabet}{include_stop}")
    num_stopped = 0
    for _ in range(1500):
        data = "".join(rng.choices(alphabet, k=rng.randrange(14))).encode()
        if rng.random() < 0.3:  # broken characters
            data = bytes(byte for byte in data if rng.random() < 0.8)
        stops = [
            "".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))
        ]
        stops = [stop.encode() for stop in stops]
        expected, index = expected_steps(data, stops, include_stop)
        stream = TextStream(BYTES, stops, include_stop)
        text = ""
        for byte, so_far in zip(data, expected, strict=False):
            stream.feed(byte)
            text += stream.take().decode()
            assert text == so_far, (data, stops)
        stream.finish()
        text += stream.take().decode()
        assert text == expected[-1], (data, stops)
        if index >= 0:
            assert stops[stream.matched] == stops[index]
            num_stopped += 1
        assert stream.stopped == (index >= 0)
    assert 200 < num_stopped < 1400


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("xaabaabz", ["aabz", "zz"]),
        ("é\n\nUser", ["\nUser", "\n\nU"]),
        ("ababac", ["abac", "bab"]),
        ("a€b", ["€"]),
        ("no stop", ["stops"]),
    ],
)
def test_how_tokens_cut_the_text_makes_no_difference(text, stops, include_stop):
    data = text.encode()
    stops = [stop.encode() for stop in stops]
    expected, index = expected_steps(data, stops, include_stop)
    for cuts in itertools.product([False, True], repeat=len(data) - 1):
        pieces = [bytearray(data[:1])]
        for byte, cut in zip(data[1:], cuts, strict=True):
            if cut:
                pieces.append(bytearray())
            pieces[-1].append(byte)
        table = TokenTable([bytes(piece) for piece in pieces], [])
        stream = TextStream(table, stops, include_stop)
        assert b"".join(feed_all(stream, range(len(pieces)))).decode() == expected[-1]
        assert stream.matched == index


@pytest.mark.parametrize("min_tokens", range(8))
def test_stop_strings_count_from_the_least_number_of_tokens_on(min_tokens):
    stream = TextStream(BYTES, [b"ab"], min_tokens=min_tokens)
    pieces = feed_all(stream, b"abxabab")
    # Complete at tokens 2, 5 and 7; it counts if its first token may be looked at.
    ends = [end for end in (2, 5, 7) if min_tokens <= end - 1]
    assert b"".join(pieces) == (b"abxabab"[: ends[0] - 2] if ends else b"abxabab")
    assert stream.stopped == bool(ends)


def test_after_a_stop_nothing_is_added():
    stream = TextStream(TokenTable([b"one STOP two", b"more"], []), [b"STOP"])
    assert stream.feed(0) is True
    assert stream.feed(1) is True
    assert (stream.take(), stream.matched, stream.finished) == (b"one ", 0, True)
    stream.finish()
    assert stream.take() == b""


def test_of_stops_complete_at_the_same_byte_the_longest_counts():
    stream = TextStream(BYTES, [b"c", b"abc", b"bc"])
    assert (b"".join(feed_all(stream, b"xabc")), stream.matched) == (b"x", 1)


def test_sixteen_long_stops():
    stops = [b"ab" * 100 + bytes([65 + i]) for i in range(16)]
    stream = TextStream(BYTES, stops)
    data = b"ab" * 150 + b"P."
    assert b"".join(feed_all(stream, data)) == b"ab" * 50
    assert stream.matched == 15


@pytest.mark.parametrize("stop", [b"", b"\x80", b"\xe2\x82", b"\xed\xa0\x80"])
def test_a_stop_that_is_no_text_is_the_clients_fault(stop):
    with pytest.raises(RequestError) as caught:
        TextStream(BYTES, [stop])
    assert caught.value.param == "stop"


# Token ids


def test_special_tokens_are_dropped_or_kept():
    table = TokenTable([b"a", b"<s>", b"b"], [1])
    assert b"".join(feed_all(TextStream(table), [0, 1, 2])) == b"ab"
    assert b"".join(feed_all(TextStream(table, skip_special=False), [0, 1, 2])) == b"a<s>b"
    assert [table.is_special(token) for token in (-1, 0, 1, 2, 3)] == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_ids_outside_the_table_are_empty():
    table = TokenTable([b"a"], [0, 5, -1])
    assert (table[-1], table[0], table[1], len(table)) == (b"", b"a", b"", 1)
    assert b"".join(feed_all(TextStream(table, skip_special=False), [-1, 0, 1, 2**31 - 1])) == b"a"


# tokenizer.decode


def sentencepiece(decoder):
    """A tokenizer with byte tokens, as Llama 2's, with the given decoder."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "▁",
        "▁▁",
        "a",
        "▁a",
        "▁hello",
        "world",
        "你",
        "▁€",
        "😀",
        "\ufffd",
        ".",
        "▁.",
        "##b",
    ]
    fast = FastTokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    fast.add_special_tokens(["<s>", "</s>"])
    fast.decoder = decoder
    return fast


FALLBACKS = {
    "llama2": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
    "gemma": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(cleanup=False),
}


def check_against_decode(fast, tokenizer, ids, skip_special):
    """Pieces of all tokens, and of every shorter sequence, join to what decode gives."""
    for end in range(len(ids) + 1):
        stream = tokenizer.stream(skip_special_tokens=skip_special)
        pieces = feed_all(stream, ids[:end])
        expected = fast.decode(ids[:end], skip_special_tokens=skip_special)
        assert b"".join(pieces).decode() == expected, ids[:end]


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("name", FALLBACKS)
def test_other_decoders_stream_what_decode_gives(name, skip_special):
    fast = sentencepiece(FALLBACKS[name])
    tokenizer = Tokenizer(fast, TokenizerConfig({}, (), {}))
    rng = random.Random(name)
    words = range(259, fast.get_vocab_size())
    emoji = [3 + byte for byte in "😀é€".encode()]
    for _ in range(150):
        ids = []
        while len(ids) < 14:
            ids += rng.choice([
                [rng.choice(words)], emoji, [rng.randrange(3)], [3 + rng.randrange(256)],
            ])  # fmt: skip
        check_against_decode(fast, tokenizer, ids, skip_special)


def test_other_decoders_stream_early_and_stop_too():
    fast = sentencepiece(FALLBACKS["llama2"])
    tokenizer = Tokenizer(fast, TokenizerConfig({}, (), {}))
    hello, world, dot = (fast.token_to_id(text) for text in ("▁hello", "world", "."))
    stream = tokenizer.stream(["world."])
    assert [(stream.feed(token), stream.take()) for token in (hello, hello, world, dot)] == [
        (False, b"hello"),
        (False, b" hello"),
        (False, b""),
        (True, b""),
    ]
    assert stream.matched == 0


@pytest.mark.parametrize("skip_special", [True, False])
def test_byte_level_streams_what_decode_gives(qwen3, qwen3_folder, skip_special):
    fast = FastTokenizer.from_file(str(qwen3_folder / "tokenizer.json"))
    rng = random.Random(7)
    fragments = [i for i in range(len(qwen3.table)) if not is_text(qwen3.token_bytes(i))]
    assert len(fragments) == 1448
    text = "He said: 你好，世界! สวัสดี မင်္ဂလာပါ 👨‍👩‍👧‍👦 \n\tnaïve\u0301"
    real = fast.encode(text).ids
    check_against_decode(fast, qwen3, real, skip_special)
    for _ in range(300):
        ids = rng.choices(fragments, k=8) + rng.choices(range(qwen3.vocab_size), k=4)
        ids += rng.choices(range(151643, qwen3.vocab_size), k=2) + rng.choices(real, k=2)
        rng.shuffle(ids)
        check_against_decode(fast, qwen3, ids, skip_special)


def test_token_bytes_are_what_decode_gives_for_every_whole_token(qwen3, qwen3_folder):
    fast = FastTokenizer.from_file(str(qwen3_folder / "tokenizer.json"))
    ids = list(range(qwen3.vocab_size))
    texts = fast.decode_batch([[i] for i in ids], skip_special_tokens=False)
    assert [qwen3.token_bytes(i).decode("utf-8", "replace") for i in ids] == texts
