"""Histograms as inline SVG, with the thresholds drawn in."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 170, 8, 22, 34


def histogram(edges: Sequence[float], counts: Sequence[int], thresholds: Sequence[float], name: str) -> str:
    """An SVG of counts below the first edge, between two, and from the last on.

    Bins are drawn equally wide, with their edges under them; a threshold within a bin is drawn at its share of it.
    """
    width = (WIDTH - 2 * LEFT) / len(counts)
    top = max([*counts, 1])
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">']
    for number, count in enumerate(counts):
        height = (HEIGHT - TOP - BOTTOM) * count / top
        x, y = LEFT + number * width, HEIGHT - BOTTOM - height
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{height:.1f}" fill="#2563eb"/>'
        )
        if count:
            parts.append(f'<text x="{x + width / 2:.1f}" y="{y - 3:.1f}" text-anchor="middle">{count:,}</text>')
    for number, edge in enumerate(edges, 1):
        parts.append(
            f'<text x="{LEFT + number * width:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{edge:.6g}</text>'
        )
    for value in thresholds:
        x = LEFT + width * _place(edges, value)
        parts.append(
            f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}" stroke="#c0362c" stroke-width="1.8" stroke-dasharray="4 3"/>'
        )
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="middle"><tspan font-weight="700">{value:.6g}</tspan></text>'
        )
    return "".join([*parts, "</svg>"])


def _place(edges: Sequence[float], value: float) -> float:
    """Where a value lies on the axis, in bins from the left."""
    number = bisect.bisect_right(edges, value)
    if number == 0 or number == len(edges):
        return float(number)
    low, high = edges[number - 1], edges[number]
    return number + (value - low) / (high - low)
