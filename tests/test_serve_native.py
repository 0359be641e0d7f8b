"""SGLang's native routes on the real engine: scores, log-probabilities, cache, abort."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server_process import ServerProcess, eventually, serving
from tiny_folder import make_tiny_model

PROMPT = [*range(3, 53)]
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = make_tiny_model(tmp_path_factory.mktemp("native") / "model")
    with serving("--model", model, "--served-model-name", "tiny", "--num-pages", 256) as server:
        yield server


def ask(server: ServerProcess, path: str = "/generate", **body: Any) -> Any:
    status, _, answer = server.request("POST", path, body)
    assert status == 200, answer
    return answer


def flush(server: ServerProcess) -> None:
    status, _, text = server.request("POST", "/flush_cache?timeout=30")
    assert status == 200, text


def values(entries: list[Any]) -> list[float]:
    return [entry[0] for entry in entries]


def test_log_probabilities_are_those_of_completions_cold_and_cached(server: ServerProcess) -> None:
    oracle = ask(
        server,
        "/v1/completions",
        prompt=PROMPT,
        max_tokens=6,
        temperature=0,
        ignore_eos=True,
        logprobs=2,
        echo=True,
        return_token_ids=True,
    )["choices"][0]
    expected = oracle["logprobs"]["token_logprobs"]
    for is_cached in (False, True):
        if not is_cached:
            flush(server)
        for start in (0, 1, 17, 49, 50):
            answer = ask(
                server,
                input_ids=PROMPT,
                sampling_params=GREEDY,
                return_logprob=True,
                logprob_start_len=start,
                top_logprobs_num=2,
                token_ids_logprob=[5, 9],
            )
            meta = answer["meta_info"]
            found = meta["input_token_logprobs"]
            assert meta["prompt_tokens"] == start + len(found)
            assert [entry[1] for entry in found] == PROMPT[start:]
            if found:
                assert found[0] == [None, PROMPT[start], None]
                assert meta["input_top_logprobs"][0] is None
                assert meta["input_token_ids_logprobs"][0] is None
            assert values(found[1:]) == pytest.approx(expected[start + 1 : 50], abs=1e-4)
            out = meta["output_token_logprobs"]
            assert [entry[1] for entry in out] == answer["output_ids"]
            assert values(out) == pytest.approx(expected[50:], abs=1e-4)
            assert len(out) == meta["completion_tokens"] == 6
            for entry, top, ids in zip(
                out, meta["output_top_logprobs"], meta["output_token_ids_logprobs"], strict=True
            ):
                assert len(top) == 2
                assert top[0] == entry  # greedy
                assert [one[1] for one in ids] == [5, 9]


def test_a_prompt_is_scored_without_a_token_being_generated(server: ServerProcess) -> None:
    params = {"max_new_tokens": 0}
    answer = ask(
        server,
        input_ids=PROMPT,
        sampling_params=params,
        return_logprob=True,
        logprob_start_len=0,
        return_text_in_logprobs=True,
    )
    meta = answer["meta_info"]
    assert (answer["text"], answer["output_ids"], meta["completion_tokens"]) == ("", [], 0)
    assert meta["output_token_logprobs"] == []
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert len(meta["input_token_logprobs"]) == 50
    assert all(isinstance(entry[2], str) for entry in meta["input_token_logprobs"])


def test_no_tokens_at_all_still_warm_the_cache(server: ServerProcess) -> None:
    flush(server)
    params = {"max_new_tokens": 0}
    first, second = (ask(server, input_ids=PROMPT, sampling_params=params) for _ in range(2))
    assert (first["meta_info"]["cached_tokens"], second["meta_info"]["cached_tokens"]) == (0, 48)
    assert second["meta_info"]["prompt_tokens"] == 50
    flush(server)
    third = ask(server, input_ids=PROMPT, sampling_params=params)
    assert third["meta_info"]["cached_tokens"] == 0


def test_log_probabilities_in_a_stream_add_up(server: ServerProcess) -> None:
    body = {
        "input_ids": [PROMPT, PROMPT[:20]],
        "sampling_params": GREEDY,
        "return_logprob": True,
        "logprob_start_len": [0, -1],
        "top_logprobs_num": [1, 0],
    }
    whole = ask(server, **body)
    stream = server.open_stream("/generate", **body)
    stream.rest()
    *events, done = stream.events()
    stream.close()
    assert done == "[DONE]"
    for index in range(2):
        last = [event for event in events if event["index"] == index][-1]
        for meta in (last["meta_info"], whole[index]["meta_info"]):
            del meta["e2e_latency"], meta["id"], meta["cached_tokens"]
            for name, entries in list(meta.items()):
                if name.endswith("_logprobs"):
                    meta[name] = _rounded(entries)
        assert last == whole[index]
    assert whole[1]["meta_info"]["input_token_logprobs"] == []
    assert "output_top_logprobs" not in whole[1]["meta_info"]


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value


def test_a_stop_string_leaves_every_log_probability(server: ServerProcess) -> None:
    letters = ask(server, "/tokenize", prompt="abcdefgh")["tokens"]
    params = {"max_new_tokens": 20, "sampling_seed": 5, "logit_bias": dict.fromkeys(letters, 100)}
    free = ask(server, input_ids=PROMPT, sampling_params=params)
    stop = free["text"][5:7]
    answer = ask(
        server, input_ids=PROMPT, sampling_params={**params, "stop": stop}, return_logprob=True
    )
    meta = answer["meta_info"]
    assert answer["text"] == free["text"][: free["text"].index(stop)]
    assert meta["finish_reason"] == {"type": "stop", "matched": stop}
    assert len(meta["output_token_logprobs"]) == len(answer["output_ids"])
    assert len(answer["output_ids"]) == meta["completion_tokens"]


def test_everything_is_aborted_and_the_cache_can_be_flushed(server: ServerProcess) -> None:
    endless = {"max_new_tokens": 400, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        running = [
            pool.submit(ask, server, input_ids=[i + 5] * 9, sampling_params=endless)
            for i in range(8)
        ]
        eventually(lambda: server.metric("minisgl_generations_open") == 8)
        assert server.request("POST", "/abort_request", {"abort_all": True})[2]["num_aborted"] > 0
        reasons = {one.result()["meta_info"]["finish_reason"]["type"] for one in running}
    assert reasons <= {"abort", "length"} and "abort" in reasons
    flush(server)
    assert server.request("GET", "/health_generate")[0] == 200
    (load,) = server.request("GET", "/v1/loads")[2]["loads"]
    assert load["num_used_tokens"] == 0
    info = server.request("GET", "/model_info")[2]
    assert (info["model_type"], info["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
