"""Known crystals as templates for a composition: the structure types, who forms them, the best guesses.

    library = learn_templates(read(["mp_train.parquet", "wbm_train.parquet"]))
    best = library.guesses({56: 1, 22: 1, 8: 3})[0]     # Ba Ti O3
    best.votes, best.template, best.crystal     # 2.95, a BaZrO3, SymmetricCrystal(221, (4.11,), ...)

A structure type here is a space group and the Wyckoff letters that each element's atoms take, whatever the
elements (their order is chosen so that equal types read equal). To a composition, every crystal of the
library with the same counts of atoms is a vote for its type, with its elements replaced in every way that
keeps the counts; the vote is as strong as the elements are alike (likeness.py). What many alike crystals form
therefore comes first: that is the nearest neighbour and the frequency of the type in one number. Within a
type, crystals whose free lengths, angles and coordinates differ are voted for apart. The cell of a guess is
that of the most alike crystal, scaled to the volume that all who voted for it say, each corrected by the mean
atomic volumes of the exchanged elements. (Of the first 300 of mp_val, by mp_train + wbm_train: where the best
guess matches, its volume is off by 3.2 % on average; pymatgen's DLS predictor, given the same guess, by
10.1 %.)

Not here: which guesses are the same crystal to a matcher (engines/template.py); where a library is kept on
disk (template_files.py).
Sources: template methods for structure prediction: Hautier et al. 2011, doi:10.1021/ic102031h; Wei et al.
2022 (TCSP), doi:10.1021/acs.inorgchem.1c03879 (recalled).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from pymatgen.core import Structure

from crystallm_kit.errors import EmptyInput, EncodeError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.elements import RANK
from crystallm_kit.structures.likeness import Family, Likeness, learn_likeness, log_votes, orders
from crystallm_kit.structures.substitution import learn_substitutions, volume_angstrom3
from crystallm_kit.structures.symmetry import (
    LETTERS,
    SYMPREC_ANGSTROM,
    Site,
    SymmetricCrystal,
    canonical,
    space_group,
    symmetric_crystal,
)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_MAX_MERGE_ANGSTROM = 0.02  # as in text/wyckoff.py
_MOST_ORDERS = 720  # of a crystal's elements; six of one count
_LENGTHS = frozenset((0, 1, 2))  # of (a, b, c, alpha, beta, gamma), what scales
# Two crystals of one type are voted for together up to these differences.
_SAME_LOG_LENGTH, _SAME_ANGLE_DEGREES, _SAME_COORDINATE = 0.12, 8.0, 0.08


@dataclass(frozen=True, eq=False)
class Rows:
    """Descriptions of the library's crystals, family after family. R rows, S sites.

    A crystal has more than one where its type looks the same with elements exchanged.

    Attributes:
        entries: (R,) position of the crystal in the library.
        groups: (R,) space group number.
        kinds, shapes, formulas: (R,) structure type, what is voted for together, and reduced formula, each
            counted from 0 in its family.
        log_volumes: (R,) of the primitive cell, angstrom^3.
        lattices: (R, 6) free lattice parameters (angstrom, degree), filled up with zeros.
        elements: (sum of k,) atomic numbers of each row in the order of its places.
        site_starts: (R + 1,) where the sites of each row begin.
        site_places, site_letters: (S,) place of the element and index of the Wyckoff letter.
        site_free: (S, 3) free coordinates, filled up with zeros.
    """

    entries: IntArray
    groups: IntArray
    kinds: IntArray
    shapes: IntArray
    formulas: IntArray
    log_volumes: FloatArray
    lattices: FloatArray
    elements: IntArray
    site_starts: IntArray
    site_places: IntArray
    site_letters: IntArray
    site_free: FloatArray

    def crystal(self, row: int, elements: Sequence[int], volume_angstrom3: float) -> SymmetricCrystal:
        """Return the crystal of a row with `elements` on its places, scaled to a primitive cell's volume."""
        group = space_group(int(self.groups[row]))
        scale = math.exp((math.log(volume_angstrom3) - self.log_volumes[row]) / 3)
        lattice = tuple(
            float(value) * scale if i in _LENGTHS else float(value)
            for i, value in zip(group.free_lattice, self.lattices[row], strict=False)
        )
        sites = []
        for site in range(self.site_starts[row], self.site_starts[row + 1]):
            position = group.positions[self.site_letters[site]]
            free = tuple(self.site_free[site, : position.n_free].tolist())
            sites.append(Site(int(elements[self.site_places[site]]), position.letter, free))
        return SymmetricCrystal(group.number, lattice, tuple(sites))


@dataclass(frozen=True)
class Guess:
    """A crystal of a composition, made from a template.

    Attributes:
        crystal: With the composition's elements, scaled.
        template: Id of the library's crystal.
        entry: Its position in the library.
        replaced: (template's, composition's) atomic numbers.
        votes: What the guess has; the vote of a crystal of this very composition is 1.
        all_votes: What all guesses for the composition have together.
    """

    crystal: SymmetricCrystal
    template: str
    entry: int
    replaced: frozenset[tuple[int, int]]
    votes: float
    all_votes: float


@dataclass(frozen=True, eq=False)
class TemplateLibrary:
    """Crystals, described and grouped; made by `learn_templates`.

    Attributes:
        ids: Of the crystals.
        counts: Atoms of the elements in the primitive cells of each family, increasing.
        starts: (F + 1,) where the rows of each family begin.
        rows: The descriptions.
        likeness: Of the elements.
        volumes_angstrom3: (104,) mean atomic volumes by atomic number.
    """

    ids: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    starts: IntArray
    rows: Rows
    likeness: Likeness
    volumes_angstrom3: FloatArray

    @cached_property
    def max_sites(self) -> int:
        """Return the atoms in the largest primitive cell."""
        return max(map(sum, self.counts))

    @cached_property
    def families(self) -> list[Family]:
        """Return the families, in the order of `counts`."""
        return list(_families(self.counts, self.starts, self.rows))

    @cached_property
    def log_kernel(self) -> FloatArray:
        """Return the log-likeness (104, 104) of the elements."""
        return self.likeness.log_kernel

    def guesses(
        self, counts: Mapping[int, int], *, groups: Sequence[int] = (), most: int = 60
    ) -> list[Guess]:
        """Return guesses for the atoms of a primitive cell, best first; none where no template fits.

        Args:
            counts: Atomic number -> atoms.
            groups: Space group numbers that may occur; empty: any.
            most: Guesses returned.
        """
        number = self._number_of.get(tuple(sorted(counts.values())))
        if number is None or _n_orders(self.counts[number]) > _MOST_ORDERS:
            return []
        family = self.families[number]
        shapes = self.rows.shapes[self.starts[number] : self.starts[number + 1]]
        ways = np.array(list(orders(dict(counts))))  # (P, k)
        logs = log_votes(self.log_kernel, ways, family)  # (P, M)
        if groups:
            logs = np.where(np.isin(family.groups, groups), logs, -np.inf)
        votes = np.exp(logs)
        n_shapes = int(shapes.max()) + 1
        total = np.stack([np.bincount(shapes, way, n_shapes) for way in votes])  # (P, S)
        _, entries, images = np.unique(family.entries, return_inverse=True, return_counts=True)
        all_votes = float((votes / images[entries]).sum())  # a type's own symmetry gives each guess twice
        found: list[Guess] = []
        seen: set[tuple[int, frozenset[tuple[int, int]]]] = set()
        for place in np.argsort(-total, axis=None, kind="stable").tolist():
            way, shape = divmod(place, n_shapes)
            if total[way, shape] <= 0 or len(found) == most:
                break
            members = np.flatnonzero(shapes == shape)
            best = int(members[np.argmax(logs[way, members])])
            replaced = frozenset(zip(family.elements[best].tolist(), ways[way].tolist(), strict=True))
            entry = int(family.entries[best])
            if (entry, replaced) in seen:  # the same by the type's own symmetry
                continue
            seen.add((entry, replaced))
            volume = self._volume(number, members, votes[way, members], ways[way])
            crystal = self.rows.crystal(int(self.starts[number]) + best, ways[way], volume)
            found.append(
                Guess(crystal, self.ids[entry], entry, replaced, float(total[way, shape]), all_votes)
            )
        return found

    @cached_property
    def _number_of(self) -> dict[tuple[int, ...], int]:
        return {counts: number for number, counts in enumerate(self.counts)}

    def _volume(self, number: int, members: IntArray, votes: FloatArray, way: IntArray) -> float:
        """Return the volume (angstrom^3) of the primitive cell that those who vote for a shape say."""
        counts = np.array(self.counts[number])
        wanted = self.volumes_angstrom3[way] @ counts
        own = self.volumes_angstrom3[self.families[number].elements[members]] @ counts
        logs = self.rows.log_volumes[self.starts[number] + members] + np.log(wanted / own)
        return float(np.exp(np.average(logs, weights=votes)))


def learn_templates(crystals: Iterable[Crystal], *, steps: int | None = None) -> TemplateLibrary:
    """Return the library of some crystals.

    Molecules, disordered crystals and those without a symmetry that can be told are left out.

    Args:
        crystals: Known ones.
        steps: Of learning which elements are alike; None: as many as were found enough.

    Raises:
        EmptyInput: If there is no crystal among them.
    """
    ids: list[str] = []
    crystals_found: list[SymmetricCrystal] = []
    described: list[_Described] = []
    for crystal in crystals:
        found = _symmetric(crystal)
        if found is None:
            continue
        described += [_Described(len(ids), *description) for description in _descriptions(found)]
        ids.append(crystal.id)
        crystals_found.append(found)
    if not described:
        raise EmptyInput("templates: no ordered crystals in the library, so nothing to learn from")
    described.sort(key=lambda d: d.counts)
    counts = sorted({d.counts for d in described})
    starts = np.searchsorted([counts.index(d.counts) for d in described], np.arange(len(counts) + 1))
    rows = _rows(described)
    families = list(_families(counts, starts, rows))
    likeness = learn_likeness(families) if steps is None else learn_likeness(families, steps=steps)
    volumes = learn_substitutions(crystals_found).volumes_angstrom3
    return TemplateLibrary(tuple(ids), tuple(counts), starts, rows, likeness, volumes)


def _families(counts: Sequence[tuple[int, ...]], starts: IntArray, rows: Rows) -> Iterator[Family]:
    first = 0
    for one, start, stop in zip(counts, starts[:-1], starts[1:], strict=True):
        last = first + (stop - start) * len(one)
        elements = rows.elements[first:last].reshape(-1, len(one))
        first = last
        yield Family(
            one, elements, rows.kinds[start:stop], rows.entries[start:stop], rows.formulas[start:stop],
            rows.groups[start:stop],
        )  # fmt: skip


def _symmetric(crystal: Crystal) -> SymmetricCrystal | None:
    structure = crystal.structure
    if not isinstance(structure, Structure) or not structure.is_ordered:
        return None
    if any(element.symbol not in RANK for element in structure.composition.elements):
        return None
    for symprec in (SYMPREC_ANGSTROM, SYMPREC_ANGSTROM / 10, SYMPREC_ANGSTROM / 1000):
        try:
            return symmetric_crystal(structure, symprec, _MAX_MERGE_ANGSTROM)
        except EncodeError:
            continue
    return None


_Kind = tuple[int, tuple[tuple[int, str], ...]]


@dataclass(frozen=True)
class _Described:
    """A crystal of the library, by its position in it, its elements by place, and described in that order."""

    entry: int
    order: tuple[int, ...]
    crystal: SymmetricCrystal

    @cached_property
    def counts(self) -> tuple[int, ...]:
        counts = self.crystal.counts
        return tuple(counts[z] for z in self.order)


def _descriptions(crystal: SymmetricCrystal) -> list[tuple[tuple[int, ...], SymmetricCrystal]]:
    """Return the orders of the elements in which the type reads first, each with the crystal in it."""
    first: _Kind | None = None
    found: list[tuple[tuple[int, ...], SymmetricCrystal]] = []
    has_many = _n_orders(tuple(crystal.counts.values())) > _MOST_ORDERS
    for order in orders(crystal.counts):
        description = canonical(crystal, order)
        kind = _kind(description)
        if first is None or kind < first:
            first, found = kind, []
        if kind == first:
            found.append((order, description))
        if has_many:
            break
    return found


def _kind(crystal: SymmetricCrystal) -> _Kind:
    """Return the type of a described crystal: space group, and place and letter of each site."""
    seen: dict[int, int] = {}  # sites stand in the order of the places
    sites = tuple((seen.setdefault(s.atomic_number, len(seen)), s.letter) for s in crystal.sites)
    return crystal.spacegroup_number, sites


def _n_orders(counts: Sequence[int]) -> int:
    return math.prod(math.factorial(counts.count(c)) for c in set(counts))


def _rows(described: Sequence[_Described]) -> Rows:
    sites = [(d.order.index(site.atomic_number), site) for d in described for site in d.crystal.sites]
    lattices, free = np.zeros((len(described), 6)), np.zeros((len(sites), 3))
    for row, one in enumerate(described):
        lattices[row, : len(one.crystal.lattice)] = one.crystal.lattice
    for row, (_, site) in enumerate(sites):
        free[row, : len(site.free)] = site.free
    volumes = np.log([volume_angstrom3(d.crystal) for d in described])
    return Rows(
        entries=np.array([d.entry for d in described]),
        groups=np.array([d.crystal.spacegroup_number for d in described]),
        kinds=_numbered((d.counts, _kind(d.crystal)) for d in described),
        shapes=_shapes(described, volumes),
        formulas=_numbered((d.counts, frozenset(zip(d.order, d.counts, strict=True))) for d in described),
        log_volumes=volumes,
        lattices=lattices,
        elements=np.array([z for d in described for z in d.order]),
        site_starts=np.cumsum([0, *(len(d.crystal.sites) for d in described)]),
        site_places=np.array([place for place, _ in sites]),
        site_letters=np.array([LETTERS.index(site.letter) for _, site in sites]),
        site_free=free,
    )


def _numbered(keys: Iterable[tuple[tuple[int, ...], object]]) -> IntArray:
    """Return a number for each (counts, key), counted from 0 for each counts."""
    tables: dict[tuple[int, ...], dict[object, int]] = defaultdict(dict)
    return np.array([tables[counts].setdefault(key, len(tables[counts])) for counts, key in keys])


def _shapes(described: Sequence[_Described], log_volumes: FloatArray) -> IntArray:
    """Return (R,) what is voted for together: rows of one type with about the same free parameters."""
    known: dict[tuple[object, ...], list[tuple[int, FloatArray]]] = defaultdict(list)
    n_shapes: dict[tuple[int, ...], int] = defaultdict(int)
    numbers = []
    for one, log_volume in zip(described, log_volumes, strict=True):
        crystal = one.crystal
        full = np.array(space_group(crystal.spacegroup_number).lattice_parameters(crystal.lattice))
        lengths = (np.log(full[:3]) - log_volume / 3) / _SAME_LOG_LENGTH
        free = np.array([x for site in crystal.sites for x in site.free])
        shape = np.concatenate((lengths, full[3:] / _SAME_ANGLE_DEGREES, free))
        alike = known[one.counts, _kind(crystal)]
        number = next((n for n, other in alike if _is_same(shape - other)), None)
        if number is None:
            number = n_shapes[one.counts]
            n_shapes[one.counts] += 1
            alike.append((number, shape))
        numbers.append(number)
    return np.array(numbers)


def _is_same(off: FloatArray) -> bool:
    coordinates = (off[6:] + 0.5) % 1.0 - 0.5
    return bool(np.abs(off[:6]).max() < 1 and np.abs(coordinates).max(initial=0.0) < _SAME_COORDINATE)
