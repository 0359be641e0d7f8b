"""A model hub on localhost, as huggingface_hub and modelscope-hub know it, with faults to order."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

REPOSITORY = "org/tiny"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
MAIN = {
    "config.json": b'{"hidden_size": 8}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"bos_token": null}',
    "generation_config.json": b'{"top_k": 20}',
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b\n",
    # and what no server reads:
    "README.md": b"# tiny",
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"GGUF",
    "modeling_tiny.py": b"raise SystemExit",
    "consolidated.safetensors": b"the same weights again",
    "onnx/config.json": b"{}",
    "original/model.safetensors": b"and again",
}
WANTED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "merges.txt",
}
OLD = {"config.json": b'{"hidden_size": 4}', "model.safetensors": b"old"}


class FakeHub:
    """The state of the server; tests set the faults and read the requests."""

    def __init__(self) -> None:
        self.revisions = {"main": MAIN, "master": MAIN, "v1": OLD}
        self.gated = False
        self.cut_bodies = 0  # so many GETs of weights end in the middle
        self.refuse_ranges = False  # and are then refused a resumption
        self.gets: list[tuple[str, str | None]] = []  # (file, Range header)
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self) -> None:
        """Stop answering; the port refuses connections afterwards."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fetched(self) -> set[str]:
        return {name for name, _ in self.gets}

    def weight_ranges(self) -> list[str | None]:
        return [header for name, header in self.gets if name == "model.safetensors"]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    yield server
    server.close()


def commit(revision: str) -> str:
    """The 40 hex digits that a revision stands for; a commit stands for itself."""
    if revision in ("main", "master"):
        revision = "main"
    return hashlib.sha1(revision.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        """Tests print nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self.huggingface_api("/".join(parts[2:4]), parts[4:])
        elif parts[0] in ("api", "openapi"):
            self.modelscope_api(parts[1:], query)
        elif "resolve" in parts:
            self.huggingface_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.reply(404, {"error": "no such page"})

    # Hugging Face: /api/models/ID/revision/R, /api/models/ID/tree/R, /ID/resolve/R/FILE

    def huggingface_api(self, repository: str, rest: list[str]) -> None:
        files = self.files(repository, rest[1] if len(rest) > 1 else "main")
        if files is None:
            return
        if rest and rest[0] == "tree":
            self.reply(200, [self.entry(name, data) for name, data in files.items()])
        else:
            revision = rest[1] if len(rest) > 1 else "main"
            siblings = [{"rfilename": name} for name in files]
            sha = revision if len(revision) == 40 else commit(revision)
            self.reply(200, {"id": repository, "sha": sha, "siblings": siblings})

    def entry(self, name: str, data: bytes) -> dict[str, object]:
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "oid": oid, "size": len(data), "path": name}

    def huggingface_file(self, repository: str, revision: str, name: str) -> None:
        files = self.files(repository, revision)
        if files is None:
            return
        if name not in files:
            self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        tag = hashlib.sha1(files[name]).hexdigest()
        sha = revision if len(revision) == 40 else commit(revision)
        self.body(name, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": sha})

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        if repository != REPOSITORY:
            headers = {"X-Error-Code": "RepoNotFound"}
            self.reply(401, {"error": "Repository not found"}, headers)
            return None
        if self.hub.gated:
            self.reply(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
            return None
        for known, files in self.hub.revisions.items():
            if revision in (known, commit(known)):
                return files
        self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    # ModelScope: /api/v1/models/ID/repo/files?Revision=, /api/v1/models/ID/repo?FilePath=

    def modelscope_api(self, parts: list[str], query: dict[str, str]) -> None:
        repository = "/".join(parts[2:4])
        if parts[1] != "models" or repository != REPOSITORY:
            self.reply(404, {"Code": 10010205001, "Message": "not found", "Success": False})
            return
        if self.hub.gated:
            self.reply(403, {"Code": 10990101007, "Message": "forbidden", "Success": False})
            return
        files = self.hub.revisions.get(query.get("Revision", "master"))
        if files is None:
            self.reply(404, {"Code": 10010205001, "Message": "no revision", "Success": False})
        elif parts[4:] == ["repo", "files"]:
            listing = [
                {
                    "Path": name,
                    "Name": name.rsplit("/", 1)[-1],
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": hashlib.sha256(data).hexdigest(),
                }
                for name, data in files.items()
            ]
            self.reply(200, {"Code": 200, "Data": {"Files": listing}, "Success": True})
        elif parts[4:] == ["repo"] and query.get("FilePath") in files:
            self.body(query["FilePath"], files[query["FilePath"]], {})
        elif not parts[4:]:
            self.reply(200, {"Code": 200, "Data": {"Path": repository}, "Success": True})
        else:
            self.reply(404, {"Code": 404, "Message": "no such file", "Success": False})

    # Bytes

    def body(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range")
        cut = False
        if self.command == "GET":
            with self.hub.lock:
                self.hub.gets.append((name, wanted))
                if name == "model.safetensors" and self.hub.cut_bodies > 0:
                    self.hub.cut_bodies -= 1
                    cut = True
        if wanted and self.hub.refuse_ranges:
            self.reply(404, {"error": "gone for now"})
            return
        start, status = 0, 200
        if wanted:
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = data[start:]
        if cut:
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(rest)

    def reply(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


SCRIPT = """
import json, sys
from minisgl_fast.errors import ConfigError
from minisgl_fast.hub import resolve_model
reports = []
try:
    path = resolve_model(
        sys.argv[1],
        revision=sys.argv[3] or None,
        source=sys.argv[2],
        weights=sys.argv[4] == "weights",
        progress=lambda *report: reports.append(report),
    )
except ConfigError as error:
    result = {"error": str(error)}
else:
    result = {"path": str(path)}
result["reports"] = reports
result["heavy"] = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
print(json.dumps(result))
"""


def resolve_in_a_process(
    source: str,
    settings: dict[str, str],
    model: str = REPOSITORY,
    revision: str = "",
    weights: bool = True,
) -> dict[str, Any]:
    """``resolve_model`` in a fresh interpreter: {"path" or "error", "reports", "heavy", "stderr"}.

    ``settings``: its environment, beside variables that say nothing about hubs.
    """
    foreign = ("HF_", "MODELSCOPE_", "TQDM")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, source, revision, "weights" * weights],
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    result["stderr"] = done.stderr
    return result


def contents(folder: str) -> dict[str, bytes]:
    """The files below a folder, by their names in it."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in Path(folder).rglob("*")
        if file.is_file()
    }


def one_line(result: dict[str, Any]) -> str:
    """The error of a result, which is all that was said."""
    message = result["error"]
    assert "\n" not in message and "Traceback" not in result["stderr"]
    return message
