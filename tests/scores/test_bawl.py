"""The hash of bonding graphs, against material-hasher's own strings."""

import networkx
import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.scores.fingerprints.bawl import bawl_hash, bonding_graph_hash, refined_hash

FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def _crystals():
    """Prototypes, and awkward ones, by name."""
    wurtzite = [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5], [1 / 3, 2 / 3, 0.382], [2 / 3, 1 / 3, 0.882]]
    perovskite = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    rutile = [
        [0, 0, 0], [0.5, 0.5, 0.5], [0.305, 0.305, 0], [0.695, 0.695, 0],
        [0.195, 0.805, 0.5], [0.805, 0.195, 0.5],
    ]  # fmt: skip
    graphite = [[0, 0, 0.25], [0, 0, 0.75], [1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]
    xenon = [[0, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0.28], [0, 0, 0.72], [0.5, 0.5, 0.78], [0.5, 0.5, 0.22]]
    triclinic = [[0.1, 0.2, 0.3], [0.7, 0.6, 0.1], [0.45, 0.9, 0.55], [0.2, 0.75, 0.8], [0.85, 0.3, 0.65]]
    rounded = [[0, 0, 0], [0.3333, 0.6667, 0.5], [0.6667, 0.3333, 0.5]]
    return {
        "rock salt": Structure(
            Lattice.cubic(5.64), ["Na"] * 4 + ["Cl"] * 4, np.vstack([FCC, (FCC + 0.5) % 1])
        ),
        "rock salt, primitive": Structure(Lattice(5.64 * FCC[1:]), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]),
        "silicon": Structure(Lattice.cubic(5.43), ["Si"] * 8, np.vstack([FCC, FCC + 0.25])),
        "copper, primitive": Structure(Lattice(3.61 * FCC[1:]), ["Cu"], [[0, 0, 0]]),
        "wurtzite": Structure(Lattice.hexagonal(3.82, 6.26), ["Zn", "Zn", "S", "S"], wurtzite),
        "perovskite": Structure(Lattice.cubic(3.905), ["Sr", "Ti", "O", "O", "O"], perovskite),
        "rutile": Structure(Lattice.tetragonal(4.594, 2.959), ["Ti"] * 2 + ["O"] * 4, rutile),
        "graphite": Structure(Lattice.hexagonal(2.46, 6.71), ["C"] * 4, graphite),
        "xenon fluoride": Structure(Lattice.tetragonal(4.32, 6.99), ["Xe"] * 2 + ["F"] * 4, xenon),
        "triclinic": Structure(
            Lattice.from_parameters(4.1, 5.3, 6.7, 71, 83, 102), ["K", "Al", "Si", "O", "O"], triclinic
        ),
        "aluminium boride, rounded": Structure(Lattice.hexagonal(3.005, 3.257), ["Al", "B", "B"], rounded),
        # Cu and Si have one electronegativity
        "copper silicide": Structure(Lattice.cubic(2.9), ["Si", "Cu"], [[0, 0, 0], [0.5] * 3]),
    }


CRYSTALS = _crystals()
# material-hasher's steps at its defaults, around structuregraph-helpers 0.0.9 and pymatgen 2025.6.14
MATERIAL_HASHER = {
    "rock salt": "05474a878a6c3d2c15d290446a1915b0_225_Na4Cl4",
    "rock salt, primitive": "aff1e5a835d320dd754c77e1494790ea_225_Na1Cl1",
    "silicon": "bf61a941bc38ae3438cae89f203cb721_227_Si8",
    "copper, primitive": "ed215e93a9232affceaa01de444bf1ef_225_Cu1",
    "wurtzite": "a7d90b952bb968f1dd7a449360461ff7_186_Zn2S2",
    "perovskite": "0e175a0d556f124cf6d855f8dc899d5f_221_Sr1Ti1O3",
    "rutile": "850bb4906b8703cb452a226453db106e_136_Ti2O4",
    "graphite": "54ab4b77483f7fe7c9929cdfe67ccee8_194_C4",
    "xenon fluoride": "9072a3ecefbb6bef348268a8ee70f39b_139_Xe2F4",
    "triclinic": "0c63f082a1a7e8c488e8bfb3a4254f88_1_K1Al1Si1O2",
    "aluminium boride, rounded": "361648bc4713a85cdb2af6dcc0a734e4_65_Al1B2",
    "copper silicide": "7020d6472f5c9cfa3bb3b4dd0f476587_221_Si1Cu1",
}


@pytest.mark.parametrize("name", CRYSTALS)
def test_hashes_are_material_hashers(name):
    assert bawl_hash(CRYSTALS[name]) == MATERIAL_HASHER[name]


def test_a_hash_of_lemat_bulk():
    """Row agm005415715 of LeMat-Bulk, and its `entalpic_fingerprint`."""
    half = 3.56534985
    lattice = half * (np.ones((3, 3)) - 2 * np.eye(3))
    sites = half / 2 * np.array([[0, 0, 0], [-1, 1, 1], [1, 1, 1], [1, -1, 1], [1, 1, -1]])
    crystal = Structure(lattice, ["Sr", "Sb", "Sb", "Sb", "Sb"], sites, coords_are_cartesian=True)
    assert bawl_hash(crystal, symmetry="spglib") == "38f73083d88aa235c8c8c9d66617f3e3_229_Sr1Sb4"


@pytest.mark.parametrize("name", CRYSTALS)
def test_neither_the_origin_nor_a_cell_of_the_same_volume_changes_a_hash(name):
    moved = CRYSTALS[name].copy()
    moved.translate_sites(range(len(moved)), [0.13, 0.27, 0.31], to_unit_cell=True)
    assert bawl_hash(moved) == bawl_hash(CRYSTALS[name])
    sheared = CRYSTALS[name].copy()
    sheared.make_supercell([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert bonding_graph_hash(sheared) == bonding_graph_hash(CRYSTALS[name])


def test_a_supercell_and_another_order_of_sites_change_it_as_they_do_the_peers():
    salt = CRYSTALS["rock salt"]
    assert bawl_hash(salt) != bawl_hash(CRYSTALS["rock salt, primitive"])
    mixed = Structure.from_sites([salt[i] for i in (7, 2, 5, 0, 1, 6, 3, 4)])
    assert bawl_hash(mixed) == "a3920c5d0cc3899851c4ef7498d7beb8_225_Na4Cl4"  # material-hasher's
    assert bawl_hash(mixed.get_sorted_structure()) == bawl_hash(salt)


def test_moyo_and_spglib_judge_rounded_coordinates_otherwise():
    rounded = CRYSTALS["aluminium boride, rounded"]
    assert bawl_hash(rounded).split("_")[1] != "191"
    assert bawl_hash(rounded, symmetry="spglib").split("_")[1] == "191"


def test_labels_are_refined_as_networkx_refines_them():
    """On graphs that both take: undirected ones."""
    graph = networkx.petersen_graph()
    graph.remove_edge(0, 1)
    labels = {node: "NaCl"[node % 4] for node in graph}
    networkx.set_node_attributes(graph, labels, "element")
    expected = networkx.weisfeiler_lehman_graph_hash(graph, node_attr="element", iterations=100)
    assert refined_hash(graph, labels) == expected


def test_an_atom_without_neighbours_has_no_hash():
    with pytest.raises(ValueError, match="empty"):
        bawl_hash(Structure(Lattice.cubic(12), ["Ar"], [[0, 0, 0]]))
