"""New crystals from known ones by replacing elements: same prototype, alike elements, volume to fit.

Crystals of one structure type differ by elements that behave alike (Hautier et al. 2011,
doi:10.1021/ic102031h), which is what template methods live on. Here the likeness is counted in the data
themselves: two elements are alike as often as they stand in for each other, all else equal (same space group,
same other elements, same counts):

    NaCl 225, KCl 225, NaBr 225 ...   ->   Na ~ K, Cl ~ Br   ->   from KBr 225: RbBr, NaBr, KCl, KI ...

The new cell is the old one, scaled so that its volume follows the mean atomic volumes of the data.

Not here: equivalent views of one crystal (augmentation.py). A substituted crystal is a guess: no property of
the original is carried over.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crystallm_kit.errors import EmptyInput
from crystallm_kit.structures.symmetry import Site, SymmetricCrystal, space_group

MAX_ATOMIC_NUMBER = 103
_LENGTHS = frozenset((0, 1, 2))  # of (a, b, c, alpha, beta, gamma), what scales
_SMOOTHING = 0.1  # added to a count, so that a rare element still has a neighbour in its column
_MAX_VOLUME_RATIO = 2.0


@dataclass(frozen=True)
class SubstitutionTable:
    """What was learned from data.

    Attributes:
        counts: (104, 104) symmetric, by atomic number: how often one element stands where the other does.
        volumes_angstrom3: (104,) mean volume of an atom of each element, by least squares over the cells.
    """

    counts: npt.NDArray[np.float64]
    volumes_angstrom3: npt.NDArray[np.float64]

    def candidates(
        self, atomic_number: int, taken: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return elements that may stand in for one, with probabilities; those in `taken` are left out."""
        weights = self.counts[atomic_number].copy()
        weights[list(taken)] = 0.0
        found = np.flatnonzero(weights)
        return found, weights[found] / max(weights.sum(), 1e-12)


def volume_angstrom3(crystal: SymmetricCrystal) -> float:
    """Return the volume of the primitive cell."""
    group = space_group(crystal.spacegroup_number)
    a, b, c, alpha, beta, gamma = group.lattice_parameters(crystal.lattice)
    x, y, z = np.cos(np.radians((alpha, beta, gamma)))
    return float(a * b * c * np.sqrt(max(1 - x * x - y * y - z * z + 2 * x * y * z, 0.0)) / group.n_centering)


def learn_substitutions(crystals: Iterable[SymmetricCrystal]) -> SubstitutionTable:
    """Return what stands in for what, and how much room each element takes.

    Raises:
        EmptyInput: If there are no crystals.
    """
    places: dict[tuple[object, ...], set[int]] = defaultdict(set)
    rows, volumes = [], []
    for crystal in crystals:
        counts = crystal.counts
        for z, n in counts.items():
            others = frozenset((other, m) for other, m in counts.items() if other != z)
            places[(crystal.spacegroup_number, n, others)].add(z)
        row = np.zeros(MAX_ATOMIC_NUMBER + 1)
        for z, n in counts.items():
            row[z] = n
        rows.append(row / sum(counts.values()))
        volumes.append(volume_angstrom3(crystal) / sum(counts.values()))
    if not rows:
        raise EmptyInput("substitutions: no crystals to learn from")
    together: dict[tuple[int, int], float] = defaultdict(float)
    for elements in places.values():
        for z in elements:
            for other in elements:
                if z != other:
                    # each place counts once for every element, however many share it
                    together[(z, other)] += 1 / (len(elements) - 1)
    counts_array = np.zeros((MAX_ATOMIC_NUMBER + 1, MAX_ATOMIC_NUMBER + 1))
    for (z, other), weight in together.items():
        counts_array[z, other] = weight
    matrix = np.array(rows)
    seen: npt.NDArray[np.bool_] = np.any(matrix, axis=0)
    counts_array[np.ix_(seen, seen)] += _SMOOTHING * _same_column(seen)
    solution = np.full(MAX_ATOMIC_NUMBER + 1, float(np.mean(volumes)))
    fitted, *_ = np.linalg.lstsq(matrix[:, seen], np.array(volumes), rcond=None)
    solution[seen] = np.clip(fitted, 2.0, 120.0)
    return SubstitutionTable(counts_array, solution)


def _same_column(seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return (n, n): 1 for two different elements of one column of the periodic table."""
    from pymatgen.core import Element

    columns = np.array([Element.from_Z(int(z)).group for z in np.flatnonzero(seen)])
    alike: npt.NDArray[np.float64] = (columns[:, None] == columns[None, :]).astype(float)
    return alike - np.eye(len(columns))


def substitute(
    crystal: SymmetricCrystal,
    table: SubstitutionTable,
    rng: np.random.Generator,
    *,
    second_probability: float = 0.35,
) -> SymmetricCrystal | None:
    """Return a crystal with one or more elements replaced, or None where none can be.

    Args:
        crystal: The known one.
        table: What stands in for what.
        rng: Draws.
        second_probability: That another element is replaced too, after each one.
    """
    elements = list(crystal.counts)
    mapping = {z: z for z in elements}
    for z in rng.permutation(elements):
        taken = [*mapping.values(), *elements]
        found, probability = table.candidates(int(z), taken)
        if len(found):
            mapping[int(z)] = int(rng.choice(found, p=probability))
        if rng.random() >= second_probability:
            break
    if all(old == new for old, new in mapping.items()):
        return None
    counts = crystal.counts
    old = sum(n * table.volumes_angstrom3[z] for z, n in counts.items())
    new = sum(n * table.volumes_angstrom3[mapping[z]] for z, n in counts.items())
    ratio = new / old
    if not 1 / _MAX_VOLUME_RATIO < ratio < _MAX_VOLUME_RATIO:
        return None
    scale = ratio ** (1 / 3)
    free = space_group(crystal.spacegroup_number).free_lattice
    lattice = tuple(v * scale if i in _LENGTHS else v for i, v in zip(free, crystal.lattice, strict=True))
    sites = tuple(Site(mapping[s.atomic_number], s.letter, s.free) for s in crystal.sites)
    return SymmetricCrystal(crystal.spacegroup_number, lattice, sites)
