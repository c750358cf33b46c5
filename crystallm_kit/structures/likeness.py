"""How alike two elements are when crystals form, learned from crystals.

    likeness = learn_likeness(families)
    likeness.log_kernel[11, 19]     -> -1.2    Na and K take the same places
    likeness.log_kernel[11, 17]     -> -60     Na and Cl do not

Every element is a point; the log-likeness of two is minus their squared distance. The points start from what
the periodic table says (Pettifor's order as pymatgen's Mendeleev number, electronegativity, radius, row,
column, f-block) and are moved until crystals are best told from the others of their composition: each crystal
in turn is left out, the others vote for the structure type and for the places of the elements in it, each
with its likeness, and the log share of the votes for the true type is raised (nearest neighbours with a
learned metric: Goldberger et al. 2004, Neighbourhood Components Analysis).

Not here: which element replaces which when new training crystals are made (substitution.py), the votes of a
new composition (templates.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, permutations, product
from warnings import catch_warnings, simplefilter

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_ATOMIC_NUMBER = 103
# Chosen on mp_val by mp_train + wbm_train. Mean log share of the true type, over binaries and ternaries:
# -1.70 by distance in Mendeleev numbers / 3, -1.80 where the points start, -1.46 after 500 steps (12 s),
# -1.50 after 200, with which the first guess matched 72.2 % of all 1,000 instead of 73.6 %.
STEPS = 500
_TARGETS_OF_A_STEP = 192
_TARGETS_OF_A_FAMILY = 24  # in one step
_MOST_ORDERS = 24
_RATE = 0.03
_DECAY = 1e-4  # pulls an element of few crystals to where the table puts it
_DIMENSIONS = 12
# Least log vote, of crystals that are not alike: what forms with everything may form with anything.
FLOOR = -12.0
COUNT_POWER = 0.45  # how much more an element of many atoms weighs in a composition; 1: in proportion


@dataclass(frozen=True, eq=False)
class Family:
    """The crystals whose primitive cells hold the same counts of atoms, such as (1, 1, 3).

    Attributes:
        counts: (k,) atoms of the elements, increasing.
        elements: (M, k) atomic numbers in the order of `counts`; elements of one count in the order of the
            places that they take in the type.
        kinds: (M,) structure type, counted from 0.
        entries: (M,) crystal; one whose type looks the same with two elements exchanged has a row for each.
        formulas: (M,) number of the reduced formula.
        groups: (M,) space group number.
    """

    counts: tuple[int, ...]
    elements: IntArray
    kinds: IntArray
    entries: IntArray
    formulas: IntArray
    groups: IntArray


@dataclass(frozen=True, eq=False)
class Likeness:
    """Points of the elements.

    Attributes:
        points: (104, D) by atomic number.
    """

    points: FloatArray

    @property
    def log_kernel(self) -> FloatArray:
        """Return (104, 104): 0 for an element and itself, the lower the less alike."""
        return _log_kernel(self.points)


def log_votes(log_kernel: FloatArray, elements: IntArray, family: Family) -> FloatArray:
    """Return (P, M) log votes of a family's rows for P ways (P, k) to put elements on its places."""
    votes: FloatArray = np.logaddexp(_log_likeness(log_kernel, elements, family), FLOOR)
    return votes


def orders(counts: dict[int, int]) -> Iterator[tuple[int, ...]]:
    """Yield the orders of atomic numbers by increasing count: all ways to arrange those of one count."""
    by_count = sorted(counts, key=lambda z: (counts[z], z))
    equal = [permutations(list(group)) for _, group in groupby(by_count, key=lambda z: counts[z])]
    for parts in product(*equal):
        yield tuple(z for part in parts for z in part)


def count_weights(counts: Sequence[int]) -> FloatArray:
    """Return (k,) weights of the elements in a composition, 1 on average."""
    powers: FloatArray = np.asarray(counts, dtype=np.float64) ** COUNT_POWER
    weights: FloatArray = powers / powers.mean()
    return weights


def learn_likeness(families: Sequence[Family], *, steps: int = STEPS, seed: int = 0) -> Likeness:
    """Return the likeness under which crystals that are left out are best told by the others.

    Args:
        families: All crystals; those with one structure type teach nothing.
        steps: Of gradient descent (Adam).
        seed: Of the crystals that are left out at each step.
    """
    start = _periodic_table()
    taught = [f for f in families if f.kinds.max() > 0 and len(next(_orders_of(f, 0))) <= _MOST_ORDERS]
    if not taught:
        return Likeness(start)
    rng = np.random.default_rng(seed)
    points = start + np.where(start.any(0), 0.0, rng.normal(0, 0.05, start.shape))
    first = points.copy()
    share = np.array([len(np.unique(f.entries)) for f in taught], dtype=np.float64)
    wanted = min(_TARGETS_OF_A_STEP, sum(len(f.entries) for f in taught))
    share /= share.sum()
    mean, square = np.zeros_like(points), np.zeros_like(points)
    for step in range(1, steps + 1):
        kernel = _log_kernel(points)
        gradient, n_targets = np.zeros_like(kernel), 0
        while n_targets < wanted:
            family = taught[int(rng.choice(len(taught), p=share))]
            rows = rng.permutation(len(family.entries))[:_TARGETS_OF_A_FAMILY]
            gradient += _gradient(kernel, family, rows)
            n_targets += len(rows)
        both = (gradient + gradient.T) / n_targets
        slope = -2 * (both.sum(1)[:, None] * points - both @ points) + 2 * _DECAY * (points - first)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        rate = _RATE if step <= 0.7 * steps else 0.3 * _RATE
        corrected = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        points = points - rate * mean / (1 - 0.9**step) / corrected
    return Likeness(points)


def _orders_of(family: Family, *rows: int) -> Iterator[IntArray]:
    """Yield (P, k) for each row: every way to put its elements on the places."""
    for row in rows:
        counts = dict(zip(family.elements[row].tolist(), family.counts, strict=True))
        yield np.array(list(orders(counts)))


def _log_likeness(kernel: FloatArray, elements: IntArray, family: Family) -> FloatArray:
    weights = count_weights(family.counts)
    total = np.zeros((*elements.shape[:-1], len(family.elements)))
    for place, weight in enumerate(weights):
        # rows of the kernel for few elements, columns for many: the smaller index first
        total += weight * kernel[elements[..., place]][..., family.elements[:, place]]
    return total


def _gradient(kernel: FloatArray, family: Family, rows: IntArray) -> FloatArray:
    """Return (104, 104) what raises minus the log share of the true types of some rows, left out in turn."""
    size = len(kernel)
    elements = np.array(list(_orders_of(family, *rows.tolist())))  # (B, P, k)
    plain = _log_likeness(kernel, elements, family)  # (B, P, M)
    votes = np.logaddexp(plain, FLOOR)
    same = (family.formulas[rows][:, None] == family.formulas) & (
        family.groups[rows][:, None] == family.groups
    )
    votes = np.where(same[:, None], -np.inf, votes)
    # The row's own order is its true place; for what symmetry exchanges, the other rows of the others vote.
    is_place = (elements == family.elements[rows][:, None]).all(-1)  # (B, P)
    is_kind = family.kinds[rows][:, None] == family.kinds  # (B, M)
    true = np.where(is_place[:, :, None] & is_kind[:, None], votes, -np.inf)
    has_both = np.isfinite(true).any((1, 2))
    if not has_both.any():
        return np.zeros((size, size))
    pull = (_softmax(votes[has_both]) - _softmax(true[has_both])) / (1 + np.exp(FLOOR - plain[has_both]))
    total = np.zeros(size * size)
    for place, weight in enumerate(count_weights(family.counts)):
        pairs = elements[has_both][:, :, place][..., None] * size + family.elements[:, place]
        total += weight * np.bincount(pairs.ravel(), pull.ravel(), size * size)
    return total.reshape(size, size)


def _softmax(votes: FloatArray) -> FloatArray:
    """Return the shares (B, P, M) of votes in the sum over P and M."""
    powers = np.exp(votes - votes.max((1, 2), keepdims=True))
    shares: FloatArray = powers / powers.sum((1, 2), keepdims=True)
    return shares


def _log_kernel(points: FloatArray) -> FloatArray:
    squares = (points**2).sum(1)
    kernel: FloatArray = -np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0.0)
    np.fill_diagonal(kernel, 0.0)
    return kernel


@lru_cache(maxsize=1)
def _periodic_table() -> FloatArray:
    """Return (104, D) where the elements start; the last columns are free."""
    from pymatgen.core import Element

    points = np.zeros((MAX_ATOMIC_NUMBER + 1, _DIMENSIONS))
    with catch_warnings():
        simplefilter("ignore")  # noble gases without an electronegativity
        for z in range(1, MAX_ATOMIC_NUMBER + 1):
            e = Element.from_Z(z)
            x = float(e.X) if e.X == e.X else 0.0  # NaN is not itself
            radius = float(e.atomic_radius or 1.5)
            is_f = float(57 <= z <= 71 or z >= 89)
            points[z, :6] = (e.mendeleev_no / 6, 2 * x, 2 * radius, 0.5 * e.row, 0.2 * e.group, is_f)
    return points * 0.5
