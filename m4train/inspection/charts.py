"""Line charts as inline SVG: small, printable, and readable without a network or a script."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 36
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")


@dataclass(frozen=True)
class Line:
    """One series of (x, y) points; `dots` draws the points too, for series with few of them."""

    name: str
    points: list[tuple[float, float]]
    dots: bool = False


def line_chart(lines: list[Line], x_label: str, y_label: str, log: bool = False) -> str:
    """An SVG of the lines with axes, ticks and a legend; an empty string if no line has a finite point.

    `log` draws y on a logarithmic scale; points that are not positive are then left out.
    """
    lines = [Line(line.name, _drawable(line.points, log), line.dots) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks = _ticks(min(xs), max(xs), 6)
    y_ticks = _log_ticks(min(ys), max(ys)) if log else _ticks(min(0.0, min(ys)), max(ys), 5)
    x_of = _scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT, False)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y_of(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{x_of(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(x)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>'
    )
    legend = []  # comes last, to be read above the lines
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if line.dots:
            parts += [
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.2" fill="{colour}"/>' for x, y in line.points
            ]
        legend.append(_legend(number, line.name, colour))
    return "".join([*parts, *legend, "</svg>"])


def _legend(number: int, name: str, colour: str) -> str:
    y = TOP + 12 + 17 * number
    swatch = f'<rect x="{WIDTH - 190}" y="{y - 8}" width="14" height="3" fill="{colour}"/>'
    return f'{swatch}<text x="{WIDTH - 170}" y="{y - 3}">{escape(name)}</text>'


def _drawable(points: list[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]


def _scale(low: float, high: float, start: float, end: float, log: bool):
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
    return [c for c in candidates if below <= c <= above]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.10g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"
