"""MatterGen's matcher: two orderings of one alloy are the same crystal.

    is_same(Alloy(l1_0_cu_au), reduced(l1_1_cu_au))    -> True; StructureMatcher alone says False

Structures of one reduced formula are compared by StructureMatcher at its defaults (0.2, 0.3, 5 degrees).
Where that fails, elements of the first structure that could alloy (relative difference of atomic radii at
most 0.3, of Pauling electronegativities at most 1.0; taken together where one leads to the other) are mixed
on all their sites by their fractions, and the mixture is compared with the second structure, now with
supercells and subsets allowed, an element matching a site whose mixture holds it.

Contract: decisions are those of pymatgen 2026.10's matcher called so; the first part is compiled
(structure_matcher.py), the second is pymatgen itself. What it raises (a supercell that it cannot make) is no
match. An element without a radius or electronegativity (noble gases) mixes with nothing.

Not here: which pairs are compared (first_copies here, as in novelty/copies.py; novelty/index.py). Source:
MatterGen evaluation/utils/structure_matcher.py and dataset_matcher.py (MIT licence), read in 2026-11 in a
fork; what is called later there is the first argument. Another version there compares space groups first.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from itertools import combinations
from typing import Any

from pymatgen.core import Element, Lattice, Structure

from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, Reduced, fit, reduced

RADIUS_DIFFERENCE, ELECTRONEGATIVITY_DIFFERENCE = 0.3, 1.0
_DEFAULT = TOLERANCES["default"]


class Alloy:
    """An ordered structure, with what it looks like when its elements that could alloy are mixed."""

    def __init__(self, structure: Structure) -> None:
        """Take a structure; it is reduced and mixed when that is first asked for."""
        self.structure = structure

    @cached_property
    def form(self) -> Reduced:
        """Return the reduced form of the ordered structure."""
        return reduced(self.structure)

    @cached_property
    def mixture(self) -> Structure | None:
        """Return the reduced cell of the mixture; None where nothing could alloy."""
        groups = substitutable(tuple(self.structure.composition.elements))
        if not groups:
            return None
        fractions = {e: self.structure.composition.get_atomic_fraction(e) for group in groups for e in group}
        mixed = self.structure.copy()
        for group in groups:
            total = sum(fractions[element] for element in group)
            shared: Any = {element: fractions[element] / total for element in group}
            mixed.replace_species(dict.fromkeys(group, shared))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _matcher()._get_reduced_structure(mixed, True, True)  # type: ignore[no-any-return]


def is_same(first: Alloy, second: Reduced) -> bool:
    """Tell whether MatterGen's default matcher calls two ordered structures the same."""
    if first.form.formula != second.formula:
        return False
    if fit(first.form, second, _DEFAULT):
        return True
    if first.mixture is None:
        return False
    other = Structure(Lattice(second.lattice), second.numbers.tolist(), second.fractional)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(_matcher().fit(first.mixture, other, skip_structure_reduction=True))
        except ValueError:  # "after supercell creation, struct1 must have more sites than struct2"
            return False


def first_copies(alloys: Sequence[Alloy | None]) -> list[int | None]:
    """Return for each structure the index of the earliest kept one that is the same; None: it is kept.

    Compared are structures of one reduced formula, the later one first, whatever the number of sites.
    """
    kept: dict[str, list[int]] = {}
    copies: list[int | None] = []
    for i, alloy in enumerate(alloys):
        if alloy is None:
            copies.append(None)
            continue
        earlier = kept.setdefault(alloy.form.formula, [])
        first = next((j for j in earlier if _is_same_as(alloy, alloys[j])), None)
        copies.append(first)
        if first is None:
            earlier.append(i)
    return copies


@cache
def substitutable(elements: tuple[Element, ...]) -> tuple[tuple[Element, ...], ...]:
    """Return the groups of two or more elements that could alloy, each linked to the next by a pair."""
    groups: list[set[Element]] = []
    for pair in combinations(elements, 2):
        if could_alloy(*pair):
            joined = {*pair}.union(*(group for group in groups if group & {*pair}))
            groups = [group for group in groups if not group & joined] + [joined]
    return tuple(tuple(sorted(group, key=lambda e: e.Z)) for group in groups)


def could_alloy(one: Element, other: Element) -> bool:
    """Tell whether two elements are alike enough, by radius and electronegativity."""
    radii = _radius(one), _radius(other)
    if math.isnan(radii[0]) or math.isnan(radii[1]):
        return False
    difference = abs(radii[0] - radii[1]) / (sum(radii) / 2)
    return difference <= RADIUS_DIFFERENCE and abs(_electronegativity(one) - _electronegativity(other)) <= (
        ELECTRONEGATIVITY_DIFFERENCE
    )


def matches_among(alloy: Alloy, entries: Iterator[tuple[str, Reduced]]) -> Iterator[str]:
    """Yield the ids of the entries (NoveltyIndex.entries of the formula) that are the same crystal."""
    for identity, form in entries:
        if is_same(alloy, form):
            yield identity


def _is_same_as(later: Alloy, earlier: Alloy | None) -> bool:
    return earlier is not None and is_same(later, earlier.form)


def _radius(element: Element) -> float:
    return math.nan if element.atomic_radius is None else float(element.atomic_radius)


@cache
def _electronegativity(element: Element) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of noble gases, whose value is NaN
        return float(element.X)


@cache
def _matcher() -> Any:
    from pymatgen.analysis.structure_matcher import OrderDisorderElementComparator, StructureMatcher

    return StructureMatcher(
        _DEFAULT.length,
        _DEFAULT.site,
        _DEFAULT.angle_degrees,
        attempt_supercell=True,
        allow_subset=True,
        comparator=OrderDisorderElementComparator(),
    )
