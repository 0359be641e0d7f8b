"""Each API's own client against the whole server with a real model."""

import anthropic
import ollama
import openai

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MODEL = "smollm2"


def test_openai(smollm2):
    client = openai.OpenAI(base_url=f"{smollm2}/v1", api_key="none", max_retries=0)
    fields = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    assert "Paris" in whole
    with client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == whole
    response = client.responses.create(
        model=MODEL, input=QUESTION, temperature=0, max_output_tokens=24
    )
    assert response.output_text == whole
    assert client.models.list().data[0].id == MODEL
    client.close()


def test_anthropic(smollm2):
    client = anthropic.Anthropic(base_url=smollm2, api_key="none", max_retries=0)
    fields = {"model": MODEL, "messages": QUESTION, "max_tokens": 24}
    greedy = {"temperature": 0}
    message = client.messages.create(**fields, extra_body=greedy)
    assert "Paris" in message.content[0].text
    with client.messages.stream(**fields, extra_body=greedy) as stream:
        assert stream.get_final_text() == message.content[0].text
    assert client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens > 10
    client.close()


def test_ollama(smollm2):
    client = ollama.Client(host=smollm2)
    fields = {
        "model": MODEL,
        "messages": QUESTION,
        "options": {"temperature": 0, "num_predict": 24},
    }
    whole = client.chat(**fields).message.content
    assert "Paris" in whole
    assert "".join(part.message.content for part in client.chat(**fields, stream=True)) == whole
    prompt = {"prompt": QUESTION[0]["content"], "options": fields["options"]}
    assert client.generate(model=MODEL, **prompt).response == whole
    client._client.close()
