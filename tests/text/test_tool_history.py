"""Tool calls of earlier turns, in the form that a template can write."""

import pytest

from minisgl_fast.errors import RequestError
from minisgl_fast.text.template import ChatTemplate

ROUND = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c",
                "type": "function",
                "function": {"name": "f", "arguments": '{"b":1, "a":"é"}'},
            }
        ],
    },
]
EACH = "{% for m in messages %}{% for c in m.tool_calls or [] %}"
DONE = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{{ c.function.arguments }}", '{"b":1, "a":"é"}'),
        ("{{ c.function.arguments | tojson }}", '{"b": 1, "a": "é"}'),
        ("{{ c.function | tojson }}", '{"name": "f", "arguments": {"b": 1, "a": "é"}}'),
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}", "b=1;a=é;"),
    ],
)
def test_arguments_take_the_form_that_a_template_can_write(body, expected):
    template = ChatTemplate({"default": EACH + body + DONE})
    assert template.render(ROUND) == expected
    assert ROUND[1]["tool_calls"][0]["function"]["arguments"] == '{"b":1, "a":"é"}'


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "5", "[" * 100_000])
def test_arguments_that_are_no_object_are_refused_where_one_is_needed(arguments):
    function = {"name": "f", "arguments": arguments}
    messages = [*ROUND[:1], {"role": "assistant", "tool_calls": [{"function": function}]}]
    template = ChatTemplate({"default": EACH + "{{ c.function.arguments | tojson }}" + DONE})
    with pytest.raises(RequestError) as caught:
        template.render(messages)
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"
    text = ChatTemplate({"default": EACH + "{{ c.function.arguments }}" + DONE})
    assert text.render(messages) == arguments


def test_missing_arguments_are_empty_and_empty_calls_are_left_out():
    for value in (None, ""):
        function = {"name": "f", "arguments": value}
        messages = [*ROUND[:1], {"role": "assistant", "tool_calls": [{"function": function}]}]
        template = ChatTemplate({"default": EACH + "{{ c.function.arguments | tojson }}" + DONE})
        assert template.render(messages) == "{}"
    template = ChatTemplate({"default": "{{ 'tool_calls' in messages[0] }}"})
    assert template.render([{"role": "assistant", "content": "x", "tool_calls": []}]) == "False"
    template = ChatTemplate({"default": "{{ messages[0].reasoning_content }}"})
    assert template.render([{"role": "assistant", "reasoning": "r"}]) == "r"
