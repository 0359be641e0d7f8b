"""What tests of chat answers share: the openai SDK's answers, whole and streamed, in one form."""

import re

from fake_engine import MODEL

MESSAGES = [{"role": "user", "content": "What is the weather?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather 天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def whole(client, **fields):
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **fields)


def joined(stream, index=0):
    """One choice of a stream as a message, with its finish reasons."""
    message = {"content": None, "reasoning_content": None, "tool_calls": []}
    reasons = []
    for chunk in stream:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            for key in ("content", "reasoning_content"):
                text = getattr(choice.delta, key, None)
                if text:
                    message[key] = (message[key] or "") + text
            for call in choice.delta.tool_calls or []:
                if call.index == len(message["tool_calls"]):
                    assert call.type == "function"
                    assert re.fullmatch("call_[0-9a-f]{24}", call.id)
                    assert call.function.arguments == ""
                    message["tool_calls"].append([call.function.name, ""])
                else:
                    assert (call.id, call.type, call.function.name) == (None, None, None)
                    message["tool_calls"][call.index][1] += call.function.arguments
            if choice.finish_reason:
                reasons.append(choice.finish_reason)
    return message, reasons


def parts(message):
    calls = [[call.function.name, call.function.arguments] for call in message.tool_calls or []]
    return {
        "content": message.content or None,
        "reasoning_content": getattr(message, "reasoning_content", None),
        "tool_calls": calls,
    }
