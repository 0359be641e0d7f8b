"""Stop patterns against Python's re: the first place where a match ends, however text is cut."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl_fast.errors import RequestError
from minisgl_fast.text.regex_syntax import MAX_INSTRUCTIONS, MAX_PATTERN_BYTES, MAX_PATTERNS
from minisgl_fast.text.stop_regex import StopProgram, StopRegex
from minisgl_fast.text.stream import TextStream, TokenTable


def first_match(patterns, text):
    """By re: (pattern, start, end) in bytes of the match that ends first, then began first."""
    compiled = [re.compile(pattern) for pattern in patterns]
    for end in range(1, len(text) + 1):
        for start in range(end):
            for index, pattern in enumerate(compiled):
                if pattern.fullmatch(text, start, end):
                    return index, len(text[:start].encode()), len(text[:end].encode())
    return None


def found(patterns, text, program=None):
    search = StopRegex(program or StopProgram(patterns))
    data = text.encode()
    used = search.feed(data)
    if search.matched < 0:
        assert used == len(data)
        return None
    return search.matched, search.start, used


CASES = [
    (["a+b"], "xxaaabyy"),
    (["\\d{2,3}"], "a1 12 345"),
    (["[0-9]{3}-[0-9]{4}"], "call 55-1234 or 555-1234"),
    (["\n\n+[A-Z]"], "text\n\nNew"),
    (["(?i)stop|halt"], "please STOP now"),
    (["(?s)a.b"], "a\nb"),
    (["a.b"], "a\nb axb"),
    (["你+好"], "说你你好吗"),
    (["[À-ÿ]{2}"], "cafés déèja"),
    (["\\w+!"], "où? où! ja"),
    (["\\s\\S\\s"], "ab c d\u00a0e\u2003"),
    (["[^\\w\\s]"], "abc déf…"),
    (["🥐|🗼"], "Paris 🗼"),
    (["x", "abc", "bc"], "aabcx"),
    (["(ab|a)(bc|c)"], "zzabc"),
    (["(?:a|b)*?c"], "ababxabac"),
    (["(?P<n>a){3}"], "aabaaa"),
    (["a{,2}b"], "aaab"),
    (["a{2,}b"], "ab aaaab"),
    (["a{x}"], "a{x}"),
    (["[]a]+]"], "aa]]"),
    (["[a-]b"], "x-b"),
    (["\\x41\\u0042\\U00000043"], "xABC"),
    (["\\.\\*\\[\\]\\-\\/"], "z.*[]-/"),
    (["[\\d\\-]+;"], "a 1-2;"),
    (["[\\Wx]"], "abcx"),
    (["(?i)[^a-m]"], "aMBz"),
    (["(?i)É"], "été"),
]


@pytest.mark.parametrize(("patterns", "text"), CASES)
def test_the_match_that_ends_first_is_the_one_of_re(patterns, text):
    expected = first_match(patterns, text)
    assert expected is not None
    assert found(patterns, text) == expected


_ATOMS = st.sampled_from(
    ["a", "b", "c", "é", "雪", ".", "[ab]", "[^a]", "\\w", "\\d", "\\s", "\\W", "[b-d雪]", "1", " "]
)
_TREES = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?", "{0,3}"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(_TREES, min_size=1, max_size=3), st.text("abcdé雪 1\n", max_size=12))
def test_any_pattern_and_text_agree_with_re(patterns, text):
    try:
        program = StopProgram(patterns)
    except RequestError as error:
        assert "empty text" in error.message
        assert any(re.fullmatch(pattern, "") for pattern in patterns)
        return
    expected = first_match(patterns, text)
    got = found(patterns, text, program)
    # Of patterns that end and begin together, which one is named is not told by re.
    assert (got and got[1:]) == (expected and expected[1:])


def test_what_may_still_match_is_held_and_nothing_else():
    search = StopRegex(StopProgram(["ab+c", "雪\\d"]))
    held = []
    for piece in ("x", "a", "b", "b", "x", "a", "ab", "雪", "雪", "-"):
        search.feed(piece.encode())
        held.append(search.held)
    assert held == [0, 1, 2, 3, 0, 1, 2, 3, 3, 0]


def test_no_match_goes_across_bytes_that_are_no_character():
    for broken in (b"\xff", b"\xe9", b"\xe9\x9b", b"\xc0\xaf", b"\xed\xa0\x80"):
        search = StopRegex(StopProgram(["a.*b"]))
        search.feed(b"a" + broken + b"b")
        assert search.matched == -1
        search.feed(b"ab")
        assert (search.matched, search.start) == (0, 2 + len(broken))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "1 to 256 bytes"),
        ("a" * (MAX_PATTERN_BYTES + 1), "1 to 256 bytes"),
        ("雪" * 86, "1 to 256 bytes"),
        ("a*", "empty text"),
        ("a|", "empty text"),
        ("(a?){9}", "empty text"),
        ("(", "missing )"),
        ("a)", "unbalanced"),
        ("[a", "unexpected end"),
        ("[b-a]", "range"),
        ("*a", "nothing to repeat"),
        ("a**", "multiple repeat"),
        ("a\\", "unexpected end"),
        ("a{3,2}", "greater"),
        ("\\xg1", "escape"),
        ("^a", "anchor"),
        ("a$", "anchor"),
        ("\\bword", "\\b is not supported"),
        ("(?=a)b", "not supported"),
        ("(?<!a)b", "not supported"),
        ("(a)\\1", "not supported"),
        ("(?x)a b", "flag"),
        ("a{1001}", "1000"),
        ("a++", "possessive"),
        ("(" * 33 + "a" + ")" * 33, "deeper"),
        ("(((a{99}){99}){99}){99}", f"{MAX_INSTRUCTIONS} states"),
        ("((()){1000}){1000}a" * 8 + "(", "missing )"),
    ],
)
def test_what_is_no_pattern_or_too_much_is_refused_with_the_reason(pattern, words):
    started = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        StopProgram([pattern])
    assert time.perf_counter() - started < 1
    assert caught.value.param == "stop_regex"
    assert words in caught.value.message
    assert len(caught.value.message) < 400


def test_the_number_of_patterns_is_bounded():
    StopProgram(["ab"] * MAX_PATTERNS)
    with pytest.raises(RequestError, match="at most 32 patterns"):
        StopProgram(["ab"] * (MAX_PATTERNS + 1))


# Each takes a backtracking matcher exponential or quadratic time.
HOSTILE = [
    "(a+)+b",
    "(a|a)*b",
    "(a|aa)+b",
    "(.*a){20}b",
    "(a?){200}a{200}b",
    ".*.*.*.*b",
    "(\\w+)*!",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_pattern_takes_linear_time(pattern):
    search = StopRegex(StopProgram([pattern]))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        search.feed(b"a" * 100)
        times.append(time.perf_counter() - started)
    assert search.matched == -1
    # A hundred tokens' worth of text: far below a step of any engine, and no more at the end.
    assert sorted(times)[10] < 0.02


TABLE = TokenTable([bytes((byte,)) for byte in range(256)], [])


def streamed(data, cuts, **options):
    """(text, matched) of a stream that is read after every ``cuts`` bytes."""
    stream = TextStream(TABLE, **options)
    pieces = []
    for i, byte in enumerate(data):
        stream.feed(byte)
        if i % cuts == 0:
            pieces.append(stream.take())
    stream.finish()
    return b"".join([*pieces, stream.take()]).decode(), stream.matched


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(_TREES, min_size=1, max_size=2),
    st.lists(st.text("abc雪", min_size=1, max_size=3), max_size=2),
    st.text("abcdé雪 1\n", max_size=12),
    st.booleans(),
)
def test_a_stream_ends_at_the_first_string_or_match(patterns, stops, text, include_stop):
    try:
        program = StopProgram(patterns)
    except RequestError:
        return
    options = {
        "stops": [stop.encode() for stop in stops],
        "patterns": program,
        "include_stop": include_stop,
    }
    expected = first_match([*map(re.escape, stops), *patterns], text)
    data = text.encode()
    shown = text
    if expected is not None:
        shown = data[: expected[2] if include_stop else expected[1]].decode()
    for cuts in (1, 3, 100):
        got, matched = streamed(data, cuts, **options)
        assert got == shown
        assert (matched >= 0) == (expected is not None)


def test_a_stream_shows_what_can_no_longer_match_at_once():
    stream = TextStream(TABLE, patterns=StopProgram(["ab+c"]))
    shown = []
    for byte in b"xabbxab":
        stream.feed(byte)
        shown.append(stream.take())
    stream.finish()
    assert [*shown, stream.take()] == [b"x", b"", b"", b"", b"abbx", b"", b"", b"ab"]


def test_patterns_count_from_the_least_number_of_tokens_on():
    text, matched = streamed(b"aaaaab", 1, patterns=StopProgram(["a"]), min_tokens=4)
    assert (text, matched) == ("aaa", 0)
