"""The fields that bind an answer, as grammars: what each allows and what is refused."""

import json

import pytest
from grammar_driver import USER

from minisgl_fast.api.chat_grammar import chat_grammar
from minisgl_fast.api.openai_request import check_chat
from minisgl_fast.api.structured import plain_grammar
from minisgl_fast.engine.grammar_check import Checker
from minisgl_fast.errors import RequestError
from minisgl_fast.parsers.select import Formats

IM_END, TOOL_CALL = "<|im_end|>", 151657


@pytest.fixture(scope="module")
def checker(tokenizer):
    vocabulary = tokenizer.vocabulary()
    return Checker(len(vocabulary), sorted(vocabulary.special_ids))


@pytest.fixture(scope="module")
def made(tokenizer):
    """The text of the grammar of a chat with these fields."""

    def make(formats=None, prompt="", **fields):
        body, _ = check_chat({"messages": USER, **fields})
        if formats is None:
            return plain_grammar(body, tokenizer)
        return chat_grammar(body, formats, tokenizer, prompt)

    return make


@pytest.fixture(scope="module")
def allows(checker, made):
    """Whether an answer may be this text."""
    from llguidance import LLMatcher

    def allows(text, formats=None, prompt="", **fields):
        grammar = made(formats, prompt, **fields)
        if grammar is None:
            return True
        checked = checker.check(grammar.text)
        assert "error" not in checked, checked
        matcher = LLMatcher(checker._tokenizer, checked["grammar"], log_level=0)
        data = text.encode()
        return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()

    return allows


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
GOOD, BAD = '{"x": 1, "y": 2}', '{"y": 2}'


def json_schema(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": json_schema(POINT)},
        {"response_format": json_schema(POINT, strict=True)},
        {"json_schema": POINT},
        {"json_schema": json.dumps(POINT)},
        {"structured_outputs": {"json": POINT}},
        {"structured_outputs": {"json": json.dumps(POINT)}},
    ],
)
def test_a_schema_may_come_in_any_of_its_fields(allows, fields):
    assert allows(GOOD, **fields) and allows('{"x":1}', **fields)
    assert allows('{\n  "x": -5\n}', **fields)
    assert not allows(BAD, **fields) and not allows('{"x": 1, "z": 1}', **fields)
    assert not allows('{"x": 1', **fields) and not allows("{" + " " * 200 + '"x": 1}', **fields)


def test_only_strict_insists_on_keywords_that_cannot_be_enforced(checker, made):
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    lenient = made(response_format=json_schema(schema)).text
    assert "error" not in checker.check(lenient)
    for fields in (
        {"response_format": json_schema(schema, strict=True)},
        {"json_schema": schema},
    ):
        assert checker.check(made(**fields).text) == {
            "error": 'Unimplemented keys: ["uniqueItems"]'
        }


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1]}'], ["[]", "1", "{"]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["[]"]),
        ({"regex": r"\d+/x"}, ["12/x"], ["٣/x", "/x", "12/x "]),
        ({"regex": r"^[\d/]{2}$"}, ["1/", "//"], ["1"]),
        ({"regex": "a\nb|é+"}, ["a\nb", "éé"], ["anb"]),
        ({"structured_outputs": {"regex": r"[^\D]\\"}}, ["5\\"], ["x\\", "5"]),
        ({"structured_outputs": {"choice": ["a", "a b", '"\\\n雪']}}, ["a b", '"\\\n雪'], ["b"]),
        ({"ebnf": 'root ::= "a" x*\nx ::= [0-9] | "é"'}, ["a", "a1é"], ["é", "ab"]),
        ({"structured_outputs": {"grammar": 'start: "a" X\nX: /b+/'}}, ["abb"], ["a"]),
        ({"structured_outputs": {"json": True}}, ["1", '"a"', "[{}]"], ["x"]),
    ],
)
def test_what_the_other_fields_allow(allows, fields, good, bad):
    assert all(allows(text, **fields) for text in good)
    assert not any(allows(text, **fields) for text in bad)


LEGACY = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=a>", "schema": {"enum": [1, 2]}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "boolean"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
TAG = {"type": "tag", "begin": "<q>", "content": {"type": "regex", "pattern": "[ab]"}, "end": "!"}


@pytest.mark.parametrize("field", ["structural_tag", "response_format"])
def test_structural_tags_bind_only_what_stands_behind_a_trigger(allows, field):
    for text in ("", "free < text", "a <f=a>1</f> b <f=b>true</f>", "<f=a>2</f><f=a>1</f>"):
        assert allows(text, **{field: LEGACY}), text
    for text in ("<f=a>3</f>", "<f=c>1</f>", "a <f=a>", "a <f=a>1</g>"):
        assert not allows(text, **{field: LEGACY}), text


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"type": "const_string", "value": "x"}, ["x"], ["", "xx"]),
        ({"type": "any_text", "excludes": ["no"]}, ["", "yes", "n o"], ["a no b"]),
        (TAG, ["<q>a!"], ["<q>c!", "<q>a"]),
        (
            {"type": "sequence", "elements": [TAG, {"type": "const_string", "value": "."}]},
            ["<q>b!."],
            ["<q>b!"],
        ),
        (
            {"type": "or", "elements": [TAG, {"type": "json_schema", "json_schema": POINT}]},
            ["<q>b!", GOOD],
            [BAD],
        ),
        (
            {"type": "tags_with_separator", "tags": [TAG], "separator": ",", "at_least_one": True},
            ["<q>b!", "<q>b!,<q>a!"],
            ["", "<q>b!<q>a!"],
        ),
        (
            {
                "type": "triggered_tags",
                "triggers": ["<q"],
                "tags": [TAG],
                "at_least_one": True,
                "stop_after_first": True,
            },
            ["<q>b!", "x <q>a!y"],
            ["", "x", "<q>b!<q>a!", "<q>c!"],
        ),
        ({"type": "grammar", "grammar": 'root ::= "a"'}, ["a"], ["b"]),
    ],
)
def test_the_newer_form_of_structural_tags(allows, form, good, bad):
    tag = {"type": "structural_tag", "format": form}
    assert all(allows(text, structural_tag=json.dumps(tag)) for text in good)
    assert not any(allows(text, response_format=tag) for text in bad)


def tool(name, schema=None, **more):
    function = {"name": name, **more} | ({} if schema is None else {"parameters": schema})
    return {"type": "function", "function": function}


TOOLS = [tool("move", POINT), tool("stop")]
CALL = '<tool_call>\n{"name": "move", "arguments": {"x": 1}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
QWEN = Formats("qwen3", "qwen25")


def test_required_and_named_choices_allow_calls_alone(allows):
    no_thought = {"formats": Formats(None, "qwen25"), "tools": TOOLS}
    required = no_thought | {"tool_choice": "required"}
    named = no_thought | {"tool_choice": TOOLS[0] | {"function": {"name": "move"}}}
    assert all(allows(text, **required) for text in (CALL, STOP, f"{CALL}\n{STOP}\n{CALL}"))
    assert not allows(f"{CALL}\n{CALL}", **required, parallel_tool_calls=False)
    assert not any(allows(text, **required) for text in ("", "hi", f"hi {CALL}", f"{CALL} hi"))
    assert not allows(CALL.replace('"x"', '"y"'), **required)
    assert allows(CALL, **named)
    assert not any(allows(text, **named) for text in (STOP, f"{CALL}\n{CALL}"))
    assert allows("anything", **no_thought)


def test_what_is_bound_stands_behind_the_reasoning(allows):
    fields = {"formats": QWEN, "tools": TOOLS, "tool_choice": "required"}
    assert allows(CALL, **fields) and allows(f"<think>\nhm {CALL}\n</think>\n\n{CALL}", **fields)
    assert not allows(f"<think>hm</think>hm {CALL}", **fields)
    assert not allows(CALL, prompt="<think>\n", **fields)
    assert allows(f"hm</think>{CALL}", prompt="<think>\n", **fields)
    assert not allows(f"hm</think>{CALL}", prompt="<think>\n\n</think>\n\n", **fields)
    choice = {"formats": QWEN, "structured_outputs": {"choice": ["yes"]}}
    assert allows("<think>x</think>yes", **choice) and allows("yes", **choice)
    assert not allows("<think>x</think>\n\nyes", **choice)
    forced = choice | {"formats": Formats("deepseek-r1", None)}
    assert allows("<think>x</think>yes", **forced) and not allows("yes", **forced)


def test_offered_tools_may_be_called_in_place_of_a_bound_text(allows):
    fields = {"formats": Formats(None, "qwen25"), "tools": TOOLS}
    fields["response_format"] = {"type": "json_object"}
    assert allows('{"a": 1}', **fields) and allows(CALL, **fields)
    assert not allows("hi", **fields)
    assert not allows(CALL, **fields, tool_choice="none")


@pytest.mark.parametrize("name", ["qwen25", "qwen3_coder", "mistral"])
def test_strict_tools_bind_their_calls_in_a_free_text(allows, name):
    tools = [tool("move", POINT, strict=True), tool("stop")]
    fields = {"formats": Formats(None, name), "tools": tools}
    good, bad = {
        "qwen25": (CALL, CALL.replace('"x"', '"y"')),
        "qwen3_coder": (
            "<tool_call>\n<function=move>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
            "<tool_call>\n<function=move>\n<parameter=x>\na\n</parameter>\n</function>\n</tool_call>",
        ),
        "mistral": (
            '[TOOL_CALLS] [{"name": "move", "arguments": {"x": 1}}]',
            '[TOOL_CALLS] [{"name": "move", "arguments": {}}]',
        ),
    }[name]
    for text in ("", "free < text", good, f"Sure.\n{good}", f"Sure. {good}\nDone."):
        assert allows(text, **fields), text
    assert not allows(bad, **fields) and not allows(f"Sure. {bad}", **fields)


def refused(made, **fields):
    with pytest.raises(RequestError) as caught:
        made(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": json_schema(5)}, "response_format.json_schema.schema"),
        ({"response_format": json_schema({}, strict=1)}, "response_format.json_schema.strict"),
        ({"response_format": "json"}, "response_format"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[" * 100 + "]" * 100}, "json_schema"),
        ({"json_schema": "[]"}, "json_schema"),
        ({"regex": ""}, "regex"),
        ({"ebnf": " "}, "ebnf"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "new": 1}}, "structured_outputs.new"),
        ({"regex": "a", "ebnf": "b"}, "ebnf"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"regex": "a" * 300_000}, "regex"),
        ({"structural_tag": {}}, "structural_tag.structures"),
        ({"structural_tag": LEGACY | {"triggers": []}}, "structural_tag.triggers"),
        ({"structural_tag": LEGACY | {"triggers": ["<g"]}}, "structural_tag.triggers"),
        ({"structural_tag": {"format": {"type": "x"}}}, "structural_tag.format.type"),
        ({"structural_tag": {"format": {"type": "or"}}}, "structural_tag.format.elements"),
    ],
)
def test_a_field_that_has_no_meaning_is_refused_by_name(made, fields, param):
    assert refused(made, **fields).param == param


def test_text_asks_for_nothing(made):
    assert made(response_format={"type": "text"}) is None
    assert made(formats=QWEN, response_format={"type": "text"}, tools=TOOLS) is None


def test_choices_that_cannot_be_enforced_are_refused(made):
    required = {"tools": TOOLS, "tool_choice": "required"}
    both = refused(made, formats=QWEN, regex="a", **required)
    assert both.param == "regex" and "tool_choice" in both.message
    odd = [tool("two words", POINT)]
    fields = {"tools": odd, "tool_choice": "required"}
    assert refused(made, formats=Formats(None, "pythonic"), **fields).param == "tools"
