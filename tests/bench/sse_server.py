"""A server for the load client: answers by a script, in the loop of the test or in a thread.

``script(request)`` returns the parts of the response: bytes are written, numbers are seconds to
wait, CUT closes the connection at once, KEEP leaves it open and says nothing more.
"""

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

CUT, KEEP = object(), object()
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@dataclass
class Request:
    """What came: the connection's number and the request's number on it count from 0."""

    path: str
    headers: dict[str, str]
    body: dict
    connection: int
    number: int
    time: float


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(data):
    text = data if isinstance(data, str) else json.dumps(data)
    return chunk(f"data: {text}\n\n".encode())


def chat_event(text):
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


END = event("[DONE]") + b"0\r\n\r\n"


def usage_event(request, num_tokens, num_prompt=7):
    return event({"choices": [], "usage": {
        "prompt_tokens": num_prompt, "completion_tokens": num_tokens}})  # fmt: skip


def talk(request):
    """A good answer of max_tokens tokens in any of the three APIs."""
    num_tokens = request.body["max_tokens"]
    yield STREAM_HEAD
    for index in range(num_tokens):
        if "messages" in request.body:
            yield chat_event(f"t{index} ")
        elif "generate" in request.path:
            yield event(f"t{index}")
        else:
            yield event({"choices": [{"index": 0, "text": f"t{index} "}]})
    if "stream_options" in request.body:
        yield usage_event(request, num_tokens)
    yield END


def plain(status, body, headers=b""):
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b" % (
        *(status, len(body), headers, body),
    )


class SseServer:
    """requests: all that came. peak: most that were under way at once."""

    def __init__(self, script=talk):
        self.script = script
        self.requests = []
        self.peak = self.num_running = self.num_connections = 0
        self.url = ""

    async def handle(self, reader, writer):
        connection, number = self.num_connections, 0
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = head.split("\r\n")
                method, path, _ = lines[0].split()
                pairs = (line.split(": ", 1) for line in lines[1:-2])
                headers = {name.lower(): value for name, value in pairs}
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                if method == "GET":
                    names = json.dumps({"data": [{"id": "served-name"}]}).encode()
                    writer.write(plain(b"200 OK", names))
                    continue
                body = json.loads(data)
                request = Request(path, headers, body, connection, number, time.perf_counter())
                number += 1
                self.requests.append(request)
                self.num_running += 1
                self.peak = max(self.peak, self.num_running)
                try:
                    if not await self.answer(request, writer):
                        return
                finally:
                    self.num_running -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, request, writer):
        for part in self.script(request):
            if part is CUT:
                await writer.drain()
                return False
            if part is KEEP:
                await asyncio.sleep(60)
            if isinstance(part, int | float):
                await asyncio.sleep(part)
            else:
                writer.write(part)
        await writer.drain()
        return True

    @asynccontextmanager
    async def running(self):
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def in_thread(server):
    """The server beside a test that has no loop."""
    ready, stop = threading.Event(), None

    async def serve():
        nonlocal stop
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def end():
            loop.call_soon_threadsafe(done.set)

        async with server.running():
            stop = end
            ready.set()
            await done.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield server
    finally:
        stop()
        thread.join(10)
