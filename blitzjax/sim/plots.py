"""Line plots as inline SVG: no script, no font, no file beside the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_COLORS = ("#1b6ca8", "#d1495b", "#3c8d40", "#8e5bb5", "#e08e26", "#5c5c5c", "#16a3a3", "#b09500")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 500, 300, 52, 30, 26
_POINTS = 600  # per line; more are thinned out


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: list[tuple[float, float]]


def plot(title: str, unit: str, lines: Sequence[Line], log_x: bool = False, step: bool = False) -> str:
    """One <svg>. `log_x` drops points at or below zero; `step` holds each value until the next point."""
    kept = [Line(line.name, [p for p in line.points if p[0] > 0 or not log_x]) for line in lines]
    xs = [x for line in kept for x, _ in line.points] or [1.0]
    top = max((y for line in kept for _, y in line.points), default=0.0) or 1.0
    scale = math.log10 if log_x else float
    low, high = scale(min(xs)), scale(max(xs))
    span = high - low or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (_LEFT + (scale(x) - low) / span * (_WIDTH - _LEFT - 10),
                _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _BOTTOM - _TOP))

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" font-size="11">',
             f'<text x="{_LEFT}" y="14" font-weight="bold">{html.escape(title)}</text>']
    for k in range(5):
        value = low + span * k / 4
        x = _LEFT + k / 4 * (_WIDTH - _LEFT - 10)
        parts.append(f'<text x="{x:.0f}" y="{_HEIGHT - 14}" text-anchor="middle">'
                     f'{10 ** value if log_x else value:.3g} {unit}</text>')
        y = place(10 ** low if log_x else low, top * k / 4)[1]
        parts.append(f'<path d="M{_LEFT} {y:.0f}H{_WIDTH - 10}" stroke="#ddd"/>'
                     f'<text x="{_LEFT - 5}" y="{y + 4:.0f}" text-anchor="end">{top * k / 4:.3g}</text>')
    for k, line in enumerate(kept):
        color = _COLORS[k % len(_COLORS)]
        parts.append(f'<path d="{_path([place(*p) for p in _thin(line.points)], step)}" fill="none" stroke="{color}" '
                     f'stroke-width="1.5"/>')
        parts.append(f'<text x="{_WIDTH - 12}" y="{_TOP + 14 + 13 * k}" text-anchor="end" fill="{color}">'
                     f'{html.escape(line.name)}</text>')
    return "".join(parts) + "</svg>"


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of every run of points the highest, so that spikes stay."""
    size = max(1, -(-len(points) // _POINTS))
    return [max(points[k:k + size], key=lambda p: p[1]) for k in range(0, len(points), size)]


def _path(points: list[tuple[float, float]], step: bool) -> str:
    if not points:
        return "M0 0"
    moves = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    moves += [f"H{x:.1f}V{y:.1f}" if step else f"L{x:.1f} {y:.1f}" for x, y in points[1:]]
    return "".join(moves)
