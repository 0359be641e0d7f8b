"""``/v1/embeddings`` and ``/v1/score`` over HTTP and a fake engine."""

from __future__ import annotations

import base64
import math
import struct

import httpx2 as httpx
import pytest
from fake_engine import embedding_of, logprob_of
from openai import OpenAI

from minisgl_fast.wire import Task


@pytest.fixture(scope="module")
def server(module_serve):
    return module_serve()


@pytest.fixture
def post(server):
    def send(path, **body):
        return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=30)

    return send


def unit(vector):
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector]


def vectors(response):
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["object"] == "list"
    assert [one["index"] for one in body["data"]] == list(range(len(body["data"])))
    assert {one["object"] for one in body["data"]} == {"embedding"}
    return [one["embedding"] for one in body["data"]]


def test_texts_and_token_ids_are_embedded_in_order(server, post):
    encode = server.frontend.tokenizer.encode
    texts = ["One", "Two and two", "Ünïcödé 🥐"]
    expected = [unit(embedding_of(encode(text))) for text in texts]
    for given in (texts, [encode(text) for text in texts]):
        response = post("embeddings", input=given)
        for found, vector in zip(vectors(response), expected, strict=True):
            assert found == pytest.approx(vector)
        num_tokens = sum(len(encode(text)) for text in texts)
        assert response.json()["usage"] == {
            "prompt_tokens": num_tokens,
            "total_tokens": num_tokens,
        }
        assert [one.task for one in server.engine.added[-3:]] == [Task.EMBED_LAST] * 3
    for given in (texts[1], encode(texts[1])):
        assert vectors(post("embeddings", input=given)) == [pytest.approx(expected[1])]


def test_fields_choose_pooling_length_and_scale(server, post):
    ids = server.frontend.tokenizer.encode("Some text")
    whole = embedding_of(ids)
    (found,) = vectors(post("embeddings", input=ids, pooling="mean", normalize=False))
    assert found == whole and server.engine.added[-1].task == Task.EMBED_MEAN
    (found,) = vectors(post("embeddings", input=ids, dimensions=3))
    assert found == pytest.approx(unit(whole[:3]))
    (found,) = vectors(post("embeddings", input=ids, encoding_format="base64", normalize=False))
    assert list(struct.unpack("<8f", base64.b64decode(found))) == whole


def test_the_sdk_reads_both_encodings(server):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    ids = server.frontend.tokenizer.encode("Some text")
    answer = client.embeddings.create(
        model="default", input="Some text", encoding_format="float", dimensions=5
    )
    assert answer.data[0].embedding == pytest.approx(unit(embedding_of(ids)[:5]))
    assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["a", 1]}, 400, "input"),
        ({"input": ["a"] * 1025}, 400, "input"),
        ({"input": [-1]}, 400, "input"),
        ({"input": [[200000]]}, 400, "input"),
        ({"input": [1] * 5000}, 400, "input"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions"),
        ({"input": "a", "dimensions": 9}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "pooling": "max"}, 400, "pooling"),
        ({"input": "a", "model": "other"}, 404, "model"),
    ],
)
def test_embedding_fields_out_of_range_are_refused(server, post, body, status, param):
    num_added = len(server.engine.added)
    response = post("embeddings", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert len(server.engine.added) == num_added


# Scores

LABELS = [7, 9000, 7]


@pytest.mark.parametrize("item_first", [False, True])
def test_scores_are_the_labels_probabilities_behind_each_item(server, post, item_first):
    query, items = "Is this good? ", ["Yes it is. ", "No, never. "]
    encode = server.frontend.tokenizer.encode
    texts = [item + query if item_first else query + item for item in items]
    response = post(
        "score", query=query, items=items, label_token_ids=LABELS, item_first=item_first
    )
    assert response.status_code == 200, response.text
    body = response.json()
    expected = [
        [math.exp(logprob_of(len(encode(text)), label)) for label in LABELS] for text in texts
    ]
    assert body["object"] == "scoring" and body["scores"] == [pytest.approx(e) for e in expected]
    assert [one.prompt for one in server.engine.added[-2:]] == [encode(text) for text in texts]
    assert {one.max_tokens for one in server.engine.added[-2:]} == {1}
    num_tokens = sum(len(encode(text)) for text in texts)
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_with_softmax_the_labels_share_one(post):
    response = post(
        "score", query=[1, 2], items=[[3], [4, 5]], label_token_ids=LABELS, apply_softmax=True
    )
    for found, position in zip(response.json()["scores"], (3, 4), strict=True):
        weights = [math.exp(logprob_of(position, label)) for label in LABELS]
        assert found == pytest.approx([weight / sum(weights) for weight in weights])
        assert sum(found) == pytest.approx(1)


def test_one_item_may_stand_alone(post):
    scores = post("score", query="a", items="b", label_token_ids=[1]).json()["scores"]
    assert len(scores) == 1 and len(scores[0]) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"items": []}, "items"),
        ({"items": ["a"] * 1025}, "items"),
        ({"items": ["a", [1]]}, "items"),
        ({"query": [1]}, "items"),
        ({"query": [200000], "items": [[1]]}, "items"),
        ({"label_token_ids": []}, "label_token_ids"),
        ({"label_token_ids": None}, "label_token_ids"),
        ({"label_token_ids": [-1]}, "label_token_ids"),
        ({"label_token_ids": [151936]}, "label_token_ids"),
        ({"label_token_ids": [1] * 1025}, "label_token_ids"),
        ({"query": "a" * 50000}, "items"),
    ],
)
def test_score_fields_out_of_range_are_refused(server, post, fields, param):
    num_added = len(server.engine.added)
    body = {"query": "a", "items": ["b"], "label_token_ids": [1], **fields}
    response = post("score", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert len(server.engine.added) == num_added
