"""Charts as inline SVG: histograms on a logarithmic axis, lines over time, curves with points.

Plain shapes and text, no script and nothing from elsewhere; colours are the CSS classes s0 to s7
of the page, so a chart follows the page's light or dark theme. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44
NUM_COLOURS = 8
LOG_MARGIN = 1.03
MARGIN, TAG_MARGIN = 1.05, 1.2  # above the highest point
TAG_LETTER, TAG_ROW = 6.4, 12  # pixels: of a letter in width, of a row of tags in height
MIN_TICKS, MAX_TICKS = 3, 6


@dataclass(slots=True)
class Line:
    """One series: points (x, y) in the units of the axes; ``labels`` stand at its points."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    labels: Sequence[str] = ()
    filled: bool = False
    stepped: bool = False
    dashed: bool = False


@dataclass(slots=True)
class Marker:
    """A vertical line at x; ``tag`` stands beside it, at the top."""

    x: float
    name: str
    colour: int
    tag: str = ""


@dataclass(slots=True)
class Axis:
    """What an axis shows; ``logarithmic`` needs values above 0."""

    title: str
    logarithmic: bool = False


class _Scale:
    """Values to pixels."""

    def __init__(self, axis: Axis, low: float, high: float, start: float, end: float) -> None:
        self.logarithmic = axis.logarithmic
        if not high > low:
            high = low * 2 if axis.logarithmic and low > 0 else low + 1
        self.low, self.high = low, high
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1,)):
                found = [factor * 10.0**d for d in decades for factor in factors]
                found = [tick for tick in found if self.low <= tick <= self.high]
                if MIN_TICKS <= len(found) <= 2 * MAX_TICKS:
                    return found
            if len(found) > MIN_TICKS:
                return found
        rough = (self.high - self.low) / MAX_TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def chart(
    title: str, x_axis: Axis, y_axis: Axis, lines: Sequence[Line], markers: Sequence[Marker] = ()
) -> str:
    """An <svg> element. Says that there is no data where there is none."""
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">'
    )
    points = [point for line in lines for point in line.points]
    if not points:
        return f'{head}<text x="{WIDTH / 2}" y="{HEIGHT / 2}" class="mid">no data</text></svg>'
    xs = [x for x, _ in points] + [marker.x for marker in markers]
    low, high = min(xs), max(xs)
    if x_axis.logarithmic:
        low, high = low / LOG_MARGIN, high * LOG_MARGIN
    x_scale = _Scale(x_axis, low, high, LEFT, WIDTH - RIGHT)
    room = TAG_MARGIN if any(marker.tag for marker in markers) else MARGIN
    y_scale = _Scale(y_axis, 0.0, max(y for _, y in points) * room, HEIGHT - BOTTOM, TOP)
    shapes = [head, _grid(x_scale, y_scale, x_axis, y_axis)]
    for line in lines:
        shapes.append(_path(line, x_scale, y_scale))
        for label, (x, y) in zip(line.labels, line.points, strict=False):
            shapes.append(_dot(x_scale(x), y_scale(y), label, line))
    for marker in markers:
        x = x_scale(marker.x)
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            f'class="mark s{marker.colour % NUM_COLOURS}"><title>{escape(marker.name)}</title>'
            "</line>"
        )
    shapes += _tags(markers, x_scale)
    return "".join([*shapes, "</svg>"])


def _tags(markers: Sequence[Marker], x_scale: _Scale) -> list[str]:
    """The tags of markers, each in the first row where it does not touch another."""
    ends: list[float] = []  # of the last tag in each row
    shapes = []
    for marker in sorted(markers, key=lambda marker: marker.x):
        if not marker.tag:
            continue
        x = x_scale(marker.x)
        width = len(marker.tag) * TAG_LETTER + 6
        is_left = x + width > WIDTH
        start = x - width if is_left else x
        row = next((row for row, end in enumerate(ends) if end <= start), len(ends))
        ends[row:] = [start + width, *ends[row + 1 :]]
        place = f'x="{x - 4:.1f}" ' if is_left else f'x="{x + 4:.1f}" '
        shapes.append(
            f'<text {place}y="{TOP + 9 + row * TAG_ROW}" class="tag s{marker.colour % NUM_COLOURS}'
            f'{" end" if is_left else ""}">{escape(marker.tag)}</text>'
        )
    return shapes


def number(value: float) -> str:
    """A number as an axis shows it."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}" if abs(value) >= 1e-9 else "0"


def _grid(x_scale: _Scale, y_scale: _Scale, x_axis: Axis, y_axis: Axis) -> str:
    bottom = HEIGHT - BOTTOM
    shapes = []
    for tick in y_scale.ticks():
        y = y_scale(tick)
        shapes.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{number(tick)}</text>')
    for tick in x_scale.ticks():
        x = x_scale(tick)
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        shapes.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="mid">{number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" class="mid name">{escape(x_axis.title)}</text>'
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" class="mid name">'
        f"{escape(y_axis.title)}</text>"
    )
    return f'<g class="grid">{"".join(shapes)}</g>'


def _path(line: Line, x_scale: _Scale, y_scale: _Scale) -> str:
    """The line, and the area under it."""
    pixels = [(x_scale(x), y_scale(y)) for x, y in line.points]
    if not pixels:
        return ""
    steps = [f"M{pixels[0][0]:.1f} {pixels[0][1]:.1f}"]
    for x, y in pixels[1:]:
        steps.append(f"H{x:.1f}V{y:.1f}" if line.stepped else f"L{x:.1f} {y:.1f}")
    drawn = "".join(steps)
    colour = f"s{line.colour % NUM_COLOURS}"
    floor = y_scale(0.0)
    area = f"{drawn}V{floor:.1f}H{pixels[0][0]:.1f}Z"
    filled = f'<path d="{area}" class="area {colour}"/>' if line.filled else ""
    style = "line dashed" if line.dashed else "line"
    name = f"<title>{escape(line.name)}</title>"
    return f'{filled}<path d="{drawn}" class="{style} {colour}">{name}</path>'


def _dot(x: float, y: float, label: str, line: Line) -> str:
    name = f"<title>{escape(line.name)}: {escape(label)}</title>"
    half = len(label) * TAG_LETTER / 2
    anchor = "end" if x + half > WIDTH else "mid"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="dot s{line.colour % NUM_COLOURS}">{name}'
        f'</circle><text x="{x:.1f}" y="{y - 8:.1f}" class="{anchor} small">{escape(label)}</text>'
    )
