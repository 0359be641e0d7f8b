"""``/generate`` in SGLang's form: one prompt and batches, whole and streamed, aborted, refused."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_client import events_of, ok, request
from fake_engine import ANSWER, FACTS, eventually

from minisgl_fast.wire import FinishReason

GENERATE = "/generate"
SEED = {"sampling_seed": 3}
TEXT = f"3. {ANSWER}"


def post(server, **body):
    return ok(server, GENERATE, **body)


def stream(server, **body):
    """The events of a stream, which ends in order."""
    status, headers, data = request(server, "POST", GENERATE, {**body, "stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    return events_of(data)


def text_params(**params):
    return {"temperature": 0.5, **SEED, **params}


# One prompt


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_text_is_answered_with_text_ids_and_meta_info(server, tokenizer, method):
    body = {"text": "Hello there", "sampling_params": text_params(), "rid": "mine"}
    status, _, data = request(server, method, GENERATE, body)
    answer = json.loads(data)
    assert status == 200
    (sent,) = server.engine.added
    assert sent.prompt == tokenizer.encode_prompt("Hello there")
    meta = answer.pop("meta_info")
    assert answer == {"text": TEXT, "output_ids": sent.tokens}
    latency = meta.pop("e2e_latency")
    assert 0 < latency < 10
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "stop", "matched": sent.tokens[-1]},
        "prompt_tokens": 2,
        "weight_version": "default",
        "completion_tokens": len(sent.tokens),
        "cached_tokens": 4,
    }


def test_token_ids_are_a_prompt_too(server):
    answer = post(server, input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 2})
    assert server.engine.added[0].prompt == [5, 6, 7]
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    assert answer["meta_info"]["prompt_tokens"] == 3


def test_the_defaults_are_sglangs_and_not_the_models(server):
    post(server, text="Hi", sampling_params={"ignore_eos": True})
    post(server, text="Hi")
    sent, _ = server.engine.added
    assert (sent.max_tokens, sent.temperature, sent.top_p, sent.top_k) == (128, 1.0, 1.0, 0)


def test_every_sampling_parameter_reaches_the_engine(server):
    post(
        server,
        text="Hi",
        priority=5,
        cache_salt="salt",
        sampling_params={
            "max_new_tokens": 7.0,
            "min_new_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 5,
            "min_p": 0.125,
            "sampling_seed": 11,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.5,
            "logit_bias": {"5": 1},
            "stop_token_ids": [9, 10],
            "ignore_eos": True,
            "spaces_between_special_tokens": True,
            "what_is_this": 1,
        },
    )
    (sent,) = server.engine.added
    assert (sent.max_tokens, sent.min_tokens, sent.seed, sent.priority) == (7, 2, 11, 5)
    assert (sent.temperature, sent.top_p, sent.top_k, sent.min_p) == (0.5, 0.25, 5, 0.125)
    penalties = (sent.presence_penalty, sent.frequency_penalty, sent.repetition_penalty)
    assert penalties == (0.5, -0.5, 1.5)
    assert (sent.bias, sent.stop_ids, sent.ignore_eos) == ({5: 1.0}, [9, 10], True)
    assert sent.cache_salt


@pytest.mark.parametrize(
    ("params", "text", "matched"),
    [
        ({"stop": "France"}, "3. The capital of ", "France"),
        ({"stop": ["x", "France"], "no_stop_trim": True}, "3. The capital of France", "France"),
        ({"stop_regex": "F[a-z]+e"}, "3. The capital of ", "F[a-z]+e"),
    ],
)
def test_a_stop_ends_the_text(server, params, text, matched):
    answer = post(server, text="Hi", sampling_params=text_params(**params))
    assert answer["text"] == text
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}


def test_a_model_name_of_a_router_is_no_reason_to_refuse(server):
    post(server, text="Hi", model="unknown", sampling_params={"max_new_tokens": 1})


def test_several_answers_are_a_list(server):
    answers = post(server, text="Hi", rid="r", sampling_params=text_params(n=3, max_new_tokens=3))
    assert [answer["text"][0] for answer in answers] == ["3", "4", "5"]
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0", "r_1", "r_2"]
    assert [answer["index"] for answer in answers] == [0, 1, 2]


def test_mini_sglangs_form_is_as_it_was(server):
    status, _, data = request(server, "POST", GENERATE, {"prompt": "Hi", "max_tokens": 3})
    assert (status, data.endswith(b"data: [DONE]\n\n")) == (200, True)
    body = {"prompt": "Hi", "max_tokens": 3, "stream": False}
    answer = json.loads(request(server, "POST", GENERATE, body)[2])
    assert answer["finish_reason"] == "length"
    assert [sent.max_tokens for sent in server.engine.added] == [3, 3]
    assert server.engine.added[0].temperature == pytest.approx(0.6)  # the model's


# Streams


def test_a_stream_repeats_the_text_and_the_ids_from_the_beginning(server):
    events = stream(server, text="Hi", sampling_params=text_params())
    whole = post(server, text="Hi", sampling_params=text_params())
    assert len(events) > 3
    for before, after in zip(events, events[1:], strict=False):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert before["meta_info"]["finish_reason"] is None
    for event in events:
        assert event["meta_info"]["completion_tokens"] == len(event["output_ids"])
        assert "index" not in event
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert events[-1]["meta_info"]["e2e_latency"] > 0


def test_a_stream_holds_what_is_new_if_the_server_is_told_so(serve):
    server = serve(incremental_streaming_output=True)
    events = stream(server, text="Hi", sampling_params=text_params())
    whole = post(server, text="Hi", sampling_params=text_params())
    assert "".join(event["text"] for event in events) == whole["text"] == TEXT
    ids = [token for event in events for token in event["output_ids"]]
    assert ids == whole["output_ids"]
    assert events[-1]["meta_info"]["completion_tokens"] == len(ids)


# Batches


def test_a_batch_is_answered_in_its_order(server):
    answers = post(
        server,
        text=["one", "two", "three"],
        rid=["a", "b", "c"],
        sampling_params=[text_params(max_new_tokens=count) for count in (5, 1, 3)],
    )
    metas = [answer["meta_info"] for answer in answers]
    assert [meta["id"] for meta in metas] == ["a", "b", "c"]
    assert [meta["completion_tokens"] for meta in metas] == [5, 1, 3]
    assert [answer["index"] for answer in answers] == [0, 1, 2]


def test_a_batch_of_one_is_a_list(server):
    (answer,) = post(server, text=["one"], sampling_params=text_params())
    assert answer["text"] == TEXT
    (answer,) = post(server, input_ids=[[5]], sampling_params=text_params())
    assert answer["text"] == TEXT


def test_one_set_of_parameters_serves_a_batch_and_n_multiplies_it(server):
    answers = post(
        server, input_ids=[[5], [6, 7]], rid="r", sampling_params=text_params(n=2, max_new_tokens=2)
    )
    metas = [answer["meta_info"] for answer in answers]
    assert [meta["id"] for meta in metas] == ["r_0_0", "r_0_1", "r_1_0", "r_1_1"]
    assert [meta["prompt_tokens"] for meta in metas] == [1, 1, 2, 2]
    assert [answer["text"] for answer in answers] == ["3.", "4.", "3.", "4."]


def test_a_batch_of_400_prompts_is_answered(server):
    answers = post(
        server, input_ids=[[i + 1] * 5 for i in range(400)], sampling_params={"max_new_tokens": 1}
    )
    assert len(answers) == 400
    assert len({answer["meta_info"]["id"] for answer in answers}) == 400


def test_a_streamed_batch_numbers_its_events(server):
    params = [text_params(max_new_tokens=count) for count in (5, 20)]
    events = stream(server, text=["one", "two"], sampling_params=params)
    whole = post(server, text=["one", "two"], sampling_params=params)
    for index in range(2):
        own = [event for event in events if event["index"] == index]
        assert [e["meta_info"]["finish_reason"] is None for e in own] == [True] * (len(own) - 1) + [
            False
        ]
        assert own[-1]["text"] == whole[index]["text"]
        assert own[-1]["output_ids"] == whole[index]["output_ids"]


@pytest.mark.parametrize("streams", [False, True])
def test_an_engine_error_ends_a_batch_with_one_error(server, streams):
    server.engine.end_of_all = FinishReason.ERROR
    body = {"text": ["one", "two"], "stream": streams}
    status, _, data = request(server, "POST", GENERATE, body)
    assert status == 500
    assert json.loads(data)["code"] == 500
    eventually(lambda: len(server.frontend.dispatcher) == 0)


def test_an_engine_error_in_a_streamed_batch_is_its_last_event(server):
    server.engine.hold = True
    body = {"text": ["one", "two"], "stream": True, "sampling_params": {"ignore_eos": True}}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(request, server, "POST", GENERATE, body)
        eventually(lambda: len(server.engine.added) == 2)
        for _ in range(3):
            server.call(server.engine.step)
        server.engine.end_of_all = FinishReason.ERROR
        server.call(server.engine.step)
        status, _, data = running.result(10)
    assert status == 200
    *events, error, done = data.decode().removesuffix("\n\n").split("\n\n")
    assert (done, json.loads(error[6:])["error"]["code"]) == ("data: [DONE]", "engine_error")
    assert all('"error"' not in event for event in events)
    eventually(lambda: len(server.frontend.dispatcher) == 0)


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_aborts_its_whole_batch(server, streams):
    server.engine.hold = True
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    body = {"text": ["one", "two", "three"], "stream": streams}
    connection.request(
        "POST", GENERATE, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    eventually(lambda: len(server.engine.added) == 3)
    if streams:
        server.call(server.engine.step)
    connection.close()
    eventually(lambda: len(server.engine.aborted) == 3)
    eventually(lambda: len(server.frontend.dispatcher) == 0 and server.http.num_exchanges == 0)


@pytest.mark.parametrize(
    ("rid", "aborted"), [("r", [True, True]), ("r_0", [True, False]), ("r_2", [False, False])]
)
def test_a_batch_or_a_part_of_it_is_aborted_by_name(server, rid, aborted):
    server.engine.hold = True
    body = {"text": ["one", "two"], "rid": "r", "sampling_params": {"max_new_tokens": 3}}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(request, server, "POST", GENERATE, body)
        eventually(lambda: len(server.engine.added) == 2)
        request(server, "POST", "/abort_request", {"rid": rid})
        server.engine.hold = False
        answers = json.loads(running.result(10)[2])
    reasons = [answer["meta_info"]["finish_reason"]["type"] for answer in answers]
    assert reasons == ["abort" if is_aborted else "length" for is_aborted in aborted]


def test_one_request_is_aborted_by_its_rid(server):
    server.engine.hold = True
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(request, server, "POST", GENERATE, {"text": "Hi", "rid": "only"})
        eventually(lambda: server.engine.added)
        assert request(server, "POST", "/abort_request", {"rid": "only"})[0] == 200
        status, _, data = running.result(10)
    assert status == 200
    assert json.loads(data)["meta_info"]["finish_reason"]["type"] == "abort"


# Errors

LONG = FACTS["max_model_len"]
TABLE = [
    ({}, "text", "Give either"),
    ({"text": "a", "input_ids": [1]}, "text", "Give either"),
    ({"text": 5}, "text", "Expected"),
    ({"text": ""}, "text", "must not be empty"),
    ({"text": []}, "text", "1 to"),
    ({"text": ["a", ""]}, "text[1]", "must not be empty"),
    ({"text": ["a"] * 1025}, "text", "1 to"),
    ({"input_ids": []}, "input_ids", "not empty"),
    ({"input_ids": [1, [2]]}, "input_ids", "list of token ids"),
    ({"input_ids": [[1], []]}, "input_ids[1]", "must not be empty"),
    ({"input_ids": [-1]}, "input_ids", "token ids in"),
    ({"input_ids": [[1], [FACTS["vocab_size"]]]}, "input_ids[1]", "token ids in"),
    ({"input_ids": [5] * LONG}, "input_ids", "maximum context length is"),
    ({"text": ["a", "x" * 3_000_000]}, "text[1]", "maximum context length is"),
    ({"text": "a", "sampling_params": 5}, "sampling_params", "must be an object"),
    ({"text": "a", "sampling_params": [{}]}, "sampling_params", "one per prompt"),
    ({"text": ["a"], "sampling_params": [{}, {}]}, "sampling_params", "one per prompt"),
    ({"text": "a", "sampling_params": {"top_p": 2}}, "sampling_params.top_p", "(0, 1]"),
    ({"text": "a", "sampling_params": {"top_p": "x"}}, "sampling_params.top_p", "Expected"),
    (
        {"text": ["a", "b"], "sampling_params": [{}, {"temperature": -1}]},
        "sampling_params[1].temperature",
        "[0, 100]",
    ),
    (
        {"text": "a", "sampling_params": {"max_new_tokens": -1}},
        "sampling_params.max_new_tokens",
        "max_new_tokens must be at least",
    ),
    (
        {"text": "a", "sampling_params": {"max_new_tokens": 1, "min_new_tokens": 2}},
        "sampling_params.min_new_tokens",
        "at most max_new_tokens",
    ),
    (
        {"text": "a", "sampling_params": {"stop_token_ids": [FACTS["vocab_size"]]}},
        "sampling_params.stop_token_ids",
        "vocabulary ends",
    ),
    ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n", "in [1,"),
    (
        {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
        "sampling_params",
        "the same for all",
    ),
    ({"text": "a", "rid": ""}, "rid", "1 to 128"),
    ({"text": "a", "rid": ["x"]}, "rid", "one per prompt"),
    ({"text": ["a", "b"], "rid": ["x"]}, "rid", "one per prompt"),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid", "different"),
    ({"text": "a", "lora_path": "x"}, "lora_path", "adapters"),
    ({"text": "a", "image_data": ["x"]}, "image_data", "text alone"),
    ({"text": "a", "return_hidden_states": True}, "return_hidden_states", "not kept"),
    ({"text": "a", "return_logprob": [True]}, "return_logprob", "one per prompt"),
    ({"text": "a", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num", "[0, 20]"),
    (
        {"text": "a", "return_logprob": True, "logprob_start_len": 50},
        "logprob_start_len",
        "at most the prompt's length",
    ),
    ({"text": "a", "token_ids_logprob": [[1], [2]]}, "token_ids_logprob", "token ids"),
    ({"text": "a", "token_ids_logprob": [-1]}, "token_ids_logprob", "token ids in"),
]


@pytest.fixture(scope="module")
def shared(module_serve):
    return module_serve()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("body", "param", "words"), TABLE)
def test_what_cannot_be_done_is_one_error_that_names_the_field(shared, body, param, words, streams):
    status, headers, data = request(shared, "POST", GENERATE, {**body, "stream": streams})
    error = json.loads(data)
    assert (status, headers["content-type"]) == (400, "application/json")
    assert error["error"]["param"] == param
    assert words in error["error"]["message"]
    assert (error["object"], error["code"]) == ("error", 400)
    assert not shared.engine.added


def test_a_batch_that_does_not_fit_the_queue_is_refused_as_a_whole(serve):
    server = serve(max_queued_requests=3)
    status, headers, _ = request(
        server, "POST", GENERATE, {"text": ["a", "b"], "sampling_params": {"n": 2}}
    )
    assert (status, headers["retry-after"]) == (503, "1")
    assert not server.engine.added
    assert len(post(server, text=["a", "b", "c"])) == 3


def test_long_prompts_of_a_batch_are_encoded_off_the_loop(server, tokenizer):
    texts = ["Some words, again and again. " * 100 + str(i) for i in range(3)]
    post(server, text=texts, sampling_params={"max_new_tokens": 1})
    assert [sent.prompt for sent in server.engine.added] == [
        tokenizer.encode_prompt(text) for text in texts
    ]
