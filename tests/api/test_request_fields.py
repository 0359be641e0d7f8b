"""What fields of requests do to the engine's work and to the answer, over HTTP."""

import pytest
from api_client import CHAT, COMPLETIONS, USER, error, ok
from fake_engine import ANSWER, EOS, FACTS

from minisgl_fast.token_rules import split

SAID = [*USER, {"role": "assistant", "content": "The capital is"}]
LIMIT = FACTS["max_model_len"]


@pytest.fixture(scope="module")
def server(module_serve):
    return module_serve()


def text_of(events, index=0):
    choices = [choice for event in events for choice in event["choices"]]
    mine = [choice for choice in choices if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in mine)


def test_priority_reaches_the_engine_and_is_0_without_one(server):
    for fields, expected in (
        ({}, 0),
        ({"priority": 7}, 7),
        ({"priority": -(2**31) + 1}, 1 - 2**31),
    ):
        ok(server, CHAT, messages=USER, max_tokens=1, **fields)
        assert server.engine.added[-1].priority == expected
    assert error(server, CHAT, messages=USER, priority=2**31)["param"] == "priority"


def test_the_clients_id_is_the_answers_id(server):
    assert ok(server, CHAT, messages=USER, max_tokens=1, rid="my-id")["id"] == "my-id"
    answer = ok(server, COMPLETIONS, prompt="Hi", max_tokens=1, request_id="mine")
    assert answer["id"] == "cmpl-mine"
    events = ok(server, CHAT, messages=USER, max_tokens=2, rid="my-id", stream=True)
    assert {event["id"] for event in events} == {"my-id"}
    for bad in ("", "a b", "é", "x" * 129):
        assert error(server, CHAT, messages=USER, rid=bad)["param"] == "rid"


def test_the_tier_that_served_is_named_when_one_was_asked_for(server):
    answer = ok(server, CHAT, messages=USER, max_tokens=1, service_tier="flex")
    assert answer["service_tier"] == "default"
    assert "service_tier" not in ok(server, CHAT, messages=USER, max_tokens=1)


def test_usage_in_every_event_counts_the_choices_own_tokens(server, tokenizer):
    options = {"continuous_usage_stats": True, "include_usage": True}
    events = ok(server, CHAT, messages=USER, n=2, stream=True, stream_options=options, seed=1)
    *events, last = events
    for index in (0, 1):
        mine = [event for event in events if event["choices"][0]["index"] == index]
        counts = [event["usage"]["completion_tokens"] for event in mine[1:]]
        assert counts == sorted(counts)
        assert counts[-1] == len(tokenizer.encode(f"{index + 1}. {ANSWER}")) + 1 or counts[-1] > 5
        assert len(set(counts)) > 3
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2 * counts[-1]
    options = {"continuous_usage_stats": True}
    events = ok(server, COMPLETIONS, prompt="Hi", max_tokens=4, stream=True, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4]
    assert all(event["usage"]["prompt_tokens"] == 1 for event in events)


def test_usage_in_every_event_changes_nothing_else(server):
    body = {"messages": USER, "seed": 5, "stream": True}
    plain = ok(server, CHAT, **body)
    dressed = ok(server, CHAT, **body, stream_options={"continuous_usage_stats": True})
    assert text_of(plain) == text_of(dressed) == "5. " + ANSWER
    assert [e["choices"][0]["finish_reason"] for e in dressed][-2:] == [None, "stop"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_come_once_each_and_the_prompts_too(server, tokenizer, path, stream):
    ask = {"messages": USER} if path == CHAT else {"prompt": ["Hi", "Ho ho"]}
    answer = ok(
        server, path, **ask, n=2, seed=3, stream=stream, max_tokens=64, return_token_ids=True
    )
    num_choices = 2 if path == CHAT else 4
    events = answer if stream else [answer]
    found = {index: [] for index in range(num_choices)}
    prompts = {}
    for event in events:
        prompts.setdefault(-1, event.get("prompt_token_ids"))
        for choice in event["choices"]:
            found[choice["index"]] += choice.get("token_ids", [])
            if "prompt_token_ids" in choice:
                assert prompts.setdefault(choice["index"], choice["prompt_token_ids"])
    sent = server.engine.added[-num_choices:]
    for index in range(num_choices):
        text = f"{(3 + index % 2) % 10}. "
        assert found[index] == [*tokenizer.encode(text), *tokenizer.encode(ANSWER), EOS]
        if path == COMPLETIONS:
            assert prompts[index] == sent[index].prompt
    if path == CHAT:
        assert prompts == {-1: sent[0].prompt}


def test_prompt_ids_come_alone_when_only_they_are_wanted(server):
    answer = ok(server, CHAT, messages=USER, max_tokens=2, return_prompt_token_ids=True)
    assert answer["prompt_token_ids"] == server.engine.added[-1].prompt
    assert "token_ids" not in answer["choices"][0]
    plain = ok(server, CHAT, messages=USER, max_tokens=2)
    assert "prompt_token_ids" not in plain


def test_padding_makes_the_length_of_a_text_invisible(server):
    body = {"messages": USER, "seed": 5, "stream": True}
    events = ok(server, CHAT, **body, stream_options={"include_obfuscation": True})
    assert text_of(events) == "5. " + ANSWER
    lengths = {
        len(event["choices"][0]["delta"]["content"].encode()) + len(event["obfuscation"])
        for event in events[1:]
        if event["choices"][0]["delta"].get("content")
    }
    assert all(length % 32 == 0 for length in lengths)
    assert len({event["obfuscation"] for event in events}) > len(events) // 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_last_message_is_continued_and_echoed(server, tokenizer, stream):
    body = {"messages": SAID, "continue_final_message": True, "stream": stream, "seed": 1}

    def text(answer):
        return text_of(answer) if stream else answer["choices"][0]["message"]["content"]

    assert text(ok(server, CHAT, **body)) == "1. " + ANSWER
    prompt = tokenizer.decode(server.engine.added[-1].prompt, skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nThe capital is")
    assert text(ok(server, CHAT, **body, echo=True)) == "The capital is1. " + ANSWER
    body["messages"] = USER
    body["continue_final_message"] = False
    assert text(ok(server, CHAT, **body, echo=True)) == "1. " + ANSWER


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": USER},
        {"messages": SAID, "add_generation_prompt": True},
        {"prompt": "Hi"},
    ],
)
def test_what_cannot_be_continued_is_refused(server, fields):
    found = error(server, CHAT, **fields, continue_final_message=True)
    assert found["param"] == "continue_final_message"


def test_ids_bypass_the_template(server):
    ok(server, CHAT, messages=USER, input_ids=[1, 2, 3], max_tokens=1)
    assert server.engine.added[-1].prompt == [1, 2, 3]
    ok(server, CHAT, input_ids=[4, 5], max_tokens=1)
    assert server.engine.added[-1].prompt == [4, 5]
    for bad in ([], [-1], [FACTS["vocab_size"]]):
        assert error(server, CHAT, input_ids=bad)["param"] == "input_ids"
    assert error(server, CHAT, input_ids=[1], prompt="x")["param"] == "input_ids"


def test_a_prompt_is_cut_on_the_side_that_is_asked_for(server):
    ids = list(range(100, 110))

    def sent(**fields):
        ok(server, COMPLETIONS, prompt=ids, max_tokens=2, **fields)
        return server.engine.added[-1].prompt

    assert sent(truncate_prompt_tokens=3) == ids[-3:]
    assert sent(truncate_prompt_tokens=3, truncation_side="right") == ids[:3]
    assert sent(truncate_prompt_tokens=30) == ids
    assert sent(truncate_prompt_tokens=-1) == ids
    ok(server, COMPLETIONS, prompt="word " * LIMIT, max_tokens=5, truncate_prompt_tokens=-1)
    assert len(server.engine.added[-1].prompt) == LIMIT - 5
    echoed = ok(
        server,
        COMPLETIONS,
        prompt="one two three",
        max_tokens=1,
        truncate_prompt_tokens=1,
        echo=True,
    )
    assert echoed["choices"][0]["text"].startswith(" three")
    for bad in (0, -2):
        found = error(server, COMPLETIONS, prompt=ids, truncate_prompt_tokens=bad)
        assert found["param"] == "truncate_prompt_tokens"


def test_a_suffix_is_filled_in_before(server, tokenizer):
    answer = ok(server, COMPLETIONS, prompt="def f(", suffix="return x", max_tokens=2, echo=True)
    prompt = tokenizer.decode(server.engine.added[-1].prompt, skip_special_tokens=False)
    assert prompt == "<|fim_prefix|>def f(<|fim_suffix|>return x<|fim_middle|>"
    assert answer["choices"][0]["text"].startswith("def f(")
    ok(server, COMPLETIONS, prompt="a", suffix="", max_tokens=1)
    assert server.engine.added[-1].prompt == tokenizer.encode("a")


def test_bad_words_of_one_token_are_biases_with_and_without_a_blank(server, tokenizer):
    ok(server, CHAT, messages=USER, max_tokens=1, bad_words=["Paris"], logit_bias={"5": 2})
    sent = server.engine.added[-1]
    ids = [tokenizer.encode(text) for text in ("Paris", " Paris")]
    assert sent.bias == {5: 2.0, **{one[0]: float("-inf") for one in ids}}
    assert sent.grammar == b""
    for bad in ("", "  ", "x" * 257):
        assert error(server, CHAT, messages=USER, bad_words=["x", bad])["param"] == "bad_words[1]"
    assert error(server, CHAT, messages=USER, bad_words=["x"] * 257)["param"] == "bad_words"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bad_words_of_several_tokens_and_allowed_tokens_are_rules(server, tokenizer, path):
    ask = {"messages": USER} if path == CHAT else {"prompt": "Hi"}
    words = ["antidisestablishmentarianism", "Paris"]
    ok(server, path, **ask, max_tokens=1, bad_words=words, stream=True)
    sent = server.engine.added[-1]
    rules, grammar = split(sent.grammar)
    long = tuple(tokenizer.encode(words[0])), tuple(tokenizer.encode(" " + words[0]))
    same = [word for word in long if len(word) == len(long[0])]
    assert (rules.allowed, list(rules.words), grammar) == (None, same, b"")
    assert len(sent.bias) == 2
    ok(server, path, **ask, max_tokens=1, allowed_token_ids=[0, 9, EOS], regex="a")
    rules, grammar = split(server.engine.added[-1].grammar)
    assert rules.words == () and b"lark_grammar" in grammar
    allowed = [i for i in range(8 * len(rules.allowed)) if rules.allowed[i >> 3] >> (i & 7) & 1]
    assert allowed == [0, 9, EOS]
    before = len(server.engine.added)
    for bad in ([], [-1], [151936], [2**40], ["x"], 5):
        name = error(server, path, **ask, allowed_token_ids=bad, stream=True)["param"]
        assert name.partition("[")[0] == "allowed_token_ids"
    assert len(server.engine.added) == before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", [{}, {"no_stop_trim": True}, {"include_stop_str_in_output": True}])
def test_a_pattern_stops_the_text_and_is_named(server, stream, keep):
    body = {"messages": USER, "seed": 1, "stream": stream, **keep}
    answer = ok(server, CHAT, **body, stop=["never"], stop_regex=["zz", "[A-Z][a-z]+s\\b"[:-2]])
    choices = [e["choices"][0] for e in answer] if stream else answer["choices"]
    text = text_of(answer) if stream else choices[0]["message"]["content"]
    expected = "1. The capital of France is "
    assert text == expected + ("Paris" if keep else "")
    assert choices[-1]["finish_reason"] == "stop"
    assert choices[-1]["matched_stop"] == choices[-1]["stop_reason"] == "[A-Z][a-z]+s"


def test_a_pattern_that_is_none_is_refused_before_anything_runs(server):
    before = len(server.engine.added)
    for bad in ("(", "a*", "x" * 257, ["a"] * 33, "(?=a)b"):
        assert error(server, CHAT, messages=USER, stop_regex=bad)["param"] == "stop_regex"
    assert len(server.engine.added) == before


def test_special_tokens_are_put_around_a_prompt_when_asked_for(server):
    for path, ask in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "Hi"})):
        for value in (True, False):
            ok(server, path, **ask, max_tokens=1, add_special_tokens=value)


def test_completions_take_max_completion_tokens_too(server):
    ok(server, COMPLETIONS, prompt="Hi", max_tokens=9, max_completion_tokens=3)
    assert server.engine.added[-1].max_tokens == 3


def test_no_spaces_between_special_tokens_are_refused_where_there_are_some(server):
    ask = {"prompt": "Hi", "max_tokens": 60, "seed": 1, "skip_special_tokens": False}
    name = "spaces_between_special_tokens"
    texts = [ok(server, COMPLETIONS, **ask, **{name: value})["choices"][0]["text"]
             for value in (True, False)]  # fmt: skip
    assert texts[0] == texts[1]
    tokenizer = server.frontend.tokenizer
    assert tokenizer.puts_spaces is False
    tokenizer.__dict__["puts_spaces"] = True  # as of a tokenizer without a decoder
    try:
        assert error(server, COMPLETIONS, **ask, **{name: False})["param"] == name
        native = {"sampling_params": {"skip_special_tokens": False, name: False}}
        assert name in error(server, "/generate", text="Hi", **native)["param"]
        ok(server, COMPLETIONS, **ask, **{name: True})
        ok(server, COMPLETIONS, **{**ask, "skip_special_tokens": True, name: False})
    finally:
        tokenizer.__dict__["puts_spaces"] = False


def test_extra_keys_divide_the_cache_like_salts(server):
    salts = []
    for salt, key in ((None, None), ("a", None), (None, "a"), ("a", "b"), ("ab", None)):
        ok(server, CHAT, messages=USER, max_tokens=1, cache_salt=salt, extra_key=key)
        salts.append(server.engine.added[-1].cache_salt)
    assert salts[0] == 0
    assert len(set(salts)) == len(salts)


def test_verbosity_and_documents_reach_the_template(serve, tokenizer):
    from minisgl_fast.text.template import ChatTemplate

    server = serve()
    source = "{{ verbosity }}|{{ documents[0].title }}|{{ messages[0].content }}"
    server.frontend.template = ChatTemplate({"default": source})
    ok(server, CHAT, messages=USER, max_tokens=1, verbosity="low", documents=[{"title": "T"}])
    assert tokenizer.decode(server.engine.added[-1].prompt) == "low|T|Hi"


def test_the_best_of_several_are_answered_best_first(server):
    ask = {"prompt": ["Hi", "Ho"], "seed": 0, "max_tokens": 12}
    every = ok(server, COMPLETIONS, **ask, n=4, logprobs=0)["choices"]
    best = ok(server, COMPLETIONS, **ask, n=2, best_of=4)
    assert len(server.engine.added) >= 8
    for prompt in (0, 1):
        mine = every[4 * prompt : 4 * prompt + 4]
        means = [sum(c["logprobs"]["token_logprobs"]) / 12 for c in mine]
        ranked = sorted(range(4), key=lambda k: means[k], reverse=True)[:2]
        found = best["choices"][2 * prompt : 2 * prompt + 2]
        assert [choice["text"] for choice in found] == [mine[k]["text"] for k in ranked]
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    assert best["usage"]["completion_tokens"] == 8 * 12
    for bad in ({"best_of": 2, "n": 3}, {"best_of": 129}, {"best_of": 2, "stream": True}):
        assert error(server, COMPLETIONS, prompt="Hi", **bad)["param"] == "best_of"
