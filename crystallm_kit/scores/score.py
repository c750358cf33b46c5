"""One number under the name of its protocol, with its counts and its interval.

    share("cdvae.comp_valid", 8325, 10_000)
    Score("cdvae.comp_valid", 0.8325, numerator=8325, denominator=10000, low=0.8250, high=0.8397, ...)

A name is "protocol.metric", as in scores/protocols.py; it is stable, and stands beside every number. What
cannot be computed is a Score too: its value is NaN, and its note says why.

Not here: what is counted (the other modules of this room).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.matching import wilson

_DRAWN_AT_ONCE = 2_000_000
Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        name: "protocol.metric".
        value: A share is in [0, 1], but where a protocol counts repeats; NaN: not computed.
        unit: "share", or that of the value: "eV/atom", "angstrom", "g/cm3"; "": none.
        numerator, denominator: Of a share; None for other numbers.
        over: What the denominator, or the mean, counts: "requested", "valid", "scored", "matched" ...
        low, high: Interval, 95 %; None: there is none.
        interval: How it was made: "wilson", "bootstrap"; "": there is none.
        better: "higher", "lower" or "": neither.
        note: What has to be known to read it; of a number that is not there, why.
    """

    name: str
    value: float
    unit: str = "share"
    numerator: int | None = None
    denominator: int | None = None
    over: str = "requested"
    low: float | None = None
    high: float | None = None
    interval: str = ""
    better: Better = ""
    note: str = ""

    @property
    def protocol(self) -> str:
        """Return the protocol's name: what stands before the first point."""
        return self.name.partition(".")[0]

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON: NaN as None."""
        plain = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Score":
        """Return the score that `as_dict` wrote."""
        return cls(**{**data, "value": math.nan if data["value"] is None else data["value"]})


def share(
    name: str, numerator: int, denominator: int, *, over: str = "requested", better: Better = "higher",
    note: str = "",
) -> Score:  # fmt: skip
    """Return a share with its Wilson interval. Raises EmptyInput where the denominator is 0."""
    if not denominator:
        raise EmptyInput(f"{name}: nothing {over}, so no share")
    low, high = wilson(numerator, denominator) if numerator <= denominator else (None, None)
    return Score(
        name, numerator / denominator, "share", numerator, denominator, over, low, high,
        "wilson" if low is not None else "", better, note,
    )  # fmt: skip


def mean(
    name: str, values: Sequence[float], *, unit: str, over: str, better: Better = "", note: str = "",
    n_draws: int = 1000, seed: int = 0,
) -> Score:  # fmt: skip
    """Return a mean with the percentile interval of a bootstrap. Raises EmptyInput without values."""
    if not len(values):
        raise EmptyInput(f"{name}: nothing {over}, so no mean")
    array = np.asarray(values, dtype=np.float64)
    generator, n = np.random.default_rng(seed), len(array)
    at_once = max(1, _DRAWN_AT_ONCE // n)  # a million values drawn 1,000 times are 8 GB
    blocks = [min(at_once, n_draws - start) for start in range(0, n_draws, at_once)]
    means = [array[generator.integers(n, size=(size, n))].mean(axis=1) for size in blocks]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Score(
        name, float(array.mean()), unit, None, len(array), over, float(low), float(high), "bootstrap", better,
        note,
    )  # fmt: skip


def not_computed(name: str, why: str, *, unit: str = "share", better: Better = "") -> Score:
    """Return the score of a number that could not be had, with the reason as its note."""
    return Score(name, math.nan, unit, better=better, note=why)
