"""structures/torchsim_potential.py: a torch-sim model, judged by finite differences of its own energies.

Skipped without torch-sim (pip install torch-sim-atomistic), which no extra of the package brings.
"""

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import ImpossibleRequest
from crystallm_kit.structures.relaxation import load_potential, relax

pytest.importorskip("torch_sim", exc_type=ImportError)
# Pairs of atoms attract and repel each other as Morse says; derivatives by torch, so that none is typed in.
MODEL = """
import torch
from torch_sim.models.interface import ModelInterface


class Pairs(ModelInterface):
    def __init__(self, stress=True):
        super().__init__()
        self._device, self._dtype = torch.device("cpu"), torch.float64
        self._compute_stress, self._compute_forces = stress, True

    def forward(self, state, **_):
        n = state.cell.shape[0]
        strain = torch.zeros(n, 3, 3, dtype=self._dtype, requires_grad=True)
        moved = state.positions.detach().requires_grad_()
        if (state.atomic_numbers == 78).any():
            raise ValueError("no platinum here")
        energies = []
        for i in range(n):
            form = torch.eye(3, dtype=self._dtype) + strain[i]
            x = moved[state.system_idx == i] @ form
            rows = state.cell[i].T @ form  # torch-sim keeps lattice vectors as columns
            steps = torch.cartesian_prod(*[torch.arange(-3.0, 4.0, dtype=self._dtype)] * 3) @ rows
            d = (x[:, None, None] - x[None, :, None] + steps).flatten(0, 2)
            r = d[(d.detach() ** 2).sum(1) > 1e-9].norm(dim=1)
            r = r[r < 7.0]
            well = (1 - torch.exp(-1.2 * (r - 2.7))) ** 2 - 1
            energies.append(0.5 * (0.3 * well * (1 - r / 7.0) ** 3).sum())
        energy = torch.stack(energies)
        by_x, by_strain = torch.autograd.grad(energy.sum(), (moved, strain))
        volume = torch.linalg.det(state.cell).abs()[:, None, None]
        return {"energy": energy.detach(), "forces": -by_x, "stress": by_strain / volume}


def pairs():
    return Pairs()


def no_stress():
    return Pairs(stress=False)
"""


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    (tmp_path / "pair_models.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return load_potential("pair_models:pairs")


def sheared():
    lattice = Lattice([[3.7, 0.3, 0], [0, 3.9, 0.2], [0.4, 0, 4.0]])
    return Structure(
        lattice, ["Au", "Cu", "Cu", "Cu"], [[0, 0, 0], [0.5, 0.52, 0], [0.49, 0, 0.5], [0, 0.5, 0.47]]
    )


def single():
    return Structure([[0, 1.9, 1.9], [1.9, 0, 1.9], [1.9, 1.9, 0]], ["Cu"], [[0, 0, 0]])


def test_forces_and_stress_are_the_slopes_of_the_energy(pairs):
    structure, h = sheared(), 1e-5
    here, alone = pairs([structure, single()])
    for i in range(3):
        for j in range(3):
            strained = []
            for sign in (1, -1):
                form = np.eye(3)
                form[i, j] += sign * h
                lattice = Lattice(structure.lattice.matrix @ form)
                strained.append(
                    pairs([Structure(lattice, structure.species, structure.frac_coords)])[0].energy_ev
                )
            slope = (strained[0] - strained[1]) / (2 * h) / structure.volume
            assert here.stress[i, j] == pytest.approx(slope, abs=1e-7)
    moved = structure.cart_coords.copy()
    moved[1, 2] += 1e-5
    further = pairs([Structure(structure.lattice, structure.species, moved, coords_are_cartesian=True)])[0]
    assert here.forces[1, 2] == pytest.approx((here.energy_ev - further.energy_ev) / 1e-5, abs=1e-3)
    assert alone.energy_ev == pytest.approx(pairs([single()])[0].energy_ev)
    assert np.abs(here.forces).max() > 0.01


def test_crystals_relax_and_one_that_breaks_the_model_is_a_record(pairs):
    bad = Structure(Lattice.cubic(3.9), ["Pt"], [[0, 0, 0]])
    found = relax([sheared(), bad, single()], pairs)
    assert [r.reason for r in found] == [None, "error: ValueError: no platinum here", None]
    assert found[0].energy_ev_per_atom < found[0].initial_energy_ev_per_atom


def test_a_model_without_stress_is_refused(pairs):
    with pytest.raises(ImpossibleRequest, match="no forces or no stress"):
        load_potential("pair_models:no_stress")
