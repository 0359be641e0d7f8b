"""Mold: what a format (response_format.py) writes, cut where one answer differs from another.

A format is made to write once with marks in place of a request's own values. What it wrote, cut at
the marks, is then filled for every request that asks for the same: so a form has one description,
and most answers are a few copies of bytes.
"""

import re
import secrets

from libcpp.string cimport string
from libcpp.vector cimport vector

_secret = secrets.token_hex(16)
# What stands for each gap in the order of mold.pxd; no model's name or stop string has it.
MARKS = tuple(f"@{gap}-{_secret}@".encode() for gap in range(NUM_GAPS))
_MARK = re.compile(f"@([0-9])-{_secret}@".encode())


cdef class Mold:

    def __init__(self, bytes written not None):
        """``written``: by a format, from values that are MARKS."""
        first, *rest = _MARK.split(written)
        self.first = first
        for gap, behind in zip(rest[::2], rest[1::2], strict=True):
            self.gaps.push_back(<Gap><int>int(gap))
            self.behind.push_back(behind)

    cdef void fill(self, const vector[string] &values, string &out) noexcept:
        """Append it with these values, one for each kind of gap."""
        cdef size_t i
        out.append(self.first)
        for i in range(self.gaps.size()):
            out.append(values[<size_t>self.gaps[i]])
            out.append(self.behind[i])
