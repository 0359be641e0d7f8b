"""LLM: the engine in this process, for scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import minisgl_fast
from minisgl_fast.errors import ConfigError, ContextLengthError, EngineError, RequestError
from minisgl_fast.llm import LLM, Output, longest_first
from minisgl_fast.params import SamplingParams

END = "<|im_end|>"


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    llm = LLM(
        str(tiny_model),
        device="cpu",
        dtype="float32",
        num_threads=1,
        num_pages=64,
        max_model_len=256,
    )
    yield llm
    assert not llm._engine.has_work
    llm._engine.check()
    llm.close()


@pytest.fixture(autouse=True)
def fresh(llm: LLM) -> None:
    llm._engine.flush_cache()


def spell(llm: LLM, text: str) -> dict[int, float]:
    """A bias under which only the ids of this text are left."""
    return dict.fromkeys(llm.tokenizer.encode(text), 100.0)


def test_the_package_offers_it_by_name() -> None:
    assert minisgl_fast.LLM is LLM
    assert minisgl_fast.SamplingParams is SamplingParams


def test_one_text_one_list_of_ids_or_many_of_both(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    ids = llm.tokenizer.encode("Hello")
    by_text = llm.generate("Hello", params)
    by_ids = llm.generate(ids, params)
    first, second = llm.generate(["Hello", ids], params)
    assert [len(by_text), len(by_ids)] == [1, 1]
    for output in (*by_text, *by_ids, first, second):
        assert isinstance(output, Output)
        assert output.prompt_ids == ids
        assert output.token_ids == by_text[0].token_ids
        assert len(output.token_ids) == 12
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert output.finish_reason == "length"
    assert llm.generate([], params) == []


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"Prompt {index} {'x' * (7 * index % 40)}" for index in range(20)]
    params = SamplingParams(max_tokens=9, temperature=0.0)
    together = llm.generate(prompts, params)
    assert [llm.tokenizer.decode(output.prompt_ids) for output in together] == prompts
    for prompt, output in zip(prompts, together, strict=True):
        assert llm.generate(prompt, params)[0].token_ids == output.token_ids


def test_each_prompt_may_have_params_of_its_own(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=length, temperature=2.0, seed=-length, ignore_eos=True)
        for length in (3, 20, 7)
    ]
    prompts = ["alpha", "beta gamma", "delta"]
    outputs = llm.generate(prompts, params)
    assert [len(output.token_ids) for output in outputs] == [3, 20, 7]
    alone = [llm.generate(prompt, [own])[0] for prompt, own in zip(prompts, params, strict=True)]
    assert [output.text for output in outputs] == [output.text for output in alone]


def test_params_that_are_not_one_a_prompt_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="There are 2 prompts and 1 params") as caught:
        llm.generate(["a", "b"], [SamplingParams(max_tokens=4)])
    assert caught.value.param == "params"
    assert not llm._engine.has_work


def test_the_longest_answer_is_added_first(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert longest_first([3, 9, 3, 12]) == [3, 1, 0, 2]
    added = []
    add = llm._add

    def spy(prompt: list[int], params: SamplingParams, max_tokens: int) -> int:
        added.append(max_tokens)
        return add(prompt, params, max_tokens)

    monkeypatch.setattr(llm, "_add", spy)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 5, 4)]
    llm.generate(["one", "two", "three"], params)
    assert added == [5, 4, 2]


def test_a_seed_repeats_and_differs_from_prompt_to_prompt(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=2.0, seed=2**64 - 1, ignore_eos=True)
    first, second = llm.generate(["same", "same"], params)
    assert first.token_ids != second.token_ids
    assert [o.token_ids for o in llm.generate(["same", "same"], params)] == [
        first.token_ids,
        second.token_ids,
    ]
    zero = SamplingParams(max_tokens=16, temperature=2.0, seed=0, ignore_eos=True)
    assert llm.generate("same", zero)[0].token_ids == second.token_ids
    unseeded = SamplingParams(max_tokens=16, temperature=2.0, ignore_eos=True)
    once, twice = (llm.generate("same", unseeded)[0].token_ids for _ in range(2))
    assert once != twice


def test_without_max_tokens_the_context_fills(llm: LLM) -> None:
    (output,) = llm.generate([5] * 200, SamplingParams(ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (56, "length")
    (output,) = llm.generate([5] * 250, SamplingParams(max_tokens=100, ignore_eos=True))
    assert len(output.token_ids) == 6


def test_cached_tokens_are_told(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1)
    assert llm.generate([7] * 40, params)[0].num_cached == 0
    assert llm.generate([7] * 40, params)[0].num_cached == 32


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_several_tokens_ends_the_text(llm: LLM, include: bool) -> None:
    free = SamplingParams(
        max_tokens=60, temperature=1.0, seed=3, logit_bias=spell(llm, "abc"), ignore_eos=True
    )
    (whole,) = llm.generate("x", free)
    assert set(whole.text) == set("abc")
    stop = whole.text[20:24]
    end = whole.text.index(stop)
    limited = SamplingParams(
        max_tokens=60,
        temperature=1.0,
        seed=3,
        logit_bias=free.logit_bias,
        ignore_eos=True,
        stop=("no such text", stop),
        include_stop_str_in_output=include,
    )
    (output,) = llm.generate("x", limited)
    assert output.text == whole.text[: end + (4 if include else 0)]
    assert output.token_ids == whole.token_ids[: end + 4]
    assert output.finish_reason == "stop"
    # A stop string that the last token completes, and one that it leaves incomplete.
    for num_tokens, text in ((end + 4, output.text), (end + 3, whole.text[: end + 3])):
        (output,) = llm.generate(
            "x",
            SamplingParams(
                max_tokens=num_tokens,
                temperature=1.0,
                seed=3,
                logit_bias=free.logit_bias,
                ignore_eos=True,
                stop=(stop,),
                include_stop_str_in_output=include,
            ),
        )
        assert output.text == text
        assert output.finish_reason == ("stop" if num_tokens == end + 4 else "length")


@pytest.mark.parametrize(
    ("include", "skip_special", "text"), [(False, True, ""), (True, False, END), (True, True, "")]
)
def test_the_stopping_token_counts_and_is_shown_on_request(
    llm: LLM, include: bool, skip_special: bool, text: str
) -> None:
    (end,) = llm.tokenizer.encode(END)
    (output,) = llm.generate(
        "x",
        SamplingParams(
            temperature=0.0,
            logit_bias={end: 100.0},
            include_stop_str_in_output=include,
            skip_special_tokens=skip_special,
        ),
    )
    assert (output.token_ids, output.text, output.finish_reason) == ([end], text, "stop")


def test_a_stop_token_is_text_on_request(llm: LLM) -> None:
    (letter,) = llm.tokenizer.encode("z")
    for include in (False, True):
        params = SamplingParams(
            temperature=0.0,
            logit_bias={letter: 100.0},
            stop_token_ids=(letter,),
            include_stop_str_in_output=include,
        )
        (output,) = llm.generate("x", params)
        assert output.text == ("z" if include else "")
        assert (output.token_ids, output.finish_reason) == ([letter], "stop")


def test_half_a_character_at_the_end_is_shown_as_decode_shows_it(llm: LLM) -> None:
    first, *_ = llm.tokenizer.encode("é")
    params = SamplingParams(max_tokens=3, temperature=0.0, logit_bias={first: 100.0})
    (output,) = llm.generate("x", params)
    assert output.text == llm.tokenizer.decode([first] * 3) == "\ufffd" * 3


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], [320]], "Prompts must hold token ids in [0, 319]."),
        ([-1], "Prompts must hold token ids in [0, 319]."),
        ([[1], []], "A prompt must not be empty."),
        ("", "A prompt must not be empty."),
        (["a", "b" * 256], "This model's maximum context length is 256 tokens."),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(
    llm: LLM, prompts: list[list[int]], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts)
    assert caught.value.message.startswith(message)
    assert caught.value.param == "prompts"
    assert isinstance(caught.value, ContextLengthError) == ("maximum" in message)
    assert not llm._engine.has_work


def test_broken_logits_end_the_call_and_leave_nothing_running(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    (expected,) = llm.generate("fine", params)
    model = llm._engine._runner._model
    with monkeypatch.context() as patch:
        embeddings = model._embed_tokens.clone()
        embeddings[9] = float("nan")
        patch.setattr(model, "_embed_tokens", embeddings)
        with pytest.raises(EngineError, match="NaN"):
            llm.generate(["fine", [1, 9]], params)
    (again,) = llm.generate("fine", params)
    assert again.token_ids == expected.token_ids
    assert llm._engine.stats()["pages_used"] == 0


def test_an_interrupted_call_leaves_nothing_running(tiny_model: Path) -> None:
    """Ctrl-C in a notebook, and then the next cell."""
    calls = []

    def progress(stage: str, done: int, total: int) -> None:
        calls.append(stage)
        if calls.count("generate") == 3:
            raise KeyboardInterrupt

    llm = LLM(str(tiny_model), device="cpu", num_threads=1, num_pages=64, progress=progress)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one", "two"], params)
    (output,) = llm.generate("three", params)
    assert len(output.token_ids) == 20
    assert llm._engine.stats()["aborted"] == 2
    assert llm._engine.stats()["pages_used"] == 0
    llm.close()


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(str(tmp_path / "nowhere"), device="cpu")
    assert "\n" not in caught.value.message
