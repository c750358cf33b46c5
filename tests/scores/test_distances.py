"""Nearest distances against pymatgen's, and against brute force in skewed cells."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from crystallm_kit.scores.distances import atomic_radii, covalent_radii, nearest_distances


def test_rock_salt_has_its_textbook_distances():
    lattice = Lattice.from_parameters(3.988, 3.988, 3.988, 60, 60, 60)  # primitive cell, a = 5.64 angstrom
    found = nearest_distances(lattice.matrix, np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))
    assert found.distance == pytest.approx([2.82], abs=1e-3)
    assert found.self_image == pytest.approx(3.988, abs=1e-9)
    assert found.shortest == pytest.approx(2.82, abs=1e-3)


def test_one_site_has_only_its_own_image():
    found = nearest_distances(Lattice.cubic(0.48).matrix, np.zeros((1, 3)))
    assert found.distance.size == 0
    assert found.shortest == pytest.approx(0.48)


def test_two_sites_in_one_place_are_exactly_zero_apart():
    found = nearest_distances(Lattice.cubic(10).matrix, np.array([[0.25, 0.5, 0.75], [1.25, -0.5, 0.75]]))
    assert found.shortest < 1e-14


def test_a_cell_of_more_than_a_hundred_sites_agrees_with_pymatgen():
    rng = np.random.default_rng(7)
    structure = Structure(Lattice.from_parameters(9, 10, 30, 70, 80, 110), ["C"] * 120, rng.random((120, 3)))
    found = nearest_distances(structure.lattice.matrix, structure.frac_coords)
    expected = structure.distance_matrix[found.first, found.second]
    np.testing.assert_allclose(found.distance, expected, atol=1e-10)


cells = st.lists(st.floats(-6, 6), min_size=9, max_size=9).map(lambda v: np.array(v).reshape(3, 3))


@settings(max_examples=100, deadline=None)
@given(cells, st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_any_cell_agrees_with_brute_force_over_many_images(cell, coordinates):
    """Angles down to a few degrees: there the 27 images around the cell as given are not enough."""
    volume = abs(np.linalg.det(cell))
    lengths = np.linalg.norm(cell, axis=1)
    if volume < 0.02 * lengths.prod() or lengths.min() < 0.5:
        return
    fractional = np.array(coordinates).reshape(2, 3)
    found = nearest_distances(cell, fractional)
    n = 8
    grid = np.array(list(itertools.product(range(-n, n + 1), repeat=3)))
    difference = fractional[1] - fractional[0]
    difference -= np.rint(difference)
    pairs = np.linalg.norm((difference + grid) @ cell, axis=1)
    images = np.linalg.norm(grid[np.abs(grid).any(1)] @ cell, axis=1)
    # In a very skewed cell the nearest image can lie beyond the grid.
    reach = n * volume / max(np.linalg.norm(np.cross(cell[i], cell[j])) for i, j in ((0, 1), (1, 2), (0, 2)))
    if found.distance[0] < reach / 2:
        assert found.distance[0] == pytest.approx(pairs.min(), abs=1e-9)
    if found.self_image < reach / 2:
        assert found.self_image == pytest.approx(images.min(), abs=1e-9)


def test_unknown_radii_have_the_stated_stand_ins():
    assert atomic_radii()[[2, 11, 17]] == pytest.approx([1.0, 1.8, 1.0])  # He unknown, Na, Cl
    assert covalent_radii()[[1, 6, 103]] == pytest.approx([0.31, 0.76, 1.5], abs=0.05)  # H, C, Lr unknown
