"""Line charts as inline SVG: small, printable, and readable without a network or a script; with the page's script values show on
hover and by the arrow keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 14, 40
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#65a30d", "#db2777", "#7c7f86")
MOST = 500  # points drawn of one line: more than there are pixels for


@dataclass(frozen=True)
class Line:
    """One series of (x, y) points; `dots` draws the points too, for series with few of them."""

    name: str
    points: list[tuple[float, float]]
    dots: bool = False


SVG = '<svg xmlns="http://www.w3.org/2000/svg" '


def line_chart(lines: list[Line], x_label: str, y_label: str, log: bool = False) -> str:
    """A figure of the lines with axes, ticks and a legend; an empty string if no line has a finite point.

    `log` draws y on a logarithmic scale, on which points that are not positive are left out, and on a linear one behind a button.
    """
    lines = [Line(line.name, _thinned(line.points), line.dots) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    positive = [Line(line.name, [(x, y) for x, y in line.points if y > 0], line.dots) for line in lines]
    scales = [(positive, True), (lines, False)] if log and any(line.points for line in positive) else [(lines, False)]
    xs = [x for line in lines for x, _ in line.points]
    x_ticks = _ticks(min(xs), max(xs), 6)
    x_of = _scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT, False)
    drawn = [
        _svg(each, x_ticks, x_of, (x_label, y_label), scale, number > 0) for number, (each, scale) in enumerate(scales)
    ]
    values = [
        {"name": line.name, "colour": _colour(n), "points": [[x, y, round(x_of(x), 1)] for x, y in line.points]}
        for n, line in enumerate(lines)
    ]
    legend = "".join(
        f'<span><i style="background:{_colour(n)}"></i>{escape(line.name)}</span>' for n, line in enumerate(lines)
    )
    button = '<button type="button" title="logarithmic or linear">log</button>' if len(scales) > 1 else ""
    return (
        f'<figure class="chart" tabindex="0" data-x="{escape(x_label)}" data-lines="{escape(json.dumps(values))}">'
        f"{''.join(drawn)}<figcaption>{legend}</figcaption>{button}</figure>"
    )


def line_drawing(lines: list[Line], x_label: str, y_label: str, style: str = "") -> str:
    """The chart as an SVG file of its own, with its names in it; an empty string if no line has a finite point."""
    figure = line_chart(lines, x_label, y_label)
    if not figure:
        return ""
    head, _, body = figure[figure.index("<svg ") : figure.index("</svg>")].partition(">")
    names = [line.name for line in lines if _thinned(line.points)]
    legend = "".join(
        f'<text x="{WIDTH - RIGHT}" y="{TOP + 14 * (n + 1)}" text-anchor="end" style="fill: {_colour(n)}">{escape(name)}</text>'
        for n, name in enumerate(names)
    )
    return f"{head.replace('<svg ', SVG, 1)}>{style}{body}{legend}</svg>"


def _svg(
    lines: list[Line],
    x_ticks: list[float],
    x_of: Callable[[float], float],
    labels: tuple[str, str],
    log: bool,
    hidden: bool,
) -> str:
    ys = [y for line in lines for _, y in line.points]
    y_ticks = _log_ticks(min(ys), max(ys)) if log else _ticks(min(0.0, min(ys)), max(ys), 5)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, log)
    about = f"{escape(labels[1])} over {escape(labels[0])}"
    scale = ('data-scale="log"' if log else 'data-scale="linear"') + ' hidden="hidden"' * hidden
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}" {scale}>']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y_of(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for place, x in enumerate(x_ticks):
        other = ' class="other"' if place % 2 else ""  # left out if there is little room
        parts.append(
            f'<text{other} x="{x_of(x):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_number(x)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(labels[0])}</text>')
    for number, line in enumerate(lines):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(number)}" stroke-width="1.8"/>')
        if line.dots:
            parts += [
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.2" fill="{_colour(number)}"/>'
                for x, y in line.points
            ]
    parts.append(f'<line class="at" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0" visibility="hidden"/>')
    return "".join([*parts, "</svg>"])


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The finite points; of too many, the lowest and the highest of each stretch, so that no spike is lost."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) <= MOST:
        return points
    size = math.ceil(2 * len(points) / MOST)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        extremes = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    if log:
        low, high = math.log(low), math.log(high)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        value = math.log(value) if log else value
        return start + (end - start) * (value - low) / span

    return place


def _ticks(low: float, high: float, count: int) -> list[float]:
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    candidates = [factor * 10.0**power for power in range(-9, 10) for factor in (1, 2, 5)]
    below = max((c for c in candidates if c <= low), default=low)
    above = min((c for c in candidates if c >= high), default=high)
    ticks = [c for c in candidates if below <= c <= above]
    if len(ticks) <= 8:
        return ticks
    return [c for c in ticks if c in (below, above) or math.log10(c) == round(math.log10(c))]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"
