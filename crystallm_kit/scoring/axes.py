"""What every picture of a report is made of: an <svg>, axes, marks, numbers as a person writes them.

    frame = Frame(190, (0, 20), (0, 0.3))
    frame.x(10), frame.y(0.15)                              where these values are in the picture
    svg("Density", 190, frame.axes("g/cm3"))                grid, ticks and their texts

Contract: a picture is one <svg> with a viewBox and no size of its own, text as text, a <title> that a screen
reader reads, and colours only through the classes of page/report.css (s0 ... s7 a set, ref the reference), so
that it follows dark mode and print. Every text that comes from data is escaped here.

Not here: the pictures (plots.py, histograms.py).
"""

import math
from dataclasses import dataclass
from html import escape

N_COLOURS = 8
WIDTH = 360
# One shape a colour, so that sets are told apart without it: disc, square, triangle, diamond.
MARK_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "M-4-4H4V4H-4Z",
    "M0-5 5 4H-5Z",
    "M0-5.5 5.5 0 0 5.5-5.5 0Z",
)


def number(value: float, digits: int = 3) -> str:
    """Return a number as a person writes it: 1,234; 0.0631; 12.5; 1.2e-05."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def svg(title: str, height: float, inner: str) -> str:
    """Return a picture, `WIDTH` wide in its own units."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {coordinate(height)}" role="img">'
        f"<title>{escape(title)}</title>{inner}</svg>"
    )


def coordinate(value: float) -> str:
    """Return a coordinate, to a tenth."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def short(text: str, most: int) -> str:
    """Return a text, escaped, cut to `most` characters."""
    return escape(text if len(text) <= most else text[: most - 1] + "…")


def written_unit(unit: str) -> str:
    """Return a unit as it is written: "angstrom3" is "Å³"."""
    unit = unit.replace("angstrom^3", "angstrom3").replace("cm^3", "cm3")
    return unit.replace("angstrom3", "Å³").replace("angstrom", "Å").replace("cm3", "cm³")


def percent(share: float) -> str:
    """Return a share in percent."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 99.95 or value == 0 else f"{value:.1f} %"


def colour_class(colour: int) -> str:
    """Return the class of the set with this number."""
    return f"s{colour % N_COLOURS}"


def mark(colour: int, x: float, y: float) -> str:
    """Return the mark of a set at a place."""
    place = f"translate({coordinate(x)} {coordinate(y)})"
    shape = MARK_SHAPES[colour % len(MARK_SHAPES)]
    return f'<path class="mark {colour_class(colour)}" transform="{place}" d="{shape}"/>'


@dataclass(frozen=True)
class Frame:
    """Two axes in a picture.

    Attributes:
        height: Of the picture.
        across, up: Range of the values on each axis.
        left, foot: Room for the ticks' texts.
        x_percent, y_percent: The values are shares, written in percent.
    """

    height: int
    across: tuple[float, float]
    up: tuple[float, float] = (0.0, 1.0)
    left: int = 40
    foot: int = 34
    x_percent: bool = False
    y_percent: bool = False

    def x(self, value: float) -> float:
        """Return where a value is on the axis to the right."""
        return self.left + _part(value, self.across) * (WIDTH - (20 if self.x_percent else 10) - self.left)

    def y(self, value: float) -> float:
        """Return where a value is on the axis upwards."""
        return self.height - self.foot - _part(value, self.up) * (self.height - self.foot - 10)

    def axes(self, unit: str = "") -> str:
        """Return both axes with lines across at the ticks of the one upwards."""
        end = coordinate(self.x(self.across[1]))
        lines = "".join(
            f'<path class="grid" d="M{self.left} {coordinate(self.y(tick))}H{end}"/>'
            f'<text class="tick" x="{self.left - 5}" y="{coordinate(self.y(tick) + 4)}" text-anchor="end">'
            f"{_tick_text(tick, self.y_percent)}</text>"
            for tick in ticks(*self.up, 4)
        )
        return lines + self.x_axis(unit)

    def x_axis(self, unit: str = "") -> str:
        """Return the axis to the right alone."""
        base, end = self.height - self.foot, coordinate(self.x(self.across[1]))
        text = (
            f'<text class="label" x="{end}" y="{self.height - 3}" text-anchor="end">'
            f"{escape(written_unit(unit))}</text>"
        )
        return f'<path class="axis" d="M{self.left} {base}H{end}"/>{text if unit else ""}' + "".join(
            f'<path class="axis" d="M{coordinate(self.x(tick))} {base}v4"/>'
            f'<text class="tick" x="{coordinate(self.x(tick))}" y="{base + 16}" text-anchor="middle">'
            f"{_tick_text(tick, self.x_percent)}</text>"
            for tick in ticks(*self.across)
        )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round values in a range, about so many."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / about * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _tick_text(value: float, is_share: bool) -> str:
    return f"{number(100 * value)} %" if is_share else number(value)


def _part(value: float, span: tuple[float, float]) -> float:
    return (value - span[0]) / ((span[1] - span[0]) or 1.0)
