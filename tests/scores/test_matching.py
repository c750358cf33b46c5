"""Match rates: by hand, by published intervals, and by pymatgen called directly."""

import math

import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.matching import match_rate, rms_distances, wilson


def rock_salt(a=5.64, anion="Cl"):
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), ["Na", anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def caesium_chloride(a=3.4):
    return Structure(Lattice.cubic(a), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def moved(structure, fraction):
    """Return the primitive cell with one of its atoms moved by this share of an edge (3.99 angstrom)."""
    cell = structure.get_primitive_structure()
    cell.translate_sites([1], [fraction, 0, 0])
    return cell


def test_wilson_gives_the_intervals_of_the_literature():
    """81 of 263 and 15 of 148: Newcombe 1998, Stat. Med. 17, 857, table I, Wilson's score method."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)


def test_wilson_keeps_to_0_and_1_where_all_or_none_succeed():
    """0 of 20 ends at 0.1611, 29 of 29 begins at 0.8830: z^2 / (n + z^2) by hand, and Newcombe 1998."""
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_wilson_of_nothing_is_refused():
    with pytest.raises(EmptyInput, match="no trials"):
        wilson(0, 0)


def test_a_target_counts_once_with_its_best_candidate_among_the_first_k():
    distances = [[None, 0.3, 0.1], [0.2, 0.4, None], [None, None, 0.05], [None, None, None], []]
    first, two, three = (match_rate(distances, k) for k in (1, 2, 3))
    assert (first.matched, first.targets, first.rmse) == (1, 5, pytest.approx(0.2))
    assert (two.matched, two.targets, two.rmse) == (2, 5, pytest.approx((0.3 + 0.2) / 2))
    assert (three.matched, three.targets, three.rmse) == (3, 5, pytest.approx((0.1 + 0.2 + 0.05) / 3))
    assert (three.low, three.high) == wilson(3, 5)


def test_a_distance_of_zero_is_a_match():
    assert match_rate([[0.0]], 1).matched == 1


def test_without_a_match_there_is_no_rmse():
    rate = match_rate([[None], []], 1)
    assert (rate.matched, rate.targets, rate.low) == (0, 2, 0.0)
    assert math.isnan(rate.rmse)


def test_without_targets_there_is_no_rate():
    with pytest.raises(EmptyInput, match="no targets"):
        match_rate([], 1)


def test_a_rate_prints_its_interval_and_counts():
    rate = match_rate([[0.058]] * 316 + [[None]] * 184, 1)
    assert str(rate) == "63.2% (58.9% to 67.3%; 316/500), RMSE 0.0580"


def test_distances_are_those_of_pymatgen_at_the_tolerances_of_the_protocol():
    truth = rock_salt()
    tried = [
        rock_salt(), moved(rock_salt(), 0.05), rock_salt(6.5), truth.get_primitive_structure(),
        caesium_chloride(), rock_salt(anion="Br"), moved(rock_salt(), 0.35),
    ]  # fmt: skip
    found = rms_distances(tried, truth)
    matcher = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10)
    for candidate, distance in zip(tried, found, strict=True):
        direct = matcher.get_rms_dist(candidate, truth)
        assert distance == (None if direct is None else pytest.approx(direct[0]))
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] == pytest.approx(0.05 * 3.988 / 2 / (5.64**3 / 8) ** (1 / 3), rel=1e-2)  # each by half
    assert found[3] is not None  # another setting of the same crystal
    assert found[4] is None
    assert found[5] is None


def test_a_candidate_that_was_not_parsed_matches_nothing():
    truth = rock_salt()
    assert rms_distances([None, truth], truth) == [None, pytest.approx(0, abs=1e-6)]
