"""The HTML report: one page that needs nothing else, for one run or several, or for a sweep.

Rules: no script, no external resource, well-formed as XML, every text from a result escaped; light
and dark by the reader's setting; prints well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from minisgl_fast.bench.charts import Axis, Line, Marker, chart
from minisgl_fast.bench.compare import label_of, number_text, table_rows
from minisgl_fast.bench.report import METRICS, warnings

Report = Mapping[str, Any]

STYLE = """
:root{color-scheme:light dark;--text:#1f2430;--faint:#6b7280;--grid:#e5e7eb;
--back:#f6f7f9;--card:#fff;--warn:#92580a;
--s0:#2563eb;--s1:#d97706;--s2:#059669;--s3:#dc2626;--s4:#7c3aed;--s5:#0891b2;--s6:#be185d;
--s7:#65a30d}
@media(prefers-color-scheme:dark){:root{--text:#e5e7eb;--faint:#9ca3af;--grid:#323c4d;
--back:#0f1420;--card:#182030;--warn:#fbbf24;--s0:#60a5fa;--s1:#fbbf24;--s2:#34d399;--s3:#f87171;--s4:#a78bfa;--s5:#22d3ee;
--s6:#f472b6;--s7:#a3e635}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--text);background:var(--back);
max-width:1200px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 1rem}h2{font-size:1rem;margin:0 0 .4rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:1rem}
figure,.card,.scroll{margin:0;padding:.9rem 1rem;background:var(--card);border:1px solid
var(--grid);border-radius:10px;break-inside:avoid}
.card{border-left:5px solid var(--c);margin-bottom:1rem}.card p{margin:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.2rem,1fr));gap:.5rem .7rem;
margin-top:.6rem}
.tile b{display:block;font-size:1.3rem;white-space:nowrap;line-height:1.2;
font-variant-numeric:tabular-nums}
.tile span{font-size:.8rem;color:var(--faint)}.card .note{margin:.5rem 0 0;font-size:.85rem}
svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--faint)}svg .name{font-size:12px}svg .small{font-size:10px}
svg .mid{text-anchor:middle}svg .end{text-anchor:end}.grid line{stroke:var(--grid)}
.line{fill:none;stroke:var(--c);stroke-width:1.8}.area{fill:var(--c);opacity:.18}
.mark{stroke:var(--c);stroke-dasharray:4 3;stroke-width:1.4}.dashed{stroke-dasharray:5 4}
.dot{fill:var(--c)}svg .tag{fill:var(--c);font-size:10px;font-weight:600}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%;
max-width:860px}
td,th{padding:.25rem .5rem;text-align:right;border-bottom:1px solid var(--grid)}
td:first-child,th:first-child{text-align:left}tr:last-child td{border-bottom:0}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:3px;
background:var(--c)}
.bad{color:var(--s3)}.warn{color:var(--warn)}.faint{color:var(--faint)}
.scroll{overflow-x:auto;margin-top:1rem}
""" + "".join(f".s{index}{{--c:var(--s{index})}}" for index in range(8))

# Fine bins in one that is drawn, so that a chart has at most MAX_BINS, or fewer for few samples.
BIN_WIDTHS = (1, 2, 5, 10, 20)
MAX_BINS = 60
MAX_STEPS = 80  # of a series over time; finer ones are averaged

SHOWN = {
    "model_id": "",
    "base_url": "at ",
    "endpoint_type": "",
    "dataset": "dataset ",
    "request_rate": "requests/s asked ",
    "max_concurrency": "at once at most ",
}


def make_page(reports: Sequence[Report], *, is_sweep: bool = False) -> str:
    """The page of these runs, in their order."""
    title = "Benchmark sweep" if is_sweep else "Benchmark report"
    figures = _sweep_charts(reports) if is_sweep else []
    figures += _run_charts(reports)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"/>'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\"/>"
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"{''.join(_run(report, index) for index, report in enumerate(reports))}"
        f'<div class="charts">{"".join(figures)}</div>{_table(reports)}</body></html>\n'
    )


def _run(report: Report, index: int) -> str:
    """A card: what was run, its figures at a glance, and what to know before believing them."""
    said = [f"{SHOWN[key]}{report[key]}" for key in SHOWN if report.get(key) is not None]
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in _tiles(report)
    )
    return (
        f'<div class="card s{index % 8}"><p><b>{escape(label_of(report, index))}</b> '
        f'<span class="faint">{escape(", ".join([*said, str(report.get("date", ""))]))}</span></p>'
        f'<div class="tiles">{tiles}</div>{_notes(report)}</div>'
    )


def _tiles(report: Report) -> list[tuple[str, str]]:
    """(name, value) of the figures that people look for first."""
    found = [("output tokens/s", number_text(report.get("output_throughput")))]
    found.append(("requests/s", number_text(report.get("request_throughput"))))
    if report.get("request_goodput") is not None:
        found.append(("good requests/s", number_text(report["request_goodput"])))
    for name in ("ttft", "tpot", "e2el"):
        median, p99 = (number_text(report.get(f"{key}_{name}_ms")) for key in ("median", "p99"))
        found.append((f"{name.upper()} ms, p50 / p99", f"{median} / {p99}"))
    found.append(("completed", f"{report.get('completed', 0):,}"))
    return found


def _notes(report: Report) -> str:
    """Errors, then warnings."""
    own = report.get("minisgl_fast", {})
    errors = []
    for kind, count in own.get("errors", {}).items():
        message = own.get("error_messages", {}).get(kind, "")
        errors.append(f"{count} failed requests: {kind} {message}")
    items = [("bad", text) for text in errors] + [("warn", text) for text in warnings(report)]
    return "".join(f'<p class="note {kind}">{escape(text)}</p>' for kind, text in items)


def _table(reports: Sequence[Report]) -> str:
    heads = "".join(
        f'<th><span class="key s{index % 8}"></span>{escape(label_of(report, index))}</th>'
        for index, report in enumerate(reports)
    )
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in table_rows(reports)
    )
    return f'<div class="scroll"><table><tr><th></th>{heads}</tr>{rows}</table></div>'


def _figure(title: str, svg: str) -> str:
    return f"<figure><h2>{escape(title)}</h2>{svg}</figure>"


def _run_charts(reports: Sequence[Report]) -> list[str]:
    charts = [_distribution(name, title, reports) for name, title in METRICS.items()]
    time, tokens = Axis("seconds"), Axis("output tokens per second")
    charts.append(_figure("Throughput", chart("Throughput", time, tokens, _over_time(
        reports, "tokens_per_s"))))  # fmt: skip
    charts.append(_figure("Concurrency", chart("Concurrency", time, Axis("requests at once"),
        _over_time(reports, "running"))))  # fmt: skip
    return charts


def _distribution(name: str, title: str, reports: Sequence[Report]) -> str:
    """Shares of the samples in logarithmic bins; dashed lines at the median and the p99."""
    lines, markers = [], []
    found = {
        index: bins
        for index, report in enumerate(reports)
        if (bins := report.get("minisgl_fast", {}).get("distributions", {}).get(name))
        and bins["count"]
    }
    first = min((bins["first_bin"] for bins in found.values()), default=0)
    last = max((bins["first_bin"] + len(bins["counts"]) for bins in found.values()), default=0)
    fewest = min((bins["count"] for bins in found.values()), default=1)
    max_bins = min(MAX_BINS, 2 * math.isqrt(fewest) + 8)
    width = next((w for w in BIN_WIDTHS if (last - first) / w <= max_bins), BIN_WIDTHS[-1])
    for index, bins in found.items():
        report = reports[index]
        label = label_of(report, index)
        points = _histogram(bins, width)
        lines.append(Line(label, _stairs(points), index, filled=True))
        for statistic in ("median", "p99"):
            value = report.get(f"{statistic}_{name}_ms")
            if value:
                words = f"{label}: {statistic} {value:.2f} ms"
                markers.append(Marker(value, words, index, statistic))
    axis = Axis("milliseconds", logarithmic=True)
    svg = chart(title, axis, Axis("% of samples"), lines, markers)
    return _figure(f"{title} ({name.upper()})", svg)


def _histogram(bins: Mapping[str, Any], width: int) -> list[tuple[float, float]]:
    """(lower edge in ms, % of samples) of every ``width`` bins, from and to 0 %."""
    shares: dict[int, float] = {}
    for index, count in enumerate(bins["counts"], bins["first_bin"]):
        shares[index // width] = shares.get(index // width, 0.0) + 100.0 * count / bins["count"]

    def edge(index: int) -> float:
        return float(bins["lowest_ms"] * 10 ** (index * width / bins["bins_per_decade"]))

    points = [(edge(index), share) for index, share in shares.items()]
    return [(points[0][0], 0.0), *points, (edge(max(shares) + 1), 0.0)]


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of which each y holds up to the next x."""
    found = [points[0]]
    for (_, before), (x, y) in zip(points, points[1:], strict=False):
        found += [(x, before), (x, y)]
    return found


def _over_time(reports: Sequence[Report], series: str) -> list[Line]:
    lines = []
    for index, report in enumerate(reports):
        timeline = report.get("minisgl_fast", {}).get("timeline")
        if timeline:
            values = timeline[series]
            group = max(1, math.ceil(len(values) / MAX_STEPS))
            parts = [values[i : i + group] for i in range(0, len(values), group)]
            step_s = timeline["interval_s"] * group
            points = [(i * step_s, sum(part) / len(part)) for i, part in enumerate(parts)]
            lines.append(Line(label_of(report, index), points, index, stepped=True))
    return lines


def _sweep_charts(reports: Sequence[Report]) -> list[str]:
    """Latencies against the throughput that was reached, one point a run."""
    figures = []
    for name in ("ttft", "tpot", "e2el"):
        lines = []
        for colour, statistic in enumerate(("median", "p99")):
            found = [
                (report["output_throughput"], report[f"{statistic}_{name}_ms"], label_of(report, i))
                for i, report in enumerate(reports)
                if report.get("completed") and f"{statistic}_{name}_ms" in report
            ]
            points = [(x, y) for x, y, _ in found]
            labels = [label for _, _, label in found]
            lines.append(Line(statistic, points, colour, labels, dashed=statistic != "median"))
        title = f"Throughput and {name.upper()}: median, and p99 dashed"
        axes = Axis("output tokens per second"), Axis("milliseconds")
        figures.append(_figure(title, chart(title, *axes, lines)))
    return figures
