"""What a potential's total energies are measured from: one energy an element, fitted to known crystals.

    references = shipped_references("chgnet 0.3.0")
    references.formation_energy(Composition("NaCl"), -3.36)   ->  -2.08 eV/atom

A potential gives total energies, a hull wants formation energies. The difference is a sum over the elements,
share of atoms times the element's energy; these energies are fitted by least squares to crystals whose
formation energies are known, with Huber weights, so that a few crystals that the potential has wrong do not
move them. What the fit leaves is the potential's error, and the data's; `check` holds what it comes to on
crystals that the fit has not seen, and is printed beside every result.

chgnet 0.3.0 comes fitted (element_references_chgnet.json); for another potential:
    python -m crystallm_kit.scoring.potential_check --potential module:factory --fit train.parquet \
        --test test.parquet --hull hull.parquet --out references.json

Not here: running potentials (structures/relaxation.py, scoring/potential_check.py), hulls (hull.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Composition

from crystallm_kit.errors import EmptyInput, ImpossibleRequest, ReadError

MIN_CRYSTALS = 5  # with the element; fewer do not fix its energy
FloatArray = NDArray[np.float64]
_HUBER_EV = 0.05  # CHGNet's errors are 0.02 on average; 1 in 20 is beyond 0.06
_ROUNDS = 50
_SHIPPED = Path(__file__).parent / "element_references_chgnet.json"


@dataclass(frozen=True)
class Check:
    """How far energies and hull distances are off on known crystals, eV/atom.

    Attributes:
        data: The crystals, and how they were chosen.
        n: Crystals.
        n_failed: Of these, relaxations that failed; they are in no mean.
        structures: "relaxed", by the potential from the known structures, or "as given".
        formation_energy_mae: Mean absolute difference of the formation energies.
        formation_energy_bias: Mean difference, the potential's minus the known.
        hull: Name of the hull.
        hull_distance_mae: Of the potential's hull distance to the known one.
        hull_distance_mae_of_hull: The same with the known formation energies: what the hull alone is off.
        metastable_agreement: Share of the crystals of which potential and known distance say the same about
            0.1 eV/atom.
        stable_agreement: The same about 0 eV/atom, where an error of any size decides for those on the hull.
        note: What else has to be known.
    """

    data: str
    n: int
    n_failed: int
    structures: str
    formation_energy_mae: float
    formation_energy_bias: float
    hull: str
    hull_distance_mae: float
    hull_distance_mae_of_hull: float
    metastable_agreement: float
    stable_agreement: float
    note: str = ""


@dataclass(frozen=True)
class ElementReferences:
    """The elements' energies under a potential.

    Attributes:
        potential: Its name, with its version.
        energies_ev_per_atom: Symbol -> energy.
        fitted_on: The crystals, how they were chosen, and how many.
        n_fitted: Crystals.
        fit_mae_ev_per_atom: What the fit leaves on them, mean absolute.
        checks: On crystals that the fit has not seen.
        versions: Library -> version, of the potential.
    """

    potential: str
    energies_ev_per_atom: Mapping[str, float]
    fitted_on: str
    n_fitted: int
    fit_mae_ev_per_atom: float
    checks: tuple[Check, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def missing_elements(self, composition: Composition) -> tuple[str, ...]:
        """Return the elements without an energy."""
        return tuple(sorted({e.symbol for e in composition.elements} - set(self.energies_ev_per_atom)))

    def formation_energy(self, composition: Composition, energy_ev_per_atom: float) -> float:
        """Return the formation energy in eV/atom of a total energy in eV/atom.

        Raises:
            ImpossibleRequest: If an element has no reference energy; the message names it.
        """
        missing = self.missing_elements(composition)
        if missing:
            raise ImpossibleRequest(
                f"no reference energy of {', '.join(missing)} under {self.potential} (fitted on "
                f"{self.fitted_on}); fit others with python -m crystallm_kit.scoring.potential_check"
            )
        mixed = sum(
            amount * self.energies_ev_per_atom[element.symbol]
            for element, amount in zip(composition.elements, composition.values(), strict=True)
        )
        return float(energy_ev_per_atom - mixed / composition.num_atoms)

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def fit_references(
    compositions: Sequence[Composition],
    energies_ev_per_atom: Sequence[float],
    formation_energies_ev_per_atom: Sequence[float],
    *,
    potential: str,
    fitted_on: str,
    versions: Mapping[str, str] | None = None,
) -> ElementReferences:
    """Fit the elements' energies.

    Args:
        compositions: Of the known crystals.
        energies_ev_per_atom: Their total energies under the potential.
        formation_energies_ev_per_atom: Known.
        potential: Its name, with its version.
        fitted_on: The crystals, in words.
        versions: Library -> version.

    Raises:
        EmptyInput: If no element is in MIN_CRYSTALS crystals.
    """
    counts: dict[str, int] = {}
    for composition in compositions:
        for element in composition.elements:
            counts[element.symbol] = counts.get(element.symbol, 0) + 1
    elements = sorted(symbol for symbol, n in counts.items() if n >= MIN_CRYSTALS)
    usable = [i for i, c in enumerate(compositions) if all(e.symbol in elements for e in c.elements)]
    if not usable:
        raise EmptyInput(
            f"{len(compositions)} crystals of {fitted_on}: no element is in {MIN_CRYSTALS} of them; give more"
        )
    column = {symbol: i for i, symbol in enumerate(elements)}
    shares: FloatArray = np.zeros((len(usable), len(elements)))
    for row, i in enumerate(usable):
        for element, amount in compositions[i].items():
            shares[row, column[element.symbol]] = amount / compositions[i].num_atoms
    wanted = np.array([energies_ev_per_atom[i] - formation_energies_ev_per_atom[i] for i in usable])
    found, left = _huber(shares, wanted)
    return ElementReferences(
        potential=potential,
        energies_ev_per_atom={s: round(float(e), 5) for s, e in zip(elements, found, strict=True)},
        fitted_on=fitted_on,
        n_fitted=len(usable),
        fit_mae_ev_per_atom=round(float(np.abs(left).mean()), 5),
        versions=dict(versions or {}),
    )


def _huber(shares: FloatArray, wanted: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the solution of a least-squares problem with Huber weights, and what it leaves."""
    weights: FloatArray = np.ones(len(wanted))
    for _ in range(_ROUNDS):
        root = np.sqrt(weights)
        solved = np.linalg.lstsq(shares * root[:, None], wanted * root, rcond=None)[0]
        found: FloatArray = np.asarray(solved, dtype=np.float64)
        left: FloatArray = wanted - shares @ found
        weights = np.asarray(1 / np.maximum(1, np.abs(left) / _HUBER_EV), dtype=np.float64)
    return found, left


def read_references(path: str | Path) -> ElementReferences:
    """Read what `save` has written. Raises ReadError if it is none."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        checks = tuple(Check(**check) for check in data.pop("checks", []))
        return ElementReferences(**data, checks=checks)
    except OSError as error:
        raise ReadError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ReadError(f"{path}: no element references ({error}); potential_check writes them") from error


@cache
def _shipped() -> ElementReferences:
    return read_references(_SHIPPED)


def shipped_references(potential: str) -> ElementReferences:
    """Return the references that come with the package for a potential, such as "chgnet 0.3.0".

    Raises:
        ImpossibleRequest: If there are none; the message says how they are made.
    """
    shipped = _shipped()
    if potential not in (shipped.potential, shipped.potential.partition(" ")[0]):
        raise ImpossibleRequest(
            f"no element references for potential '{potential}' (they come for {shipped.potential}); fit "
            "them with python -m crystallm_kit.scoring.potential_check --potential NAME"
        )
    return shipped
