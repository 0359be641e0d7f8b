"""The link to the engine: frames out, room and lengths, what its end does to open choices."""

import json

import pytest
from fake_engine import FACTS, unpack_add
from recording import RecordingExchange, RecordingResponse

from minisgl_fast.config import Config
from minisgl_fast.errors import ContextLengthError, EngineError, OverloadedError, RequestError
from minisgl_fast.params import SamplingParams
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.response import Choice
from minisgl_fast.wire import AddTemplate, FrameKind


class RecordingChannel:
    def __init__(self):
        self.sent = []

    def send(self, kind, payload):
        self.sent.append((kind, payload))

    def close(self):
        self.sent.append("close")


@pytest.fixture
def frontend(tokenizer, template):
    frontend = Frontend(Config(model="m", max_queued_requests=2), tokenizer, template)
    frontend.channel = RecordingChannel()
    frontend.connect(frontend.channel)
    frontend.on_frame(FrameKind.READY, json.dumps(FACTS).encode())
    return frontend


def choice_of(tokenizer):
    response = RecordingResponse(RecordingExchange())
    return Choice(response, 0, tokenizer.stream(), b"", b"", False, 0.0)


def test_submit_sends_add_and_abort_sends_abort_once(frontend, tokenizer):
    choice = choice_of(tokenizer)
    rid = frontend.submit(
        choice, [1, 2], AddTemplate(SamplingParams()), seed=2**64 - 1, max_tokens=9
    )
    (kind, payload) = frontend.channel.sent.pop()
    sent = unpack_add(payload)
    assert kind == FrameKind.ADD
    assert (sent.rid, sent.prompt, sent.seed, sent.max_tokens) == (rid, [1, 2], 2**64 - 1, 9)
    assert frontend.abort(choice) is True
    assert frontend.channel.sent == [(FrameKind.ABORT, rid.to_bytes(4, "little"))]
    assert frontend.abort(choice) is False
    assert len(frontend.channel.sent) == 1


def test_room_is_bounded_by_open_choices(frontend, tokenizer):
    frontend.check_room(2)
    with pytest.raises(OverloadedError):
        frontend.check_room(3)
    choice = choice_of(tokenizer)
    frontend.submit(choice, [1], AddTemplate(SamplingParams()), seed=0, max_tokens=1)
    with pytest.raises(OverloadedError):
        frontend.check_room(2)
    frontend.abort(choice)
    frontend.check_room(2)


def test_lengths_at_their_edges(frontend):
    limit = FACTS["max_model_len"]
    assert frontend.room_for([5], None, param="prompt") == limit - 1
    assert frontend.room_for([5] * (limit - 1), 1, param="prompt") == 1
    assert frontend.room_for([5] * 10, limit - 10, param="prompt") == limit - 10
    for prompt, max_tokens, param in (
        ([5] * limit, None, "prompt"),
        ([5] * (limit - 1), 2, "max_tokens"),
        ([5] * 10, limit - 9, "max_tokens"),
    ):
        with pytest.raises(ContextLengthError) as caught:
            frontend.room_for(prompt, max_tokens, param="prompt")
        assert caught.value.param == param
        assert f"maximum context length is {limit} tokens" in caught.value.message
    with pytest.raises(RequestError):
        frontend.room_for([], None, param="prompt")


def test_the_engines_end_fails_open_choices_once_and_refuses_new_ones(frontend, tokenizer):
    choice = choice_of(tokenizer)
    frontend.submit(choice, [1], AddTemplate(SamplingParams()), seed=0, max_tokens=1)
    frontend.on_close("out of memory at /secret/path")
    frontend.on_close()
    (error,) = choice.response.log
    assert isinstance(error, EngineError)
    assert "secret" not in error.message
    with pytest.raises(EngineError):
        frontend.check_ready()


def test_closing_on_purpose_is_no_failure(frontend):
    frontend.close()
    frontend.on_close()
    assert frontend.state == "closed"
    assert frontend.channel.sent[-1] == "close"
    with pytest.raises(OverloadedError):
        frontend.check_ready()
