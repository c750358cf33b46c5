"""Which structures of a set are copies of others of the set, and which are known.

    first_copies([a, b, a_as_supercell, None], TOLERANCES["default"]) -> [None, None, 0, None]

Contract: what comes back is what comparing pair by pair with pymatgen's StructureMatcher gives, in each
protocol's order of arguments and with each protocol's rule of which pairs are compared at all:

    rule                         compared with              arguments         bucket            protocols
    first_copies                 kept earlier ones          (later, earlier)  reduced formula   kit, mattergen
    first_copies, cell_formula   kept earlier ones          (later, earlier)  cell formula      crystallm
    later_copies                 all later ones             (earlier, later)  reduced formula   lemat
    duplicate_pairs              every other one            both orders       reduced formula   genmetrics
    copies_by_hash               the kept of equal hash     -                 -                 crystallm_pi

The matcher is neither symmetric nor transitive, so the order of the set matters a little: of
Crystal-text-LLM's 3,221 published samples 2,196 are kept at the default tolerances, 2,198 of the reversed
list.

A pair is handed to the matcher but where the answer is certain without it: other formula; another number of
sites in the reduced cells (without supercells StructureMatcher asks for a bijection of sites);
lattices that cannot be mapped (matcher/lattice_bounds.py).

Not here: reduced cells (matcher/structure_matcher.py), the lasting index of a reference (index.py), shares
and counts under the protocols' names (scores.py), alloys (matcher/mattergen_disorder.py).
Sources: the peers' code for the orders of arguments: CrystaLLM bin/check_valid_unique_novel.py, MatterGen
evaluation/utils/dataset_matcher.py, lemat-genbench metrics/uniqueness_metric.py, matbench-genmetrics
core/utils/match.py, read in 2026-11.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.errors import UserError
from crystallm_kit.scores.matcher.lattice_bounds import (
    allowed,
    lengths,
    may_match,
    may_match_as_first,
    minima,
)
from crystallm_kit.scores.matcher.structure_matcher import Reduced, Tolerances, fit

Bucket = Literal["reduced_formula", "cell_formula"]
_FEW = 4  # forms of a bucket up to which bounds cost more than they save


def first_copies(
    forms: Sequence[Reduced | None],
    tolerances: Tolerances,
    *,
    bucket: Bucket = "reduced_formula",
    cell_formulas: Sequence[str | None] | None = None,
) -> list[int | None]:
    """Return for each form the index of the earliest kept one that it is a copy of; None: it is kept.

    Args:
        forms: In the order in which they were generated; None: nothing to compare (not a structure, or one
            that the protocol leaves out), which gives None.
        tolerances: The matcher's.
        bucket: "cell_formula" compares only within equal formulas of the cells as given, so that a supercell
            is no copy.
        cell_formulas: One for each form, for that bucket: `structure.composition.formula`.

    Raises:
        UserError: If the cell formulas are missing or of another number.
    """
    kept: dict[Hashable, list[int]] = {}
    copies: list[int | None] = []
    bounds = _Bounds(forms)
    for i, form in enumerate(forms):
        if form is None:
            copies.append(None)
            continue
        key = (form.formula, len(form.numbers), _cell_formula(i, forms, bucket, cell_formulas))
        earlier = kept.setdefault(key, [])
        first = next(bounds.matches(i, earlier, tolerances), None)
        copies.append(first)
        if first is None:
            earlier.append(i)
    return copies


def later_copies(forms: Sequence[Reduced | None], tolerances: Tolerances) -> list[int | None]:
    """Return for each form the index of the first later one that is equivalent to it; None: there is none.

    This is LeMat-GenBench's rule: a structure counts as unique if no later one of the set is equivalent, kept
    or not, with the earlier one as the matcher's first argument. None forms give None.
    """
    found: list[int | None] = [None] * len(forms)
    bounds = _Bounds(forms)
    for members in _buckets(forms):
        for place, i in enumerate(members[:-1]):
            found[i] = next(bounds.matches(i, members[place + 1 :], tolerances), None)
    return found


def duplicate_pairs(forms: Sequence[Reduced | None], tolerances: Tolerances) -> int:
    """Return how many ordered pairs of different members match: matbench-genmetrics' count of repeats."""
    bounds = _Bounds(forms)
    return sum(
        1
        for members in _buckets(forms)
        for i in members
        for _ in bounds.matches(i, [j for j in members if j != i], tolerances)
    )


def copies_by_hash(hashes: Sequence[str | None], ranks: Sequence[tuple[bool, float]]) -> list[int | None]:
    """Return for each member the index of the one that is kept of its hash; None: it is kept, or has no hash.

    Args:
        hashes: Such as fingerprints.bawl.bawl_hash makes; None: takes no part.
        ranks: The lowest of each hash is kept; of equal ones the first.
    """
    kept: dict[str, int] = {}
    for i, key in enumerate(hashes):
        if key is not None and (key not in kept or ranks[i] < ranks[kept[key]]):
            kept[key] = i
    best = [None if key is None else kept[key] for key in hashes]
    return [None if one == i else one for i, one in enumerate(best)]


def select_possible(
    form: Reduced,
    lattices: NDArray[np.float64],
    tolerances: Tolerances,
    *,
    form_is_second: bool = False,
) -> NDArray[np.intp]:
    """Return the rows of (M, 3, 3) lattices, of as many sites as the form, that the matcher has to see."""
    if len(lattices) <= _FEW:
        return np.arange(len(lattices))
    if form_is_second:
        return np.flatnonzero(may_match_as_first(lattices, form.lattice, tolerances))
    return np.flatnonzero(may_match(form.lattice, lattices, tolerances))


class _Bounds:
    """The forms of a set, with what matcher/lattice_bounds.py needs of them, worked out once."""

    def __init__(self, forms: Sequence[Reduced | None]) -> None:
        self._forms = forms
        lattices = np.array([np.eye(3) if form is None else form.lattice for form in forms]).reshape(-1, 3, 3)
        self._minima, self._lengths = minima(lattices), lengths(lattices)

    def matches(self, i: int, others: Sequence[int], tolerances: Tolerances) -> Iterator[int]:
        """Yield which of the others, of as many sites, match form i as second arguments, in order."""
        form = self._forms[i]
        if len(others) > _FEW:
            rows = np.array(others)
            others = rows[allowed(self._minima[i : i + 1], self._lengths[rows], tolerances)].tolist()
        for j in others:
            other = self._forms[j]
            if form is not None and other is not None and fit(form, other, tolerances):
                yield j


def _buckets(forms: Sequence[Reduced | None]) -> list[list[int]]:
    """Return which forms have one formula and number of sites, in order."""
    found: dict[Hashable, list[int]] = {}
    for i, form in enumerate(forms):
        if form is not None:
            found.setdefault((form.formula, len(form.numbers)), []).append(i)
    return list(found.values())


def _cell_formula(
    i: int, forms: Sequence[Reduced | None], bucket: Bucket, cell_formulas: Sequence[str | None] | None
) -> str | None:
    if bucket == "reduced_formula":
        return None
    if cell_formulas is None or len(cell_formulas) != len(forms):
        n = "no" if cell_formulas is None else str(len(cell_formulas))
        raise UserError(
            f"copies within equal cell formulas: {n} cell formulas for {len(forms)} forms; "
            "pass one for each, structure.composition.formula"
        )
    return cell_formulas[i]
