"""The engine process: ``python -m minisgl_fast.engine.worker FD [FD ...]``.

Each FD is the engine's end of one frontend's socketpair; more may come by JOIN frames. The first
frame on the first channel is CONFIG; then the engine loads, tells its PROGRESS, says READY on every
channel, and works until every frontend is gone.

Rules: one thread; never blocks while there is work; a frontend that is gone takes its requests with
it; an error of the engine itself ends the process after a FATAL frame that says why.
"""

from __future__ import annotations

import gc
import json
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from minisgl_fast.channel import EngineChannel, wait_for_any
from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.errors import ConfigError
from minisgl_fast.vocabulary import Vocabulary
from minisgl_fast.wire import FrameKind

STATS_INTERVAL_S = 0.1
# The whole cache is walked, so not each time that a light load goes idle.
CHECK_INTERVAL_S = 1.0
EXIT_CONFIG = 1
EXIT_ENGINE = 3


def main(arguments: list[str]) -> int:
    """Serve the channels given as file descriptors; the exit code."""
    # Ctrl-C reaches the whole process group, a service manager's SIGTERM the whole service; the
    # frontend decides how to stop, and closes the channel when it has drained.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channels = [EngineChannel(socket.socket(fileno=int(descriptor))) for descriptor in arguments]
    try:
        engine = _load(channels)
        if engine is not None:
            _serve(engine, channels)
        return 0
    except ConfigError as error:
        return _fatal(channels, error.message, EXIT_CONFIG)
    except Exception as error:
        traceback.print_exc()
        return _fatal(channels, f"The engine failed: {type(error).__name__}.", EXIT_ENGINE)


def _load(channels: list[EngineChannel]) -> Engine | None:
    """Wait for CONFIG and load; None when the frontend went away instead."""
    frames: list[tuple[int, bytes]] = []
    while not frames:
        wait_for_any(channels[:1], None)
        frames = channels[0].receive()
        if channels[0].closed:
            return None
    settings = json.loads(frames[0][1])

    def progress(stage: str, done: int, total: int) -> None:
        message = json.dumps({"stage": stage, "done": done, "total": total}).encode()
        for channel in channels:
            channel.send(FrameKind.PROGRESS, message)

    vocabulary = settings["vocabulary"]
    engine = Engine(
        Config(**settings["config"]),
        Path(settings["model_path"]),
        settings["vocab_limit"],
        settings["eos_ids"],
        progress,
        None if vocabulary is None else Vocabulary.from_text(vocabulary),
    )
    # Everything that lives by now lives to the end: keep the collector from walking it again.
    gc.collect()
    gc.freeze()
    facts = json.dumps(engine.facts()).encode()
    for channel in channels:
        channel.send(FrameKind.READY, facts)
    return engine


def _serve(engine: Engine, channels: list[EngineChannel]) -> None:
    """Work until every frontend is gone."""
    live = dict(enumerate(channels))
    num_channels = len(channels)
    last_stats_s = last_check_s = 0.0
    while True:
        received = [_receive(engine, number, channel) for number, channel in live.items()]
        for sock in [sock for channel in live.values() for sock in channel.take_sockets()]:
            joined = live[num_channels] = EngineChannel(sock)
            num_channels += 1
            joined.send(FrameKind.READY, json.dumps(engine.facts()).encode())
        # The end of a channel shows when it is read and when it is written to.
        for number in [number for number, channel in live.items() if channel.closed]:
            engine.abort_channel(number)
            live.pop(number).close()
        if not live:
            return
        if engine.has_work or any(received):
            for number, kind, payload in engine.step():
                if number in live:
                    live[number].send(kind, payload)
        idle = not engine.has_work
        now = time.monotonic()
        if idle or now - last_stats_s >= STATS_INTERVAL_S:
            last_stats_s = now
            stats = json.dumps(engine.stats()).encode()
            for channel in live.values():
                channel.send(FrameKind.STATS, stats)
        if idle:
            if now - last_check_s >= CHECK_INTERVAL_S:
                last_check_s = now
                engine.check()
            wait_for_any(live.values(), None)


def _receive(engine: Engine, number: int, channel: EngineChannel) -> bool:
    """Hand a frontend's frames to the engine; True if there were any."""
    frames = channel.receive()
    for kind, payload in frames:
        if kind == FrameKind.ADD:
            engine.add(number, payload)
        elif kind == FrameKind.ABORT:
            engine.abort(number, int.from_bytes(payload, "little"))
        elif kind == FrameKind.FLUSH:
            channel.send(FrameKind.FLUSHED, payload + bytes((engine.flush_cache(),)))
    if channel.has_unsent:
        channel.flush()
    return bool(frames)


def _fatal(channels: list[EngineChannel], message: str, exit_code: int) -> int:
    payload = json.dumps({"message": message, "exit_code": exit_code}).encode()
    for channel in channels:
        if not channel.closed:
            channel.send(FrameKind.FATAL, payload)
    return exit_code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
