"""The ``usage`` object of OpenAI's answers."""

from libcpp.string cimport string, to_string

from minisgl_fast.server.string_bytes cimport to_bytes


def usage_json(long num_prompt, long num_completion, long num_cached, num_reasoning):
    """``num_reasoning``: None where nothing tells reasoning from content."""
    cdef string out
    cdef long reasoning = -1 if num_reasoning is None else num_reasoning
    append_usage(out, num_prompt, num_completion, num_cached, reasoning)
    return to_bytes(out)


cdef void append_usage(
    string &out, long num_prompt, long num_completion, long num_cached, long num_reasoning
) noexcept:
    """usage_json into ``out``; ``num_reasoning`` is -1 for None."""
    out.append(b'{"prompt_tokens":')
    out.append(to_string(num_prompt))
    out.append(b',"completion_tokens":')
    out.append(to_string(num_completion))
    out.append(b',"total_tokens":')
    out.append(to_string(num_prompt + num_completion))
    out.append(b',"prompt_tokens_details":{"cached_tokens":')
    out.append(to_string(num_cached))
    out.append(b"}")
    if num_reasoning >= 0:
        out.append(b',"completion_tokens_details":{"reasoning_tokens":')
        out.append(to_string(num_reasoning))
        out.append(b"}")
    out.append(b"}")
