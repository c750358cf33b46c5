"""The funnel, parity and calibration of a report as pictures.

    funnel_picture([["requested", 600], ["parsed", 590], ...], "DiffCSP", 0)    -> "<svg ...>...</svg>"
    parity_picture({"title": ..., "x": [...], "y": [...]}, 0)                   -> picture, sentence

Contract: as in axes.py. Pairs that are not two finite numbers are left out, and the sentence counts the rest.

Not here: distributions (histograms.py); structures (gallery.py).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from crystallm_kit.scores.matching import wilson
from crystallm_kit.scoring.axes import (
    WIDTH,
    Frame,
    colour_class,
    coordinate,
    mark,
    number,
    percent,
    short,
    svg,
    written_unit,
)

_MOST_POINTS = 1500  # of a scatter: more only make the file large
_FEW = 12  # so many asked values at most are shown as medians with their middle half


def funnel_picture(stages: Sequence[Sequence[Any]], name: str, colour: int) -> str:
    """Return a funnel: a bar a stage, as wide as its count, and what was lost on the way to it.

    Args:
        stages: [stage, count] from what was requested down.
        name: Of the set.
        colour: The set's number.
    """
    total = max((int(count) for _, count in stages), default=0) or 1
    middle, step, bar = 166, 34, 21
    parts: list[str] = []
    before, width_before = 0, 0.0
    for k, (stage, count) in enumerate(stages):
        width, top = max(150 * int(count) / total, 1.0), 2 + k * step
        left = coordinate(middle - width / 2)
        if k:
            parts.append(
                f'<path class="slope" d="M{coordinate(middle - width_before / 2)} {top - step + bar}'
                f'h{coordinate(width_before)}L{coordinate(middle + width / 2)} {top}H{left}Z"/>'
            )
        lost = f'<text class="lost" x="294" y="{top - 1}" text-anchor="end">−{before - int(count):,}</text>'
        parts.append(
            f'<rect class="fill" x="{left}" y="{top}" width="{coordinate(width)}" height="{bar}" rx="3"/>'
            f'<text x="80" y="{top + 15}" text-anchor="end">{short(str(stage), 13)}</text>'
            f'<text class="strong" x="294" y="{top + 15}" text-anchor="end">{int(count):,}</text>'
            f'<text class="quiet" x="{WIDTH - 2}" y="{top + 15}" text-anchor="end">'
            f"{percent(int(count) / total)}</text>{lost if k and before > int(count) else ''}"
        )
        before, width_before = int(count), width
    said = ", ".join(f"{stage} {count:,}" for stage, count in stages)
    inner = f'<g class="{colour_class(colour)}">{"".join(parts)}</g>'
    return svg(f"Funnel of {name}: {said}", step * len(stages), inner)


def parity_picture(plot: Mapping[str, Any], colour: int) -> tuple[str, str]:
    """Return a plot of y over x, and a sentence with its numbers; "" where there is no pair of numbers.

    A few asked values with many answers each become medians with their middle halves; "kind": "calibration"
    (x a probability, y 0 or 1) becomes ten shares with Wilson intervals; everything else points.
    """
    pairs = [(float(a), float(b)) for a, b in zip(plot["x"], plot["y"], strict=True) if _is_pair(a, b)]
    if not pairs:
        return "", "no pair of numbers"
    if plot.get("kind") == "calibration":
        return _calibration(plot, pairs, colour)
    grouped: dict[float, list[float]] = defaultdict(list)
    for a, b in pairs:
        grouped[a].append(b)
    span = _square(pairs)
    frame = Frame(300, span, span, left=50, foot=40)
    parts = [_labelled(frame, plot)]
    unit = f" {written_unit(str(plot['unit']))}" if plot.get("unit") else ""
    difference = sum(abs(b - a) for a, b in pairs) / len(pairs)
    said = f"{len(pairs):,} pairs; mean absolute difference {number(difference)}{unit}"
    correlation = _correlation(pairs)
    if correlation is not None:
        said += f"; correlation {correlation:.3f}"
    if len(grouped) <= _FEW and len(pairs) >= 5 * len(grouped):
        parts += [_whisker(frame, a, *_quartiles(found), colour) for a, found in sorted(grouped.items())]
        said += "; points are medians, bars the middle half"
    else:
        inside = [(a, b) for a, b in pairs if all(span[0] <= value <= span[1] for value in (a, b))]
        shown = inside[:: math.ceil(len(inside) / _MOST_POINTS)]
        dots = "".join(f"M{coordinate(frame.x(a))} {coordinate(frame.y(b))}h0" for a, b in shown)
        parts.append(f'<path class="dots {colour_class(colour)}" d="{dots}"/>')
        if len(shown) < len(pairs):
            said += f"; {len(shown):,} of them drawn ({len(pairs) - len(inside):,} lie outside)"
    return svg(f"{plot['title']}: {said}", frame.height, "".join(parts)), said


def _calibration(
    plot: Mapping[str, Any], pairs: Sequence[tuple[float, float]], colour: int
) -> tuple[str, str]:
    frame = Frame(300, (0.0, 1.0), (0.0, 1.0), left=50, foot=40, x_percent=True, y_percent=True)
    parts = [_labelled(frame, plot)]
    grouped: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for a, b in pairs:
        grouped[min(max(int(a * 10), 0), 9)].append((a, b))
    error = 0.0
    for _, found in sorted(grouped.items()):
        told, came = sum(a for a, _ in found) / len(found), sum(b for _, b in found)
        low, high = wilson(round(came), len(found))
        parts.append(_whisker(frame, told, low, came / len(found), high, colour))
        error += abs(came / len(found) - told) * len(found) / len(pairs)
    said = f"{len(pairs):,} cases in {len(grouped)} groups; mean calibration error {percent(error)}"
    return svg(f"{plot['title']}: {said}", frame.height, "".join(parts)), said


def _labelled(frame: Frame, plot: Mapping[str, Any]) -> str:
    """Return the axes, their labels, and the line on which both are equal."""
    unit = f", {written_unit(str(plot['unit']))}" if plot.get("unit") else ""
    (x0, x1), (y0, y1) = frame.across, frame.up
    middle, centre = (frame.x(x0) + frame.x(x1)) / 2, (frame.y(y0) + frame.y(y1)) / 2
    return (
        f'{frame.axes()}<path class="diagonal" d="M{coordinate(frame.x(x0))} {coordinate(frame.y(y0))}'
        f'L{coordinate(frame.x(x1))} {coordinate(frame.y(y1))}"/>'
        f'<text class="label" x="{coordinate(middle)}" y="{frame.height - 4}" text-anchor="middle">'
        f"{short(str(plot['x_label']) + unit, 48)}</text>"
        f'<text class="label" transform="translate(11 {coordinate(centre)}) rotate(-90)"'
        f' text-anchor="middle">'
        f"{short(str(plot['y_label']) + unit, 40)}</text>"
    )


def _whisker(frame: Frame, at: float, low: float, middle: float, high: float, colour: int) -> str:
    x = coordinate(frame.x(at))
    top, bottom, centre = (
        frame.y(min(max(value, frame.up[0]), frame.up[1])) for value in (high, low, middle)
    )
    path = f"M{x} {coordinate(bottom)}V{coordinate(top)}m-4 0h8M{x} {coordinate(bottom)}m-4 0h8"
    return f'<path class="whisker {colour_class(colour)}" d="{path}"/>' + mark(colour, frame.x(at), centre)


def _is_pair(a: Any, b: Any) -> bool:
    return a is not None and b is not None and math.isfinite(a) and math.isfinite(b)


def _square(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return one range for both axes; beyond it lie at most 1 % of the values."""
    values = sorted(value for pair in pairs for value in pair)
    cut = len(values) // 200
    low, high = values[cut], values[-1 - cut]
    room = 0.04 * (high - low) or 1.0
    return (min(0.0, low) if 0 <= low < 0.4 * high else low - room), high + room


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return at(0.25), at(0.5), at(0.75)


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    n = len(pairs)
    mean_x, mean_y = sum(a for a, _ in pairs) / n, sum(b for _, b in pairs) / n
    xx = sum((a - mean_x) ** 2 for a, _ in pairs)
    yy = sum((b - mean_y) ** 2 for _, b in pairs)
    if not (xx and yy):
        return None
    return sum((a - mean_x) * (b - mean_y) for a, b in pairs) / math.sqrt(xx * yy)
