"""Distributions of a report as pictures: histograms, frequent categories, elements in the periodic table.

    numeric_picture("Density", [Series("DiffCSP", 0, {"edges": ..., "counts": ...})], reference, "g/cm3")

Contract: as in axes.py. A set's shares are of its own samples, so that sets of different sizes compare.

Not here: what is counted (stages of the run).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crystallm_kit.scoring.axes import Frame, colour_class, coordinate, mark, number, percent, short, svg

_MOST_CATEGORIES = 12
CRYSTAL_SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")


@dataclass(frozen=True)
class Series:
    """One set's distribution.

    Attributes:
        name: Of the set.
        colour: Its number, 0 the first.
        distribution: As in `report.json`: {"kind", "unit", "edges", "counts"} or {"kind", "unit", "values"}.
    """

    name: str
    colour: int
    distribution: Mapping[str, Any]


def numeric_picture(
    title: str, series: Sequence[Series], reference: Mapping[str, Any] | None, unit: str
) -> str:
    """Return histograms over one axis: the reference as an area, each set as a line of steps; "" without any.

    Each is the share of its samples in a bin; where the bins of two are not the same, that share divided by
    the bin's width.
    """
    named = [(name, d) for name, d in _named(series, reference) if sum(d["counts"])]
    if not named:
        return ""
    edges = named[0][1]["edges"]
    same = all(len(d["edges"]) == len(edges) and _close(d["edges"], edges) for _, d in named)
    top = max(max(_heights(d, same)) for _, d in named) * 1.04
    frame = Frame(190, _extent([d for _, d in named]), (0.0, top), y_percent=same)
    parts = [frame.axes(unit)]
    if reference and sum(reference["counts"]):
        parts.append(f'<path class="area" d="{_steps(reference, same, frame)}Z"/>')
    for one in series:
        if sum(one.distribution["counts"]):
            dashes = f"d{one.colour % 4}"
            path = _steps(one.distribution, same, frame)
            parts.append(f'<path class="line {colour_class(one.colour)} {dashes}" d="{path}"/>')
    means = "; ".join(f"mean of {name or 'the reference'} {number(_mean(d))}" for name, d in named)
    return svg(f"{title}: {means}", frame.height, "".join(parts))


def category_picture(
    title: str, series: Sequence[Series], reference: Mapping[str, Any] | None, labels: Mapping[str, str]
) -> str:
    """Return shares of the most frequent categories: reference a bar, each set a mark; "" without any.

    Args:
        title: What the categories are.
        series: The sets.
        reference: Its distribution, if there is one.
        labels: Category -> what is written for it, where that is not the category itself.
    """
    shares = {name: _shares(d) for name, d in _named(series, reference)}
    most = {c: max(s.get(c, 0.0) for s in shares.values()) for found in shares.values() for c in found}
    if not most:
        return ""
    first = next(iter(shares.values()))
    shown = sorted(most, key=lambda c: (-most[c], c))[:_MOST_CATEGORIES]
    if set(most) <= set(CRYSTAL_SYSTEMS):
        shown.sort(key=CRYSTAL_SYSTEMS.index)
    else:
        shown.sort(key=lambda c: (-first.get(c, 0.0), -most[c], c))
    step = 18
    frame = Frame(step * len(shown) + 30, (0.0, max(most.values()) * 1.03), left=104, foot=24, x_percent=True)
    parts = [frame.x_axis()]
    for k, category in enumerate(shown):
        middle = 6 + step * (k + 0.5)
        label = short(labels.get(category, category), 16)
        parts.append(f'<text x="98" y="{coordinate(middle + 4)}" text-anchor="end">{label}</text>')
        if "" in shares:
            width = frame.x(shares[""].get(category, 0.0)) - frame.left
            parts.append(
                f'<rect class="area" x="{frame.left}" y="{coordinate(middle - 6)}"'
                f' width="{coordinate(width)}" height="12"/>'
            )
        parts += [mark(s.colour, frame.x(shares[s.name].get(category, 0.0)), middle) for s in series]
    said = ", ".join(f"{labels.get(c, c)} {percent(first.get(c, 0.0))}" for c in shown[:5])
    return svg(f"{title}, most frequent: {said}", frame.height, "".join(parts))


# Row, column of each element that has its place in the table; La-Lu and Ac-Lr stand below it.
_PERIODS = (
    "H" + " ." * 16 + " He",
    "Li Be" + " ." * 10 + " B C N O F Ne",
    "Na Mg" + " ." * 10 + " Al Si P S Cl Ar",
    "K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr",
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe",
    "Cs Ba . Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn",
    "Fr Ra . Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og",
    ". . La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu .",
    ". . Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr .",
)


def elements_picture(name: str, colour: int | None, distribution: Mapping[str, Any], most: float) -> str:
    """Return a periodic table, each element as dark as its share of all element counts.

    Args:
        name: Of the set or the reference.
        colour: The set's number; None: the reference.
        distribution: Element -> count.
        most: The share that is fully dark, the same for all tables that are compared.
    """
    shares = _shares(distribution)
    side, parts = 20, []
    for row, line in enumerate(_PERIODS):
        for column, symbol in enumerate(line.split()):
            if symbol == ".":
                continue
            part = shares.get(symbol, 0.0)
            x, y = column * side, row * side + (5 if row > 6 else 0)
            # The eye sees small shares only if darkness goes with the root of the share.
            dark = math.sqrt(min(part / most, 1.0)) if most else 0.0
            text = ' class="over"' if dark > 0.6 else ""
            parts.append(
                f'<g><title>{symbol}: {percent(part)}</title><rect class="cell" x="{x + 0.5}" y="{y + 0.5}"'
                f' width="19" height="19" rx="2"/><rect class="fill" x="{x + 0.5}" y="{y + 0.5}" width="19"'
                f' height="19" rx="2" fill-opacity="{dark:.2f}"/><text{text} x="{x + 10}" y="{y + 13.5}"'
                f' text-anchor="middle">{symbol}</text></g>'
            )
    frequent = sorted(shares, key=lambda symbol: -shares[symbol])[:6]
    said = ", ".join(f"{symbol} {percent(shares[symbol])}" for symbol in frequent)
    kind = "ref" if colour is None else colour_class(colour)
    return svg(f"Elements of {name}: {said}", 186, f'<g class="{kind} table">{"".join(parts)}</g>')


def largest_share(distributions: Sequence[Mapping[str, Any]]) -> float:
    """Return the largest share of a category in any of them."""
    return max((share for d in distributions for share in _shares(d).values()), default=0.0)


# ---------------------------------------------------------------- counts


def _named(
    series: Sequence[Series], reference: Mapping[str, Any] | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (name, distribution) of all; the reference is called "" and comes first."""
    return ([("", reference)] if reference else []) + [(s.name, s.distribution) for s in series]


def _shares(distribution: Mapping[str, Any]) -> dict[str, float]:
    values = {str(k): float(v) for k, v in distribution["values"].items()}
    total = sum(values.values())
    return {k: v / total for k, v in values.items()} if total else {}


def _heights(distribution: Mapping[str, Any], same: bool) -> list[float]:
    total = sum(distribution["counts"])
    widths = [1.0 if same else b - a for a, b in itertools.pairwise(distribution["edges"])]
    return [count / total / width for count, width in zip(distribution["counts"], widths, strict=True)]


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(one, other, strict=True))


def _extent(distributions: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return where the bins that hold anything begin and end; a thin tail (0.2 % a side) is cut off."""
    lows, highs = [], []
    for d in distributions:
        total, before = sum(d["counts"]), 0.0
        filled = []
        for k, count in enumerate(d["counts"]):
            before += count
            if count and 0.002 * total <= before and before - count <= 0.998 * total:
                filled.append(k)
        lows.append(d["edges"][filled[0]])
        highs.append(d["edges"][filled[-1] + 1])
    return min(lows), max(highs)


def _steps(distribution: Mapping[str, Any], same: bool, frame: Frame) -> str:
    low, high = frame.across
    bins = zip(itertools.pairwise(distribution["edges"]), _heights(distribution, same), strict=True)
    inside = [(start, end, height) for (start, end), height in bins if end > low and start < high]
    path = f"M{coordinate(frame.x(max(inside[0][0], low)))} {coordinate(frame.y(0))}" if inside else ""
    for _, end, height in inside:
        path += f"V{coordinate(frame.y(height))}H{coordinate(frame.x(min(end, high)))}"
    return path + f"V{coordinate(frame.y(0))}" if inside else ""


def _mean(distribution: Mapping[str, Any]) -> float:
    middles = [(a + b) / 2 for a, b in itertools.pairwise(distribution["edges"])]
    total = sum(distribution["counts"])
    if not total:
        return math.nan
    return float(sum(m * c for m, c in zip(middles, distribution["counts"], strict=True)) / total)
