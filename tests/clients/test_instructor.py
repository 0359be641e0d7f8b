"""instructor: models out of a server's answers, by tools and by structured output."""

import instructor
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

JOKE = [{"role": "user", "content": "Tell me a joke about cats."}]
PERSON = [{"role": "user", "content": "Ann is 34 years old. Who is it?"}]


class Joke(BaseModel):
    setup: str
    punchline: str


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


class Closed(Person):
    """With no more properties, of which a random model would never have enough."""

    model_config = ConfigDict(extra="forbid")


def patched(url, mode):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return instructor.from_openai(client, mode=mode)


@pytest.mark.parametrize(
    "mode",
    [
        instructor.Mode.TOOLS,
        instructor.Mode.JSON,
        instructor.Mode.JSON_SCHEMA,
        instructor.Mode.MD_JSON,
    ],
)
def test_a_model_is_read_from_the_answer(scripted, mode):
    joke = patched(scripted, mode).chat.completions.create(
        model="scripted", messages=JOKE, response_model=Joke, max_retries=0
    )
    assert joke.punchline == "To watch the mouse."


def about_ann(model, shape, **fields):
    """A request for what ``shape`` has of a person."""
    asked = {"max_retries": 0, "temperature": 0, "max_tokens": 200, **fields}
    return {"model": model, "messages": PERSON, "response_model": shape, **asked}


@pytest.mark.parametrize(
    ("mode", "shape"), [(instructor.Mode.JSON_SCHEMA, Person), (instructor.Mode.TOOLS, Closed)]
)
def test_a_small_model_is_bound(smollm2, mode, shape):
    person = patched(smollm2, mode).chat.completions.create(**about_ann("smollm2", shape))
    assert isinstance(person, shape)


def test_a_model_comes_piece_by_piece(smollm2):
    client = patched(smollm2, instructor.Mode.JSON_SCHEMA)
    *_, last = client.chat.completions.create_partial(**about_ann("smollm2", Person))
    assert Person.model_validate(last.model_dump())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_a_random_model_is_bound_just_as_well(tiny, mode, seed):
    asked = about_ann("tiny", Closed, temperature=1.5, max_tokens=1000, seed=seed)
    person = patched(tiny, mode).chat.completions.create(**asked)
    assert 0 <= person.age <= 150 and len(person.name) <= 20
