"""Relaxing crystals with a machine-learned potential, many at a time.

    >>> relax([structure], load_potential("chgnet"))
    [Relaxed(structure=..., energy_ev_per_atom=-3.36, converged=True, n_steps=14, reason=None, ...)]

The default potential is CHGNet (Deng et al. 2023, doi:10.1038/s42256-023-00716-3), whose weights come in its
wheel; any ASE calculator and any torch-sim model serve too, named "module:factory". Atoms and cell move
together under FIRE (Bitzek et al. 2006, doi:10.1103/PhysRevLett.97.170201), each crystal with a time step of
its own, all crystals in the same calls of the potential. One bad crystal is a record with a reason, never an
exception.

Energies are those of the potential: total energies in eV/atom, neither formation energies nor hull distances.
Stress is positive under tension, as in ASE.

Legend: N crystals, A atoms of all of them.
Not here: thousands of crystals, over cores and kills (relaxed_set.py); torch-sim models
(torchsim_potential.py); what is measured on relaxed crystals (scores/bulk_modulus.py, scores/stability/).
"""

import contextlib
import importlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import ImpossibleRequest, MissingExtra, UnknownName

EV_PER_ANGSTROM3_IN_GPA = 160.21766208
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# FIRE as published, with ASE's time steps: eV, angstrom and unit masses set the scale.
_DT, _DT_MAX, _MIX, _N_MIN, _FASTER, _SLOWER, _LESS_MIX, _MAX_MOVE = 0.1, 1.0, 0.1, 5, 1.1, 0.5, 0.99, 0.2
_FORCE_LIMIT = 1e3  # eV/angstrom: atoms on top of each other, where no potential was trained
_VOLUME_LIMIT = 2.0  # the cell has melted, flown apart or collapsed


class Evaluation(NamedTuple):
    """What a potential says of one crystal.

    Attributes:
        energy_ev: Of the cell.
        forces: (atoms, 3) eV/angstrom.
        stress: (3, 3) eV/angstrom^3.
    """

    energy_ev: float
    forces: FloatArray
    stress: FloatArray


class CrystalArrays(NamedTuple):
    """Crystals as arrays, their atoms after one another.

    Attributes:
        lattices: (N, 3, 3) angstrom, lattice vectors in rows.
        fractional: (A, 3), of any cell.
        numbers: (A,) int64 atomic numbers.
        counts: (N,) int64 atoms of each.
    """

    lattices: FloatArray
    fractional: FloatArray
    numbers: IntArray
    counts: IntArray

    @classmethod
    def of(cls, structures: Sequence[Structure]) -> "CrystalArrays":
        """Return the arrays of ordered structures."""
        return cls(
            np.array([s.lattice.matrix for s in structures], dtype=float).reshape(-1, 3, 3),
            np.concatenate([np.empty((0, 3)), *(s.frac_coords for s in structures)]),
            np.array([site.specie.Z for s in structures for site in s], dtype=np.int64),
            np.array([len(s) for s in structures], dtype=np.int64),
        )

    def some(self, crystals: Sequence[int]) -> "CrystalArrays":
        """Return some of the crystals, by index and in their order here."""
        kept = np.zeros(len(self.counts), dtype=bool)
        kept[list(crystals)] = True
        atoms = np.repeat(kept, self.counts)
        return CrystalArrays(
            self.lattices[kept], self.fractional[atoms], self.numbers[atoms], self.counts[kept]
        )


class Evaluations(NamedTuple):
    """What a potential says of crystals that came as arrays; NaN where there is a reason.

    Attributes:
        energies_ev: (N,) of the cells.
        forces: (A, 3) eV/angstrom.
        stresses: (N, 3, 3) eV/angstrom^3.
        reasons: Why a crystal has none, by its index.
    """

    energies_ev: FloatArray
    forces: FloatArray
    stresses: FloatArray
    reasons: dict[int, str]


class Potential(Protocol):
    """Energies, forces and stresses of crystals.

    Attributes:
        name: As it stands beside results.
    """

    @property
    def name(self) -> str:
        """Return the name."""

    def __call__(self, structures: Sequence[Structure]) -> list[Evaluation | str]:
        """Return one entry a crystal: its evaluation, or why there is none."""


@dataclass(frozen=True)
class Relaxed:
    """What became of one crystal.

    Attributes:
        structure: Where the relaxation ended, sites in the order given; None where it failed.
        energy_ev_per_atom: There; NaN where it failed.
        converged: Whether forces and stress came below the limits.
        n_steps: Moves done.
        reason: None if converged, else not_converged, or why it failed: volume (grew or shrank to more than
            twice or less than half), forces (out of all bounds), not_finite, or what the potential says
            (isolated_atoms, element, error: ...).
        max_force_ev_per_angstrom: Largest force left on an atom.
        pressure_gpa: Left; positive where the crystal wants to expand.
        initial_energy_ev_per_atom: Of the crystal as it was given; NaN where the potential had none.
    """

    structure: Structure | None
    energy_ev_per_atom: float
    converged: bool
    n_steps: int
    reason: str | None
    max_force_ev_per_angstrom: float = math.nan
    pressure_gpa: float = math.nan
    initial_energy_ev_per_atom: float = math.nan


def relax(
    structures: Sequence[Structure],
    potential: Potential | None = None,
    *,
    cell: bool = True,
    max_force_ev_per_angstrom: float = 0.05,
    max_steps: int = 300,
) -> list[Relaxed]:
    """Relax crystals, all at once.

    Args:
        structures: Ordered; primitive cells are quicker, and the same crystal.
        potential: None: CHGNet, on a GPU where there is one.
        cell: Whether lattices relax too, or atoms alone.
        max_force_ev_per_angstrom: Done when no atom feels more; a cell's force is volume x stress / atoms
            (ASE's cell filters have the same: 0.05 at 20 angstrom^3 an atom is 0.4 GPa).
        max_steps: Moves at most.

    Returns:
        One record for each crystal.
    """
    potential = potential or load_potential()
    runs = [_Fire(structure, cell) for structure in structures]
    active = list(runs)
    for step in range(max_steps + 1):
        found = potential([run.structure() for run in active])
        for run, evaluation in zip(active, found, strict=True):
            run.take(evaluation, max_force_ev_per_angstrom)
        active = [run for run in active if not run.converged and run.reason is None]
        if not active:
            break
        if step < max_steps:
            for run in active:
                run.move()
    return [run.result() for run in runs]


class _Fire:
    """One crystal under way. Moves are rows: one an atom, and three of strain times the number of atoms."""

    def __init__(self, structure: Structure, cell: bool) -> None:
        self.species = [site.specie for site in structure]
        self.lattice: FloatArray = np.array(structure.lattice.matrix)
        self.fractional: FloatArray = np.array(structure.frac_coords)
        self.n_atoms = len(self.species)
        self.cell = cell
        self.start_volume = structure.volume
        self.velocity: FloatArray = np.zeros((self.n_atoms + 3 * cell, 3))
        self.dt, self.mix, self.n_downhill = _DT, _MIX, 0
        self.force: FloatArray = self.velocity
        self.evaluation: Evaluation | None = None
        self.initial_energy = math.nan
        self.n_steps, self.converged = 0, False
        self.reason: str | None = None

    def structure(self) -> Structure:
        return Structure(Lattice(self.lattice), self.species, self.fractional)

    @property
    def volume(self) -> float:
        return abs(float(np.linalg.det(self.lattice)))

    def take(self, evaluation: Evaluation | str, max_force: float) -> None:
        """Take what the potential says of where the crystal is."""
        if isinstance(evaluation, str):
            self.reason = evaluation
            return
        force = np.concatenate([evaluation.forces, self._strain_force(evaluation.stress)])
        if not (np.isfinite(force).all() and math.isfinite(evaluation.energy_ev)):
            self.reason = "not_finite"
            return
        if self.evaluation is None:
            self.initial_energy = evaluation.energy_ev / self.n_atoms
        self.force, self.evaluation = force, evaluation
        largest = float(np.sqrt((force**2).sum(axis=1).max()))
        if largest > _FORCE_LIMIT:
            self.reason = "forces"
        self.converged = largest < max_force

    def _strain_force(self, stress: FloatArray) -> FloatArray:
        if not self.cell:
            return np.zeros((0, 3))
        return -self.volume * (stress + stress.T) / (2 * self.n_atoms)

    def move(self) -> None:
        """Make one step of FIRE."""
        force, velocity = self.force, self.velocity
        power = float((force * velocity).sum())
        if power > 0:
            length = math.sqrt(float((velocity**2).sum()) / float((force**2).sum()))
            velocity = (1 - self.mix) * velocity + self.mix * length * force
            if self.n_downhill > _N_MIN:
                self.dt, self.mix = min(self.dt * _FASTER, _DT_MAX), self.mix * _LESS_MIX
            self.n_downhill += 1
        else:
            velocity = np.zeros_like(velocity)
            if self.n_steps:
                self.dt *= _SLOWER
            self.mix, self.n_downhill = _MIX, 0
        self.velocity = velocity + self.dt * force
        moves = self.dt * self.velocity
        length = float(np.sqrt((moves**2).sum()))
        if length > _MAX_MOVE:
            moves *= _MAX_MOVE / length
        self.fractional = self.fractional + moves[: self.n_atoms] @ np.linalg.inv(self.lattice)
        if self.cell:
            self.lattice = self.lattice @ (np.eye(3) + moves[self.n_atoms :] / self.n_atoms)
            ratio = self.volume / self.start_volume
            if not 1 / _VOLUME_LIMIT < ratio < _VOLUME_LIMIT:
                self.reason = "volume"
        self.n_steps += 1

    def result(self) -> Relaxed:
        """Return the record."""
        reason = None if self.converged else self.reason or "not_converged"
        if self.evaluation is None or self.reason is not None:
            return Relaxed(
                None, math.nan, False, self.n_steps, reason, initial_energy_ev_per_atom=self.initial_energy
            )
        forces = np.sqrt((self.evaluation.forces**2).sum(axis=1))
        return Relaxed(
            structure=self.structure(),
            energy_ev_per_atom=self.evaluation.energy_ev / self.n_atoms,
            converged=self.converged,
            n_steps=self.n_steps,
            reason=reason,
            max_force_ev_per_angstrom=float(forces.max()),
            pressure_gpa=-float(np.trace(self.evaluation.stress)) / 3 * EV_PER_ANGSTROM3_IN_GPA,
            initial_energy_ev_per_atom=self.initial_energy,
        )


# ---------------------------------------------------------------- potentials


def load_potential(
    name: str = "chgnet", *, device: str | None = None, batch_atoms: int | None = None
) -> Potential:
    """Return a potential by its name.

    Args:
        name: "chgnet", or "module:factory" whose factory() is an ASE calculator with stress, such as
            "ase.calculators.emt:EMT", or a torch-sim model with stress.
        device: Of CHGNet: cpu, cuda ...; None: a GPU where there is one.
        batch_atoms: Atoms of the crystals that CHGNet, or a torch-sim model, evaluates together; None: 48 on
            a CPU, where more crystals only leave the cache (14 ms a crystal of nine atoms in fives, 20 ms in
            hundreds), 4,096 on a GPU (6 GB of CHGNet's).

    Raises:
        MissingExtra: If the potential's library is not installed.
        UnknownName: If there is none of that name.
    """
    if name == "chgnet":
        return ChgnetPotential(device=device, batch_atoms=batch_atoms)
    module, colon, factory = name.partition(":")
    if not colon:
        raise UnknownName(
            f"no potential '{name}'; known: chgnet; ASE calculators and torch-sim models: module:factory."
        )
    try:
        made = getattr(importlib.import_module(module), factory)()
    except ImportError as error:
        raise MissingExtra(f"potential '{name}' needs {module}, which cannot be loaded: {error}") from error
    except AttributeError as error:
        raise UnknownName(f"potential '{name}': {module} has no '{factory}'.") from error
    if hasattr(made, "compute_stress") and hasattr(made, "dtype"):  # torch-sim's ModelInterface
        from crystallm_kit.structures.torchsim_potential import TorchSimPotential

        return TorchSimPotential(made, name=name, batch_atoms=batch_atoms)
    return AsePotential(made, name=name)


def best_device() -> str:
    """Return cuda where there is a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class ChgnetPotential:
    """CHGNet, several crystals at a time."""

    name = "chgnet"

    def __init__(self, *, device: str | None = None, batch_atoms: int | None = None) -> None:
        """Load the weights that chgnet brings. Raises MissingExtra without chgnet."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                from chgnet.model import CHGNet

                from crystallm_kit.structures.chgnet_batches import evaluate
        except ImportError as error:
            raise MissingExtra.of("potential 'chgnet'", "chgnet", "stability") from error
        self.device = device or best_device()
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = CHGNet.load(use_device=self.device, verbose=False).eval()
        self.name = f"chgnet {self.model.version}"
        self.model.requires_grad_(False)
        self.batch_atoms = batch_atoms or (48 if self.device == "cpu" else 4096)
        self._evaluate = evaluate

    def __call__(self, structures: Sequence[Structure]) -> list[Evaluation | str]:
        """Return one entry a crystal: its evaluation, or why there is none."""
        if not structures:
            return []
        crystals = CrystalArrays.of(structures)
        found = self._evaluate(self.model, crystals, most=self.batch_atoms)
        forces = np.split(found.forces, np.cumsum(crystals.counts)[:-1])
        return [
            found.reasons.get(i) or Evaluation(float(energy), force, stress)
            for i, (energy, force, stress) in enumerate(
                zip(found.energies_ev, forces, found.stresses, strict=True)
            )
        ]


def batches_of(indices: Sequence[int], sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the indices in lists whose sizes add up to at most `most`, or of one."""
    batch: list[int] = []
    total = 0
    for i in indices:
        if batch and total + sizes[i] > most:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += sizes[i]
    if batch:
        yield batch


class AsePotential:
    """Any ASE calculator with stress, one crystal after the other."""

    def __init__(self, calculator: Any, *, name: str | None = None) -> None:
        self.calculator = calculator
        self.name = name or type(calculator).__name__
        missing = {"energy", "forces", "stress"} - set(getattr(calculator, "implemented_properties", ()))
        if missing:
            raise ImpossibleRequest(f"potential '{self.name}': gives no {', '.join(sorted(missing))}.")

    def __call__(self, structures: Sequence[Structure]) -> list[Evaluation | str]:
        """Return one entry a crystal: its evaluation, or why there is none."""
        return [self._evaluate(structure) for structure in structures]

    def _evaluate(self, structure: Structure) -> Evaluation | str:
        from ase import Atoms

        atoms = Atoms(
            numbers=[site.specie.Z for site in structure],
            cell=structure.lattice.matrix,
            scaled_positions=structure.frac_coords,
            pbc=True,
            calculator=self.calculator,
        )
        try:
            return Evaluation(
                float(atoms.get_potential_energy()),
                np.array(atoms.get_forces(), dtype=float),
                np.array(atoms.get_stress(voigt=False), dtype=float),
            )
        except Exception as error:  # noqa: BLE001 - calculators raise what they like, and one crystal is no reason
            return f"error: {type(error).__name__}: {error}"
