"""Histograms as inline SVG, with the thresholds drawn in."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 160, 8, 22, 22


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
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{height:.1f}" class="column"/>'
        )
        if count:
            parts.append(f'<text x="{x + width / 2:.1f}" y="{y - 3:.1f}" text-anchor="middle">{count:,}</text>')
    every = 2 if len(counts) > 14 else 1  # so that labels do not run into each other
    bold = {f"{value:.6g}" for value in thresholds}  # written below
    for number, edge in enumerate(edges, 1):
        label = f"{edge:.6g}"
        if (
            label not in bold
            and number % every == 0
            and not any(abs(number - _place(edges, v)) < every for v in thresholds)
        ):
            parts.append(
                f'<text x="{LEFT + number * width:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{label}</text>'
            )
    for value in thresholds:
        x = LEFT + width * _place(edges, value)
        parts.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle"><tspan font-weight="700">{value:.6g}</tspan></text>'
        )
    return "".join([*parts, "</svg>"])


def _place(edges: Sequence[float], value: float) -> float:
    """Where a value lies on the axis, in bins from the left."""
    number = bisect.bisect_right(edges, value)
    if number == 0:  # its bin ends just after it, see `Rule.edges`
        return 1.0
    if number == len(edges):
        return float(number)
    low, high = edges[number - 1], edges[number]
    return number + (value - low) / (high - low)
