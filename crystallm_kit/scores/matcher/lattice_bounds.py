"""Pairs of lattices that StructureMatcher can only turn down, told apart by arithmetic on their lengths.

    may_match(lattice, lattices, TOLERANCES["default"]) -> (M,) bool; False: certainly no match

Why it is certain. StructureMatcher scales both structures (of equal numbers of sites; others are turned down
before) to one volume, and then needs vectors a1, a2, a3 of the first structure's lattice, of which each is
shorter than (1 + ltol) times the vector b1, b2, b3 of the second structure's cell that it stands for, and
which span the first lattice (`Lattice.find_all_mappings`, determinant of the change of basis +-1); without
them it stops. Sort b by length: the k shortest have k independent vectors of the first lattice no longer than
(1 + ltol) |b_k| beside them, so the k-th successive minimum of the first lattice, in units of V^(1/3), is
below (1 + ltol) |b_k| in those units. Where that fails for a k, there is no match, whatever the atoms.

The successive minima of a lattice are the lengths of a Minkowski-reduced basis (three dimensions: van der
Waerden 1956; Nguyen, Stehle 2009, doi:10.1145/1597036.1597050). A cell that is not reduced so, whatever made
it, gets minima of 0, which rule out nothing. Rounding is met with a margin of 1e-6, far above the error of
the lengths (about 1e-14).

Not here: everything else that a match needs (structure_matcher.py).
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.scores.matcher.structure_matcher import Tolerances

_MARGIN = 1e-6  # relative
_FEW = np.array([-1.0, 0.0, 1.0])
# All x, y of the conditions |b + x a| >= |b| and |c + x a + y b| >= |c|, as rows that multiply (a, b, c).
_SECOND = np.array([(x, 1.0, 0.0) for x in _FEW])
_THIRD = np.array([(x, y, 1.0) for x, y in itertools.product(_FEW, _FEW)])


def may_match(
    first: NDArray[np.float64], seconds: NDArray[np.float64], tolerances: Tolerances
) -> NDArray[np.bool_]:
    """Tell which of several lattices a matcher has to look at; the others certainly do not match.

    Args:
        first: (3, 3) rows are vectors, angstrom: the matcher's first argument, the prediction.
        seconds: (M, 3, 3) its second arguments; all of as many sites as the first.
        tolerances: The matcher's.
    """
    return allowed(minima(first[None]), lengths(seconds), tolerances)


def may_match_as_first(
    firsts: NDArray[np.float64], second: NDArray[np.float64], tolerances: Tolerances
) -> NDArray[np.bool_]:
    """Tell the same with the roles exchanged: (M, 3, 3) first arguments, one (3, 3) second."""
    return allowed(minima(firsts), lengths(second[None]), tolerances)


def lengths(lattices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (M, 3) lengths of the cells' vectors, shortest first, in units of V^(1/3)."""
    scale = np.cbrt(np.abs(np.linalg.det(lattices)))
    found: NDArray[np.float64] = np.sort(np.sqrt((lattices * lattices).sum(axis=2)), axis=1) / scale[:, None]
    return found


def minima(lattices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (M, 3) successive minima in units of V^(1/3); 0 where the cell is not Minkowski-reduced."""
    squares = (lattices * lattices).sum(axis=2)
    ordered = np.take_along_axis(lattices, np.argsort(squares, axis=1, kind="stable")[:, :, None], axis=1)
    squares = np.sort(squares, axis=1)
    second = ((_SECOND @ ordered) ** 2).sum(axis=2).min(axis=1)
    third = ((_THIRD @ ordered) ** 2).sum(axis=2).min(axis=1)
    # A cell that breaks a condition within rounding has its minima within the margin of may_match.
    reduced = (second >= squares[:, 1] * (1 - 1e-9)) & (third >= squares[:, 2] * (1 - 1e-9))
    scale = np.cbrt(np.abs(np.linalg.det(lattices)))
    return np.where(reduced[:, None], np.sqrt(squares) / scale[:, None], 0.0)


def allowed(
    shortest: NDArray[np.float64], given: NDArray[np.float64], tolerances: Tolerances
) -> NDArray[np.bool_]:
    """Tell which may match from the minima of first arguments and the lengths of second ones.

    Args:
        shortest: (M, 3) or (1, 3), of the first arguments.
        given: (M, 3) or (1, 3), of the second ones.
        tolerances: The matcher's.
    """
    short_enough: NDArray[np.bool_] = shortest < (1 + tolerances.length) * (1 + _MARGIN) * given
    result: NDArray[np.bool_] = np.logical_and.reduce(short_enough, axis=1)
    return result
