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

Legend: N crystals, A atoms of all of them, R rows of moves: A, and 3 N where cells relax.
Not here: thousands of crystals, over cores and kills (relaxed_set.py); torch-sim models
(torchsim_potential.py); what is measured on relaxed crystals (scores/bulk_modulus.py, scores/stability/).
"""

import contextlib
import importlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

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

    @property
    def volumes(self) -> FloatArray:
        """Return (N,) angstrom^3."""
        volumes: FloatArray = np.abs(np.linalg.det(self.lattices))
        return volumes

    def split(self, of_atoms: FloatArray) -> list[FloatArray]:
        """Return what is of all atoms, (A, ...), crystal by crystal."""
        return np.split(of_atoms, np.cumsum(self.counts)[:-1]) if len(self.counts) else []

    def some(self, crystals: Sequence[int] | IntArray) -> "CrystalArrays":
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

    @classmethod
    def of(cls, found: Sequence[Evaluation | str], counts: IntArray) -> "Evaluations":
        """Return as arrays what a potential says of each crystal, of `counts` atoms."""
        nothing = [Evaluation(math.nan, np.full((n, 3), math.nan), np.full((3, 3), math.nan)) for n in counts]
        numbers = [nothing[i] if isinstance(one, str) else one for i, one in enumerate(found)]
        return cls(
            np.array([one.energy_ev for one in numbers]),
            np.concatenate([np.empty((0, 3)), *(one.forces for one in numbers)]),
            np.array([one.stress for one in numbers]).reshape(-1, 3, 3),
            {i: one for i, one in enumerate(found) if isinstance(one, str)},
        )


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


@runtime_checkable
class ArrayPotential(Potential, Protocol):
    """A potential that takes arrays too, without a Python object a crystal."""

    def of_arrays(self, crystals: CrystalArrays) -> Evaluations:
        """Return energies, forces and stresses of all crystals."""


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
    say: Callable[[], None] | None = None,
) -> list[Relaxed]:
    """Relax crystals, all at once.

    Args:
        structures: Ordered; primitive cells are quicker, and the same crystal.
        potential: None: CHGNet, on a GPU where there is one.
        cell: Whether lattices relax too, or atoms alone.
        max_force_ev_per_angstrom: Done when no atom feels more; a cell's force is volume x stress / atoms
            (ASE's cell filters have the same: 0.05 at 20 angstrom^3 an atom is 0.4 GPa).
        max_steps: Moves at most.
        say: Called whenever the potential has answered.

    Returns:
        One record for each crystal.
    """
    potential = potential or load_potential()
    species = [[site.specie for site in structure] for structure in structures]
    under_way = _Fire(CrystalArrays.of(structures), cell)
    records: dict[int, Relaxed] = {}
    for step in range(max_steps + 1):
        if not len(under_way.index):
            break
        found = _asked(potential, under_way.crystals, [species[i] for i in under_way.index])
        if say:
            say()
        reasons = under_way.take(found, max_force_ev_per_angstrom)
        if step == max_steps:
            reasons = [reason or "not_converged" for reason in reasons]
        records |= under_way.leave(reasons, species)
        if step < max_steps:
            records |= under_way.leave(under_way.move(), species)
    return [records[i] for i in range(len(structures))]


def _asked(potential: Potential, crystals: CrystalArrays, species: Sequence[list[Any]]) -> Evaluations:
    """Return what a potential says of crystals; those that take no arrays are asked of structures."""
    if isinstance(potential, ArrayPotential):
        return potential.of_arrays(crystals)
    parts = zip(crystals.lattices, species, crystals.split(crystals.fractional), strict=True)
    return Evaluations.of(potential([Structure(Lattice(m), z, x) for m, z, x in parts]), crystals.counts)


_CONVERGED = "converged"


class _Fire:
    """Crystals under way, as many as are left. Moves are rows: one an atom, then three of each strain.

    Strain moves count as much as the crystal's atoms together: they are strains times the number of atoms.

    Attributes:
        index: (N,) of each crystal among those that began.
        owner: (R,) crystal of each row.
        found: What the potential said last, of the crystals there were then.
    """

    def __init__(self, crystals: CrystalArrays, cell: bool) -> None:
        n = len(crystals.counts)
        self.crystals, self.cell = crystals, cell
        self.index = np.arange(n)
        self.owner = self._owner()
        self.velocity: FloatArray = np.zeros((len(self.owner), 3))
        self.force = self.velocity
        self.dt, self.mix, self.n_downhill = np.full(n, _DT), np.full(n, _MIX), np.zeros(n, dtype=int)
        self.start_volumes = crystals.volumes
        self.initial_energies = np.full(n, math.nan)  # eV/atom
        self.found: Evaluations | None = None
        self.n_steps = 0

    def _owner(self) -> IntArray:
        crystals = np.arange(len(self.crystals.counts))
        return np.concatenate(
            [np.repeat(crystals, self.crystals.counts), np.repeat(crystals, 3 if self.cell else 0)]
        )

    def _sums(self, values: FloatArray) -> FloatArray:
        """Return the sums over each crystal's rows of (R, 3) values."""
        sums = np.bincount(self.owner, values.sum(axis=1), minlength=len(self.index))
        return np.asarray(sums, dtype=np.float64)

    def take(self, found: Evaluations, max_force: float) -> list[str | None]:
        """Take what the potential says of where the crystals are, and return why some go no further."""
        counts = self.crystals.counts
        stresses = found.stresses + found.stresses.transpose(0, 2, 1)
        strains = -(self.crystals.volumes / (2 * np.maximum(counts, 1)))[:, None, None] * stresses
        self.found = found
        self.force = np.concatenate([found.forces, strains.reshape(-1, 3)]) if self.cell else found.forces
        largest: FloatArray = np.zeros(len(counts))
        with np.errstate(over="ignore", invalid="ignore"):
            np.maximum.at(largest, self.owner, np.sqrt((self.force**2).sum(axis=1)))
        is_finite = np.isfinite(self._sums(np.abs(self.force))) & np.isfinite(found.energies_ev)
        if self.n_steps == 0:
            self.initial_energies = np.where(is_finite, found.energies_ev / np.maximum(counts, 1), math.nan)
        reasons: list[str | None] = [None] * len(counts)
        for which, reason in (
            (largest < max_force, _CONVERGED),
            (largest > _FORCE_LIMIT, "forces"),
            (~is_finite, "not_finite"),
        ):
            for i in np.flatnonzero(which).tolist():
                reasons[i] = reason
        return [found.reasons.get(i, reason) for i, reason in enumerate(reasons)]

    def move(self) -> list[str | None]:
        """Make one step of FIRE, and return why some crystals go no further."""
        force, owner = self.force, self.owner
        is_downhill = self._sums(force * self.velocity) > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            turn = self.mix * np.sqrt(self._sums(self.velocity**2) / self._sums(force**2))
        kept, turn = np.where(is_downhill, 1 - self.mix, 0.0), np.where(is_downhill, turn, 0.0)
        is_faster = is_downhill & (self.n_downhill > _N_MIN)
        slower = _SLOWER if self.n_steps else 1.0
        self.dt = np.where(is_faster, np.minimum(self.dt * _FASTER, _DT_MAX), self.dt)
        self.dt = np.where(is_downhill, self.dt, self.dt * slower)
        self.mix = np.where(is_downhill, np.where(is_faster, self.mix * _LESS_MIX, self.mix), _MIX)
        self.n_downhill = np.where(is_downhill, self.n_downhill + 1, 0)
        self.velocity = kept[owner, None] * self.velocity + (turn + self.dt)[owner, None] * force
        moves = self.dt[owner, None] * self.velocity
        lengths = np.sqrt(self._sums(moves**2))
        moves *= np.minimum(1.0, _MAX_MOVE / np.maximum(lengths, _MAX_MOVE))[owner, None]
        return self._displace(moves)

    def _displace(self, moves: FloatArray) -> list[str | None]:
        lattices, fractional, _, counts = self.crystals
        n_atoms = len(fractional)
        inverses = np.linalg.inv(lattices)[self.owner[:n_atoms]]
        fractional = fractional + np.einsum("ai,aij->aj", moves[:n_atoms], inverses)
        self.n_steps += 1
        if self.cell:
            lattices = lattices @ (np.eye(3) + moves[n_atoms:].reshape(-1, 3, 3) / counts[:, None, None])
        self.crystals = self.crystals._replace(lattices=lattices, fractional=fractional)
        ratios = self.crystals.volumes / self.start_volumes
        return [None if 1 / _VOLUME_LIMIT < ratio < _VOLUME_LIMIT else "volume" for ratio in ratios]

    def leave(self, reasons: Sequence[str | None], species: Sequence[list[Any]]) -> dict[int, Relaxed]:
        """Return the records of crystals that go no further; the others stay."""
        left = [i for i, reason in enumerate(reasons) if reason is not None]
        if not left:
            return {}
        records = {int(self.index[i]): self._record(i, str(reasons[i]), species) for i in left}
        stay = np.array([reason is None for reason in reasons])
        rows = stay[self.owner]
        self.velocity, self.force = self.velocity[rows], self.force[rows]
        self.dt, self.mix, self.n_downhill = self.dt[stay], self.mix[stay], self.n_downhill[stay]
        self.start_volumes, self.initial_energies = self.start_volumes[stay], self.initial_energies[stay]
        self.crystals, self.index = self.crystals.some(np.flatnonzero(stay)), self.index[stay]
        self.owner = self._owner()
        return records

    def _record(self, i: int, reason: str, species: Sequence[list[Any]]) -> Relaxed:
        initial = float(self.initial_energies[i])
        if self.found is None or reason not in (_CONVERGED, "not_converged"):
            return Relaxed(None, math.nan, False, self.n_steps, reason, initial_energy_ev_per_atom=initial)
        end = int(self.crystals.counts[: i + 1].sum())
        atoms = slice(end - int(self.crystals.counts[i]), end)
        lattice = Lattice(self.crystals.lattices[i])
        return Relaxed(
            structure=Structure(lattice, species[self.index[i]], self.crystals.fractional[atoms]),
            energy_ev_per_atom=float(self.found.energies_ev[i]) / (atoms.stop - atoms.start),
            converged=reason == _CONVERGED,
            n_steps=self.n_steps,
            reason=None if reason == _CONVERGED else reason,
            max_force_ev_per_angstrom=float(np.linalg.norm(self.found.forces[atoms], axis=1).max()),
            pressure_gpa=-float(np.trace(self.found.stresses[i])) / 3 * EV_PER_ANGSTROM3_IN_GPA,
            initial_energy_ev_per_atom=initial,
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
        batch_atoms: Atoms of the crystals that CHGNet, or a torch-sim model, evaluates together; None: 4,096
            on a GPU (6 GB of CHGNet's); on a CPU 192 of CHGNet's, as more leave the cache (9.2 ms a crystal
            of nine atoms; 11.1 with 48, 10.5 with 768), and 48 of a torch-sim model's.

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
                from crystallm_kit.structures.chgnet_layers import multiply_first
        except ImportError as error:
            raise MissingExtra.of("potential 'chgnet'", "chgnet", "stability") from error
        self.device = device or best_device()
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = CHGNet.load(use_device=self.device, verbose=False).eval()
        self.name = f"chgnet {self.model.version}"
        self.model.requires_grad_(False)
        multiply_first(self.model)
        self.batch_atoms = batch_atoms or (192 if self.device == "cpu" else 4096)
        self._evaluate = evaluate

    def __call__(self, structures: Sequence[Structure]) -> list[Evaluation | str]:
        """Return one entry a crystal: its evaluation, or why there is none."""
        crystals = CrystalArrays.of(structures)
        found = self.of_arrays(crystals)
        parts = zip(found.energies_ev, crystals.split(found.forces), found.stresses, strict=True)
        return [found.reasons.get(i) or Evaluation(float(e), f, s) for i, (e, f, s) in enumerate(parts)]

    def of_arrays(self, crystals: CrystalArrays) -> Evaluations:
        """Return energies, forces and stresses of all crystals."""
        return self._evaluate(self.model, crystals, most=self.batch_atoms)


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
