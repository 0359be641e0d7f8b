"""Tokenizer and parsers by themselves, against the ones that generation uses."""

import pytest
from api_client import CHAT, USER, error, ok, request
from fake_engine import FACTS

TEXT = 'The capital 🥐 of "France"\n你好鑫'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


@pytest.fixture(scope="module")
def server(module_serve):
    return module_serve()


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_a_prompt_is_tokenized(server, tokenizer, path):
    ids = tokenizer.encode_prompt(TEXT)
    assert ok(server, path, prompt=TEXT) == {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": FACTS["max_model_len"],
    }


def test_several_prompts_are_tokenized(server, tokenizer):
    found = ok(server, "/tokenize", prompt=["one", "two three", ""], model="default")
    lists = [tokenizer.encode_prompt(text) for text in ("one", "two three", "")]
    assert (found["tokens"], found["count"]) == (lists, [len(ids) for ids in lists])
    assert ok(server, "/tokenize", prompt=["one"])["tokens"] == lists[:1]


def test_messages_become_the_ids_that_chat_uses(server, tokenizer, template):
    body = {
        "messages": USER,
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    found = ok(server, "/tokenize", **body)
    request(server, "POST", CHAT, {**body, "max_tokens": 1})
    assert found["tokens"] == server.engine.added[-1].prompt
    assert tokenizer.decode(found["tokens"], False) == template.render(
        USER, [TOOL], chat_template_kwargs={"enable_thinking": False}
    )
    shorter = ok(server, "/tokenize", messages=USER, add_generation_prompt=False)
    text = template.render(USER, add_generation_prompt=False)
    assert shorter["tokens"] == tokenizer.encode(text)


def test_a_text_longer_than_the_context_is_counted(server):
    assert ok(server, "/tokenize", prompt="word " * 10_000)["count"] > FACTS["max_model_len"]


def test_token_texts_are_given_on_request(server):
    assert ok(server, "/tokenize", prompt="a b", return_token_strs=True)["token_strs"] == [
        "a",
        " b",
    ]
    found = ok(server, "/tokenize", prompt=["a b", "c"], return_token_strs=True)
    assert found["token_strs"] == [["a", " b"], ["c"]]


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_ids_become_text_again(server, tokenizer, path):
    ids = tokenizer.encode(TEXT)
    assert ok(server, path, tokens=ids) == {"text": TEXT, "prompt": TEXT}
    assert ok(server, path, tokens=[ids, []])["text"] == [TEXT, ""]
    assert ok(server, path, tokens=[])["text"] == ""


def test_special_tokens_are_left_out_unless_wanted(server, tokenizer):
    ids = tokenizer.encode("<|im_start|>user")
    assert ok(server, "/detokenize", tokens=ids)["text"] == "user"
    found = ok(server, "/detokenize", tokens=ids, skip_special_tokens=False)
    assert found["text"] == "<|im_start|>user"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": []}, "prompt"),
        ("/tokenize", {"prompt": ["x"] * 1025}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": USER}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ("/tokenize", {"messages": USER, "tools": [{}]}, "tools[0].type"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, [2]]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [[5], [FACTS["vocab_size"]]]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/parse_function_call", {"text": "x"}, "tools"),
        ("/parse_function_call", {"tools": []}, "text"),
        ("/parse_function_call", {"text": "x", "tools": [{}]}, "tools[0].type"),
        (
            "/parse_function_call",
            {"text": "x", "tools": [TOOL], "tool_call_parser": "none"},
            "tool_call_parser",
        ),
        ("/separate_reasoning", {}, "text"),
        ("/separate_reasoning", {"text": "x", "reasoning_parser": "y"}, "reasoning_parser"),
        ("/separate_reasoning", {"text": "x", "return_blocks": True}, "return_blocks"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_field(server, path, body, param):
    assert error(server, path, **body)["param"] == param


def test_an_unknown_model_is_refused(server):
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert request(server, "POST", path, {**body, "model": "gpt-4"})[0] == 404


@pytest.mark.parametrize("name", [None, "auto", "qwen25", "qwen", "hermes"])
def test_calls_are_taken_out_of_a_text(server, name):
    text = f"Let me see.\n{CALL}\n{CALL}"
    found = ok(server, "/parse_function_call", text=text, tools=[TOOL], tool_call_parser=name)
    call = {"name": "get_weather", "parameters": '{"city": "Paris"}'}
    assert found == {
        "normal_text": "Let me see.\n",
        "calls": [{"tool_index": 0, **call}, {"tool_index": 1, **call}],
    }


def test_a_text_without_calls_is_normal(server):
    expected = {"normal_text": "Hi <tool", "calls": []}
    assert ok(server, "/parse_function_call", text="Hi <tool", tools=[TOOL]) == expected
    expected = {"normal_text": CALL, "calls": []}
    assert ok(server, "/parse_function_call", text=CALL, tools=[]) == expected


@pytest.mark.parametrize(
    ("name", "text", "reasoning", "content"),
    [
        (None, "<think>a</think>b", "a", "b"),
        ("auto", "<think>a</think>b", "a", "b"),
        ("qwen3", "a</think>b", "a", "b"),
        ("qwen3-thinking", "a</think>b", "a", "b"),
        ("qwen3", "plain", "", "plain"),
        ("qwen3", "<think>cut off", "cut off", ""),
        ("deepseek-r1", "a</think>b", "a", "b"),
        ("kimi", "◁think▷a◁/think▷b", "a", "b"),
        ("gpt-oss", "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b", "a", "b"),
    ],
)
def test_reasoning_is_taken_out_of_a_text(server, name, text, reasoning, content):
    found = ok(server, "/separate_reasoning", text=text, reasoning_parser=name)
    assert found == {"reasoning_text": reasoning, "text": content}


def test_a_model_without_formats_needs_a_name(serve):
    server = serve(reasoning_parser="none", tool_call_parser="none")
    assert error(server, "/separate_reasoning", text="x")["param"] == "reasoning_parser"
    found = error(server, "/parse_function_call", text="x", tools=[TOOL])
    assert found["param"] == "tool_call_parser"
