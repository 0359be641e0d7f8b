"""C view of usage.pyx."""

from libcpp.string cimport string


cdef void append_usage(
    string &out, long num_prompt, long num_completion, long num_cached, long num_reasoning
) noexcept
