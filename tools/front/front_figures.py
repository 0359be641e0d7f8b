"""What the frontend's benchmarks print: tables in Markdown, last each figure beside its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: what was reached, and what the target asks for (at most or at least).

    floor: what the bare C writer reached in the same run, where it can: what the machine gives.
    """

    name: str
    reached: float
    target: float
    unit: str = ""
    digits: int = 0
    floor: float | None = None
    at_most: bool = True

    @property
    def is_met(self) -> bool:
        return self._meets(self.reached)

    def cells(self) -> list[str]:
        bound = "at most" if self.at_most else "at least"
        met = "yes" if self.is_met else "**no**"
        if not self.is_met and self.floor is not None and not self._meets(self.floor):
            met += ", nor C"
        return [
            self.name,
            self._text(self.reached),
            "" if self.floor is None else self._text(self.floor),
            f"{bound} {self._text(self.target)}",
            met,
        ]

    def _meets(self, value: float) -> bool:
        shown = round(value, self.digits)
        return shown <= self.target if self.at_most else shown >= self.target

    def _text(self, value: float) -> str:
        return f"{value:,.{self.digits}f}{self.unit}"


at_most = partial(Figure, at_most=True)
at_least = partial(Figure, at_most=False)


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
        """Each figure beside its target, and beside the floor's where there is one."""
        rows = [["figure", "reached", "C floor", "target", "met"]]
        rows += [figure.cells() for figure in self.figures]
        if not any(floor for _, _, floor, *_ in rows[1:]):
            rows = [[*row[:2], *row[3:]] for row in rows]
        self.table(rows[0], rows[1:])

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
