"""The short way of plain requests gives, byte for byte, what the long way gives."""

import asyncio
import functools
import gc
import json
import weakref

import pytest
from fake_engine import ANSWER, FACTS
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_driver import CHAT, COMPLETIONS, Driver, counters, ended

from minisgl_fast.api import plain_session, session
from minisgl_fast.text.tokenizer import MAX_INLINE_CHARACTERS
from minisgl_fast.wire import FinishReason, FrameKind

USER = {"role": "user", "content": "Hi"}
REASON = FinishReason


def on_a_loop(test):
    @functools.wraps(test)
    def run(*arguments, **named):
        return asyncio.run(test(*arguments, **named))

    return run


async def outcome(driver, path, body, tokens, reason):
    """(what was written, what the engine got, which sessions there were) of one request."""
    kinds = await driver.send(path, body)
    written = await driver.answer(tokens, reason)
    added = driver.adds()
    for add in added:
        add.rid = 0
        if b'"seed"' not in body:
            add.seed = 0
    return written, added, kinds


async def compare(tokenizer, template, path, bodies, tokens, reason=REASON.LENGTH, **settings):
    """Both ways answer all bodies alike; whether the last one went the short way."""
    short = Driver(tokenizer, template, **settings)
    long = Driver(tokenizer, template, lane=False, **settings)
    kinds = []
    for body in bodies:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        got, added, kinds = await outcome(short, path, data, tokens, reason)
        expected, expected_added, others = await outcome(long, path, data, tokens, reason)
        assert (got, added) == (expected, expected_added), data[:300]
        assert set(others) <= {"Session"}
    assert counters(short) == counters(long)
    assert len(short.frontend.dispatcher) == 0
    return kinds == ["PlainSession"]


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["Qwen/Qwen3-0.6B", "default", "gpt-4"]),
        "max_tokens": st.sampled_from([1, 5, 4000, 5000, None]),
        "max_completion_tokens": st.sampled_from([3, None]),
        "temperature": st.sampled_from([0, 0.5, 1e-9, 3, -1]),
        "top_p": st.sampled_from([0.5, 1, 0]),
        "top_k": st.sampled_from([-1, 0, 5]),
        "min_p": st.just(0.25),
        "seed": st.sampled_from([0, -1, 2**63 - 1]),
        "presence_penalty": st.just(0.5),
        "frequency_penalty": st.just(-0.5),
        "repetition_penalty": st.just(1.25),
        "stop": st.sampled_from(["Fr", ["ris", "zzz"], "\U0001f950", [], ["capital", " of"]]),
        "ignore_eos": st.booleans(),
        "n": st.sampled_from([1, 2]),
        "stream": st.booleans(),
        "stream_options": st.sampled_from(
            [{"include_usage": True}, {"continuous_usage_stats": True}, {}, None]
        ),
        "chat_template_kwargs": st.sampled_from([{"enable_thinking": False}, {}]),
        # Not plain.
        "user": st.just("u"),
        "min_tokens": st.just(4),
        "stop_token_ids": st.just([12095]),
        "include_stop_str_in_output": st.booleans(),
    },
)
ENDS = st.sampled_from([REASON.EOS, REASON.LENGTH, REASON.STOP_TOKEN, REASON.ABORTED, REASON.ERROR])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(fields=FIELDS, reason=ENDS, as_ids=st.booleans())
def test_completions_are_answered_alike(tokenizer, template, fields, reason, as_ids):
    fields.pop("chat_template_kwargs", None)
    prompts = [[5, 6, 7], [8], [9, 151935, 0]] if as_ids else ["Hi", 'a "b"\n\u4f60 \\', "c d"]
    bodies = [{**fields, "prompt": prompt} for prompt in prompts]
    tokens = ended(ANSWER, tokenizer)
    asyncio.run(compare(tokenizer, template, COMPLETIONS, bodies, tokens, reason))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(fields=FIELDS, reason=ENDS)
def test_chats_are_answered_alike(tokenizer, template, fields, reason):
    system = {"role": "system", "content": "Be \u00fcber-brief."}
    turns = [system, USER, {"role": "assistant", "content": "Hello!"}, USER]
    bodies = [{**fields, "messages": messages} for messages in ([USER], turns, [system, USER])]
    tokens = ended(ANSWER, tokenizer)
    asyncio.run(compare(tokenizer, template, CHAT, bodies, tokens, reason))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@on_a_loop
async def test_a_request_that_comes_again_goes_the_short_way(tokenizer, template, path, stream):
    short = Driver(tokenizer, template)
    prompt = {"messages": [USER]} if path == CHAT else {"prompt": [1, 2]}
    body = json.dumps({**prompt, "max_tokens": 9, "stream": stream}).encode()
    kinds = [(await outcome(short, path, body, [5], REASON.LENGTH))[2] for _ in range(3)]
    assert kinds == [["Session"], ["PlainSession"], ["PlainSession"]]


# What stands before and behind a number, of bodies whose other numbers go the short way.
PLACES = (
    (b'{"prompt":[1],"seed":', b"}", True),
    (b'{"seed" : ', b' ,"prompt":[1]}', True),
    (b'{"prompt":[1],"max_tokens":3,"seed":', b'\n,"stream":true}', True),
    (b'{"prompt":[1],"max_tokens":', b"}", True),
    (b'{"max_tokens":', b',"prompt":[1],"seed":5,"stop":["x"]}', True),
    (b'{"prompt":[1],"max_tokens":7,"max_completion_tokens":', b"}", True),
    (b'{"prompt":[1],"max_completion_tokens":8,"max_tokens":', b"}", False),
    (b'{"max_tokens":', b',"prompt":[1],"min_tokens":6}', False),
    # Not where the number belongs.
    (b'{"prompt":[1],"metadata":{"seed":', b"}}", False),
    (b'{"metadata":{"seed":', b'},"seed":3,"prompt":[1]}', False),
    (b'{"seed":', b',"seed":3,"prompt":[1]}', False),
    (b'{"prompt":[1],"user":"\\"seed\\":', b'"}', False),
    (b'{"prompt":[1],"max_tokens":1\x02,"seed":', b"}", False),
)
NUMBERS = (
    b"0", b"1", b"5", b"6", b"7", b"4095", b"4096", b"999999999999999999", b"9223372036854775807",
    b"18446744073709551616", b"-1", b"-0", b"01", b"1.0", b"1.5", b"1e1", b"1 2", b"", b"null",
    b"true", b'"1"', b"\x01", b"\x02", b"+1", b"0x1", b"1]",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@on_a_loop
async def test_numbers_of_their_own_are_told_alike(tokenizer, template, place, monkeypatch):
    for module in (session, plain_session):
        monkeypatch.setattr(module, "fresh_seed", lambda: 77)
    before, behind, is_short = place
    fresh = [b"%d" % number for number in (11, 12, 13)]
    bodies = [before + number + behind for number in (*fresh, *NUMBERS, b"14")]
    assert await compare(tokenizer, template, COMPLETIONS, bodies, [5, 6]) is is_short


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("wanted", ["include_obfuscation", "continuous_usage_stats"])
@on_a_loop
async def test_what_wants_more_than_text_goes_the_long_way(tokenizer, template, path, wanted):
    driver = Driver(tokenizer, template)
    prompt = {"messages": [USER]} if path == CHAT else {"prompt": [1, 2]}
    body = json.dumps({**prompt, "stream": True, "stream_options": {wanted: True}}).encode()
    for _ in range(3):
        written, _, kinds = await outcome(driver, path, body, [5], REASON.LENGTH)
        assert kinds == ["Session"]
        assert (b'"obfuscation":"' if wanted == "include_obfuscation" else b'"usage":{') in written


@on_a_loop
async def test_what_is_encoded_off_the_loop_is_rendered_once(tokenizer, template):
    rendered = []

    class Counted:
        def __getattr__(self, name):
            return getattr(template, name)

        def render(self, *arguments, **named):
            rendered.append(arguments)
            return template.render(*arguments, **named)

    driver = Driver(tokenizer, Counted())
    for _ in range(3):
        body = json.dumps({"messages": [USER], "max_tokens": 9}).encode()
        kinds = (await outcome(driver, CHAT, body, [5], REASON.LENGTH))[2]
    assert kinds == ["PlainSession"]
    rendered.clear()
    long = {"role": "user", "content": "word " * (MAX_INLINE_CHARACTERS // 5)}
    await driver.send(CHAT, json.dumps({"messages": [long], "max_tokens": 9}).encode())
    assert len(rendered) == 1


ANSWERS = (
    "<think>\nlong\n</think>\n\nText", " \n<think>a</think>b", "<think>never ends", "</think>x",
    "1 < 2", "<", "<thin", "", " ", "<think></think>", "a<think>b</think>c", "plain \u4f60\u597d",
    "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>",
)  # fmt: skip


@pytest.mark.parametrize("parser", ["auto", "deepseek-r1", "kimi", "none", "gpt-oss"])
@pytest.mark.parametrize("stream", [False, True])
@on_a_loop
async def test_reasoning_is_taken_apart_alike(tokenizer, template, parser, stream):
    for text in ANSWERS:
        for variables in ({}, {"enable_thinking": False}):
            body = {"messages": [USER], "stream": stream, "chat_template_kwargs": variables}
            if stream:
                body["stream_options"] = {"include_usage": True}
            assert await compare(
                tokenizer, template, CHAT, [body] * 3, ended(text, tokenizer), REASON.EOS,
                reasoning_parser=parser,
            )  # fmt: skip


IDS = (
    b"[1]", b"[ 1 , 2 ]", b"[\n1\t,2\r]", b"[151935]", b"[0]", b"[151936]", b"[01]", b"[1.0]",
    b"[1e1]", b"[-1]", b"[-0]", b"[2147483648]", b"[99999999999]", b"[]", b"[1,]", b"[,1]",
    b"[1 2]", b"[1", b"[1,\x0b2]", b"[[1,2]]", b"[[1],[2]]", b"[true]", b'["a"]', b'["a","b"]',
    b"null", b"5", b'"a"', b'""', b'"\\ud83d\\ude00 \\u00e9\\n"', b'"\\ud800"',
    b'"\xff"', b'"\x01"',
    b'"a\\"b"', b'"a\\\\"', b'"', b"{}", b"[1]]", b"[1]}", b'"a"b',
    b'[1],"prompt":[2]', b'[1],"prompt":"x"',
    b"[" + b",".join([b"7"] * 5000) + b"]", b'"' + b"word " * 6000 + b'"', b"",
)  # fmt: skip
AROUND = (
    (b'{"prompt":', b',"max_tokens":2}'),
    (b' { "max_tokens" : 2 , "prompt" :\n', b" } "),
    (b'{"user":"\\"prompt\\":[1]","prompt":', b"}"),
    (b'{"model":"prompt","max_tokens":2,"prompt":', b"}"),
    (b'{"model":"default","model":"default","prompt":', b',"stop":["]}","\\""]}'),
    (b'{"stop":"\\"prompt\\": [1]","prompt":', b"}"),
    (b'{"prompt":[5],"prompt":', b"}"),
    (b'{"prompt":', b',"prompt":[5]}'),
    (b'{"stop":["prompt",', b'],"prompt":[5]}'),
    (b'{"stream_options":{"prompt":', b'},"stream":true,"prompt":[5]}'),
    (b'{"prompt":', b',"max_tokens":2'),
    (b'{"prompt":', b',"temperature":9e9}'),
    (b'{"prompt" ', b"}"),
    (b"[", b"]"),
)


@pytest.mark.parametrize("around", AROUND)
@on_a_loop
async def test_a_prompt_is_only_what_json_says_it_is(tokenizer, template, around):
    before, behind = around
    bodies = [before + value + behind for value in (b"[3]", b"[3]", b'"t"', *IDS)]
    await compare(tokenizer, template, COMPLETIONS, bodies, [5, 6])


MESSAGES = (
    b'[{"role":"user","content":"a"}]', b'[ {"content" : "a]\\"}" , "role":"user"} ]', b"[]",
    b'[{"role":"user","content":"a","name":"n"}]', b'[{"role":"user"}]', b'[{"role":"tool"}]',
    b'[{"role":"developer","content":"d"},{"role":"user","content":"a"}]', b"null", b"{}", b'"a"',
    b'[{"role":"user","content":[{"type":"text","text":"t"}]}]', b"[[]]", b'[{"role":"user"',
    b'[{"role":"user","content":"\\ud800"}]', b'[{"role":"user","content":"\xff"}]',
    b'[{"role":"user","content":"a"},]', b'[{"role":"assistant","content":"a"}]',
    b'[{"role":"user","content":"x</think>"}]', b'[{"role":"system","content":"s"}]',
    b'[{"role":"user","content":"' + b"word " * 6000 + b'"}]',
    b"[" + b",".join([b'{"role":"user","content":"a"}'] * 4097) + b"]",
)  # fmt: skip


@on_a_loop
async def test_messages_are_only_what_json_says_they_are(tokenizer, template):
    for before, behind in ((b'{"messages":', b"}"), (b'{"seed":1,"messages" : ', b',"top_k":3}')):
        bodies = [before + value + behind for value in (MESSAGES[0], MESSAGES[0], *MESSAGES)]
        await compare(tokenizer, template, CHAT, bodies, [5, 6])


@on_a_loop
async def test_a_template_that_looks_at_the_end_of_the_prompt_keeps_its_parser(tokenizer, template):
    """Whether an answer reasons depends on how its prompt ends, not on those before it."""
    bodies = [{"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}] * 2
    bodies += [{"messages": [{"role": "user", "content": "x"}]}] * 3
    assert await compare(tokenizer, template, CHAT, bodies, ended("<think>a</think>b", tokenizer))


# Ends


BODY = {"prompt": [1, 2, 3], "max_tokens": 9}


async def prepared(tokenizer, template, body=BODY, **settings):
    """A driver that knows the body's recipe, with such a request open; its session, weakly."""
    driver = Driver(tokenizer, template, **settings)
    data = json.dumps(body).encode()
    for _ in range(2):
        await outcome(driver, COMPLETIONS, data, [5], REASON.LENGTH)
    assert await driver.send(COMPLETIONS, data) == ["PlainSession"]
    (choice,) = driver.frontend.dispatcher.choices()
    return driver, data, weakref.ref(choice.response)


def requests_counted(driver):
    return {tuple(key): count for *key, count in driver.api.metrics.snapshot()["requests"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["token", "client", "engine", "death", "cut", "bad"])
@on_a_loop
async def test_every_end_counts_once_and_leaves_no_cycle(tokenizer, template, stream, end):
    gc.disable()
    try:
        driver, _, session = await prepared(tokenizer, template, {**BODY, "stream": stream})
        (choice,) = driver.frontend.dispatcher.choices()
        rid = choice.rid
        del choice
        driver.sent.clear()
        if stream:
            await driver.step((rid, 5, REASON.RUNNING))
        status, reason, aborted = 200, "length", []
        if end == "token":
            await driver.step((rid, 5, REASON.LENGTH))
        elif end == "client":
            driver.connection.connection_lost(None)
            status, reason, aborted = 499, "disconnect", [rid]
        elif end == "engine":
            await driver.step((rid, -1, REASON.ERROR))
            status, reason = 500, "error"
        elif end == "death":
            driver.frontend.on_close("gone")
            status, reason = 500, "error"
        elif end == "cut":
            driver.api.chat._pipeline.abort("r1")
            await asyncio.sleep(0)
            reason, aborted = "abort", [rid]
        else:
            await driver.step((rid, -1, REASON.GRAMMAR))
            status, reason = 400, "error"
        for _ in range(3):
            await asyncio.sleep(0)
        assert requests_counted(driver)[COMPLETIONS, status, reason] == 1 + 2 * (reason == "length")
        assert sum(requests_counted(driver).values()) == 3
        sent = [int.from_bytes(data, "little") for kind, data in driver.sent]
        assert sent == aborted
        assert {kind for kind, _ in driver.sent} <= {FrameKind.ABORT}
        assert len(driver.frontend.dispatcher) == 0
        assert session() is None
    finally:
        gc.enable()


@on_a_loop
async def test_what_refuses_requests_refuses_plain_ones(tokenizer, template):
    driver, data, _ = await prepared(tokenizer, template, max_queued_requests=1)
    driver.connect()
    await driver.send(COMPLETIONS, data)
    assert driver.take().startswith(b"HTTP/1.1 503 ")
    driver.frontend.drain()
    await driver.send(COMPLETIONS, data)
    assert b"shutting down" in driver.take()
    assert len(driver.frontend.dispatcher) == 1


@on_a_loop
async def test_what_is_kept_of_bodies_is_bounded(tokenizer, template):
    """Bodies that differ in more than their prompts are answered all the same."""
    limit = FACTS["max_model_len"]
    bodies = [{"prompt": [1], "top_k": top_k % 1500} for top_k in range(5000)]
    bodies += [{"prompt": [1], "stop": ["x" * 200] * 20}] * 3 + [{"prompt": [1] * limit}] * 3
    driver = Driver(tokenizer, template)
    for body in bodies:
        await outcome(driver, COMPLETIONS, json.dumps(body).encode(), [5], REASON.LENGTH)
    assert requests_counted(driver)[COMPLETIONS, 200, "length"] == 5003
    assert requests_counted(driver)[COMPLETIONS, 400, ""] == 3
