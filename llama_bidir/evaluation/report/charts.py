"""Charts as inline SVG. Colours and fonts are those of the page's style sheet; sizes are for a phone's width."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from .contents import Histogram

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 12, 40  # margins
NUM_TICKS = 5

Scale = Callable[[float], float]


def difference_chart(differences: Sequence[float], label: str) -> str:
    """One bar a query, falling: what the run gains is above the line, what it loses below."""
    low, high = min(0.0, *differences), max(0.0, *differences)
    if low == high:
        high = 1.0
    y = _linear(low, high, HEIGHT - BOTTOM, TOP)
    x = _linear(0, len(differences), LEFT, WIDTH - RIGHT)
    shapes = []
    for name, part in (
        ("gain", [max(0.0, value) for value in differences]),
        ("loss", [min(0.0, value) for value in differences]),
    ):
        if any(part):
            shapes.append(f'<path class="area {name}" d="{_steps(part, x, y)}"/>')
    shapes.append(f'<path class="axis" d="M{LEFT} {y(0):.1f}H{WIDTH - RIGHT}"/>')
    ticks = [(1, "1"), (len(differences), str(len(differences)))] if len(differences) > 1 else [(1, "1")]
    positions = [(x(number - 0.5), text) for number, text in ticks]
    return _chart(label, _y_axis(low, high, y) + _x_axis(positions, "queries, by difference"), shapes)


def depth_chart(curves: Mapping[str, Sequence[tuple[int, float]]], label: str) -> str:
    """One line a system over the rank depth, on a logarithmic axis."""
    values = [value for curve in curves.values() for _, value in curve]
    low, high = min(values), max(values)
    padding = max(0.02, (high - low) * 0.1)
    low, high = max(0.0, low - padding), min(1.0, high + padding)
    deepest = max(depth for curve in curves.values() for depth, _ in curve)
    log_x = _linear(0, math.log(deepest), LEFT + 6, WIDTH - RIGHT - 8)
    y = _linear(low, high, HEIGHT - BOTTOM, TOP)
    shapes = []
    for name, curve in zip(("run", "baseline"), curves.values(), strict=False):
        points = [(log_x(math.log(depth)), y(value)) for depth, value in curve]
        path = "L".join(f"{left:.1f} {top:.1f}" for left, top in points)
        shapes.append(f'<path class="line {name}" d="M{path}"/>')
        shapes += [f'<circle class="dot {name}" cx="{left:.1f}" cy="{top:.1f}" r="2.6"/>' for left, top in points]
    marks = [(log_x(math.log(depth)), str(depth)) for depth in (1, 2, 3, 5, 10, 20, 50, 100) if depth <= deepest]
    return _chart(label, _y_axis(low, high, y) + _x_axis(marks, "rank depth"), shapes)


def histogram_chart(histogram: Histogram, label: str) -> str:
    """The scores of relevant candidates (filled) and of all others (outlined), each as shares of their number."""
    high = max([*histogram.relevant, *histogram.others]) or 1.0
    y = _linear(0, high, HEIGHT - BOTTOM, TOP)
    x = _linear(0, len(histogram.relevant), LEFT, WIDTH - RIGHT)
    first, last = histogram.edges[0], histogram.edges[-1]
    score_x = _linear(first, last, LEFT, WIDTH - RIGHT)
    marks = [(score_x(tick), _number(tick)) for tick in _ticks(first, last)]
    shapes = [
        f'<path class="area run" d="{_steps(histogram.relevant, x, y)}"/>',
        f'<path class="outline" d="{_steps(histogram.others, x, y)}"/>',
    ]
    percent = "".join(_y_tick(y(tick), f"{_number(100 * tick)}%") for tick in _ticks(0, high))
    return _chart(label, percent + _x_axis(marks, "score"), shapes)


def _chart(label: str, axes: str, shapes: Sequence[str]) -> str:
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}"'
    return f"<svg {view}>{axes}{''.join(shapes)}</svg>"


def _y_axis(low: float, high: float, y: Scale) -> str:
    return "".join(_y_tick(y(tick), _number(tick)) for tick in _ticks(low, high))


def _y_tick(top: float, text: str) -> str:
    grid = f'<path class="grid" d="M{LEFT} {top:.1f}H{WIDTH - RIGHT}"/>'
    return f'{grid}<text class="end" x="{LEFT - 6}" y="{top + 4:.1f}">{text}</text>'


def _x_axis(marks: Sequence[tuple[float, str]], title: str) -> str:
    top = HEIGHT - BOTTOM + 16
    ticks = "".join(f'<text class="middle" x="{left:.1f}" y="{top}">{text}</text>' for left, text in marks)
    return f'{ticks}<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 6}">{title}</text>'


def _steps(values: Sequence[float], x: Scale, y: Scale) -> str:
    """The outline of bars without gaps; neighbours of equal height are one bar."""
    path = [f"M{x(0):.2f} {y(0):.2f}"]
    for number, value in enumerate(values):
        if number + 1 == len(values) or values[number + 1] != value:
            path.append(f"V{y(value):.2f}H{x(number + 1):.2f}")
    return f"{''.join(path)}V{y(0):.2f}Z"


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    rough = (high - low) / NUM_TICKS or 1.0
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    text = f"{value:.4g}"
    return "0" if text in ("-0", "0") else text.replace("-", "\N{MINUS SIGN}")
