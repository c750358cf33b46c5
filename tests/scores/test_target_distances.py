"""Distances of candidates, against pymatgen called directly; the same in processes as here."""

import os

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.match_scores import metre_scores
from crystallm_kit.scores.matcher.reduced_forms import in_processes, reduced_forms
from crystallm_kit.scores.target_distances import distances_all_to_all, distances_to_targets

FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def rock_salt(a=5.64, cation="Na", shift=0.0):
    """NaCl with one anion moved along x by a share of the edge."""
    anions = 0.5 - FCC
    anions[0, 0] += shift
    return Structure(Lattice.cubic(a), [cation] * 4 + ["Cl"] * 4, np.vstack([FCC, anions]))


def caesium_chloride(a=4.12, cation="Na"):
    return Structure(Lattice.cubic(a), [cation, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


TARGETS = [rock_salt(), caesium_chloride(), rock_salt(6.29, "K")]
CANDIDATES = [
    [None, caesium_chloride(), rock_salt(5.7, shift=0.04)],
    [rock_salt(5.5), rock_salt(6.3, "K")],
    [],
]


@pytest.mark.parametrize("processes", [1, 2])
def test_distances_are_those_of_pymatgen(processes):
    found = distances_to_targets(TARGETS, CANDIDATES, processes=processes)
    matcher = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10)
    for target, row, distances in zip(TARGETS, CANDIDATES, found, strict=True):
        expected = [None if one is None else matcher.get_rms_dist(one, target) for one in row]
        assert distances == [None if e is None else pytest.approx(e[0], abs=1e-9) for e in expected]
    # The reduction takes the four anions for one, moved by 0.01 a; each sublattice then moves by half of it.
    assert found[0][2] == pytest.approx(0.005 * 2, abs=1e-9)


def test_all_to_all_compares_every_candidate_of_a_formula_with_every_target_of_it():
    found = distances_all_to_all(TARGETS, CANDIDATES, processes=1)
    assert [[d is not None for d in row] for row in found] == [
        [False, True, True],  # candidates: CsCl type, rock salt, rock salt
        [True, False, False],
        [True],  # generated for NaCl, and no match there
    ]
    assert metre_scores(found)[0].value == 1.0
    first = distances_all_to_all(TARGETS, CANDIDATES, k=1, processes=1)
    assert [len(row) for row in first] == [1, 1, 0]


def test_lists_have_to_be_as_many_as_targets():
    with pytest.raises(UserError, match="2 lists of candidates for 3 targets"):
        distances_to_targets(TARGETS, CANDIDATES[:2])


def test_what_cannot_be_reduced_matches_nothing_and_stops_nothing():
    flat = Structure(Lattice([[4, 0, 0], [0, 4, 0], [4, 4, 1e-12]]), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    lost = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [np.nan, 0, 0]])
    mixed = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}, "Cl"], [[0, 0, 0], [0.5] * 3])
    found = distances_to_targets([rock_salt()], [[flat, lost, mixed, rock_salt()]], processes=1)
    assert found[0][:3] == [None, None, None]
    assert found[0][3] == pytest.approx(0, abs=1e-6)
    assert list(reduced_forms([None, lost, mixed])) == [None, None, None]


def test_a_killed_worker_is_told_and_not_waited_for():
    with pytest.raises(UserError, match="one of 2 worker processes was killed"):
        list(in_processes(os._exit, [9, 9], 2))


def test_results_come_in_the_order_of_the_tasks_however_many():
    assert list(in_processes(abs, range(-50, 0), 2)) == list(range(50, 0, -1))
