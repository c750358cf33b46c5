"""Bounds on lattices: against the definition of successive minima, and against the matcher itself."""

import itertools

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.scores.matcher.lattice_bounds import lengths, may_match, may_match_as_first, minima
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, fit, reduced


def successive_minima(matrix, reach=4):
    """Return the minima by trying every vector with coefficients up to `reach`."""
    coefficients = np.array([v for v in itertools.product(range(-reach, reach + 1), repeat=3) if any(v)])
    vectors = coefficients @ matrix
    found, basis = [], []
    for row in np.argsort((vectors**2).sum(1), kind="stable"):
        if np.linalg.matrix_rank(np.array([*basis, coefficients[row]])) > len(basis):
            basis.append(coefficients[row])
            found.append(np.linalg.norm(vectors[row]))
        if len(basis) == 3:
            return np.array(found)
    raise AssertionError("no basis")


def random_cells(n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield Lattice.from_parameters(*rng.uniform(2, 9, 3), *rng.uniform(62, 115, 3))


def test_minima_of_reduced_cells_are_the_successive_minima():
    for lattice in random_cells(30):
        cell = lattice.get_niggli_reduced_lattice().matrix
        found = minima(cell[None])[0] * abs(np.linalg.det(cell)) ** (1 / 3)
        assert found == pytest.approx(successive_minima(cell), rel=1e-9)


def test_a_cell_that_is_not_reduced_rules_out_nothing():
    skewed = np.array([[3.0, 0, 0], [2.9, 3.0, 0], [0, 0, 3.0]])
    assert (minima(skewed[None]) == 0).all()
    assert may_match(skewed, np.eye(3)[None], TOLERANCES["lemat"]).all()


def test_lengths_are_sorted_and_free_of_scale():
    cell = np.diag([4.0, 1.0, 2.0])
    assert lengths(cell[None])[0] == pytest.approx([0.5, 1.0, 2.0])
    assert lengths(7.3 * cell[None])[0] == pytest.approx([0.5, 1.0, 2.0])


@pytest.mark.parametrize("name", sorted(TOLERANCES))
def test_what_is_ruled_out_never_matches(name):
    """One atom in a cell matches wherever the lattices do: the hardest case for a bound on lattices."""
    tolerances = TOLERANCES[name]
    rng = np.random.default_rng(1)
    forms = []
    for lattice in random_cells(10, seed=2):
        for strain in (0.0, 0.05, 0.2):
            matrix = lattice.matrix @ (np.eye(3) + strain * rng.uniform(-1, 1, (3, 3)))
            forms.append(reduced(Structure(Lattice(matrix), ["Fe"], [[0, 0, 0]])))
    ruled_out = matched = 0
    for first in forms:
        possible = may_match(first.lattice, np.array([f.lattice for f in forms]), tolerances)
        backwards = may_match_as_first(np.array([f.lattice for f in forms]), first.lattice, tolerances)
        for second, may, may_back in zip(forms, possible, backwards, strict=True):
            one, other = fit(first, second, tolerances), fit(second, first, tolerances)
            assert may or not one
            assert may_back or not other
            ruled_out += not may
            matched += one
    assert ruled_out > 100
    assert matched > 30
