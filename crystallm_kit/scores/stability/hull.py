"""The convex hull of formation energies, and how far a crystal is above or below it.

    hull = Hull.from_formation_energies(["Na", "Cl2", "NaCl"], [0.0, 0.0, -2.1], name="three phases")
    hull.distance(Composition("NaCl3"), -0.9)   ->  0.15 eV/atom: NaCl + 2 Cl beats it (-1.05)

A formation energy is relative to the elements, so every element that the hull has an entry of stands in it at
0, or below where an entry says so. An element that no entry contains is missing, and what contains it has no
distance. A distance below zero is a crystal that the hull does not know and that beats it.

Contract: the distance is the optimum of the linear program that pymatgen's PhaseDiagram solves by facets
(agreement to 1e-9 eV/atom: tests/scores/test_hull.py). Here the simplex method walks from the elements to the
optimum; the decompositions found are kept, and mostly one of them is it for the next composition.

Legend: N entries of a chemical system, K elements of it.
Not here: files and services that hulls come from (hull_sources.py); energies of a potential
(element_references.py).
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Composition

from crystallm_kit.errors import EmptyInput, ImpossibleRequest

FloatArray = NDArray[np.float64]
_TOLERANCE = 1e-12  # eV/atom, and shares of atoms
_SUBSETS_UP_TO = 12  # elements: 4,095 chemical systems to look up


@dataclass(frozen=True)
class Place:
    """Where a crystal is with respect to a hull.

    Attributes:
        distance_ev_per_atom: Above the hull; negative below it; None where elements are missing.
        n_competing: Compositions of its chemical system, and of parts of it, that the hull has entries of,
            the elements left out. 0: a sparse hull, where anything bound at all is "stable".
        missing: Elements that the hull has no entry of.
        products: Reduced formula -> share of the atoms of what the hull has at this composition.
    """

    distance_ev_per_atom: float | None
    n_competing: int
    missing: tuple[str, ...] = ()
    products: Mapping[str, float] = field(default_factory=dict)


class Hull:
    """Entries of known formation energy, and the hull of each chemical system as it is asked for.

    Attributes:
        name: As it stands beside results.
        n_entries: Entries read, polymorphs included.
    """

    def __init__(self, lowest: Mapping[str, tuple[Composition, float]], *, name: str, n_entries: int) -> None:
        """Take the lowest formation energy (eV/atom) of each reduced formula."""
        self.name = name
        self.n_entries = n_entries
        self._by_system: dict[frozenset[str], list[tuple[str, dict[str, float], float]]] = {}
        elements: set[str] = set()
        for formula, (composition, energy) in lowest.items():
            fractions = _fractions(composition)
            elements.update(fractions)
            self._by_system.setdefault(frozenset(fractions), []).append((formula, fractions, energy))
        for element in elements:
            self._by_system.setdefault(frozenset((element,)), []).append((element, {element: 1.0}, 0.0))
        self.elements = frozenset(elements)
        self._systems: dict[tuple[str, ...], _System] = {}

    @classmethod
    def from_formation_energies(
        cls, formulas: Iterable[str | Composition], energies_ev_per_atom: Iterable[float], *, name: str
    ) -> "Hull":
        """Return the hull of entries.

        Args:
            formulas: Of the entries; any number of formula units, any order.
            energies_ev_per_atom: Their formation energies.
            name: As it stands beside results.

        Raises:
            EmptyInput: Without entries.
            ImpossibleRequest: If an energy is no number.
        """
        lowest: dict[str, tuple[Composition, float]] = {}
        n_entries = 0
        for formula, energy in zip(formulas, energies_ev_per_atom, strict=True):
            composition = formula if isinstance(formula, Composition) else Composition(formula)
            if not np.isfinite(energy):
                raise ImpossibleRequest(
                    f"hull '{name}': formation energy of {formula} is {energy}; a number expected"
                )
            n_entries += 1
            key = _reduced_formula(composition)
            if key not in lowest or energy < lowest[key][1]:
                lowest[key] = composition, float(energy)
        if not n_entries:
            raise EmptyInput(f"hull '{name}': no entries")
        return cls(lowest, name=name, n_entries=n_entries)

    def missing_elements(self, composition: Composition) -> tuple[str, ...]:
        """Return the elements of a composition that the hull has no entry of."""
        return tuple(sorted(set(_fractions(composition)) - self.elements))

    def distance(self, composition: Composition, formation_energy_ev_per_atom: float) -> float:
        """Return the distance from the hull in eV/atom; negative below it.

        Raises:
            ImpossibleRequest: If the hull has no entry of an element; the message names it.
        """
        place = self.place(composition, formation_energy_ev_per_atom)
        if place.distance_ev_per_atom is None:
            raise ImpossibleRequest(
                f"hull '{self.name}' has no entry of {', '.join(place.missing)}, which "
                f"{_reduced_formula(composition)} contains; add the elements' energies to the hull's file."
            )
        return place.distance_ev_per_atom

    def place(self, composition: Composition, formation_energy_ev_per_atom: float) -> Place:
        """Return where a crystal of this composition and formation energy is; never raises for elements."""
        missing = self.missing_elements(composition)
        if missing:
            return Place(None, 0, missing)
        fractions = _fractions(composition)
        system = self._system(tuple(sorted(fractions)))
        at = np.array([fractions[element] for element in system.elements])
        energy, products = system.lowest(at)
        return Place(float(formation_energy_ev_per_atom) - energy, system.n_competing, (), products)

    def _system(self, elements: tuple[str, ...]) -> "_System":
        if elements not in self._systems:
            if len(elements) <= _SUBSETS_UP_TO:
                parts = [frozenset(p) for n in range(1, len(elements) + 1) for p in combinations(elements, n)]
            else:
                parts = [s for s in self._by_system if s <= set(elements)]
            entries = [entry for part in parts for entry in self._by_system.get(part, ())]
            self._systems[elements] = _System(elements, entries)
        return self._systems[elements]


def _reduced_formula(composition: Composition) -> str:
    with warnings.catch_warnings():  # noble gases have no electronegativity to sort them by
        warnings.simplefilter("ignore")
        return str(composition.reduced_formula)


def _fractions(composition: Composition) -> dict[str, float]:
    """Return symbol -> share of atoms, oxidation states left out."""
    total = composition.num_atoms
    shares: dict[str, float] = {}
    for species, amount in composition.items():
        symbol = getattr(species, "element", species).symbol
        shares[symbol] = shares.get(symbol, 0.0) + amount / total
    return shares


class _System:
    """The hull of one chemical system."""

    def __init__(
        self, elements: tuple[str, ...], entries: Sequence[tuple[str, dict[str, float], float]]
    ) -> None:
        self.elements = elements
        self.n_competing = sum(len(fractions) > 1 for _, fractions, _ in entries)
        terminal: dict[str, float] = {}
        for _, fractions, energy in entries:
            if len(fractions) == 1:
                (element,) = fractions
                terminal[element] = min(energy, terminal.get(element, np.inf))
        # what is above the mixture of its elements is never part of the optimum
        bound = [
            (formula, fractions, energy)
            for formula, fractions, energy in entries
            if len(fractions) > 1 and energy < sum(x * terminal[e] for e, x in fractions.items())
        ]
        self.names = [*elements, *(formula for formula, _, _ in bound)]
        points = [[f.get(e, 0.0) for e in elements] for _, f, _ in bound]
        self.points_NK: FloatArray = np.vstack([np.eye(len(elements)), *(np.array(p) for p in points)])
        self.energies_N: FloatArray = np.array([*(terminal[e] for e in elements), *(e for *_, e in bound)])
        # optimal bases, and the inverses of their (K, K) matrices
        self.bases: list[NDArray[np.int64]] = []
        self.inverses_BKK: FloatArray = np.empty((0, len(elements), len(elements)))

    def lowest(self, at_K: FloatArray) -> tuple[float, dict[str, float]]:
        """Return the hull's energy at a composition, and what is there."""
        if len(self.bases):
            amounts_BK = self.inverses_BKK @ at_K
            (known,) = np.nonzero((amounts_BK >= -_TOLERANCE).all(axis=1))
            if len(known):
                return self._answer(self.bases[known[0]], amounts_BK[known[0]])
        basis, inverse = self._optimum(at_K)
        self.bases.append(basis)
        self.inverses_BKK = np.concatenate([self.inverses_BKK, inverse[None]])
        return self._answer(basis, inverse @ at_K)

    def _answer(self, basis: NDArray[np.int64], amounts_K: FloatArray) -> tuple[float, dict[str, float]]:
        there = {self.names[i]: float(x) for i, x in zip(basis, amounts_K, strict=True) if x > 1e-9}
        return float(self.energies_N[basis] @ amounts_K), there

    def _optimum(self, at_K: FloatArray) -> tuple[NDArray[np.int64], FloatArray]:
        """Return the basis of lowest energy at a composition, and its inverse: the simplex method.

        It begins with the elements. Whatever lies farthest below the plane through the basis enters; what it
        uses up first leaves. After many steps, which means steps of no length, the first that lies below
        enters (Bland's rule, which ends always).
        """
        k = len(at_K)
        basis = np.arange(k)
        inverse = np.eye(k)
        for step in range(50 * len(self.energies_N) + 1000):
            amounts = inverse @ at_K
            plane_K = self.energies_N[basis] @ inverse
            below = self.energies_N - self.points_NK @ plane_K
            below[basis] = 0.0
            if below.min() >= -_TOLERANCE:
                break
            patient = step < 20 * k
            enters = int(below.argmin()) if patient else int(np.nonzero(below < -_TOLERANCE)[0][0])
            used = inverse @ self.points_NK[enters]
            ratios = np.full(k, np.inf)
            using = used > _TOLERANCE
            ratios[using] = np.maximum(amounts[using], 0.0) / used[using]
            ties = np.nonzero(ratios <= ratios.min() + _TOLERANCE)[0]
            leaves = ties[np.argmax(used[ties])] if patient else ties[np.argmin(basis[ties])]
            basis = basis.copy()
            basis[leaves] = enters
            inverse[:] = np.linalg.inv(self.points_NK[basis].T)
        return basis, inverse
