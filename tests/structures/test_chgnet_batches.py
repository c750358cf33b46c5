"""structures/chgnet_batches.py: chgnet's graphs, energies, forces and stresses, of many crystals at once."""

import functools
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

torch = pytest.importorskip("torch")
pytest.importorskip("chgnet")

from chgnet.model import CHGNet  # noqa: E402 - after the skip

from crystallm_kit.structures import chgnet_batches  # noqa: E402
from crystallm_kit.structures.chgnet_batches import evaluate, find_bonds, graph_of  # noqa: E402
from crystallm_kit.structures.files import read  # noqa: E402
from crystallm_kit.structures.relaxation import (  # noqa: E402
    EV_PER_ANGSTROM3_IN_GPA,
    CrystalArrays,
    load_potential,
)

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_potential("chgnet", device="cpu").model


@functools.cache
def plain_chgnet():
    """CHGNet as chgnet has it, with its own layers."""
    model = CHGNet.load(use_device="cpu", verbose=False)
    model.graph_converter.set_isolated_atom_response("ignore")
    return model


def random_crystal(seed):
    """A triclinic cell of one to six atoms, some outside it; one in three is sheared far or flat."""
    rng = np.random.default_rng(seed)
    lattice = np.diag(rng.uniform(3, 7, 3)) + rng.uniform(-1, 1, (3, 3))
    if seed % 3 == 1:
        lattice[2] += rng.integers(-3, 4) * lattice[0] + rng.integers(-3, 4) * lattice[1]
    if seed % 3 == 2:
        lattice[2] *= 0.4
    n_atoms = int(rng.integers(1, 7))
    return Structure(lattice, rng.integers(1, 95, n_atoms).tolist(), rng.uniform(-1.5, 1.5, (n_atoms, 3)))


CRYSTALS = {
    "one atom, its own neighbour": Structure(Lattice.cubic(2.9), ["Po"], [[0, 0, 0]]),
    "rock salt": Structure(
        [[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]], ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    ),
    "two bonds of one pair": Structure(
        Lattice.orthorhombic(4.2, 9, 9), ["Na", "Cl"], [[0, 0, 0], [0.5, 0, 0]]
    ),
    "nearly on top": Structure(
        Lattice.cubic(3.1), ["Cu", "Cu", "O"], [[0, 0, 0], [0.05, 0, 0], [0.5, 0.5, 0.5]]
    ),
    "no angle": Structure(Lattice.cubic(5), ["Xe"], [[0, 0, 0]]),
    "a molecule in a large cell": Structure(Lattice.cubic(25), ["O", "O"], [[0.99, 0, 0], [0.04, 0, 0]]),
    "a flat cell": Structure(
        Lattice.orthorhombic(14, 14, 1.3), ["C", "Si"], [[0.1, 0.2, 0.3], [0.25, 0.2, 0.4]]
    ),
    "a long cell": Structure(Lattice.orthorhombic(2.8, 2.8, 40), ["Fe", "Al"], [[0, 0, 0.9], [0.5, 0.5, 0]]),
} | {f"random {seed}": random_crystal(seed) for seed in range(24)}


def reversed_edge(edge):
    i, j, *image = edge
    return (j, i, *(-n for n in image))


def their_edges_and_angles(model, structure):
    graph = model.graph_converter(structure)
    edges = [
        (*pair, *image)
        for pair, image in zip(graph.atom_graph.tolist(), graph.neighbor_image.int().tolist(), strict=True)
    ]
    undirected = [edges[k] for k in graph.undirected2directed.tolist()]
    angles = [(row[0], row[1], row[3]) for row in graph.bond_graph.tolist()]
    return edges, undirected, angles


def our_edges_and_angles(model, structure):
    crystals = CrystalArrays.of([structure])
    bonds = find_bonds(crystals, 6.0, CPU)
    graph = graph_of(model, torch.as_tensor(crystals.numbers), torch.zeros(len(structure)).long(), bonds)
    first, second = bonds.first.numpy(), bonds.second.numpy()
    apart = crystals.fractional[second] - crystals.fractional[first]
    images = bonds.vectors.numpy() @ np.linalg.inv(crystals.lattices[0]) - apart
    assert np.abs(images - np.rint(images)).max() < 1e-9
    undirected = [
        (i, j, *image)
        for i, j, image in zip(
            first.tolist(), second.tolist(), np.rint(images).astype(int).tolist(), strict=True
        )
    ]
    assert graph.batched_atom_graph.tolist() == [list(e[:2]) for e in undirected] + [
        [e[1], e[0]] for e in undirected
    ]
    assert graph.directed2undirected.tolist() == [*range(len(undirected))] * 2
    return undirected + [reversed_edge(e) for e in undirected], undirected, graph.batched_bond_graph.tolist()


def assert_same_graph(model, structure):
    theirs, our = their_edges_and_angles(model, structure), our_edges_and_angles(model, structure)
    assert Counter(theirs[0]) == Counter(our[0])
    angles = [
        Counter(
            (centre, *(min(undirected[k], reversed_edge(undirected[k])) for k in bonds))
            for centre, *bonds in found
        )
        for _, undirected, found in (theirs, our)
    ]
    assert angles[0] == angles[1]
    return len(our[2])


def assert_same_numbers(model, structures, *, batches=(1_000_000,), force=1e-4):
    expected = plain_chgnet().predict_structure(structures, task="efs")
    expected = [expected] if len(structures) == 1 else expected
    for most in batches:
        found = evaluate(model, CrystalArrays.of(structures), most=most)
        assert not found.reasons
        forces = np.split(found.forces, np.cumsum([len(s) for s in structures])[:-1])
        for k, (structure, theirs) in enumerate(zip(structures, expected, strict=True)):
            scale = max(1.0, float(np.abs(theirs["f"]).max()))
            assert found.energies_ev[k] / len(structure) == pytest.approx(float(theirs["e"]), abs=1e-5)
            assert np.abs(forces[k] - theirs["f"]).max() < force * scale
            assert np.abs(found.stresses[k] * EV_PER_ANGSTROM3_IN_GPA - theirs["s"]).max() < 2e-3 * scale


def test_the_layers_of_a_potential_are_those_that_multiply_first(model):
    layers = [*model.atom_conv_layers, *model.bond_conv_layers, *model.angle_layers]
    assert {type(layer).__name__ for layer in layers} == {"_AtomConv", "_BondConv", "_AngleUpdate"}
    graph = model.graph_converter(CRYSTALS["a flat cell"])
    found, expected = (m.predict_graph(graph, return_site_energies=True) for m in (model, plain_chgnet()))
    for name in ("e", "f", "s", "m", "site_energies"):
        assert np.allclose(found[name], expected[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("name", CRYSTALS)
def test_bonds_and_angles_are_those_of_chgnets_own_graph(model, name):
    n_angles = assert_same_graph(model, CRYSTALS[name])
    if not name.startswith("random"):
        assert (n_angles == 0) == (name in ("no angle", "a molecule in a large cell"))


def ordinary_crystals():
    """Those without atoms so near that forces, and their rounding, have no bounds."""
    return [c for c in CRYSTALS.values() if len(find_bonds(CrystalArrays.of([c]), 0.9, CPU).first) == 0]


def test_energies_forces_and_stresses_are_chgnets_however_crystals_are_batched(model):
    assert len(ordinary_crystals()) > 20
    assert_same_numbers(model, ordinary_crystals(), batches=(1, 12, 1_000_000))


def test_a_crystal_without_angles_is_evaluated_alone(model):
    assert_same_numbers(model, [CRYSTALS["no angle"]])


def test_a_bond_as_long_as_the_cutoff_counts_as_much_as_in_chgnet(model):
    """At 3 angstrom chgnet makes angles of weight zero, which are not made here; at 6 both have the bond."""
    at_three = Structure(Lattice.orthorhombic(3.0, 2.5, 3.4), ["Cu"], [[0, 0, 0]])
    at_six = Structure(Lattice.cubic(6.0), ["Xe"], [[0, 0, 0]])
    assert len(their_edges_and_angles(model, at_three)[2]) > len(our_edges_and_angles(model, at_three)[2])
    assert len(their_edges_and_angles(model, at_six)[0]) == len(our_edges_and_angles(model, at_six)[0]) == 6
    assert_same_numbers(model, [at_three, at_six])


def test_bonds_are_the_same_whatever_is_searched_at_once(monkeypatch):
    crystals = CrystalArrays.of(list(CRYSTALS.values()))
    whole = find_bonds(crystals, 6.0, CPU)
    for at_once in (1, 1000):
        monkeypatch.setitem(chgnet_batches._AT_ONCE, "cpu", at_once)
        parts = find_bonds(crystals, 6.0, CPU)
        assert torch.equal(parts.first, whole.first)
        assert torch.equal(parts.second, whole.second)
        assert torch.equal(parts.vectors, whole.vectors)


def test_crystals_that_cannot_be_evaluated_have_reasons_and_disturb_no_other(model):
    salt = CRYSTALS["rock salt"]
    flat = Structure(np.diag([4.0, 4.0, 0.0]), ["Na"], [[0, 0, 0]])
    crystals = {
        "isolated_atoms": Structure(Lattice.cubic(30), ["Ar"], [[0, 0, 0]]),
        "element": Structure(Lattice.cubic(4), ["Og", "Na"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        "error: 1 atoms in 0 angstrom^3 have too many neighbours": flat,
        "error: numbers that are not finite": Structure(Lattice.cubic(4), ["Na"], [[np.nan, 0, 0]]),
        "error: 1 atoms in 0.0001 angstrom^3 have too many neighbours": Structure(
            Lattice.orthorhombic(5, 2, 1e-5), ["Na"], [[0, 0, 0]]
        ),
        "error: more than 2,000,000 bonds and angles": Structure(Lattice.cubic(0.4), ["Na"], [[0, 0, 0]]),
        "error: no atoms": Structure(Lattice.cubic(4), [], []),
    }
    mixed = [one for bad in crystals.values() for one in (bad, salt)]
    alone = evaluate(model, CrystalArrays.of([salt]), most=1000)
    for most in (1000, 1_000_000):
        found = evaluate(model, CrystalArrays.of(mixed), most=most)
        assert [found.reasons.get(2 * k) for k in range(len(crystals))] == list(crystals)
        assert not any(k % 2 for k in found.reasons)
        assert np.allclose(found.energies_ev[1::2], alone.energies_ev, atol=1e-5)
        assert np.allclose(found.stresses[1::2], alone.stresses, atol=1e-6)
        assert np.isnan(found.energies_ev[::2]).all()
        assert np.isnan(found.stresses[::2]).all()
        assert np.isnan(found.forces).all(axis=1).sum() == sum(len(bad) for bad in crystals.values())
    only_bad = evaluate(model, CrystalArrays.of(list(crystals.values())), most=1000)
    assert [only_bad.reasons[k] for k in range(len(crystals))] == list(crystals)
    assert evaluate(model, CrystalArrays.of([]), most=1000).reasons == {}


def test_atoms_on_top_of_each_other_have_no_energy_and_disturb_no_other(model):
    on_top = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0, 0, 0]])
    salt = CRYSTALS["rock salt"]
    found = evaluate(model, CrystalArrays.of([on_top, salt]), most=1000)
    alone = evaluate(model, CrystalArrays.of([salt]), most=1000)
    assert np.isnan(found.energies_ev[0])
    assert found.energies_ev[1] == pytest.approx(alone.energies_ev[0], abs=1e-5)
    assert np.isfinite(found.forces[2:]).all()


def test_what_does_not_fit_into_memory_is_evaluated_in_halves(model, monkeypatch):
    gradients = chgnet_batches._gradients

    def small(model, numbers, owner, bonds):
        if len(numbers) > 2 or numbers[0] == 84:
            raise torch.OutOfMemoryError
        return gradients(model, numbers, owner, bonds)

    monkeypatch.setattr(chgnet_batches, "_gradients", small)
    salt, polonium = CRYSTALS["rock salt"], CRYSTALS["one atom, its own neighbour"]
    found = evaluate(model, CrystalArrays.of([salt, polonium, salt, salt]), most=1000)
    assert found.reasons == {1: "error: the device has too little memory"}
    assert found.energies_ev[[0, 2]] == pytest.approx(found.energies_ev[[3, 3]], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_finds_what_a_cpu_finds(model):
    on_gpu = load_potential("chgnet", device="cuda").model
    crystals = CrystalArrays.of(list(CRYSTALS.values()))
    theirs, ours = (find_bonds(crystals, 6.0, torch.device(d)) for d in ("cpu", "cuda"))
    assert torch.equal(theirs.first, ours.first.cpu())
    assert torch.equal(theirs.second, ours.second.cpu())
    assert torch.allclose(theirs.vectors, ours.vectors.cpu())
    crystals = CrystalArrays.of(ordinary_crystals())
    for most in (1, 200):
        expected, found = (evaluate(m, crystals, most=most) for m in (model, on_gpu))
        assert np.abs((expected.energies_ev - found.energies_ev) / crystals.counts).max() < 2e-5
        for theirs, ours in zip(crystals.split(expected.forces), crystals.split(found.forces), strict=True):
            assert np.abs(theirs - ours).max() < 3e-4 * max(1.0, float(np.abs(theirs).max()))


@pytest.mark.slow
@pytest.mark.skipif("CRYSTALLM_KIT_DATA" not in os.environ, reason="CRYSTALLM_KIT_DATA names no data folder")
def test_real_crystals_have_chgnets_graphs_and_numbers(model):
    entries = islice(read(Path(os.environ["CRYSTALLM_KIT_DATA"]) / "mp_test.parquet"), 200)
    structures = [e.structure for e in entries if isinstance(e.structure, Structure)]
    for structure in structures:
        assert_same_graph(model, structure)
    assert_same_numbers(model, structures, batches=(48,), force=5e-4)
