"""What a model with random weights answers where a grammar binds it, end to end but for HTTP."""

import json
import re

import jsonschema
import pytest
import tokenizers
from grammar_driver import Formats, GrammarDriver, parsed
from schemas import make_schema
from tiny_folder import make_harmony_model, make_tiny_model
from tokenizers import decoders, models, pre_tokenizers

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "unit": {"enum": ["c", "f"]},
        "wind": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "mix": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
TOOL_FORMATS = ("qwen25", "qwen3_coder", "llama3", "pythonic", "mistral")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("structured") / "tiny")
    driver = GrammarDriver(folder, max_running_requests=100, num_pages=8192)
    yield driver
    driver.close()


def json_schema(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@pytest.mark.parametrize("first", [0, 100])
def test_answers_to_200_schemas_are_valid(driver, first):
    schemas = [make_schema(seed) for seed in range(first, first + 100)]
    grammars = [
        driver.grammar(response_format=json_schema(schema, strict=True)) for schema in schemas
    ]
    texts = driver.texts(grammars, seed=first)
    for schema, text in zip(schemas, texts, strict=True):
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0])
def test_regex_choice_and_ebnf_are_obeyed_at_any_temperature(driver, temperature):
    fields = [
        ({"regex": r"^(\d{2,3}/[a-f]x?){1,3}$"}, r"(?:[0-9]{2,3}/[a-f]x?){1,3}"),
        ({"structured_outputs": {"regex": r"[\d.]{1,4}\.png"}}, r"[0-9.]{1,4}\.png"),
        ({"structured_outputs": {"choice": ["yes", "no", "非常"]}}, r"yes|no|非常"),
        ({"ebnf": 'root ::= "<" item{1,3} ">"\nitem ::= [a-c] | "é,"'}, r"<(?:[a-c]|é,){1,3}>"),
        ({"structured_outputs": {"grammar": 'start: "a" B\nB: /[0-9]{2}/'}}, r"a[0-9]{2}"),
    ]
    grammars = [driver.grammar(**one) for one, _ in fields] * 5
    texts = driver.texts(grammars, temperature=temperature)
    for index, text in enumerate(texts):
        assert re.fullmatch(fields[index % len(fields)][1], text), text


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_bound_calls_are_read_by_the_parser_and_satisfy_the_schema(driver, name):
    formats = Formats(None, name)
    cases = [
        ({"tool_choice": "required"}, {"get_weather", "now"}, 20),
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"get_weather", "now"}, 1),
        ({"tool_choice": NAMED}, {"get_weather"}, 1),
    ]
    grammars = [driver.grammar(formats, tools=TOOLS, **fields) for fields, _, _ in cases] * 8
    called = set()
    for index, text in enumerate(driver.texts(grammars)):
        _, names, most = cases[index % len(cases)]
        calls, content, _ = parsed(formats, text, TOOLS)
        assert calls and not content.strip(), text
        assert len(calls) <= most or most == 20
        for function, arguments in calls:
            assert function in names
            jsonschema.validate(
                arguments, CITY if function == "get_weather" else {"maxProperties": 0}
            )
            called.add(function)
    assert called == {"get_weather", "now"}


PIECES = [
    *("<unk>", "<s>", "</s>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("▁", "▁▁", "a", "▁a", "▁hello", "world", "你", "▁€", "😀", "1", "▁1", "0", "true", "▁true"),
    *(".", "▁.", '"', '▁"', "▁{", '{"', "}", "▁}", ",▁", "null", "[", "▁[", "]", ":", ":▁"),
]


@pytest.fixture(scope="module", params=["llama2", "metaspace"])
def sentencepiece(request, tmp_path_factory):
    """The tiny model with blanks as ▁ and bytes as tokens of their own, as Llama 2 has them."""
    folder = make_tiny_model(tmp_path_factory.mktemp(request.param) / "tiny")
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    blanks = [decoders.Replace("▁", " ")] if request.param == "llama2" else [decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence([*blanks, decoders.ByteFallback(), decoders.Fuse()])
    if request.param == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    driver = GrammarDriver(folder, max_running_requests=64, num_pages=8192)
    yield driver
    driver.close()


def test_tokenizers_with_byte_fallback_are_bound_too(sentencepiece):
    # Without definitions: a recursive answer among so many tokens of blanks may take all the room.
    schemas = [schema for seed in range(200, 240) if "$defs" not in (schema := make_schema(seed))]
    formats = [json_schema(schema, strict=True) for schema in schemas]
    grammars = [sentencepiece.grammar(response_format=one) for one in formats]
    for schema, text in zip(schemas, sentencepiece.texts(grammars), strict=True):
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    choices = ["yes", "非常 well", " a  b"]
    grammar = sentencepiece.grammar(structured_outputs={"choice": choices})
    # The decoder may take a blank from the front of a text.
    found = {text.strip() for text in sentencepiece.texts([grammar] * 60, temperature=9.0)}
    assert found == {choice.strip() for choice in choices}


@pytest.fixture(scope="module")
def harmony(tmp_path_factory):
    folder = make_harmony_model(tmp_path_factory.mktemp("harmony") / "tiny")
    driver = GrammarDriver(folder, max_running_requests=32)
    yield driver
    driver.close()


def test_answers_in_channels_are_bound_in_the_final_message_and_in_calls(harmony):
    formats = Formats("gpt-oss", "gpt-oss")
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}}
              for tool in TOOLS]  # fmt: skip
    cases = [
        {"response_format": json_schema(CITY)},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": NAMED},
        {"tools": TOOLS, "structured_outputs": {"choice": ["yes", "no"]}},
        {"tools": strict},
    ]
    grammars = [harmony.grammar(formats, "<|start|>assistant", **case) for case in cases] * 6
    seen = set()
    for index, text in enumerate(harmony.texts(grammars, max_tokens=1200, temperature=2.0)):
        if text == "LENGTH":  # lost in thought
            continue
        case = index % len(cases)
        calls, content, _ = parsed(formats, text, TOOLS)
        # Preambles are content; the final message is what stands last.
        _, _, final = text.rpartition("<|channel|>final<|message|>")
        assert len(calls) <= 1
        for function, arguments in calls:
            assert case in (1, 2, 3, 4) and (case != 2 or function == "get_weather")
            schema = CITY if function == "get_weather" else {"maxProperties": 0}
            jsonschema.validate(arguments, schema)
        if case == 0:
            jsonschema.validate(json.loads(final), CITY)
        elif case in (1, 2):
            assert calls
        elif case == 3 and not calls:
            assert final in ("yes", "no") and content.endswith(final)
        seen.add((case, bool(calls)))
    assert seen >= {(0, False), (1, True), (2, True), (3, True), (4, True)}


def test_what_binds_an_answer_begins_behind_its_reasoning(driver):
    formats = Formats("qwen3", "qwen25")
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}
    closed = driver.grammar(formats, "<think>\n\n</think>\n\n", **choice)
    assert set(driver.texts([closed] * 6)) <= {"yes", "no"}
    # A model whose tags are easy to hit by chance: one character each.
    maybe = driver.grammar(formats, "", **choice)
    for text in driver.texts([maybe] * 6, max_tokens=1500):
        if text != "LENGTH":
            calls, content, _ = parsed(formats, text, [])
            assert not calls and content in ("yes", "no")
