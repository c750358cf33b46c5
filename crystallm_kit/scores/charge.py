"""Charge balance of a composition by the SMACT rule, on the frozen tables of SMACT 2.2.1.

A composition passes if it is one element, or consists of metals only, or if one oxidation state per element
can be chosen that makes it neutral without giving a positive state to an element at least as electronegative
as one with a negative state. Rock salt, NaCl, passes: Na +1 (electronegativity 0.93), Cl -1 (3.16). NaCl3
fails: one state serves all atoms of an element, and +1 -3 is not 0.

The tables decide: of the 10,000 compositions that DiffCSP published (MP-20), 8,325 pass with SMACT 2.2.1 and
8,273 with 3.0.1. 2.2.1 is the version that CDVAE pins, so it is what smact_2_2_1.json holds.

Loopholes kept, since the peers' numbers contain them: any single element and any alloy pass; an element
without a known electronegativity (Pm, Rn, Lr) passes as soon as it meets an ion of opposite sign.

Not here: bond valences or charges from geometry (a formula is all that is read).
Sources: Davies et al., Chem 1, 617 (2016); the rule as CDVAE applies it, Xie et al., arXiv:2110.06197.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import NamedTuple

from pymatgen.core import Element


class _Ion(NamedTuple):
    atoms: int
    states: tuple[int, ...]
    electronegativity: float | None


class SmactTables(NamedTuple):
    """SMACT 2.2.1's element tables: element -> oxidation states, element -> Pauling electronegativity,
    metals.
    """

    oxidation_states: Mapping[str, tuple[int, ...]]
    electronegativity: Mapping[str, float | None]
    metals: frozenset[str]


@cache
def smact_tables() -> SmactTables:
    """Return the frozen tables, elements 1-103."""
    text = resources.files("crystallm_kit.scores").joinpath("smact_2_2_1.json").read_text(encoding="utf-8")
    data = json.loads(text)
    elements = data["elements"]
    return SmactTables(
        oxidation_states={symbol: tuple(row[0]) for symbol, row in elements.items()},
        electronegativity={symbol: row[1] for symbol, row in elements.items()},
        metals=frozenset(data["metals"]),
    )


def is_charge_balanced(counts: Mapping[str, int], *, max_combinations: float = math.inf) -> bool:
    """Tell whether a composition passes the SMACT rule of the module docstring.

    The answer is cached by reduced composition.

    Args:
        counts: Element symbol -> atoms, at least 1 each; any multiple of the formula unit.
        max_combinations: Above this many choices of oxidation states the answer is False, as DiffCSP and
            CrystaLLM do at 1e7; infinite (CDVAE, MatterGen) by default. Single elements and alloys are
            decided before.

    Returns:
        True if it passes. Elements beyond 103 have no states: False, unless alone.
    """
    divisor = math.gcd(*counts.values())
    reduced = tuple(sorted((Element(symbol).Z, count // divisor) for symbol, count in counts.items()))
    return _passes(reduced, max_combinations)


@lru_cache(maxsize=200_000)
def _passes(composition: tuple[tuple[int, int], ...], max_combinations: float) -> bool:
    tables = smact_tables()
    symbols = [Element.from_Z(number).symbol for number, _ in composition]
    if len(symbols) == 1 or tables.metals.issuperset(symbols):
        return True
    ions = [
        _Ion(count, tables.oxidation_states.get(symbol, ()), tables.electronegativity.get(symbol))
        for symbol, (_, count) in zip(symbols, composition, strict=True)
    ]
    n_combinations = math.prod(len(ion.states) for ion in ions)
    if n_combinations == 0 or n_combinations > max_combinations:
        return False
    known = [(ion.electronegativity, ion) for ion in ions if ion.electronegativity is not None]
    if len(known) < len(ions):
        return _passes_by_enumeration(ions)
    return _passes_by_sums([ion for _, ion in sorted(known, key=lambda pair: pair[0])])


def _passes_by_sums(ions: Sequence[_Ion]) -> bool:
    """Decide a composition of elements sorted by electronegativity, all of them known.

    No state of the table is 0, and a cation may not reach the electronegativity of any anion, so the cations
    are the k least electronegative elements for some k, and k may not cut between equals. Which charges the
    two sides can sum to is a set each: small, where the product of all choices is not.
    """
    for k in range(1, len(ions)):
        if ions[k - 1].electronegativity == ions[k].electronegativity:
            continue
        positive = _sums([[state for state in ion.states if state > 0] for ion in ions[:k]], ions[:k])
        negative = _sums([[-state for state in ion.states if state < 0] for ion in ions[k:]], ions[k:])
        if not positive.isdisjoint(negative):
            return True
    return False


def _sums(choices: Sequence[Sequence[int]], ions: Sequence[_Ion]) -> set[int]:
    sums = {0}
    for states, ion in zip(choices, ions, strict=True):
        sums = {total + ion.atoms * state for total in sums for state in states}
    return sums


def _passes_by_enumeration(ions: Sequence[_Ion]) -> bool:
    """Decide a composition with an unknown electronegativity, where the order of the elements (by number)
    counts.
    """
    *first, last = ions
    for states in itertools.product(*(ion.states for ion in first)):
        charge = sum(ion.atoms * state for ion, state in zip(first, states, strict=True))
        state, rest = divmod(-charge, last.atoms)
        if rest == 0 and state in last.states and _pauling_as_smact(ions, (*states, state)):
            return True
    return False


def _pauling_as_smact(ions: Sequence[_Ion], states: Sequence[int]) -> bool:
    """SMACT 2.2.1 compares pairs in order: an unknown value raises at opposite signs, which the peers count
    as a pass, and fails at equal signs."""
    for (ion_a, state_a), (ion_b, state_b) in itertools.combinations(zip(ions, states, strict=True), 2):
        a, b = ion_a.electronegativity, ion_b.electronegativity
        if a is None or b is None:
            return state_a * state_b < 0
        if (state_a > 0 > state_b and a >= b) or (state_a < 0 < state_b and a <= b):
            return False
    return True
