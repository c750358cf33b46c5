"""Structure prediction: does a candidate match the truth, and how often over many targets?

The protocol `csp` is the one of DiffCSP, CrystaLLM and FlowMM: pymatgen's StructureMatcher with ltol 0.3,
stol 0.5, angle_tol 10 degrees; the RMSE is `get_rms_dist`, divided by (V/N)^(1/3). The denominator is all
targets. There is no validity gate here (peers that gate count fewer matches; a number with and one without do
not compare).

Not here: how candidates are made and ordered (generation.py); uniqueness (funnel.py).
Source: Jiao et al. 2023 (DiffCSP), arXiv:2309.04475.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pymatgen.core import Structure

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.matcher import structure_matcher


@dataclass(frozen=True)
class MatchRate:
    """Share of targets that one of the first k candidates matches.

    Attributes:
        k: Candidates looked at.
        matched, targets: Numerator and denominator.
        rmse: Mean over matched targets of the smallest normalised RMS distance; NaN without a match.
        low, high: Wilson interval of the share, 95 %.
    """

    k: int
    matched: int
    targets: int
    rmse: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return "63.2% (58.9% to 67.3%; 316/500), RMSE 0.0580"."""
        share = self.matched / self.targets
        interval = f"{self.low:.1%} to {self.high:.1%}"
        return f"{share:.1%} ({interval}; {self.matched}/{self.targets}), RMSE {self.rmse:.4f}"


def rms_distances(candidates: Sequence[Structure | None], truth: Structure) -> list[float | None]:
    """Return the normalised RMS distance of each candidate to the truth; None where it does not match.

    A candidate whose cell is none (flat, not finite) matches nothing.

    Raises:
        UserError: If the truth has no cell, or shared sites.
    """
    return structure_matcher.rms_distances(
        structure_matcher.reduce_many(candidates),
        structure_matcher.reduced(truth),
        structure_matcher.TOLERANCES["csp"],
    )


def match_rate(distances: Sequence[Sequence[float | None]], k: int) -> MatchRate:
    """Return the match rate over targets, each given as the distances of its ordered candidates.

    Raises:
        EmptyInput: Without targets.
    """
    if not distances:
        raise EmptyInput("match rate: no targets, so no rate")
    best = [min((d for d in row[:k] if d is not None), default=None) for row in distances]
    matched = [d for d in best if d is not None]
    low, high = wilson(len(matched), len(distances))
    rmse = sum(matched) / len(matched) if matched else math.nan
    return MatchRate(k, len(matched), len(distances), rmse, low, high)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share (Wilson 1927).

    Raises:
        EmptyInput: Without trials.
    """
    if not trials:
        raise EmptyInput("interval of a share: no trials, so no share")
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = (
        z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    )
    return max(0.0, centre - half), min(1.0, centre + half)
