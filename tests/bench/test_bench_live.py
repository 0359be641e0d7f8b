"""Progress while a run goes on."""

import io
from types import SimpleNamespace

from minisgl_fast.bench.live import Live


class Terminal(io.StringIO):
    def isatty(self):
        return True


def client(**values):
    state = {"num_events": 0, "num_ended": 0, "total": 8, "num_running": 3}
    return SimpleNamespace(results=SimpleNamespace(failed=0), **{**state, **values})


def test_lines_say_what_has_changed_since_the_last(monkeypatch):
    now = 100.0
    monkeypatch.setattr("minisgl_fast.bench.live.time.monotonic", lambda: now)
    stream, state = io.StringIO(), client()
    live = Live(state, "bench", stream)
    now = 102.0
    state.num_events, state.num_ended = 5000, 3
    live.report()
    now = 103.0
    state.num_events, state.num_ended, state.num_running = 5100, 8, 0
    state.results.failed = 2
    live.report()
    assert stream.getvalue().splitlines() == [
        "bench: 3/8 done, 3 running, 1.5 requests/s, 2,500 tokens/s",
        "bench: 8/8 done, 0 running, 5.0 requests/s, 100 tokens/s, 2 failed",
    ]


def test_a_terminal_gets_a_bar():
    stream, state = Terminal(), client()
    live = Live(state, "bench", stream)
    live.open_bar()
    state.num_ended = 4
    live.report()
    live.close()
    drawn = stream.getvalue().split("\r")[-1]
    assert "bench:  50%" in drawn
    assert "3 running" in drawn
    assert "\n" in drawn
