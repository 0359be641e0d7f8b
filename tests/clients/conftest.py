"""Servers for real clients. The clients have an environment of their own: see the Makefile.

scripted   a frontend whose engine says what the test tells it to (scripted_server.py)
smollm2    the whole server with the demo model; greedy
tiny       the whole server with a tiny random Qwen3, which only does what it is bound to
"""

import os
import queue
import re
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = os.environ.get("MINISGL_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
TIMEOUT_S = 120


@contextmanager
def running(*command, announces):
    """A process, given as the first match of what it prints on either stream."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = queue.SimpleQueue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        printed = []
        while True:
            line = lines.get(timeout=TIMEOUT_S)
            assert line is not None, "".join(printed)
            printed.append(line)
            found = re.search(announces, line)
            if found:
                break
        yield found
    finally:
        process.stdin.close()
        process.terminate()
        process.wait(TIMEOUT_S)
        reader.join(TIMEOUT_S)
        process.stdout.close()


@pytest.fixture(scope="session")
def scripted():
    """The URL of the scripted server; its model is called "scripted"."""
    with running(PYTHON, str(HERE / "scripted_server.py"), announces=r"^(http://\S+)$") as found:
        yield found[1]


@pytest.fixture(scope="session")
def smollm2():
    """The URL of a server with SmolLM2-135M-Instruct, called "smollm2"."""
    with _served(_made("tools/demo_model.py"), "smollm2") as url:
        yield url


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The URL of a server with a tiny random model, called "tiny"."""
    folder = str(tmp_path_factory.mktemp("tiny") / "model")
    _made("tools/make_tiny_model.py", folder)
    with _served(folder, "tiny", "--num-pages", "1024") as url:
        yield url


def _made(tool, *arguments):
    """What a tool of this repository prints."""
    command = [PYTHON, tool, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def _served(folder, name, *arguments):
    """The URL of a whole server; its model has no calls of its own, so they are Qwen's."""
    command = (
        *(PYTHON, "-m", "minisgl_fast", "--model", folder, "--served-model-name", name),
        *("--port", "0", "--device", "cpu", "--dtype", "float32"),
        *("--tool-call-parser", "qwen25", *arguments),
    )
    with running(*command, announces=r"ready to serve on (\S+)$") as found:
        yield f"http://{found[1]}"
