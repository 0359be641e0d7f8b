"""What bench_front.py prints: tables in Markdown, and at the end each figure beside its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: what was reached, and what the target asks for (at most or at least)."""

    name: str
    reached: float
    target: float
    at_most: bool
    unit: str = ""
    digits: int = 0

    @property
    def is_met(self) -> bool:
        shown = round(self.reached, self.digits)
        return shown <= self.target if self.at_most else shown >= self.target

    def cells(self) -> list[str]:
        bound = "at most" if self.at_most else "at least"
        reached = f"{self.reached:,.{self.digits}f}{self.unit}"
        met = "yes" if self.is_met else "**no**"
        return [
            self.name,
            reached,
            f"{bound} {self.target:,.{self.digits}f}{self.unit}",
            met,
        ]


def at_most(name: str, reached: float, target: float, unit: str = "", digits: int = 0) -> Figure:
    return Figure(name, reached, target, True, unit, digits)


def at_least(name: str, reached: float, target: float, unit: str = "", digits: int = 0) -> Figure:
    return Figure(name, reached, target, False, unit, digits)


@dataclass(slots=True)
class Output:
    """Prints as it goes, and keeps what it printed."""

    lines: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def text(self, line: str) -> None:
        self._put(line, "")

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns as wide as what they hold, numbers to the right."""
        all_rows = [list(heads), *map(list, rows)]
        widths = [max(len(row[index]) for row in all_rows) for index in range(len(heads))]
        lines = [_row(row, widths) for row in all_rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        self._put(*lines, "")

    def add(self, *figures: Figure) -> None:
        self.figures += figures

    def summary(self) -> None:
        heads = ["figure", "reached", "target", "met"]
        self.table(heads, [figure.cells() for figure in self.figures])

    def write_into(self, page: Path, program: str) -> None:
        """Replace what stands between the marks of a program. ValueError if there are none."""
        begin, end = f"<!-- {program} writes from here -->", f"<!-- {program} ends here -->"
        text = page.read_text()
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ValueError(f"{page} lacks the lines {begin!r} and {end!r}")
        content = "\n".join(self.lines).rstrip("\n")
        page.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}")

    def _put(self, *lines: str) -> None:
        self.lines += lines
        print("\n".join(lines), flush=True)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(aligned)} |"
