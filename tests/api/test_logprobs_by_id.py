"""vLLM's fields for log-probabilities: of tokens by id, of prompts, with ids as names."""

import pytest
from api_client import CHAT, COMPLETIONS, error, ok
from fake_engine import logprob_of, top_of
from logprobs_expected import (
    MESSAGES,
    PROMPT,
    chat,
    chat_entries,
    complete,
    entry,
    num_prompt_of,
    tokens_of,
)


@pytest.fixture(scope="module")
def server(module_serve):
    return module_serve()


def listed_by_id(server, position, token, ids, num_top):
    """Chat's top_logprobs: the likeliest, or else the token itself, and those asked for."""
    likeliest = top_of(position, num_top) or [(token, logprob_of(position, token))]
    pairs = dict(likeliest) | {
        one: logprob_of(position, one) for one in ids if one not in dict(likeliest)
    }
    return [{**entry(server, 0, one), "logprob": value} for one, value in pairs.items()]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_top", [0, 3])
def test_a_chat_lists_the_tokens_that_are_asked_for_by_id(server, num_top, stream):
    ids = [9, 1000, 5, 9]
    choices = chat(
        server, logprobs=True, top_logprobs=num_top, logprob_token_ids=ids, seed=3, stream=stream
    )
    found = [event[2] for event in choices if event[2]] if stream else [choices[0]["logprobs"]]
    entries = [entry for one in found for entry in one["content"]]
    first, tokens = num_prompt_of(server), tokens_of(server, 3)
    assert [one["top_logprobs"] for one in entries] == [
        listed_by_id(server, first + i, token, ids, num_top) for i, token in enumerate(tokens)
    ]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("num_top", [0, 3])
def test_a_completion_lists_the_tokens_that_are_asked_for_by_id(server, num_top, echo):
    ids = [9, 1000, 5]
    (choice,) = complete(server, 
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
def test_ids_without_logprobs_or_out_of_range_are_refused(server, fields):
    num_added = len(server.engine.added)
    for path, body in (
        (COMPLETIONS, {"prompt": "x", **fields}),
        (CHAT, {"messages": MESSAGES, **fields, "logprobs": "logprobs" in fields}),
    ):
        param = error(server, path, **body, stream=True)["param"]
        assert param.startswith("logprob_token_ids")
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
def test_a_chat_prompt_has_its_log_probabilities(server, fields, num_top):
    body = {"messages": MESSAGES, "seed": 3, "n": 2, "prompt_logprobs": num_top, **fields}
    answer = ok(server, CHAT, **body)
    prompt = server.engine.added[-1].prompt
    assert answer["prompt_logprobs"] == prompt_entries(server, prompt, num_top)
    expected = chat_entries(server, tokens_of(server, 3), len(prompt), 5)
    content = {"content": expected, "refusal": None} if fields else None
    assert answer["choices"][0]["logprobs"] == content
    assert "prompt_logprobs" not in ok(server, CHAT, messages=MESSAGES, seed=3)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}, {"echo": True, "logprobs": 4}])
def test_each_prompt_of_a_completion_has_its_own(server, fields):
    choices = complete(server, prompt=["One", "Two two"], n=2, prompt_logprobs=2, seed=0, **fields)
    prompts = [server.frontend.tokenizer.encode(text) for text in ("One", "Two two")]
    for index, choice in enumerate(choices):
        assert choice["prompt_logprobs"] == prompt_entries(server, prompts[index // 2], 2)
        listed = choice["logprobs"]
        assert (listed is None) == (not fields)
        if listed:
            lengths = {len(top) for top in listed["top_logprobs"] if top}
            assert lengths == {fields["logprobs"] + 1}


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_may_be_called_by_their_ids(server, stream):
    fields = {"seed": 3, "return_tokens_as_token_ids": True, "stream": stream}
    names = [f"token_id:{token}" for token in tokens_of(server, 3)]
    choices = chat(server, logprobs=True, top_logprobs=1, **fields)
    found = [event[2] for event in choices if event[2]] if stream else [choices[0]["logprobs"]]
    entries = [entry for one in found for entry in one["content"]]
    assert [entry["token"] for entry in entries] == names
    assert all(entry["top_logprobs"][0]["token"].startswith("token_id:1") for entry in entries)
    choices = complete(server, logprobs=1, max_tokens=99, **fields)
    found = [event[2] for event in choices] if stream else [choices[0]["logprobs"]]
    assert [name for one in found for name in one["tokens"]] == names
    assert all(name in top for one in found for name, top in
               zip(one["tokens"], one["top_logprobs"], strict=True))  # fmt: skip
    if not stream:
        answer = ok(server, CHAT, messages=MESSAGES, **fields, prompt_logprobs=0)
        prompt = server.engine.added[-1].prompt
        expected = prompt_entries(server, prompt, 0, name="token_id:{}")
        assert answer["prompt_logprobs"] == expected
