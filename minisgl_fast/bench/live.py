"""Progress while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import NoReturn, TextIO

from tqdm import tqdm

from minisgl_fast.bench.client import Client

BAR_INTERVAL_S = 0.5
LINE_INTERVAL_S = 5.0


class Live:
    """Reports on a client until it is cancelled, then once more."""

    def __init__(self, client: Client, title: str, stream: TextIO | None = None) -> None:
        self._client = client
        self._title = title
        self._stream = sys.stderr if stream is None else stream
        self._bar: tqdm[NoReturn] | None = None
        self._last_s = time.monotonic()
        self._last_events = 0
        self._last_ended = 0

    async def run(self) -> None:
        """Report at intervals."""
        if self._stream.isatty():
            self.open_bar()
        try:
            while True:
                await asyncio.sleep(BAR_INTERVAL_S if self._bar is not None else LINE_INTERVAL_S)
                self.report()
        finally:
            self.report()
            self.close()

    def open_bar(self) -> None:
        """Draw a bar from now on, in place of lines."""
        self._bar = tqdm(total=self._client.total, desc=self._title, file=self._stream)

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def report(self) -> None:
        """One report of what has changed since the last."""
        client, now = self._client, time.monotonic()
        passed_s = max(now - self._last_s, 1e-9)
        num_events, num_ended = client.num_events, client.num_ended
        tokens_per_s = max(0, num_events - self._last_events) / passed_s
        requests_per_s = (num_ended - self._last_ended) / passed_s
        self._last_s, self._last_events, self._last_ended = now, num_events, num_ended
        failed = f", {client.results.failed} failed" if client.results.failed else ""
        state = (
            f"{client.num_running} running, {requests_per_s:,.1f} requests/s, "
            f"{tokens_per_s:,.0f} tokens/s{failed}"
        )
        if self._bar is not None:
            self._bar.total = client.total
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(num_ended - self._bar.n)
            self._bar.refresh()
        else:
            line = f"{self._title}: {num_ended}/{client.total} done, {state}"
            print(line, file=self._stream, flush=True)
