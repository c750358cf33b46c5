"""Fingerprints of structures and compositions."""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Composition, Lattice, Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.fingerprints import neighbours as fingerprint_neighbours
from crystallm_kit.scores.fingerprints.cells import certain_cell, solid_angles_and_areas
from crystallm_kit.scores.fingerprints.composition import (
    composition_fingerprint,
    magpie_features,
    magpie_tables,
    scaled,
    unscaled,
)
from crystallm_kit.scores.fingerprints.crystal import (
    FingerprintFailure,
    Fingerprints,
    fingerprints,
    structure_fingerprint,
)
from crystallm_kit.scores.fingerprints.motifs import TABLE
from crystallm_kit.scores.fingerprints.plain import site_fingerprint

FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def _crystals():
    """Prototypes with ties everywhere, and awkward ones, by name."""
    wurtzite = [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5], [1 / 3, 2 / 3, 0.382], [2 / 3, 1 / 3, 0.882]]
    perovskite = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    rutile = [
        [0, 0, 0], [0.5, 0.5, 0.5], [0.305, 0.305, 0], [0.695, 0.695, 0],
        [0.195, 0.805, 0.5], [0.805, 0.195, 0.5],
    ]  # fmt: skip
    graphite = [[0, 0, 0.25], [0, 0, 0.75], [1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]
    triclinic = Lattice.from_parameters(4.1, 5.3, 6.7, 71, 83, 102)
    rng = np.random.default_rng(7)
    found = {
        "rock salt": Structure(Lattice.cubic(5.64), ["Na"] * 4 + ["Cl"] * 4, np.vstack([FCC, 0.5 - FCC])),
        "iron": Structure(Lattice.cubic(2.87), ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        "copper, primitive": Structure(Lattice(1.805 * (1 - np.eye(3))), ["Cu"], [[0, 0, 0]]),
        "magnesium": Structure(
            Lattice.hexagonal(3.21, 5.21), ["Mg", "Mg"], [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]
        ),
        "wurtzite": Structure(Lattice.hexagonal(3.82, 6.26), ["Zn", "Zn", "S", "S"], wurtzite),
        "perovskite": Structure(Lattice.cubic(3.905), ["Sr", "Ti", "O", "O", "O"], perovskite),
        "rutile": Structure(Lattice.tetragonal(4.594, 2.959), ["Ti"] * 2 + ["O"] * 4, rutile),
        "graphite": Structure(Lattice.hexagonal(2.46, 6.71), ["C"] * 4, graphite),
        "caesium chloride": Structure(Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        "xenon fluoride": Structure(
            Lattice.tetragonal(4.32, 6.99),
            ["Xe", "Xe"] + ["F"] * 4,
            [[0, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0.28], [0, 0, 0.72], [0.5, 0.5, 0.78], [0.5, 0.5, 0.22]],
        ),
        "one atom in a long cell": Structure(Lattice.orthorhombic(2.5, 3, 25), ["Po"], [[0.1, 0.2, 0.3]]),
        "triclinic": Structure(triclinic, ["K", "Al", "Si", "O", "O", "H"], rng.random((6, 3))),
        "two atoms in one place": Structure(
            Lattice.cubic(4), ["Ga", "As", "As"], [[0, 0, 0], [0.3, 0.25, 0.2], [0.3, 0.25, 0.2]]
        ),
    }
    # as if relaxed to 1e-8, where azimuths around almost straight bonds are all noise
    almost = found["perovskite"] * (2, 1, 1)
    almost.perturb(1e-8, seed=1)
    found["perovskite, almost"] = almost
    loose = found["rutile"] * (1, 1, 2)
    loose.perturb(0.15, seed=2)
    found["rutile, shaken"] = loose
    return found


CRYSTALS = _crystals()
# matminer's own values, see "source" in the file
MATMINER = json.loads(Path(__file__).with_name("fingerprints_matminer.json").read_text(encoding="utf-8"))


@pytest.fixture
def rocksalt():
    return CRYSTALS["rock salt"].copy()


def _floats(values):
    return np.array([np.nan if value is None else value for value in values])


@pytest.mark.parametrize("name", sorted(CRYSTALS))
def test_structure_fingerprint_is_matminers(name):
    found = structure_fingerprint(CRYSTALS[name])
    np.testing.assert_allclose(found, _floats(MATMINER[name]["structure"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CRYSTALS))
def test_magpie_features_are_matminers(name):
    features = magpie_features(CRYSTALS[name].composition)
    np.testing.assert_allclose(features, _floats(MATMINER[name]["composition"]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["triclinic", "rutile, shaken", "perovskite, almost"])
def test_the_quick_way_and_pymatgens_own_classes_agree_site_by_site(name):
    structure = CRYSTALS[name]
    plain = np.mean([site_fingerprint(structure, i) for i in range(len(structure))], axis=0)
    np.testing.assert_allclose(structure_fingerprint(structure), plain, rtol=0, atol=1e-13)


def test_six_neighbours_of_rock_salt_are_an_octahedron(rocksalt):
    found = structure_fingerprint(rocksalt)
    weights = _labelled(found)
    assert weights["wt 6"] == pytest.approx(1)
    assert weights["octahedral"] == pytest.approx(1)
    assert weights["wt 4"] == weights["tetrahedral"] == 0


def _labelled(found):
    labels = []
    for n in range(1, 25):
        labels.append(f"wt {n}")
        labels += [motif.name for motif in TABLE if motif.neighbours == n]
    assert len(labels) == 61
    return dict(zip(labels, found, strict=True))


def test_fingerprint_does_not_depend_on_the_cell_or_its_origin():
    structure = CRYSTALS["triclinic"]
    moved = structure.copy() * (2, 1, 1)
    moved.translate_sites(range(len(moved)), [0.21, 0.34, 0.41])
    np.testing.assert_allclose(structure_fingerprint(moved), structure_fingerprint(structure), atol=1e-9)


def test_a_certain_cell_is_qhulls():
    from scipy.spatial import Voronoi

    points = np.random.default_rng(3).uniform(-6, 6, size=(150, 3))
    points = points[np.argsort(np.linalg.norm(points, axis=1))]
    points = points[np.argsort(np.linalg.norm(points - points[0], axis=1))]
    faces, cell = certain_cell(points)
    qhull = Voronoi(points)
    expected = sorted(int(sum(pair)) for pair in qhull.ridge_points if 0 in pair)
    assert sorted(faces.tolist()) == expected
    angles, areas = solid_angles_and_areas(cell)
    assert angles.sum() == pytest.approx(4 * np.pi)
    volume = (areas * np.linalg.norm(points[faces] - points[0], axis=1) / 6).sum()
    from scipy.spatial import ConvexHull

    region = qhull.vertices[qhull.regions[qhull.point_region[0]]]
    assert volume == pytest.approx(ConvexHull(region).volume)


def test_a_cell_with_a_vertex_of_four_planes_is_left_to_qhull():
    corners = 2 * (FCC[:, None] + np.indices((3, 3, 3)).reshape(3, -1).T[None] - 1).reshape(-1, 3)
    points = corners[np.argsort(np.linalg.norm(corners, axis=1), kind="stable")]
    assert certain_cell(points) is None


def test_an_open_cell_is_not_certain():
    assert certain_cell(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1.1, 1, 1]], float)) is None


def test_qhull_is_left_out_where_the_cell_is_certain(monkeypatch):
    """The same numbers come with and without the quick cells, which most sites without symmetry use."""
    structure = CRYSTALS["triclinic"]
    quick = structure_fingerprint(structure)
    asked = []
    qhull_cell = fingerprint_neighbours._qhull_cell

    def counted(*args):
        asked.append(1)
        return qhull_cell(*args)

    monkeypatch.setattr(fingerprint_neighbours, "_qhull_cell", counted)
    structure_fingerprint(structure)
    assert len(asked) < len(structure) / 2
    monkeypatch.setattr(fingerprint_neighbours, "certain_cell", lambda _points: None)
    np.testing.assert_array_equal(structure_fingerprint(structure), quick)
    assert len(asked) >= len(structure)


def test_oxidation_states_are_not_looked_at(rocksalt):
    charged = rocksalt.copy()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    np.testing.assert_array_equal(structure_fingerprint(charged), structure_fingerprint(rocksalt))
    assert charged[0].specie.oxi_state == 1


def test_both_fingerprints_travel_between_processes(rocksalt):
    found = pickle.loads(pickle.dumps(fingerprints(rocksalt)))  # noqa: S301
    assert isinstance(found, Fingerprints)
    assert found.structure.shape == (61,)
    assert found.composition.shape == (132,)


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (Structure(Lattice.cubic(4), [{"Na": 0.5}, "Cl"], [[0, 0, 0], [0.5] * 3]), "disordered"),
        (Structure(Lattice.cubic(4), [], []), "composition"),
        (Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [np.nan, 0, 0]]), "neighbours"),
        (Structure(Lattice([[5, 0, 0], [0, 5, 0], [5, 5, 0]]), ["Na"], [[0, 0, 0]]), "neighbours"),
        # a cell that would put 40 million atoms within 7 angstrom
        (Structure(Lattice.orthorhombic(0.01, 0.06, 0.06), ["Na"], [[0, 0, 0]]), "time"),
    ],
)
def test_what_has_no_fingerprint_has_a_reason(structure, reason):
    found = fingerprints(structure)
    assert isinstance(found, FingerprintFailure)
    assert found.reason == f"fingerprint:{reason}"
    assert found.detail
    assert structure_fingerprint(structure) is None


def test_the_time_limit_ends_a_structure_with_a_reason():
    large = CRYSTALS["rutile, shaken"] * (4, 4, 4)
    start = time.process_time()
    found = fingerprints(large, seconds=0.2)
    assert isinstance(found, FingerprintFailure)
    assert found.reason == "fingerprint:time"
    assert time.process_time() - start < 5


def test_unknown_element_values_are_the_mean_after_scaling():
    features = magpie_features({"He": 1, "O": 1})
    assert np.isnan(features[18:23]).all(), "He has no melting point"
    fingerprint = composition_fingerprint({"He": 1, "O": 1})
    assert (fingerprint[18:23] == 0).all()
    assert np.isfinite(fingerprint).all()


def test_composition_fingerprint_does_not_depend_on_the_formula_unit():
    one, four = composition_fingerprint("SrTiO3"), composition_fingerprint(Composition("Sr4Ti4O12"))
    np.testing.assert_allclose(one, four, atol=1e-12)


def test_scaling_and_back():
    features = magpie_features("SrTiO3")
    np.testing.assert_allclose(unscaled(scaled(features)), features, rtol=1e-12, atol=1e-12)


def test_means_of_the_range_are_those_of_maximum_less_minimum():
    """Half of the 132 frozen means check each other; a digit typed wrong would show."""
    tables = magpie_tables()
    low, high, spread = tables.means.reshape(22, 6)[:, :3].T
    np.testing.assert_allclose(high - low, spread, rtol=1e-9)
    assert (tables.deviations > 0).all()
    assert len(tables.properties) == 22


@pytest.mark.parametrize("wrong", [{}, Composition({"X0+": 1})])
def test_a_composition_without_elements_is_refused(wrong):
    with pytest.raises(UserError, match="elements"):
        composition_fingerprint(wrong)


@pytest.mark.slow
@pytest.mark.real_data
def test_real_crystals_agree_with_pymatgens_own_classes():
    """60 entries of mp_test and 60 of DiffCSP's samples, all sites."""
    from crystallm_kit.structures.files import read

    data, samples = os.environ.get("CRYSTALLM_KIT_DATA"), os.environ.get("CRYSTALLM_KIT_SAMPLES")
    if not (data and samples):
        pytest.skip("CRYSTALLM_KIT_DATA or CRYSTALLM_KIT_SAMPLES is not set")
    for path in (Path(data) / "mp_test.parquet", Path(samples) / "DiffCSP_mp_20.pt"):
        for crystal, _ in zip(read(path), range(60), strict=False):
            structure = crystal.structure
            plain = np.mean([site_fingerprint(structure, i) for i in range(len(structure))], axis=0)
            found = structure_fingerprint(structure)
            np.testing.assert_allclose(found, plain, rtol=0, atol=1e-12, err_msg=crystal.id)
