"""Integer tables of the space groups' Wyckoff positions, and what they can hold.

A space group offers letters with free coordinates without limit, and letters without any (fixed letters)
once each. Fixed letters of one multiplicity are alike, so what is used of them is a small vector of counts,
one per multiplicity: at most 27 such vectors in any group, so a set of them is one integer, and 112 different
tables serve 230 groups (a group's table is its signature).

    >>> can_hold(225, [1, 1])     # Fm-3m, primitive cell: one Na and one Cl on the fixed letters a and b
    True

Not here: the masks made of them (masking.py), what is asked (requests.py).
"""

# Shape legend: S signature of a group, N count 0-99, C fixed-letter vectors, L letters, E elements of one
# composition, G space groups.

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crystallm_kit.structures.symmetry import FREE_LATTICE, LETTERS, crystal_system, space_group
from crystallm_kit.text import wyckoff as format_

MAX_ELEMENTS = 10  # different elements in one composition
N_COUNTS = format_.MAX_COUNT + 1
N_LETTERS = len(LETTERS)
# Every cubic space group has one of these as a subgroup with the same primitive cell, so what they cannot
# hold, no cubic group can. In every other crystal system a group with a free letter of multiplicity 1 holds
# anything.
_CUBIC_WITNESSES = (195, 196, 197, 198, 199)


@dataclass(frozen=True)
class Tables:
    """The integer tables of all space groups; see the module docstring.

    Sets of fixed-letter vectors are integers: bit u stands for vector u. Index C is the impossible vector.
    """

    signature: npt.NDArray[np.int64]  # (G,)
    sums: npt.NDArray[np.int64]  # (S, N, C): set of u + v
    full: npt.NDArray[np.int64]  # (S,): the vector of all fixed letters
    enough: npt.NDArray[np.int64]  # (S, N, E + 1): set of u after which n atoms can make k elements
    multiplicity: npt.NDArray[np.int64]  # (G, L), 0 where the group has no such letter
    is_fixed: npt.NDArray[np.bool_]  # (G, L)
    left_after: npt.NDArray[
        np.int64
    ]  # (G, L, C + 1): vector left after one use of a letter, C if there is none
    n_free: npt.NDArray[np.int64]  # (G, L)
    n_lattice: npt.NDArray[np.int64]  # (G,)
    lattice_kind: npt.NDArray[
        np.int64
    ]  # (G, 6): 0 length, 1 alpha, 2 beta, 3 gamma, 4 beta of a monoclinic cell


@functools.lru_cache(maxsize=1)
def tables() -> Tables:
    """Return the tables, made once."""
    multiplicity = np.zeros((230, N_LETTERS), dtype=np.int64)
    is_fixed = np.zeros((230, N_LETTERS), dtype=bool)
    n_free = np.zeros((230, N_LETTERS), dtype=np.int64)
    for row in range(230):
        for index, position in enumerate(space_group(row + 1).positions):
            multiplicity[row, index] = position.primitive_multiplicity
            n_free[row, index] = position.n_free
            is_fixed[row, index] = position.n_free == 0
    signatures: dict[tuple[tuple[tuple[int, int], ...], tuple[int, ...]], int] = {}
    signature = np.zeros(230, dtype=np.int64)
    for g in range(230):
        present = multiplicity[g] > 0
        fixed = tuple(sorted(Counter(multiplicity[g][present & is_fixed[g]].tolist()).items()))
        free = tuple(sorted(set(multiplicity[g][present & ~is_fixed[g]].tolist())))
        signature[g] = signatures.setdefault((fixed, free), len(signatures))
    size = max(math.prod(n + 1 for _, n in fixed) for fixed, _ in signatures)
    shape = (len(signatures), N_COUNTS)
    sums = np.zeros((*shape, size), dtype=np.int64)
    enough = np.zeros((*shape, MAX_ELEMENTS + 1), dtype=np.int64)
    full = np.zeros(len(signatures), dtype=np.int64)
    left_after = np.full((230, N_LETTERS, size + 1), size)
    left_after[multiplicity > 0] = np.arange(size + 1)
    for (fixed, free), s in signatures.items():
        vectors = list(itertools.product(*(range(n + 1) for _, n in fixed)))
        vector_index = {v: i for i, v in enumerate(vectors)}
        full[s] = len(vectors) - 1
        weight = np.array([sum(m * used for (m, _), used in zip(fixed, v, strict=True)) for v in vectors])
        orbits = _most_parts(free)
        with_vector = [np.concatenate([np.full(min(w, N_COUNTS), -1), orbits])[:N_COUNTS] for w in weight]
        for i, v in enumerate(vectors):
            placed = with_vector[i] >= 0  # (N,)
            for j, u in enumerate(vectors):
                total = vector_index.get(tuple(a + b for a, b in zip(u, v, strict=True)))
                if total is None:
                    continue
                sums[s, :, j] |= placed.astype(np.int64) << total
                # Used u, then v more: n atoms are sum(v) orbits on fixed letters and the most there can be on
                # free ones.
                parts = np.where(placed, with_vector[i] + sum(v), -1)  # (N,)
                enough[s] |= (parts[:, None] >= np.arange(MAX_ELEMENTS + 1)).astype(np.int64) << j
        for row in np.flatnonzero(signature == s).tolist():
            for index in np.flatnonzero(is_fixed[row]).tolist():
                one = tuple(int(m == multiplicity[row, index]) for m, _ in fixed)
                for i, v in enumerate(vectors):
                    rest = tuple(a - b for a, b in zip(v, one, strict=True))
                    left_after[row, index, i] = vector_index.get(rest, size)
    kinds = {"monoclinic": (0, 0, 0, 4), "triclinic": (0, 0, 0, 1, 2, 3)}
    lattice_kind = np.zeros((230, 6), dtype=np.int64)
    n_lattice = np.zeros(230, dtype=np.int64)
    for g in range(230):
        system = crystal_system(g + 1)
        n_lattice[g] = len(FREE_LATTICE[system])
        lattice_kind[g, : n_lattice[g]] = kinds.get(system, (0,) * int(n_lattice[g]))
    return Tables(signature, sums, full, enough, multiplicity, is_fixed, left_after, n_free, n_lattice,
                   lattice_kind)  # fmt: skip


def _most_parts(parts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return (N,): the largest number of terms, repeats allowed, that add up to n; -1 where none do."""
    most = np.full(N_COUNTS, -1)
    most[0] = 0
    for n in range(1, N_COUNTS):
        best = max((int(most[n - p]) for p in parts if p <= n), default=-1)
        most[n] = best + 1 if best >= 0 else -1
    return most


def witnesses(groups: Sequence[int]) -> tuple[int, ...]:
    """Return few groups such that what fits any of `groups` fits one of these in its crystal system."""
    if crystal_system(groups[0]) == "cubic":
        return _CUBIC_WITNESSES
    t = tables()
    one_free = (t.multiplicity == 1) & ~t.is_fixed
    return (next(g for g in groups if one_free[g - 1].any()),)


@dataclass(frozen=True)
class Automaton:
    """The sets of fixed-letter vectors that can come up, numbered, and the set that each count leads to.

    However many elements a composition has, few sets come up: 2,920 over all signatures, 225 at most in one.
    So what a composition can use of a group's fixed letters is one number that a table moves on.

    Attributes:
        after: (X, N): the set after an element with n atoms; 0, the empty set, where they cannot be placed.
        members: (X,): the vectors of a set, as bits.
        nothing_used: (S,): the set that holds only the vector of no letters.
        everything: (S,): the set of all vectors.
    """

    after: npt.NDArray[np.int64]
    members: npt.NDArray[np.int64]
    nothing_used: npt.NDArray[np.int64]
    everything: npt.NDArray[np.int64]


@functools.lru_cache(maxsize=1)
def automaton() -> Automaton:
    """Return the automaton of all signatures, made once."""
    t = tables()
    n_signatures, _, n_vectors = t.sums.shape
    all_vectors = (1 << n_vectors) - 1
    after, members = [np.zeros((1, N_COUNTS), dtype=np.int64)], [0]
    nothing_used = np.zeros(n_signatures, dtype=np.int64)
    everything = np.zeros(n_signatures, dtype=np.int64)
    for s in range(n_signatures):
        number = {0: 0, 1: len(members), all_vectors: len(members) + 1}
        fresh = [1, all_vectors]
        while fresh:
            members += fresh
            following = np.zeros((len(fresh), N_COUNTS), dtype=np.int64)
            for u in range(n_vectors):
                following |= np.where(np.array(fresh)[:, None] >> u & 1, t.sums[s, :, u], 0)
            fresh = [found for found in np.unique(following).tolist() if found not in number]
            number |= {found: len(members) + i for i, found in enumerate(fresh)}
            after.append(np.vectorize(number.__getitem__)(following))
        nothing_used[s], everything[s] = number[1], number[all_vectors]
    return Automaton(np.concatenate(after), np.array(members), nothing_used, everything)


def can_hold(spacegroup_number: int, counts: Sequence[int]) -> bool:
    """Tell whether a space group's Wyckoff positions can hold these atoms of each element in a primitive
    cell.
    """
    a = automaton()
    used = a.nothing_used[tables().signature[spacegroup_number - 1]]
    for n in counts:
        used = a.after[used, n]
    return bool(used)


def can_fill(groups: Sequence[int], n_sites: int, limit: int, n_elements: int) -> bool:
    """Tell whether one of the groups holds n_sites atoms (0: any number up to limit) of so many elements or
    more.
    """
    t = tables()
    counts = [n_sites] if n_sites else range(1, limit + 1)
    return any(
        t.enough[t.signature[g - 1], n, n_elements] & 1
        for g in (groups if len(groups) == 1 else witnesses(groups))
        for n in counts
    )
