"""Log-probabilities in the answers of chat and completions, over HTTP and a fake engine."""

import pytest
from api_client import CHAT, COMPLETIONS, error
from fake_engine import ANSWER, EOS, logprob_of, top_of
from logprobs_expected import (
    MESSAGES,
    PROMPT,
    chat,
    chat_entries,
    complete,
    num_prompt_of,
    tokens_of,
)


@pytest.fixture(scope="module")
def server(module_serve):
    return module_serve()


# Chat


@pytest.mark.parametrize("num_top", [None, 0, 1, 20])
def test_a_chat_answer_has_an_entry_for_every_token(server, num_top):
    (choice,) = chat(server, logprobs=True, top_logprobs=num_top, seed=3)
    expected = chat_entries(server, tokens_of(server, 3), num_prompt_of(server), num_top or 0)
    assert choice["logprobs"] == {"content": expected, "refusal": None}
    assert choice["message"]["content"] == "3. " + ANSWER
    data = b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"][:-1])
    assert data.decode() == "3. " + ANSWER


def test_without_logprobs_the_engine_is_asked_for_none(server):
    for choices in (
        chat(server),
        chat(server, logprobs=False, top_logprobs=0),
        complete(server, logprobs=False),
    ):
        assert choices[0]["logprobs"] is None
        asked = server.engine.added[-1]
        assert (asked.num_top_logprobs, asked.prompt_logprobs_from) == (-1, -1)
    assert all(logprobs is None for _, _, logprobs, _ in chat(server, stream=True))


def test_a_streamed_chunk_carries_exactly_its_tokens(server):
    events = chat(server, logprobs=True, top_logprobs=2, seed=4, stream=True)
    assert events[0] == (0, "", None, None)
    expected = chat_entries(server, tokens_of(server, 4), num_prompt_of(server), 2)
    num_listed, shown, listed = 0, b"", b""
    for _, text, logprobs, _ in events[1:]:
        content = logprobs["content"] if logprobs else []
        assert content == expected[num_listed : num_listed + len(content)]
        num_listed += len(content)
        shown += text.encode()
        listed += b"".join(bytes(one["bytes"]) for one in content if one["token"] != "<|im_end|>")
        # A token comes with its last byte.
        following = b"".join(bytes(one["bytes"]) for one in expected[num_listed : num_listed + 1])
        assert shown.startswith(listed) and len(shown) - len(listed) < max(len(following), 1)
    assert num_listed == len(expected)


def test_every_choice_has_its_own(server):
    choices = chat(server, logprobs=True, seed=5, n=3)
    for k, choice in enumerate(choices):
        expected = chat_entries(server, tokens_of(server, 5 + k), num_prompt_of(server), 0)
        assert choice["logprobs"]["content"] == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["Paris", "is Par", "France is", "🗼", "capital"])
def test_tokens_that_a_stop_string_cut_off_are_not_listed(server, stop, stream):
    choices = chat(server, logprobs=True, seed=6, stop=stop, stream=stream)
    if stream:
        text = "".join(text for _, text, _, _ in choices)
        content = [one for _, _, found, _ in choices if found for one in found["content"]]
    else:
        text, content = choices[0]["message"]["content"], choices[0]["logprobs"]["content"]
    assert text == ("6. " + ANSWER).split(stop)[0]
    data = b"".join(bytes(one["bytes"]) for one in content)
    # A token that is shown in part is listed; none begins behind the text.
    assert data.startswith(text.encode())
    assert len(data) - len(bytes(content[-1]["bytes"])) < len(text.encode())


def test_a_stop_string_that_is_shown_keeps_its_tokens(server):
    (choice,) = chat(server, logprobs=True, seed=6, stop="France", include_stop_str_in_output=True)
    data = b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"])
    assert data.decode() == choice["message"]["content"] == "6. The capital of France"


def test_text_that_is_taken_apart_loses_no_token(module_serve):
    parsed = module_serve(reasoning_parser="qwen3")
    (plain,) = chat(parsed, logprobs=True, seed=1)
    expected = chat_entries(parsed, tokens_of(parsed, 1), num_prompt_of(parsed), 0)
    assert plain["logprobs"]["content"] == expected
    events = chat(parsed, logprobs=True, seed=1, stream=True)
    streamed = [one for _, _, found, _ in events if found for one in found["content"]]
    assert streamed == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": "3"}, "top_logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": -1, "stream": False}, "prompt_logprobs"),
        ({"prompt_logprobs": 21, "stream": False}, "prompt_logprobs"),
    ],
)
def test_chat_fields_out_of_range_are_refused(server, fields, param):
    body = {"messages": MESSAGES, "stream": True, **fields}
    assert error(server, CHAT, **body)["param"] == param


# Completions


def top_texts(server, position, token, num_top):
    decode = server.frontend.tokenizer.token_bytes
    pairs = [*top_of(position, num_top), (token, logprob_of(position, token))]
    return {decode(one).decode("utf-8", "replace"): value for one, value in reversed(pairs)}


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_a_completion_has_parallel_lists(server, num_top):
    (choice,) = complete(server, logprobs=num_top, seed=2, max_tokens=100)
    tokens, first = tokens_of(server, 2), num_prompt_of(server)
    found = choice["logprobs"]
    decode = server.frontend.tokenizer.token_bytes
    assert found["tokens"] == [decode(token).decode("utf-8", "replace") for token in tokens]
    assert found["token_logprobs"] == [logprob_of(first + i, t) for i, t in enumerate(tokens)]
    assert found["top_logprobs"] == [
        top_texts(server, first + i, token, num_top) for i, token in enumerate(tokens)
    ]
    for text, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if "\ufffd" not in text and text != "<|im_end|>":
            assert choice["text"].startswith(text, offset)
    assert found["text_offset"][-1] == len(choice["text"])


def test_offsets_inside_a_character_are_that_characters(server):
    (choice,) = complete(server, logprobs=0, seed=2, max_tokens=100)
    found = choice["logprobs"]
    decode = server.frontend.tokenizer.token_bytes
    data = b""
    for token, offset in zip(tokens_of(server, 2, eos=False), found["text_offset"], strict=False):
        assert offset == len(data.decode("utf-8", "ignore"))
        data += decode(token)
    assert any("\ufffd" in text for text in found["tokens"])


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_lists_the_prompt_first(server, stream, max_tokens, as_ids):
    ids = server.frontend.tokenizer.encode(PROMPT)
    choices = complete(server, 
        prompt=ids if as_ids else PROMPT, echo=True, logprobs=2, seed=7, max_tokens=max_tokens,
        stream=stream,
    )  # fmt: skip
    own = tokens_of(server, 7) if max_tokens else []
    if stream:
        # The prompt's text comes alone and first, with its tokens.
        assert choices[0][1] == PROMPT and len(choices[0][2]["tokens"]) == len(ids)
        text = "".join(text for _, text, _, _ in choices)
        found = {key: [one for event in choices for one in event[2][key]] for key in choices[0][2]}
    else:
        text, found = choices[0]["text"], choices[0]["logprobs"]
    assert text == PROMPT + ("7. " + ANSWER if max_tokens else "")
    decode = server.frontend.tokenizer.token_bytes
    expected = [decode(token).decode("utf-8", "replace") for token in ids + own]
    assert found["tokens"] == expected
    assert found["token_logprobs"] == [
        logprob_of(position, token) if position else None
        for position, token in enumerate(ids + own)
    ]
    assert found["top_logprobs"] == [
        top_texts(server, position, token, 2) if position else None
        for position, token in enumerate(ids + own)
    ]
    data = b""
    for token, offset in zip(ids + own, found["text_offset"], strict=True):
        assert offset == len(data.decode("utf-8", "ignore"))
        data += decode(token) if token != EOS else b""
    asked = server.engine.added[-1]
    assert (asked.num_top_logprobs, asked.prompt_logprobs_from) == (2, 0)
    assert asked.max_tokens == max_tokens


def test_several_prompts_and_choices_keep_theirs_apart(server):
    prompts = ["One", "Two two", "Three three three"]
    events = complete(
        server, prompt=prompts, n=2, echo=True, logprobs=1, seed=0, max_tokens=9, stream=True
    )
    encode = server.frontend.tokenizer.encode
    for index in range(6):
        prompt, k = divmod(index, 2)
        found = [one for i, _, one, _ in events if i == index]
        tokens = encode(prompts[prompt]) + tokens_of(server, k)[:9]
        listed = [value for one in found for value in one["token_logprobs"]]
        assert listed == [None] + [logprob_of(i, t) for i, t in enumerate(tokens)][1:]


def test_echo_without_logprobs_needs_no_engine_for_no_tokens(server):
    num_added = len(server.engine.added)
    (choice,) = complete(server, echo=True, max_tokens=0)
    assert choice["text"] == PROMPT and choice["logprobs"] is None
    assert len(server.engine.added) == num_added


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": "5"}, "logprobs"),
        ({"logprobs": 1, "top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": 20, "n": 16, "max_tokens": 4000, "prompt": ["a"] * 8}, "logprobs"),
    ],
)
def test_completion_fields_out_of_range_are_refused(server, fields, param):
    num_added = len(server.engine.added)
    body = {"prompt": "x", "stream": True, **fields}
    assert error(server, COMPLETIONS, **body)["param"] == param
    assert len(server.engine.added) == num_added
