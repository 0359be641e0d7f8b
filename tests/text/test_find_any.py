"""FindAny finds what Python's own search finds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl_fast.text.find_any import FindAny

MARKS = ((">", "think>"), ("|", "<|"), ("|", "|>"), ("_", "a_b"))
FOUND = FindAny(MARKS)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text(alphabet="<|>think a_bé\U0001f600\0", max_size=40))
def test_it_finds_marks_wherever_they_stand(text):
    assert FOUND.found_in(text) == any(mark in text for _, mark in MARKS)


def test_marks_at_the_edges():
    for text in ("<|", "|>", "think>", "xa_b", "a_b"):
        assert FOUND.found_in(text)
    for text in ("", "|", ">", "hink>", "_b", "a_", "<", "think"):
        assert not FOUND.found_in(text)


def test_half_of_a_surrogate_pair_has_no_utf8():
    with pytest.raises(UnicodeEncodeError):
        FOUND.found_in("\ud800")
