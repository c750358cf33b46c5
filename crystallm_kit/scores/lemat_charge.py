"""LeMat-GenBench's rule for charge neutrality, as far as a composition decides it, on frozen tables.

The peer's rule, in its order; the first that decides:
    1  SMACT's metallicity above 0.7                            -> neutral
    2  every bond-valence sum is 0                              -> neutral      (needs the structure)
    3  pymatgen's bond-valence analyzer finds oxidation states  -> neutral      (needs the structure)
    4  known states, of all atoms of an element within 1, add up to 0
    5  the same from all states known at all, only if the best choice rises against electronegativity
No step but the last says "not neutral". So the order does not matter, and the composition is asked first: of
DiffCSP's 10,000 samples it decides 8,854, and steps 2 and 3 are left to the rest. One exception, kept: an
element that has states but no prior (At, Fr, Fm, Md, No, Lr) makes the peer's step 4 fail, which counts as
not neutral unless steps 1 to 3 passed.

    NaCl          step 4: +1 and -1
    Fe3O4         step 4: 2 + 3 + 3 - 4 * 2, within 1 of each other
    Cu3Au         step 1: metallicity 0.85

Not here: steps 2 and 3 (lemat.py); SMACT's rule (charge.py), which allows one state per element.
Sources: LeMaterial/lemat-genbench (arXiv:2512.04562), metrics/validity_metrics.py and
utils/oxidation_state.py; smact.metallicity 4.0.2. Tables and their sources: lemat_tables.json.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import NamedTuple

import numpy as np

METALLIC = 0.7
_BEYOND_SMACT = frozenset("Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og".split())

Counts = tuple[tuple[str, int], ...]  # element symbol, atoms


class LematElement(NamedTuple):
    """What the rule knows of one element.

    Attributes:
        prior: Oxidation states of step 4.
        known: Of step 5.
        bond_valence: States that the bond-valence analyzer can give; without any it refuses the structure.
        electronegativity: Pauling's, as pymatgen has it; None: unknown.
        smact_electronegativity, valence_electrons: As SMACT has them; None: unknown.
    """

    prior: tuple[int, ...]
    known: tuple[int, ...]
    bond_valence: tuple[int, ...]
    electronegativity: float | None
    smact_electronegativity: float | None
    valence_electrons: int | None


class LematTables(NamedTuple):
    """The frozen tables.

    Attributes:
        elements: Symbol -> what is known, for elements 1-118.
        without_prior: Elements that make step 4 fail.
        metals, d_block: As SMACT counts them.
    """

    elements: Mapping[str, LematElement]
    without_prior: frozenset[str]
    metals: frozenset[str]
    d_block: frozenset[str]


@cache
def lemat_tables() -> LematTables:
    """Return the frozen tables."""
    text = resources.files("crystallm_kit.scores").joinpath("lemat_tables.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return LematTables(
        {
            s: LematElement(tuple(p), tuple(k), tuple(b), *rest)
            for s, (p, k, b, *rest) in data["elements"].items()
        },
        frozenset(data["without_prior"]),
        frozenset(data["metals"]),
        frozenset(data["d_block"]),
    )


@lru_cache(maxsize=200_000)
def neutral_by_composition(reduced: Counts) -> bool | None:
    """Tell whether steps 1, 4 and 5 call a composition neutral.

    Args:
        reduced: Counts without a common divisor, in any fixed order.

    Returns:
        True: neutral, whatever the structure. None: steps 2 and 3 decide; without them it is not neutral.
    """
    score = metallicity(reduced)
    if score is not None and score > METALLIC:
        return True
    tables = lemat_tables()
    if any(symbol in tables.without_prior for symbol, _ in reduced):
        return None
    if can_be_neutral(reduced, [tables.elements[symbol].prior for symbol, _ in reduced]):
        return True
    return True if _falls_with_electronegativity(reduced) else None


def metallicity(counts: Counts) -> float | None:
    """Return SMACT's metallicity score, 0 to 1; None where SMACT does not know an element (beyond 103).

    Shares of metals and d-block elements, the number of metals, the distance of the mean valence electron
    count from 8, and the mean difference of electronegativities, weighted 0.3, 0.2, 0.2, 0.15, 0.15.
    """
    tables = lemat_tables()
    found = [tables.elements[symbol] for symbol, _ in counts]
    if any(symbol in _BEYOND_SMACT for symbol, _ in counts):
        return None
    total = sum(n for _, n in counts)
    valence, pauling = 0.5, 0.5
    electrons = [element.valence_electrons for element in found]
    if None not in electrons:
        mean = sum(n * (e or 0) for (_, n), e in zip(counts, electrons, strict=True)) / total
        valence = 1.0 - abs(mean - 8.0) / 8.0
    values = [
        element.smact_electronegativity for element in found if element.smact_electronegativity is not None
    ]
    if len(values) == len(found):
        differences = [abs(a - b) for a, b in itertools.combinations(values, 2)]
        pauling = 1.0 - min((float(np.mean(differences)) if differences else 0.0) / 3.0, 1.0)
    metals = [(symbol, n) for symbol, n in counts if symbol in tables.metals]
    score = (
        0.3 * (sum(n for _, n in metals) / total)
        + 0.2 * (sum(n for symbol, n in counts if symbol in tables.d_block) / total)
        + 0.2 * min(len(metals) / 3.0, 1.0)
        + 0.15 * valence
        + 0.15 * pauling
    )
    return max(0.0, min(1.0, score))


def can_be_neutral(counts: Counts, states: Sequence[Sequence[int]]) -> bool:
    """Tell whether states can be chosen, within 1 for all atoms of an element, that add up to 0.

    No element may add up to 0 by itself.

    Args:
        counts: The composition.
        states: Of each of its elements.
    """
    reachable = {0}
    for (_, n), choices in zip(counts, states, strict=True):
        reachable = {total + own for total in reachable for own in _sums(tuple(choices), n)}
    return 0 in reachable


@lru_cache(maxsize=20_000)
def _sums(states: tuple[int, ...], n: int) -> tuple[int, ...]:
    """Return what n atoms can add up to: all in one state, or in a state and the next higher one; not 0."""
    sums = {state * n for state in states}
    for state in states:
        if state + 1 in states:
            sums.update(state * n + k for k in range(1, n))
    return tuple(sorted(sums - {0}))


def _falls_with_electronegativity(counts: Counts) -> bool:
    """Step 5: whether a neutral choice's mean states correlate negatively with electronegativity.

    The sign of Pearson's coefficient is that of sum(state (X - mean X)), which is linear in the states: the
    least of it is kept for every charge so far, in whole numbers, so that no rounding decides.
    """
    found = [lemat_tables().elements[symbol] for symbol, _ in counts]
    known = [element.electronegativity for element in found if element.electronegativity is not None]
    # The peer's coefficient is not a number where an electronegativity is missing, or all are the same.
    if len(known) < len(found) or len(set(known)) < 2:
        return False
    hundredths = [round(100 * x) for x in known]
    common = math.lcm(*(n for _, n in counts))
    least = {0: 0}
    for (_, n), element, x in zip(counts, found, hundredths, strict=True):
        slope = (len(known) * x - sum(hundredths)) * (common // n)
        after: dict[int, int] = {}
        for own in _sums(element.known, n):
            for total, value in least.items():
                candidate = value + own * slope
                if candidate < after.get(total + own, candidate + 1):
                    after[total + own] = candidate
        least = after
    return least.get(0, 0) < 0
