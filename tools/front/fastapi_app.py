"""FastAPI servers whose engine is a loop in their own process: what a framework's stream costs.

    python tools/front/fastapi_app.py SHAPE PORT_FILE CPU TICK_US

SHAPE is how an event is made: ``vllm`` builds pydantic models for each token and dumps them,
``sglang`` encodes msgspec Structs and decodes them to text. No hop to an engine, no template, no
tokens, no usage, no aborts: less than those servers do. With TICK_US 0 a stream gets its next token
when the last was taken.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

TEXT = " fox"


class Body(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[dict[str, Any]]
    max_tokens: int = 16
    stream: bool = False


class Delta(BaseModel):
    role: str | None = None
    content: str | None = None


class Choice(BaseModel):
    index: int
    delta: Delta
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]


class DeltaStruct(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChoiceStruct(msgspec.Struct):
    index: int
    delta: DeltaStruct
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChunkStruct(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceStruct]


_encoder = msgspec.json.Encoder()


def vllm_event(identity: str, created: int) -> str:
    delta = Delta(content=TEXT)
    choice = Choice(index=0, delta=delta, logprobs=None, finish_reason=None)
    chunk = Chunk(
        id=identity,
        object="chat.completion.chunk",
        created=created,
        model="fake",
        choices=[choice],
    )
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def sglang_event(identity: str, created: int) -> str:
    choice = ChoiceStruct(0, DeltaStruct(content=TEXT))
    chunk = ChunkStruct(identity, "chat.completion.chunk", created, "fake", [choice])
    return (b"data: " + _encoder.encode(chunk) + b"\n\n").decode()


EVENTS: dict[str, Callable[[str, int], str]] = {"vllm": vllm_event, "sglang": sglang_event}


def make_app(make_event: Callable[[str, int], str], tick_s: float) -> FastAPI:
    app = FastAPI()

    async def events(num_tokens: int) -> AsyncIterator[str]:
        created = int(time.time())
        due = time.perf_counter()
        for _ in range(num_tokens):
            due += tick_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()) if tick_s else 0)
            yield make_event("chatcmpl-req-0123456789ab-1f", created)
        yield "data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def chat(body: Body) -> StreamingResponse:
        return StreamingResponse(events(body.max_tokens), media_type="text/event-stream")

    return app


def main() -> None:
    shape, port_file, cpu, tick_us = sys.argv[1:]
    os.sched_setaffinity(0, {int(cpu)})
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    Path(port_file).write_text(f"{listener.getsockname()[1]}\n")
    app = make_app(EVENTS[shape], int(tick_us) / 1e6)
    settings = uvicorn.Config(app, log_level="error", loop="uvloop", http="httptools")
    uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    main()
