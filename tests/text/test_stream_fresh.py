"""TextStream.fresh: many streams by the rules of one."""

import pytest
from test_stream import BYTES, feed_all

from minisgl_fast.text.stop_regex import StopProgram
from minisgl_fast.text.stream import TextStream


class Doubling:
    """A window that says every token twice, once it is whole."""

    def __init__(self):
        self.last = ""

    def fresh(self):
        return Doubling()

    def step(self, token):
        said, self.last = self.last * 2, chr(token)
        return said

    def finish(self):
        return self.last * 2


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("window", [None, Doubling()])
def test_a_fresh_stream_keeps_the_rules_and_shares_no_text(include_stop, window):
    patterns = StopProgram(("q+z",))

    def make():
        stops = [b"bcb", b"xx"]
        return TextStream(BYTES, stops, include_stop, True, window and Doubling(), 3, patterns)

    first = make()
    for text in (b"abcbcb!", b"aaqqzz", b"xxaxxa", b"", b"plain"):
        one, other, expected = first.fresh(), first.fresh(), make()
        other.feed(98)
        assert feed_all(one, text) == feed_all(expected, text)
        assert (one.matched, one.num_taken) == (expected.matched, expected.num_taken)
