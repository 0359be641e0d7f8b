"""Drives the engine process over real socketpairs, as a frontend would."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minisgl_fast.config import Config
from minisgl_fast.frames import FrameReader
from minisgl_fast.params import SamplingParams
from minisgl_fast.wire import FinishReason, FrameKind, frame, pack_add, unpack_step

TIMEOUT_S = 90.0  # a deadline for a loaded machine, not a figure
HOT = SamplingParams(temperature=1.5, ignore_eos=True)


class Peer:
    """A frontend's end of one channel, with blocking reads."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT_S)
        self._sock = sock
        self._reader = FrameReader()
        self._frames: list[tuple[int, bytes]] = []
        self.progress: list[dict[str, Any]] = []
        self.stats: dict[str, int] = {}

    def send(self, kind: int, payload: bytes) -> None:
        self._sock.sendall(frame(kind, payload))

    def send_socket(self, kind: int, sock: socket.socket) -> None:
        socket.send_fds(self._sock, [frame(kind, b"")], [sock.fileno()])

    def configure(self, model: Path, **settings: Any) -> None:
        config = Config(
            **{
                "model": str(model),
                "device": "cpu",
                "dtype": "float32",
                "num_threads": 1,
                "num_pages": 64,
                "max_model_len": 1024,
                "max_running_requests": 4,
                **settings,
            }
        )
        message = {
            "config": config.to_dict(),
            "model_path": str(model),
            "vocab_limit": 259,
            "eos_ids": [258],
            "vocabulary": None,
        }
        self.send(FrameKind.CONFIG, json.dumps(message).encode())

    def add(self, rid: int, prompt: list[int], max_tokens: int = 20, **options: Any) -> None:
        payload = pack_add(rid, HOT, array("i", prompt), seed=7, max_tokens=max_tokens, **options)
        self.send(FrameKind.ADD, payload)

    def abort(self, rid: int) -> None:
        self.send(FrameKind.ABORT, rid.to_bytes(4, "little"))

    def receive(self) -> tuple[int, bytes]:
        """The next frame; PROGRESS and STATS are put aside. EOFError at the end."""
        while True:
            while not self._frames:
                data = self._sock.recv(1 << 16)
                if not data:
                    raise EOFError
                self._frames += self._reader.feed(data)
            kind, payload = self._frames.pop(0)
            if kind == FrameKind.PROGRESS:
                self.progress.append(json.loads(payload))
            elif kind == FrameKind.STATS:
                self.stats = json.loads(payload)
            else:
                return kind, payload

    def expect(self, kind: int) -> bytes:
        got, payload = self.receive()
        assert got == kind, (got, payload)
        return payload

    def wait_stats(self, condition: Callable[[dict[str, int]], bool]) -> None:
        """Read on until the counters are as they should be; no other frame may come."""
        while not (self.stats and condition(self.stats)):
            while not self._frames:
                data = self._sock.recv(1 << 16)
                assert data, "the engine has ended"
                self._frames += self._reader.feed(data)
            kind, payload = self._frames.pop(0)
            assert kind == FrameKind.STATS
            self.stats = json.loads(payload)

    def collect(self, rids: set[int]) -> dict[int, tuple[list[int], FinishReason]]:
        """All rows until each of these requests has had its last."""
        tokens: dict[int, list[int]] = {rid: [] for rid in rids}
        reasons: dict[int, FinishReason] = {}
        while set(reasons) != rids:
            rows, _ = unpack_step(self.expect(FrameKind.STEP))
            for rid, token, reason in rows:
                assert rid not in reasons
                if token >= 0:
                    tokens[rid].append(token)
                if reason != FinishReason.RUNNING:
                    reasons[rid] = FinishReason(reason)
        return {rid: (tokens[rid], reasons[rid]) for rid in rids}

    def wait_for_end(self) -> None:
        with pytest.raises(EOFError):
            while True:
                self.receive()

    def close(self) -> None:
        self._sock.close()


class Worker:
    """The engine process with its frontends."""

    def __init__(self, num_channels: int, program: list[str]) -> None:
        pairs = [socket.socketpair() for _ in range(num_channels)]
        descriptors = [theirs.fileno() for _, theirs in pairs]
        self.process = subprocess.Popen(
            [sys.executable, *program, *map(str, descriptors)],
            pass_fds=descriptors,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _, theirs in pairs:
            theirs.close()
        self.peers = [Peer(ours) for ours, _ in pairs]

    def wait(self) -> tuple[int, str]:
        """(exit code, stderr); nothing is ever written to stdout."""
        printed, errors = self.process.communicate(timeout=TIMEOUT_S)
        assert printed == ""
        return self.process.returncode, errors

    def end(self) -> None:
        for peer in self.peers:
            peer.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
