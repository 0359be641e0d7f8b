"""Several results side by side, as text. A value that a result lacks shows as a dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROWS = {
    "Completed": "completed",
    "Failed": "failed",
    "Duration (s)": "duration",
    "Requests/s": "request_throughput",
    "Goodput (requests/s)": "request_goodput",
    "Output tokens/s": "output_throughput",
    "All tokens/s": "total_token_throughput",
    "Most at once": "max_concurrent_requests",
}
METRIC_NAMES = ("ttft", "tpot", "itl", "e2el")
NAME_WIDTH = 24
COLUMN_WIDTH = 16


def label_of(report: Mapping[str, Any], index: int) -> str:
    """The label of a run, or its number."""
    return str(report.get("label") or f"run {index + 1}")


def table_rows(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(name, one cell a report) of everything that at least one report has."""
    keys = dict(ROWS)
    for name in METRIC_NAMES:
        for statistic in _statistics(reports, name):
            key = f"{statistic}_{name}_ms"
            keys[f"{statistic.capitalize()} {name.upper()} (ms)"] = key
    rows = []
    for title, key in keys.items():
        values = [report.get(key) for report in reports]
        if any(value is not None for value in values):
            rows.append((title, [_cell(value) for value in values]))
    return rows


def make_comparison(reports: Sequence[Mapping[str, Any]]) -> str:
    """One column a report."""
    labels = [label_of(report, index) for index, report in enumerate(reports)]
    width = max(COLUMN_WIDTH, *(len(label) + 2 for label in labels))
    lines = [" " * NAME_WIDTH + "".join(f"{label:>{width}}" for label in labels)]
    for title, cells in table_rows(reports):
        lines.append(f"{title:<{NAME_WIDTH}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def _statistics(reports: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """mean, median, then the percentiles that any report has, in order."""
    ending = f"_{name}_ms"
    found = {
        key.removesuffix(ending) for report in reports for key in report if key.endswith(ending)
    }
    percentiles = [word for word in found if word[:1] == "p" and _is_number(word[1:])]
    return ["mean", "median", *sorted(percentiles, key=lambda word: float(word[1:]))]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def number_text(value: Any) -> str:
    """A number in three digits or four, as a person says it; a dash for none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.1f}k"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"
