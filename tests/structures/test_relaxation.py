"""structures/relaxation.py: relaxed as ASE relaxes, many at a time, and a bad crystal is a record."""

import math

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import ImpossibleRequest, MissingExtra, UnknownName
from crystallm_kit.structures.relaxation import Evaluation, Evaluations, load_potential, relax

EMT = (
    "ase.calculators.emt:EMT"  # effective medium theory: Al, Cu, Ag, Au, Ni, Pd, Pt; a millisecond a crystal
)


def fcc(element, a):
    basis = [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]]
    return Structure(basis, [element], [[0, 0, 0]])


def rock_salt(a, cation="Na", anion="Cl"):
    basis = [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]]
    return Structure(basis, [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def distorted_alloy():
    """L1_2 Cu3Au, sheared, with atoms off their sites."""
    lattice = Lattice([[3.7, 0.1, 0], [0, 3.9, 0.05], [0.1, 0, 4.0]])
    sites = [[0, 0, 0], [0.5, 0.52, 0], [0.49, 0, 0.5], [0, 0.5, 0.47]]
    return Structure(lattice, ["Au", "Cu", "Cu", "Cu"], sites)


@pytest.fixture(scope="module")
def emt():
    return load_potential(EMT)


def relaxed_by_ase(structure, calculator, force):
    from ase import Atoms
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS

    atoms = Atoms(
        numbers=[site.specie.Z for site in structure],
        cell=structure.lattice.matrix,
        scaled_positions=structure.frac_coords,
        pbc=True,
        calculator=calculator,
    )
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=force, steps=500)
    return atoms


def test_atoms_and_cell_end_where_ase_ends(emt):
    from ase.calculators import emt as effective_medium

    structure = distorted_alloy()
    (found,) = relax([structure], emt, max_force_ev_per_angstrom=0.005)
    expected = relaxed_by_ase(structure, effective_medium.EMT(), 0.005)
    assert found.converged
    assert found.reason is None
    assert found.energy_ev_per_atom == pytest.approx(expected.get_potential_energy() / 4, abs=2e-4)
    assert found.structure.volume == pytest.approx(expected.get_volume(), rel=2e-3)
    assert found.max_force_ev_per_angstrom < 0.005
    assert abs(found.pressure_gpa) < 0.2


def test_crystals_relax_together_as_they_do_alone(emt):
    crystals = [fcc("Cu", 3.8), distorted_alloy(), fcc("Al", 3.9)]
    together = relax(crystals, emt)
    assert [r.n_steps for r in together] == [relax([c], emt)[0].n_steps for c in crystals]
    assert len({r.n_steps for r in together}) > 1  # each stops when it is done
    for crystal, found in zip(crystals, together, strict=True):
        (alone,) = relax([crystal], emt)
        assert found.energy_ev_per_atom == alone.energy_ev_per_atom
        assert [s.specie for s in found.structure] == [s.specie for s in crystal]


def test_the_cell_stays_where_only_atoms_may_move(emt):
    structure = distorted_alloy()
    (found,) = relax([structure], emt, cell=False)
    assert found.converged
    assert np.array_equal(found.structure.lattice.matrix, structure.lattice.matrix)
    assert found.structure != structure
    (free,) = relax([structure], emt)
    assert free.energy_ev_per_atom < found.energy_ev_per_atom


def test_what_is_given_stays_as_it_is(emt):
    structure = distorted_alloy()
    before = structure.copy()
    relax([structure], emt)
    assert structure == before


def test_a_crystal_out_of_steps_is_not_converged_but_there(emt):
    (found,) = relax([distorted_alloy()], emt, max_steps=1)
    assert (found.converged, found.reason, found.n_steps) == (False, "not_converged", 1)
    assert found.structure is not None
    assert math.isfinite(found.energy_ev_per_atom)


def test_a_bad_crystal_has_a_reason_and_the_others_are_relaxed(emt):
    on_top = Structure(Lattice.cubic(4.0), ["Cu", "Cu"], [[0, 0, 0], [0.001, 0, 0]])
    found = relax([rock_salt(5.6), fcc("Cu", 3.7), on_top], emt)
    assert found[0].reason.startswith("error: NotImplementedError")  # EMT knows no Na
    assert found[1].converged
    assert found[2].reason is not None
    for bad in (found[0], found[2]):
        assert bad.structure is None
        assert math.isnan(bad.energy_ev_per_atom)


def test_a_cell_that_flies_apart_is_stopped():
    """An inverted spring: the larger the cell, the stronger it pushes."""

    class Repulsive:
        name = "repulsive"

        def __call__(self, structures):
            return [Evaluation(-s.volume, np.zeros((len(s), 3)), -np.eye(3)) for s in structures]

    (found,) = relax([fcc("Cu", 3.6)], Repulsive())
    assert found.reason == "volume"
    assert found.structure is None


def test_numbers_that_are_none_are_a_reason():
    class Broken:
        name = "broken"

        def __call__(self, structures):
            return [Evaluation(math.nan, np.zeros((len(s), 3)), np.zeros((3, 3))) for s in structures]

    assert relax([fcc("Cu", 3.6)], Broken())[0].reason == "not_finite"


def test_a_potential_that_takes_arrays_is_asked_for_no_structures():
    """Harmonic wells: atoms come to rest at x = 0 of their cell, whose stress is zero."""

    class Wells:
        name = "wells"

        def __call__(self, structures):
            raise AssertionError

        def of_arrays(self, crystals):
            owner = np.repeat(np.arange(len(crystals.counts)), crystals.counts)
            at = np.einsum("ai,aij->aj", crystals.fractional, crystals.lattices[owner])
            energies = np.bincount(owner, (at**2).sum(axis=1) / 2)
            reasons = dict.fromkeys(np.flatnonzero(crystals.counts == 3), "wells")
            return Evaluations(energies, -at, np.zeros((len(crystals.counts), 3, 3)), reasons)

    crystals = [
        Structure(Lattice.cubic(4), ["Cu"] * n, np.linspace(0.02, 0.1 * n, 3 * n).reshape(n, 3))
        for n in (2, 3, 5, 1)
    ]
    asked = []
    found = relax(crystals, Wells(), say=lambda: asked.append(1))
    assert [r.reason for r in found] == [None, "wells", None, None]
    assert found[0].n_steps != found[2].n_steps
    assert len(asked) == max(r.n_steps for r in found) + 1
    for crystal, relaxed in zip(crystals, found, strict=True):
        if relaxed.converged:
            assert np.abs(relaxed.structure.cart_coords).max() < 0.05
            assert len(relaxed.structure) == len(crystal)
            assert relaxed.n_steps == relax([crystal], Wells())[0].n_steps


def test_nothing_to_relax_is_nothing(emt):
    assert relax([], emt) == []


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("chgnett", UnknownName, "no potential 'chgnett'"),
        ("ase.calculators.emt:Emt", UnknownName, "has no 'Emt'"),
        ("no_such_library:factory", MissingExtra, "needs no_such_library"),
        ("ase.calculators.harmonic:SpringCalculator", ImpossibleRequest, "gives no stress"),
    ],
)
def test_a_potential_that_is_none_is_refused(name, error, words):
    if "Spring" in name:
        from crystallm_kit.structures.relaxation import AsePotential

        with pytest.raises(error, match=words):
            AsePotential(type("OnlyForces", (), {"implemented_properties": ["energy", "forces"]})())
        return
    with pytest.raises(error, match=words):
        load_potential(name)


# ---------------------------------------------------------------- CHGNet


@pytest.fixture(scope="module")
def chgnet():
    pytest.importorskip("chgnet")
    return load_potential("chgnet", device="cpu")


def distorted_rock_salt():
    structure = rock_salt(5.5)
    structure.apply_strain([0.02, -0.01, 0.03])
    structure.translate_sites([1], [0.02, 0.01, -0.03])
    return structure


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_chgnet_says_what_its_own_prediction_says(chgnet):
    from chgnet.model import CHGNet

    crystals = [distorted_rock_salt(), distorted_alloy(), fcc("Si", 5.4)]
    found = chgnet(crystals)
    expected = CHGNet.load(use_device="cpu", verbose=False).predict_structure(crystals, task="efs")
    for crystal, ours, theirs in zip(crystals, found, expected, strict=True):
        assert ours.energy_ev / len(crystal) == pytest.approx(float(theirs["e"]), abs=1e-5)
        assert np.abs(ours.forces - theirs["f"]).max() < 1e-4
        assert np.abs(ours.stress * 160.21766 - theirs["s"]).max() < 1e-3
    assert np.abs(found[0].forces).max() > 0.1  # there is something to compare


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_relaxation_with_chgnet_ends_where_ase_ends(chgnet):
    from chgnet.model import CHGNetCalculator

    # it changes the model's settings, so it gets one of its own
    calculator = CHGNetCalculator(load_potential("chgnet", device="cpu").model, use_device="cpu")
    crystals = [distorted_rock_salt(), rock_salt(4.1, "Mg", "O")]
    for crystal, found in zip(crystals, relax(crystals, chgnet), strict=True):
        atoms = relaxed_by_ase(crystal, calculator, 0.05)
        assert found.converged
        assert found.energy_ev_per_atom == pytest.approx(atoms.get_potential_energy() / 2, abs=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_chgnet_has_reasons_for_what_it_cannot_say(chgnet):
    lonely = Structure(Lattice.cubic(30.0), ["Ar"], [[0, 0, 0]])
    oganesson = fcc("Og", 6.0)
    found = relax([lonely, oganesson, rock_salt(5.6)], chgnet)
    assert [r.reason for r in found] == ["isolated_atoms", "element", None]
