"""Log-probabilities in the answers of chat and completions, over HTTP and a fake engine."""

from __future__ import annotations

import json

import httpx2 as httpx
import pytest
from fake_engine import ANSWER, EOS, logprob_of, top_of

MESSAGES = [{"role": "user", "content": "Say something."}]
PROMPT = "Once upon a time in Zürich 🥐, there was"


@pytest.fixture(scope="module")
def server(module_serve):
    return module_serve()


@pytest.fixture
def post(server):
    def send(path, **body):
        return httpx.post(f"{server.url}/v1/{path}", json={"model": "default", **body}, timeout=30)

    return send


@pytest.fixture
def chat(post):
    def send(**body):
        return whole(post("chat/completions", messages=MESSAGES, **body), "delta")

    return send


@pytest.fixture
def complete(post):
    def send(**body):
        return whole(post("completions", **{"prompt": PROMPT, **body}), "text")

    return send


def whole(response, text_key):
    """The choices of an answer; those of a stream as (text, logprobs, reason) per event."""
    assert response.status_code == 200, response.text
    if "text/event-stream" not in response.headers["content-type"]:
        return response.json()["choices"]
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    events = []
    for line in lines:
        (choice,) = json.loads(line)["choices"]
        text = choice["text"] if text_key == "text" else choice["delta"].get("content", "")
        events.append((choice["index"], text, choice["logprobs"], choice["finish_reason"]))
    return events


def tokens_of(server, seed, *, eos=True):
    """What the fake engine says to a request with this seed."""
    encode = server.frontend.tokenizer.encode
    return [*encode(f"{seed}. "), *encode(ANSWER), *([EOS] if eos else [])]


def entry(server, position, token):
    data = server.frontend.tokenizer.token_bytes(token)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": logprob_of(position, token), "bytes": list(data)}


def chat_entries(server, tokens, num_prompt, num_top):
    return [
        {
            **entry(server, num_prompt + i, token),
            "top_logprobs": [
                {**entry(server, 0, one), "logprob": value}
                for one, value in top_of(num_prompt + i, num_top)
            ],
        }
        for i, token in enumerate(tokens)
    ]


def num_prompt_of(server):
    return len(server.engine.added[-1].prompt)


# Chat


@pytest.mark.parametrize("num_top", [None, 0, 1, 20])
def test_a_chat_answer_has_an_entry_for_every_token(server, chat, num_top):
    (choice,) = chat(logprobs=True, top_logprobs=num_top, seed=3)
    expected = chat_entries(server, tokens_of(server, 3), num_prompt_of(server), num_top or 0)
    assert choice["logprobs"] == {"content": expected, "refusal": None}
    assert choice["message"]["content"] == "3. " + ANSWER
    data = b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"][:-1])
    assert data.decode() == "3. " + ANSWER


def test_without_logprobs_the_engine_is_asked_for_none(server, chat, complete):
    for choices in (chat(), chat(logprobs=False, top_logprobs=0), complete(logprobs=False)):
        assert choices[0]["logprobs"] is None
        asked = server.engine.added[-1]
        assert (asked.num_top_logprobs, asked.prompt_logprobs_from) == (-1, -1)
    assert all(logprobs is None for _, _, logprobs, _ in chat(stream=True))


def test_a_streamed_chunk_carries_exactly_its_tokens(server, chat):
    events = chat(logprobs=True, top_logprobs=2, seed=4, stream=True)
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


def test_every_choice_has_its_own(server, chat):
    choices = chat(logprobs=True, seed=5, n=3)
    for k, choice in enumerate(choices):
        expected = chat_entries(server, tokens_of(server, 5 + k), num_prompt_of(server), 0)
        assert choice["logprobs"]["content"] == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["Paris", "is Par", "France is", "🗼", "capital"])
def test_tokens_that_a_stop_string_cut_off_are_not_listed(chat, stop, stream):
    choices = chat(logprobs=True, seed=6, stop=stop, stream=stream)
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


def test_a_stop_string_that_is_shown_keeps_its_tokens(chat):
    (choice,) = chat(logprobs=True, seed=6, stop="France", include_stop_str_in_output=True)
    data = b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"])
    assert data.decode() == choice["message"]["content"] == "6. The capital of France"


def test_text_that_is_taken_apart_loses_no_token(server, module_serve):
    parsed = module_serve(reasoning_parser="qwen3")
    body = {"model": "default", "messages": MESSAGES, "logprobs": True, "seed": 1}
    url = f"{parsed.url}/v1/chat/completions"
    plain = httpx.post(url, json=body, timeout=30).json()["choices"][0]
    expected = chat_entries(parsed, tokens_of(parsed, 1), num_prompt_of(parsed), 0)
    assert plain["logprobs"]["content"] == expected
    response = httpx.post(url, json={**body, "stream": True}, timeout=30)
    events = whole(response, "delta")
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
def test_chat_fields_out_of_range_are_refused(post, fields, param):
    response = post("chat/completions", messages=MESSAGES, **{"stream": True, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# Completions


def top_texts(server, position, token, num_top):
    decode = server.frontend.tokenizer.token_bytes
    pairs = [*top_of(position, num_top), (token, logprob_of(position, token))]
    return {decode(one).decode("utf-8", "replace"): value for one, value in reversed(pairs)}


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_a_completion_has_parallel_lists(server, complete, num_top):
    (choice,) = complete(logprobs=num_top, seed=2, max_tokens=100)
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


def test_offsets_inside_a_character_are_that_characters(server, complete):
    (choice,) = complete(logprobs=0, seed=2, max_tokens=100)
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
def test_echo_lists_the_prompt_first(server, complete, stream, max_tokens, as_ids):
    ids = server.frontend.tokenizer.encode(PROMPT)
    choices = complete(
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


def test_several_prompts_and_choices_keep_theirs_apart(server, complete):
    prompts = ["One", "Two two", "Three three three"]
    events = complete(prompt=prompts, n=2, echo=True, logprobs=1, seed=0, max_tokens=9, stream=True)
    encode = server.frontend.tokenizer.encode
    for index in range(6):
        prompt, k = divmod(index, 2)
        found = [one for i, _, one, _ in events if i == index]
        tokens = encode(prompts[prompt]) + tokens_of(server, k)[:9]
        listed = [value for one in found for value in one["token_logprobs"]]
        assert listed == [None] + [logprob_of(i, t) for i, t in enumerate(tokens)][1:]


def test_echo_without_logprobs_needs_no_engine_for_no_tokens(server, complete):
    num_added = len(server.engine.added)
    (choice,) = complete(echo=True, max_tokens=0)
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
def test_completion_fields_out_of_range_are_refused(server, post, fields, param):
    num_added = len(server.engine.added)
    response = post("completions", **{"prompt": "x", "stream": True, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert len(server.engine.added) == num_added


# vLLM's fields


def listed_by_id(server, position, token, ids, num_top):
    """Chat's top_logprobs: the likeliest, or else the token itself, and those asked for."""
    likeliest = top_of(position, num_top) or [(token, logprob_of(position, token))]
    pairs = dict(likeliest) | {
        one: logprob_of(position, one) for one in ids if one not in dict(likeliest)
    }
    return [{**entry(server, 0, one), "logprob": value} for one, value in pairs.items()]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_top", [0, 3])
def test_a_chat_lists_the_tokens_that_are_asked_for_by_id(server, chat, num_top, stream):
    ids = [9, 1000, 5, 9]
    choices = chat(
        logprobs=True, top_logprobs=num_top, logprob_token_ids=ids, seed=3, stream=stream
    )
    found = [event[2] for event in choices if event[2]] if stream else [choices[0]["logprobs"]]
    entries = [entry for one in found for entry in one["content"]]
    first, tokens = num_prompt_of(server), tokens_of(server, 3)
    assert [one["top_logprobs"] for one in entries] == [
        listed_by_id(server, first + i, token, ids, num_top) for i, token in enumerate(tokens)
    ]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("num_top", [0, 3])
def test_a_completion_lists_the_tokens_that_are_asked_for_by_id(server, complete, num_top, echo):
    ids = [9, 1000, 5]
    (choice,) = complete(
        logprobs=num_top, logprob_token_ids=ids, seed=2, max_tokens=9, echo=echo,
        return_tokens_as_token_ids=True,
    )  # fmt: skip
    prompt = server.frontend.tokenizer.encode(PROMPT)
    tokens = [*prompt, *tokens_of(server, 2)[:9]]
    expected = []
    for position, token in enumerate(tokens):
        pairs = dict([*top_of(position, num_top), (token, logprob_of(position, token))])
        pairs |= {one: logprob_of(position, one) for one in ids}
        expected.append({f"token_id:{one}": value for one, value in pairs.items()})
    expected = [None, *expected[1:]] if echo else expected[len(prompt) :]
    assert choice["logprobs"]["top_logprobs"] == expected


@pytest.mark.parametrize(
    "fields",
    [{"logprob_token_ids": [1]}, {"logprobs": 1, "logprob_token_ids": [-1]},
     {"logprobs": 1, "logprob_token_ids": [10**6]},
     {"logprobs": 1, "logprob_token_ids": [1] * 1025},
     {"logprobs": 1, "logprob_token_ids": ["1"]}],
)  # fmt: skip
def test_ids_without_logprobs_or_out_of_range_are_refused(server, post, fields):
    num_added = len(server.engine.added)
    for path, body in (
        ("completions", {"prompt": "x", **fields}),
        ("chat/completions", {"messages": MESSAGES, **fields, "logprobs": "logprobs" in fields}),
    ):
        response = post(path, **body, stream=True)
        param = response.json()["error"]["param"]
        assert response.status_code == 400 and param.startswith("logprob_token_ids")
    assert len(server.engine.added) == num_added


def prompt_entries(server, prompt, num_top, *, name=None):
    """What prompt_logprobs has to say: the fake engine's top tokens rank first."""
    decode = server.frontend.tokenizer.token_bytes

    def one(token, value, rank):
        text = name or decode(token).decode("utf-8", "replace")
        text = text.format(token) if name else text
        return {str(token): {"logprob": value, "rank": rank, "decoded_token": text}}

    found = [None]
    for position, token in list(enumerate(prompt))[1:]:
        entry = {}
        for rank, (top, value) in enumerate(top_of(position, num_top), 1):
            entry |= one(top, value, rank)
        found.append(entry | one(token, logprob_of(position, token), None))
    return found


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 5}])
@pytest.mark.parametrize("num_top", [0, 3])
def test_a_chat_prompt_has_its_log_probabilities(server, post, fields, num_top):
    body = {"messages": MESSAGES, "seed": 3, "n": 2, "prompt_logprobs": num_top, **fields}
    answer = post("chat/completions", **body).json()
    prompt = server.engine.added[-1].prompt
    assert answer["prompt_logprobs"] == prompt_entries(server, prompt, num_top)
    expected = chat_entries(server, tokens_of(server, 3), len(prompt), 5)
    content = {"content": expected, "refusal": None} if fields else None
    assert answer["choices"][0]["logprobs"] == content
    assert "prompt_logprobs" not in post("chat/completions", messages=MESSAGES, seed=3).json()


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}, {"echo": True, "logprobs": 4}])
def test_each_prompt_of_a_completion_has_its_own(server, complete, fields):
    choices = complete(prompt=["One", "Two two"], n=2, prompt_logprobs=2, seed=0, **fields)
    prompts = [server.frontend.tokenizer.encode(text) for text in ("One", "Two two")]
    for index, choice in enumerate(choices):
        assert choice["prompt_logprobs"] == prompt_entries(server, prompts[index // 2], 2)
        listed = choice["logprobs"]
        assert (listed is None) == (not fields)
        if listed:
            lengths = {len(top) for top in listed["top_logprobs"] if top}
            assert lengths == {fields["logprobs"] + 1}


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_may_be_called_by_their_ids(server, post, chat, complete, stream):
    fields = {"seed": 3, "return_tokens_as_token_ids": True, "stream": stream}
    names = [f"token_id:{token}" for token in tokens_of(server, 3)]
    choices = chat(logprobs=True, top_logprobs=1, **fields)
    found = [event[2] for event in choices if event[2]] if stream else [choices[0]["logprobs"]]
    entries = [entry for one in found for entry in one["content"]]
    assert [entry["token"] for entry in entries] == names
    assert all(entry["top_logprobs"][0]["token"].startswith("token_id:1") for entry in entries)
    choices = complete(logprobs=1, max_tokens=99, **fields)
    found = [event[2] for event in choices] if stream else [choices[0]["logprobs"]]
    assert [name for one in found for name in one["tokens"]] == names
    assert all(name in top for one in found for name, top in
               zip(one["tokens"], one["top_logprobs"], strict=True))  # fmt: skip
    if not stream:
        answer = post("chat/completions", messages=MESSAGES, **fields, prompt_logprobs=0).json()
        prompt = server.engine.added[-1].prompt
        expected = prompt_entries(server, prompt, 0, name="token_id:{}")
        assert answer["prompt_logprobs"] == expected
