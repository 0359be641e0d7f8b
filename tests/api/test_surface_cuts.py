"""A stream of any API, put together again, is its whole answer, whatever way the text was cut."""

import json
import random

import pytest

from minisgl_fast.api.chat_output import ChatOutput, OutputRules
from minisgl_fast.api.messages_format import MessagesFormat
from minisgl_fast.api.ollama_format import OllamaFormat
from minisgl_fast.api.openai_response import ChatFormat, Head
from minisgl_fast.api.response_format import Answer, Usage, json_escaped
from minisgl_fast.api.responses_format import ResponsesFormat
from minisgl_fast.parsers.plain import PlainParser
from minisgl_fast.parsers.select import Formats

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Zürich 🏔", "q": "\\"<\\""}}\n</tool_call>'
THOUGHT = "<think>\nLet me 想想 🤔 < 2\n</think>\n\n"
TEXTS = [
    "",
    'Sunny ☀️ "quoted" \\ and < more\n',
    CALL,
    f"{CALL}\n{CALL}",
    f"Sure 🙂.\n{CALL}",
    f"{THOUGHT}{CALL}",
    f"{THOUGHT}Sunny.",
    f"{THOUGHT}Grüezi <b> {CALL}\nBye.",
    CALL[:-18],
    THOUGHT[:20],
    "<tool_call>{no",
]
USAGE = Usage(10, 5, 4, 0)
FORMS = {
    "chat": lambda: ChatFormat(Head("r1", "m")),
    "responses": lambda: ResponsesFormat("r1", "m", {"store": False}),
    "messages": lambda: MessagesFormat("r1", "m", 100),
    "ollama": lambda: OllamaFormat("m", 0.0),
}


class Written:
    """What a session and its token loop make of the pieces of a text."""

    def __init__(self, form, pieces, streaming, parsed=True):
        parser = Formats("qwen3", "qwen25").parser("", TOOLS) if parsed else PlainParser()
        rules = OutputRules(reasoning=True, end_tokens=(1,))
        self.output = ChatOutput(form.writer(0), parser, rules, form.has_plain)
        self.is_parsed, self.lane = True, (b"", b"", b"")
        self.form, self.streaming = form, streaming
        *running, last = pieces
        self.data = b"".join(map(self.piece, running))
        answer = Answer(0, json_escaped(last), "stop", 7)
        if self.is_parsed:
            events = self.output.finish(last.encode())
            answer.text = b""
        else:
            events = b""
        if not streaming and self.is_parsed:
            answer.message = self.output.message()
        answer.finish_reason = self.output.finish_reason("stop")
        if streaming:
            self.data += events + form.closing(answer)
            self.data = form.opening(0, USAGE) + self.data + form.ending(USAGE)
        else:
            self.data = form.body([answer], USAGE)

    def piece(self, text):
        data = text.encode()
        if not self.is_parsed:
            return self.form.prefix(0) + json_escaped(text) + self.form.suffix(0) if text else b""
        before, after, watched = self.lane
        if not text or not self.streaming:
            return self.output.feed(data) if text else b""
        if watched and not set(watched) & set(data):
            return before + json_escaped(text) + after
        events = self.output.feed(data)
        self.is_parsed = not self.output.is_plain
        self.lane = self.output.lane()
        return events


def events_of(data):
    blocks = [block.rpartition(b"data: ")[2] for block in data.split(b"\n\n") if block]
    return [json.loads(block) for block in blocks if block != b"[DONE]"]


def chat(data, streaming):
    if not streaming:
        message = json.loads(data)["choices"][0]["message"]
        calls = [
            (c["function"]["name"], c["function"]["arguments"])
            for c in message.get("tool_calls", [])
        ]
        return message["content"] or "", message["reasoning_content"] or "", calls
    content, reasoning, calls = "", "", []
    for event in events_of(data):
        for choice in event["choices"]:
            content += choice["delta"].get("content") or ""
            reasoning += choice["delta"].get("reasoning_content") or ""
            for call in choice["delta"].get("tool_calls", []):
                function = call["function"]
                if "name" in function:
                    calls.append((function["name"], ""))
                calls[-1] = (calls[-1][0], calls[-1][1] + function["arguments"])
    return content, reasoning, calls


def responses(data, streaming):
    if streaming:
        events = events_of(data)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        texts = {}
        for event in events:
            if "delta" in event:
                place = event["output_index"]
                texts[place] = texts.get(place, "") + event["delta"]
            if event["type"].endswith(("text.done", "arguments.done")):
                done = event.get("text", event.get("arguments"))
                assert texts.get(event["output_index"], "") == done
        response = events[-1]["response"]
        items = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        assert response["output"] == items
    else:
        response = json.loads(data)
    for item in response["output"]:
        item.pop("call_id", None)
    return response["status"], response["output"]


def messages(data, streaming):
    if not streaming:
        message = json.loads(data)
        for block in message["content"]:
            block.pop("id", None)
        return message["stop_reason"], message["content"]
    blocks, raw, is_open = [], "", False
    for event in events_of(data):
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks) and not is_open
            blocks.append(event["content_block"])
            blocks[-1].pop("id", None)
            raw, is_open = "", True
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1 and is_open
            for key, value in event["delta"].items():
                if key == "partial_json":
                    raw += value
                elif key == "signature":
                    blocks[-1][key] = value
                elif key != "type":
                    blocks[-1][key] += value
        elif event["type"] == "content_block_stop":
            is_open = False
            if blocks[-1]["type"] == "tool_use":
                try:
                    blocks[-1]["input"] = json.loads(raw)
                except ValueError:
                    assert blocks[-1]["input"] == {}
        elif event["type"] == "message_delta":
            reason = event["delta"]["stop_reason"]
    assert not is_open
    return reason, blocks


def ollama(data, streaming):
    lines = [json.loads(line) for line in data.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    parts = [line["message"] for line in lines]
    calls = [call["function"] for part in parts for call in part.get("tool_calls", [])]
    texts = ["".join(part.get(key, "") for part in parts) for key in ("content", "thinking")]
    return *texts, calls


READERS = {"chat": chat, "responses": responses, "messages": messages, "ollama": ollama}


def cuts(text, name):
    generator = random.Random(f"{name} {text}")
    yield list(text) + [""]
    for at in range(len(text) + 1):
        yield [text[:at], text[at:]]
        yield [text[:at], text[at : at + 3], text[at + 3 :], ""]
    for _ in range(20):
        places = sorted(generator.choices(range(len(text) + 1), k=generator.randint(2, 9)))
        yield [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("parsed", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_every_cut_streams_the_whole_answer(name, parsed):
    read = READERS[name]
    for text in TEXTS:
        whole = read(Written(FORMS[name](), [text], False, parsed).data, False)
        for pieces in cuts(text, name):
            streamed = Written(FORMS[name](), pieces, True, parsed)
            assert read(streamed.data, True) == whole, pieces
            assert read(Written(FORMS[name](), pieces, False, parsed).data, False) == whole
