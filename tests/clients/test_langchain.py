"""langchain-tests' integration tests of chat models, for ChatOpenAI before this server.

What a model would have to know or want to do, the scripted engine does; the tests are about
shapes: messages, streams, tool calls, structured output, usage.
"""

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import BaseModel, ConfigDict, Field


class _Chat(ChatModelIntegrationTests):
    responses_api = False

    @pytest.fixture(autouse=True)
    def _server(self, scripted):
        type(self).url = scripted

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "base_url": f"{self.url}/v1",
            "api_key": "none",
            "model": "scripted",
            "max_retries": 0,
            "temperature": 0,
            "stream_usage": True,
            "use_responses_api": self.responses_api,
        }

    @property
    def supports_image_inputs(self):
        return False

    @property
    def supports_model_override(self):
        return False  # one model is served


class TestChatCompletions(_Chat):
    @property
    def supports_json_mode(self):
        return True


class TestResponses(_Chat):
    responses_api = True


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)
    tags: list[bool] = Field(max_length=3)


def random_chat(url, seed, responses_api):
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="tiny", max_retries=0, temperature=1.5,
        max_tokens=1000, use_responses_api=responses_api, extra_body={"seed": seed},
    )  # fmt: skip


@pytest.mark.parametrize("responses_api", [False, True])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_random_model_answers_in_the_form_that_is_asked_for(tiny, method, responses_api):
    chat = random_chat(tiny, 0, responses_api)
    person = chat.with_structured_output(Person, method=method).invoke("Who is it?")
    assert isinstance(person, Person)


@pytest.mark.parametrize("responses_api", [False, True])
def test_a_random_model_calls_a_tool_when_it_must(tiny, responses_api):
    chat = random_chat(tiny, 5, responses_api).bind_tools([Person], tool_choice="any")
    for answer in (chat.invoke("Who?"), sum_of(chat.stream("Who?"))):
        assert answer.tool_calls
        for call in answer.tool_calls:
            assert call["name"] == "Person"
            Person.model_validate(call["args"], strict=True)


def sum_of(chunks):
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first
