"""Pairs of real crystals on which two matchers can be compared.

    for pair in real_pairs(pool_of(Path("data"), Path("samples")), count=1000, seed=0):
        pair.kind, pair.candidate, pair.truth

Four kinds: a crystal against a perturbed copy of itself (moved atoms, strained, other cell, other origin,
other order of sites); against the prototype of another one with its elements substituted; what other
generators published against the nearest things known; and two crystals of one formula. The same seed and
pool give the same pairs.

Not here: matching (structure_matcher.py), measuring (speed.py).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import EmptyInput
from crystallm_kit.structures.files import read

_KNOWN = ("mp_test", "mp_val", "mp_train", "wbm_train", "perov_5_test", "perov_5_val", "carbon_24_test")
_MOVES_ANGSTROM = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)  # standard deviation of each coordinate
_STRAINS = (0.0, 0.0, 0.01, 0.04, 0.1, 0.2)
_KINDS = ("perturbed", "substituted", "generated", "formula")
_SHARES = (0.4, 0.2, 0.15, 0.25)
_Prototype = tuple[float, ...]  # amounts in the cell, sorted
_MOST_SITES = 60  # a cell made larger stays below; the peer takes minutes above some hundred


@dataclass(frozen=True)
class Pair:
    """A prediction, the truth, and which of the kinds above they are."""

    kind: str
    candidate: Structure
    truth: Structure


@dataclass(frozen=True)
class Pool:
    """The crystals that pairs are made of: known ones, and what others generated."""

    known: Sequence[Structure]
    generated: Sequence[Structure]


def pool_of(data: Path, samples: Path | None = None, *, limit: int | None = None) -> Pool:
    """Read the crystals: `<data>/mp_test.parquet` and so on, and every file of `samples`.

    Args:
        data: Folder of the Parquet files; those that are not there are left out.
        samples: Folder of files that generators wrote.
        limit: Crystals of each file, the first ones; None: all.

    Raises:
        EmptyInput: If there is no known crystal.
    """
    files = [data / f"{name}.parquet" for name in _KNOWN if (data / f"{name}.parquet").exists()]
    known = [structure for path in files for structure in _structures(path, limit)]
    if not known:
        raise EmptyInput(f"{data}: none of {', '.join(_KNOWN)} (.parquet) is here")
    written = sorted(path for path in samples.iterdir() if path.is_file()) if samples else []
    return Pool(known, [structure for path in written for structure in _structures(path, limit)])


def real_pairs(pool: Pool, count: int, *, seed: int = 0) -> Iterator[Pair]:
    """Yield pairs in a random mixture of the kinds; those of "generated" only where there are any."""
    rng = np.random.default_rng(seed)
    everything = [*pool.known, *pool.generated]
    by_formula, by_prototype = defaultdict(list), defaultdict(list)
    for structure in everything:
        by_formula[structure.composition.reduced_formula].append(structure)
    for structure in pool.known:
        by_prototype[_prototype(structure)].append(structure)
    # Carbon's 2,000 polymorphs would be most of the pairs of one formula.
    in_pairs = [s for f, group in by_formula.items() if len(group) > 1 for s in group[:40] if f]
    made = 0
    while made < count:
        kind = _KINDS[int(rng.choice(len(_KINDS), p=_SHARES))]
        if kind == "generated":
            if not pool.generated:
                continue
            first = _one_of(pool.generated, rng)
            same = [s for s in by_formula[first.composition.reduced_formula] if s is not first]
            pair = _substituted(first, by_prototype, rng) or (_one_of(same, rng) if same else None)
            second = perturbed(first, rng) if pair is None else pair
        elif kind == "substituted":
            second = _one_of(pool.known, rng)
            found = _substituted(second, by_prototype, rng)
            if found is None:
                continue
            first = found
        elif kind == "formula":
            if not in_pairs:
                continue
            first = _one_of(in_pairs, rng)
            second = _one_of(
                [s for s in by_formula[first.composition.reduced_formula] if s is not first], rng
            )
        else:
            second = _one_of(pool.known, rng)
            first = perturbed(second, rng)
        made += 1
        yield Pair(kind, first, second)


def candidates_of(truth: Structure, pool: Pool, rng: np.random.Generator, *, count: int) -> list[Structure]:
    """Return what a generator might offer for a formula: half of it prototypes, half the perturbed truth."""
    size = _prototype(truth)
    by_prototype = {size: [one for one in pool.known if _prototype(one) == size]}
    others = [_substituted(truth, by_prototype, rng) for _ in range(count // 2)]
    found = [one for one in others if one is not None]
    return found + [perturbed(truth, rng) for _ in range(count - len(found))]


def perturbed(structure: Structure, rng: np.random.Generator) -> Structure:
    """Return the crystal with moved atoms, a strained, perhaps other or larger cell, and another origin."""
    if rng.random() < 0.3:
        structure = _in_another_cell(structure, rng)
    lattice, fractional = structure.lattice.matrix, structure.frac_coords
    species = [site.specie for site in structure]
    strain = float(rng.choice(_STRAINS)) * rng.uniform(-0.5, 0.5, (3, 3))
    move = float(rng.choice(_MOVES_ANGSTROM)) * rng.normal(size=fractional.shape) @ np.linalg.inv(lattice)
    origin = rng.random(3) if rng.random() < 0.7 else np.zeros(3)
    order = rng.permutation(len(species)) if rng.random() < 0.5 else np.arange(len(species))
    moved = (fractional + move + origin)[order] % 1
    cell = Lattice(lattice @ (np.eye(3) + (strain + strain.T) / 2))
    return Structure(cell, [species[i] for i in order], moved)


def _in_another_cell(structure: Structure, rng: np.random.Generator) -> Structure:
    """Return the crystal in a cell of other lattice vectors, up to four times as large."""
    while True:
        matrix = rng.integers(-1, 2, (3, 3))
        size = round(abs(np.linalg.det(matrix)))
        if size >= 1 and (size == 1 or size * len(structure) <= _MOST_SITES):
            larger = structure.copy()
            larger.make_supercell(matrix, to_unit_cell=True)
            return larger


def _substituted(
    target: Structure, by_prototype: Mapping[_Prototype, Sequence[Structure]], rng: np.random.Generator
) -> Structure | None:
    """Return another crystal of the same anonymous cell formula with the target's elements, if any."""
    others = [s for s in by_prototype.get(_prototype(target), ()) if s is not target]
    if not others:
        return None
    other = _one_of(others, rng)
    order_of = [sorted(s.composition.items(), key=lambda p: (p[1], p[0].Z)) for s in (other, target)]
    mapping = {mine: theirs for (mine, _), (theirs, _) in zip(*order_of, strict=True)}
    return Structure(other.lattice, [mapping[site.specie] for site in other], other.frac_coords)


def _prototype(structure: Structure) -> _Prototype:
    return tuple(sorted(structure.composition.values()))


def _structures(path: Path, limit: int | None) -> list[Structure]:
    found = []
    for crystal in read(path):
        if isinstance(crystal.structure, Structure) and crystal.structure.is_ordered:
            found.append(crystal.structure)
        if limit is not None and len(found) >= limit:
            break
    return found


def _one_of(structures: Sequence[Structure], rng: np.random.Generator) -> Structure:
    return structures[int(rng.integers(len(structures)))]
