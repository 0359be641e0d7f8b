"""The openai SDK, as its users call it, against a whole frontend with a fake engine."""

import asyncio

import openai
import pytest
from fake_engine import ANSWER, MODEL, eventually

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def joined(stream, index=0):
    """The text, finish reasons and chunks of one choice of a chat stream."""
    chunks = list(stream)
    choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, [c.finish_reason for c in choices if c.finish_reason], chunks


def test_chat_answers_in_one_piece(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=0)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id
    choice = answer.choices[0]
    assert choice.message.content == "0. " + ANSWER
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.matched_stop == 151645
    usage = answer.usage
    assert usage.prompt_tokens_details.cached_tokens == 4
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens


def test_chat_streams_what_it_answers_in_one_piece(client):
    arguments = {"model": MODEL, "messages": MESSAGES, "seed": 3}
    whole = client.chat.completions.create(**arguments)
    text, reasons, chunks = joined(
        client.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
    )
    assert text == whole.choices[0].message.content
    assert reasons == ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "�" not in text
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_has_the_key(client):
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    assert all("usage" not in chunk.model_fields_set for chunk in stream)


def test_two_choices_interleave_and_differ_by_seed(client):
    arguments = {"model": MODEL, "messages": MESSAGES, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**arguments)
    assert [c.message.content for c in whole.choices] == ["5. " + ANSWER, "6. " + ANSWER]
    assert [c.index for c in whole.choices] == [0, 1]
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    for index in (0, 1):
        text, reasons, _ = joined(chunks, index)
        assert text == whole.choices[index].message.content
        assert reasons == ["stop"]
    indices = [c.index for chunk in chunks for c in chunk.choices]
    assert indices != sorted(indices)
    one = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=5)
    assert whole.usage.prompt_tokens == one.usage.prompt_tokens
    assert whole.usage.completion_tokens == 2 * one.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text_and_aborts_in_the_engine(server, client, stream):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=0, stop=["xyz", "is Paris"], stream=stream
    )
    if stream:
        text, reasons, chunks = joined(answer)
        last = chunks[-1].choices[0]
    else:
        last = answer.choices[0]
        text, reasons = last.message.content, [last.finish_reason]
    assert text == "0. The capital of France "
    assert reasons == ["stop"]
    assert last.matched_stop == "is Paris"
    eventually(lambda: server.engine.aborted == [server.engine.added[0].rid])


def test_usage_counts_up_to_the_token_that_completes_the_stop_string(client, tokenizer):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=0, stop=" Paris", max_tokens=100
    )
    expected = len(tokenizer.encode("0. ")) + len(
        tokenizer.encode("The capital of France is Paris")
    )
    assert answer.usage.completion_tokens == expected


def test_max_tokens_ends_with_length(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, **{name: 5})
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].matched_stop is None
        assert answer.usage.completion_tokens == 5


def test_completions_default_to_16_tokens_and_put_the_reason_on_the_last_text(client):
    whole = client.completions.create(model=MODEL, prompt="Say", seed=0)
    assert whole.object == "text_completion"
    assert whole.usage.completion_tokens == 16
    chunks = list(client.completions.create(model=MODEL, prompt="Say", seed=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [
        chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason
    ] == ["length"]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.object for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_times_n_choices_are_numbered_prompt_first(server, client, stream):
    answer = client.completions.create(
        model=MODEL, prompt=["One", "Two two"], n=2, seed=7, echo=True, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    texts = ["", "", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [text[:10] for text in texts] == ["One7. The ", "One8. The ", "Two two7. ", "Two two8. "]
    assert [r.seed for r in server.engine.added] == [7, 8, 7, 8]


def test_echo_with_no_tokens_gives_the_prompt_alone(server, client):
    for stream in (False, True):
        answer = client.completions.create(
            model=MODEL, prompt='Say "hi"\n', max_tokens=0, echo=True, stream=stream
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == 'Say "hi"\n'
        assert chunks[-1].choices[0].finish_reason == "length"
    assert not server.engine.added


@pytest.mark.parametrize(
    "prompt", [[785, 6722], [[785, 6722], [785]], "The capital", ["The capital"]]
)
def test_prompts_may_be_texts_or_token_ids(server, client, tokenizer, prompt):
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, echo=True)
    sent = [request.prompt for request in server.engine.added]
    if isinstance(prompt[0], int):
        assert sent == [prompt]
    elif isinstance(prompt[0], list):
        assert sent == prompt
    else:
        assert sent == [[785, 6722]]
    assert answer.choices[0].text.startswith("The capital")


def test_the_async_client_streams_many_answers_at_once(server):
    async def ask(client, seed):
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, seed=seed, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=1)
            assert whole.choices[0].message.content == "1. " + ANSWER
            return await asyncio.gather(*(ask(client, seed) for seed in range(10)))

    assert asyncio.run(main()) == [f"{seed}. {ANSWER}" for seed in range(10)]


def test_models_are_listed_and_retrieved_by_an_id_with_a_slash(client):
    (card,) = client.models.list().data
    assert (card.id, card.owned_by, card.root, card.max_model_len) == (
        MODEL,
        "mini-sglang",
        MODEL,
        4096,
    )
    assert client.models.retrieve(MODEL) == card
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_errors_are_the_sdk_exceptions(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1, stream=True)
    assert bad.value.param == "temperature"
