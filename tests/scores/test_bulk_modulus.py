"""scores/bulk_modulus.py: equations of state fitted as others fit them; what cannot be fitted is refused."""

import numpy as np
import pytest
from pymatgen.analysis.eos import BirchMurnaghan
from pymatgen.core import Lattice, Structure

from crystallm_kit.scores.bulk_modulus import VOLUME_RATIOS, birch_murnaghan, bulk_moduli
from crystallm_kit.structures.relaxation import EV_PER_ANGSTROM3_IN_GPA, load_potential

# Effective medium theory. ASE's tutorial of equations of state has Ag at 100.14 GPa, 16.7811 angstrom^3:
# https://wiki.fysik.dtu.dk/ase/tutorials/eos/eos.html
EMT = "ase.calculators.emt:EMT"


def energies(volumes, e0, b0, b1, v0):
    """Birch 1947 as it is usually printed."""
    eta = (v0 / np.asarray(volumes)) ** (2 / 3)
    return e0 + 9 * b0 * v0 / 16 * ((eta - 1) ** 3 * b1 + (eta - 1) ** 2 * (6 - 4 * eta))


def fcc(element, a):
    basis = [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]]
    return Structure(basis, [element], [[0, 0, 0]])


@pytest.mark.parametrize(("b0", "b1", "v0"), [(0.1, 4.0, 20.0), (0.02, 6.5, 38.0), (2.75, 3.6, 5.6)])
def test_the_fit_returns_what_the_curve_was_made_from(b0, b1, v0):
    volumes = 1.01 * v0 * np.array(VOLUME_RATIOS)
    found = birch_murnaghan(volumes, energies(volumes, -4.2, b0, b1, v0))
    assert found.gpa == pytest.approx(b0 * EV_PER_ANGSTROM3_IN_GPA, rel=1e-6)
    assert found.volume == pytest.approx(v0, rel=1e-6)
    assert found.residual < 1e-6


def test_the_fit_is_pymatgens_on_energies_with_noise():
    volumes = 30.0 * np.array(VOLUME_RATIOS)
    noise = 2e-5 * np.random.default_rng(1).standard_normal(len(volumes))
    noisy = energies(volumes, -3.0, 0.4, 4.5, 30.3) + noise
    theirs = BirchMurnaghan(volumes, noisy)
    theirs.fit()
    found = birch_murnaghan(volumes, noisy)
    assert found.gpa == pytest.approx(float(theirs.b0_GPa), rel=1e-3)
    assert found.volume == pytest.approx(float(theirs.v0), rel=1e-4)
    assert 1e-4 < found.residual < 1e-2


def test_a_curve_without_a_minimum_inside_is_refused():
    volumes = 20.0 * np.array(VOLUME_RATIOS)
    assert birch_murnaghan(volumes, energies(volumes, 0.0, 0.1, 4.0, 23.0)) is None
    assert birch_murnaghan(volumes, -energies(volumes, 0.0, 0.1, 4.0, 20.0)) is None


def test_silver_under_effective_medium_theory_is_as_stiff_as_others_find():
    (found,) = bulk_moduli([fcc("Ag", 4.2)], load_potential(EMT))
    assert found.reason is None
    assert found.gpa == pytest.approx(100.14, rel=0.02)
    assert found.volume_per_atom_angstrom3 == pytest.approx(16.78, rel=0.005)


def test_an_alloy_with_free_atoms_is_softer_when_they_may_move():
    """Atoms that relax at each volume can only lower the energies away from the minimum."""
    structure = Structure(
        Lattice.tetragonal(2.8, 7.6), ["Cu", "Au", "Pd", "Cu"],
        [[0, 0, 0], [0.5, 0.5, 0.21], [0, 0, 0.52], [0.5, 0.5, 0.77]],
    )  # fmt: skip
    potential = load_potential(EMT)
    (moving,) = bulk_moduli([structure], potential, max_force_ev_per_angstrom=0.01)
    (static,) = bulk_moduli([structure], potential, relax_atoms=False, max_force_ev_per_angstrom=0.01)
    assert moving.reason is None
    assert moving.gpa < static.gpa


def test_a_crystal_that_cannot_be_measured_has_its_reason_and_the_others_their_numbers():
    table_salt = Structure(Lattice.cubic(4.0), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    found = bulk_moduli([fcc("Cu", 3.6), table_salt, fcc("Al", 4.0)], load_potential(EMT))
    assert [m.gpa is None for m in found] == [False, True, False]
    assert found[1].reason.startswith("relaxation:error: NotImplementedError")
    assert found[0].gpa > found[2].gpa  # copper is stiffer than aluminium
    assert bulk_moduli([], load_potential(EMT)) == []


def test_a_crystal_that_did_not_converge_is_not_measured():
    (found,) = bulk_moduli([fcc("Cu", 3.9)], load_potential(EMT), max_steps=1)
    assert (found.gpa, found.reason) == (None, "relaxation:not_converged")


def test_a_rough_curve_is_refused():
    class Rough:
        """Energies with a step of the size of their spread between two volumes."""

        name = "rough"

        def __init__(self):
            self.emt = load_potential(EMT)

        def __call__(self, structures):
            found = self.emt(structures)
            if len(structures) == 1:
                return found
            return [e._replace(energy_ev=e.energy_ev + 0.05 * (i % 2)) for i, e in enumerate(found)]

    (found,) = bulk_moduli([fcc("Cu", 3.6)], Rough())
    assert found.gpa is None
    assert found.reason in ("no_smooth_curve", "no_minimum")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_diamond_is_stiffer_than_rock_salt_is_stiffer_than_caesium_under_chgnet():
    pytest.importorskip("chgnet")
    a = 3.57
    basis = [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]]
    diamond = Structure(basis, ["C", "C"], [[0, 0, 0], [0.25, 0.25, 0.25]])
    salt = Structure([[2.82 * x for x in row] for row in ([0, 1, 1], [1, 0, 1], [1, 1, 0])],
                     ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])  # fmt: skip
    found = bulk_moduli([diamond, salt], load_potential("chgnet", device="cpu"))
    # measured: 443 and 24 GPa (Kittel, Introduction to Solid State Physics)
    assert found[0].gpa == pytest.approx(443, rel=0.2)
    assert found[1].gpa == pytest.approx(24, rel=0.3)
