"""Fixtures: a whole frontend on a free port, before a fake engine, in a thread of its own."""

import asyncio
import gzip
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import uvloop
from fake_engine import ANSWER, EOS, MODEL, FakeEngine

from minisgl_fast.api.app import Api
from minisgl_fast.config import Config
from minisgl_fast.frontend_channel import FrontendChannel
from minisgl_fast.server.access import Access
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.http import HttpServer
from minisgl_fast.server.http_rules import HttpLimits
from minisgl_fast.server.tls import server_context
from minisgl_fast.text.template import ChatTemplate
from minisgl_fast.text.tokenizer import Tokenizer

QWEN3 = Path(__file__).parent / "data" / "qwen3-tokenizer"
DEFAULTS = SimpleNamespace(
    temperature=0.6, top_p=0.95, top_k=20, min_p=None, repetition_penalty=None
)


@dataclass
class ApiServer:
    """What a test talks to; ``call`` runs a function on the server's loop."""

    url: str
    port: int
    frontend: Frontend
    engine: FakeEngine
    api: Api
    http: HttpServer
    loop: asyncio.AbstractEventLoop

    def call(self, function, *arguments):
        async def run():
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    text = gzip.decompress((QWEN3 / "tokenizer.json.gz").read_bytes())
    (folder / "tokenizer.json").write_bytes(text)
    (folder / "tokenizer_config.json").write_bytes((QWEN3 / "tokenizer_config.json").read_bytes())
    return folder


@pytest.fixture(scope="session")
def tokenizer(qwen3_folder):
    tokenizer = Tokenizer.load(qwen3_folder)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="session")
def template(qwen3_folder):
    return ChatTemplate.load(qwen3_folder)


@contextmanager
def servers(tokenizer, template):
    """Gives a function that starts servers: start(ready=True, **config fields) -> ApiServer."""
    started = []

    def start(*, ready=True, **settings):
        config = replace(Config(model=MODEL), **settings)
        answer = tokenizer.encode(ANSWER)

        def script(request):
            # Choices differ by their seed's last digit, visibly and predictably.
            return [*tokenizer.encode(f"{request.seed % 10}. "), *answer, EOS]

        server, stop = _run(config, tokenizer, template, FakeEngine(script), ready)
        started.append(stop)
        return server

    yield start
    for stop in started:
        stop()


@pytest.fixture
def serve(tokenizer, template):
    with servers(tokenizer, template) as start:
        yield start


@pytest.fixture(scope="module")
def module_serve(tokenizer, template):
    with servers(tokenizer, template) as start:
        yield start


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def say(server, tokenizer):
    """Makes the engine say a text; returns its tokens."""

    def script(text):
        tokens = tokenizer.encode(text)
        server.engine.script = lambda request: [*tokens, EOS]
        return tokens

    return script


@pytest.fixture
def last_prompt(server, tokenizer):
    """Gives the text of the prompt that reached the engine last."""
    return lambda: tokenizer.decode(server.engine.added[-1].prompt, skip_special_tokens=False)


def _run(config, tokenizer, template, engine, ready):
    loop = uvloop.new_event_loop()
    frontend = Frontend(config, tokenizer, template, DEFAULTS)
    api = Api(config, frontend)
    access = Access.load(config)
    limits = HttpLimits(max_body=config.max_body)
    http = HttpServer(access.guard(api), limits, admit=access.admit)
    tls = server_context(config.ssl_certfile, config.ssl_keyfile) if config.ssl_certfile else None
    running = threading.Event()
    stopping = asyncio.Event()
    found = {}

    async def main():
        ours, theirs = socket.socketpair()
        channel = FrontendChannel(frontend.on_frame, frontend.on_close)
        frontend.connect(channel)
        await loop.create_connection(lambda: channel, sock=ours)
        await loop.create_connection(lambda: engine.channel, sock=theirs)
        if ready:
            engine.ready()
            while frontend.state == "loading":
                await asyncio.sleep(0.001)
        http.start(loop)
        listener = await loop.create_server(http.connection, "127.0.0.1", 0, ssl=tls)
        found["port"] = listener.sockets[0].getsockname()[1]
        steps = loop.create_task(engine.run())
        running.set()
        await stopping.wait()
        steps.cancel()
        listener.close()
        http.close()
        frontend.close()
        engine.channel.close()
        await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert running.wait(10)

    def stop():
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)
        loop.close()

    url = f"{'https' if tls else 'http'}://127.0.0.1:{found['port']}"
    return ApiServer(url, found["port"], frontend, engine, api, http, loop), stop
