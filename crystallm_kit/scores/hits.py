"""Whether samples have the property that was asked for: median, spread and hits of each target.

    target 150   requested 200, valid 131, unique 102, measured 131
                 median 142, middle half 128 to 160, hits 71 of 200 = 35.5 % (29.2 to 42.3)

A hit is a sample whose measured value is within a tolerance of the target. The denominator is what was
requested: failures, copies and what could not be measured are misses. Median and spread are of the measured
samples that are no copies.

Not here: measuring (bulk_modulus.py), drawing the samples (benchmark.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.matching import wilson

TOLERANCE = 0.2  # of the target


@dataclass(frozen=True)
class Measured:
    """One requested sample.

    Attributes:
        value: Measured on it; None where the sample is no valid crystal, or could not be measured.
        valid: Whether it is a crystal (Verdict), copies of earlier samples included.
        is_copy: Whether it is a copy of an earlier sample of the same target.
        is_known: Whether the training data hold its composition in its space group; None: not looked up.
    """

    value: float | None
    valid: bool
    is_copy: bool = False
    is_known: bool | None = None


@dataclass(frozen=True)
class TargetResult:
    """What came of one target.

    Attributes:
        target: In the property's unit; None: nothing was asked.
        requested, valid, unique, measured: Samples; valid and measured count copies, unique does not.
        median, first_quartile, third_quartile: Of the measured that are no copies; NaN without any.
        hits: Target asked about -> (hits, of these no copies, of these not known or None). Of a target its
            own alone.
    """

    target: float | None
    requested: int
    valid: int
    unique: int
    measured: int
    median: float
    first_quartile: float
    third_quartile: float
    hits: dict[float, tuple[int, int, int | None]]


def target_result(
    samples: Iterable[Measured],
    target: float | None,
    *,
    asked_about: Sequence[float] = (),
    tolerance: float = TOLERANCE,
) -> TargetResult:
    """Return the result of the samples of one target.

    Args:
        samples: Every request's, failures included.
        target: What was asked; None: nothing.
        asked_about: For samples without a target: the targets whose hits are counted.
        tolerance: Relative.

    Raises:
        EmptyInput: Without samples.
    """
    rows = list(samples)
    if not rows:
        raise EmptyInput(f"target {target}: no samples, so no rates")
    values = [row.value for row in rows if row.value is not None and not row.is_copy]
    low, middle, high = np.percentile(values, [25, 50, 75]) if values else (np.nan,) * 3
    return TargetResult(
        target=target,
        requested=len(rows),
        valid=sum(row.valid for row in rows),
        unique=sum(row.valid and not row.is_copy for row in rows),
        measured=sum(row.value is not None for row in rows),
        median=float(middle),
        first_quartile=float(low),
        third_quartile=float(high),
        hits={t: _hits(rows, t, tolerance) for t in (asked_about if target is None else (target,))},
    )


def _hits(rows: Sequence[Measured], target: float, tolerance: float) -> tuple[int, int, int | None]:
    found = [r for r in rows if r.value is not None and abs(r.value - target) <= tolerance * target]
    unique = [r for r in found if not r.is_copy]
    new = None if any(r.is_known is None for r in unique) else sum(not r.is_known for r in unique)
    return len(found), len(unique), new


def lines(results: Iterable[tuple[str, TargetResult]]) -> list[str]:
    """Return a Markdown table with a row for each (name, result), and for each target asked about."""
    head = (
        "samples", "requested", "valid", "unique", "measured", "median", "middle half",
        f"hits within {TOLERANCE:.0%}, no copies (95 % interval)", "of these not in the training data",
        "hits, copies counted",
    )  # fmt: skip
    table = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, r in results:
        spread = f"{r.first_quartile:.0f} to {r.third_quartile:.0f}"
        counts: tuple[object, ...] = (
            name,
            r.requested,
            r.valid,
            r.unique,
            r.measured,
            f"{r.median:.0f}",
            spread,
        )
        for target, (all_, unique, new) in r.hits.items():
            low, high = wilson(unique, r.requested)
            of = "" if r.target is not None else f" of {target:g}"
            cells = (
                *counts,
                f"{unique}{of} = {unique / r.requested:.1%} ({100 * low:.1f} to {100 * high:.1f})",
                "not looked up" if new is None else new,
                f"{all_ / r.requested:.1%}",
            )
            table.append("| " + " | ".join(map(str, cells)) + " |")
            counts = ("",) * len(counts)
    return table


def is_ordered(results: Sequence[TargetResult]) -> bool:
    """Tell whether the medians rise with the targets."""
    rising = sorted((r for r in results if r.target is not None), key=lambda r: r.target or 0.0)
    return all(a.median < b.median for a, b in pairwise(rising))
