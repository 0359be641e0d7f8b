"""Rounds of measurements on a machine that may be busy: what each lost to others, the quietest.

A virtual machine's host may give its processors to others for a while ("steal" in /proc/stat), and
other processes may take the server's core from it. What is measured then is the machine. So every
run notes the share of its time that was lost; runs that lost more than ``MAX_LOST`` are made again,
up to ``MAX_EXTRA`` times and within the time that is left for that, and medians are taken over the
quietest ``rounds`` runs of each case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, float]
STAT = Path("/proc/stat")
MAX_LOST = 0.03
MAX_EXTRA = 5
LOST = "lost"  # in a row: the larger of both shares, 0 to 1
STEAL_FIELD, NUM_FIELDS = 7, 8  # user nice system idle iowait irq softirq steal


class Steal:
    """Shares of the time of some processors that the host took, since it was made."""

    def __init__(self, cpus: set[int], stat: Path = STAT) -> None:
        self._cpus = {f"cpu{cpu}" for cpu in cpus}
        self._stat = stat
        self._before = self._read()

    def share(self) -> float:
        """0 to 1, of the processor that it took most of."""
        return max((stolen / max(passed, 1) for stolen, passed in self._ticks()), default=0.0)

    def is_small(self) -> bool:
        """Whether what was measured is the machine's. A short run cannot tell a tick from none."""
        return all(stolen <= max(passed * MAX_LOST, 1) for stolen, passed in self._ticks())

    def _ticks(self) -> list[tuple[int, int]]:
        """(stolen, all) of each processor."""
        found = []
        for name, now in self._read().items():
            passed = [new - old for new, old in zip(now, self._before[name], strict=True)]
            found.append((passed[STEAL_FIELD], sum(passed)))
        return found

    def _read(self) -> dict[str, list[int]]:
        lines = (line.split() for line in self._stat.read_text().splitlines())
        return {
            name: list(map(int, ticks[:NUM_FIELDS])) for name, *ticks in lines if name in self._cpus
        }


@dataclass
class Rounds:
    """Makes runs of several cases in turns.

    patience_s: how long runs may be made again, for each call of ``take``; what one leaves the
    next may use.
    """

    rounds: int
    patience_s: float
    cpus: set[int]
    left_s: float = 0.0
    stat: Path = STAT

    def take(self, cases: Mapping[str, Callable[[], Row]]) -> dict[str, list[Row]]:
        """The quietest runs of each case, in the order they were made, each with what it lost.

        A run's row may tell the share for which the server waited for its core.
        """
        self.left_s += self.patience_s
        rows: dict[str, list[Row]] = {name: [] for name in cases}
        num_quiet = dict.fromkeys(cases, 0)
        for index in range(self.rounds + MAX_EXTRA):
            is_extra = index >= self.rounds
            for name, run in cases.items():
                if is_extra and (num_quiet[name] >= self.rounds or self.left_s <= 0):
                    continue
                begin, steal = time.monotonic(), Steal(self.cpus, self.stat)
                row = run()
                waited = row.get(LOST, 0.0)
                num_quiet[name] += steal.is_small() and waited <= MAX_LOST
                rows[name].append({**row, LOST: max(steal.share(), waited)})
                self.left_s -= (time.monotonic() - begin) * is_extra
        return {name: self._quietest(several) for name, several in rows.items()}

    def _quietest(self, rows: list[Row]) -> list[Row]:
        chosen = sorted(range(len(rows)), key=lambda index: rows[index][LOST])[: self.rounds]
        return [rows[index] for index in sorted(chosen)]


def lost_text(row: Row) -> str:
    """The most that one of the runs lost which a row was made of."""
    return f"{row[LOST] * 100:.1f} %"
