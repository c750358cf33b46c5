"""Hit rates: what was asked for, condition by condition."""

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.records import Conditions, Range
from crystallm_kit.scores.asked import asked_checks, asked_of, hit_scores, is_hit

FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


@pytest.fixture
def rocksalt():
    return Structure(Lattice.cubic(5.64), ["Na"] * 4 + ["Cl"] * 4, np.vstack([FCC, 0.5 - FCC]))


EVERYTHING = Conditions(
    formula={"Cl": 1, "Na": 1}, elements=("Na",), only_elements=True, n_elements=2, anonymous_formula="AB",
    spacegroup_number=225, crystal_system="cubic", n_sites=2,
    properties={"density_g_cm3": Range.exactly(2.2), "band_gap_ev": Range(4.0, None)},
)  # fmt: skip


def test_rock_salt_meets_all_that_rock_salt_was_asked_for(rocksalt):
    row = asked_checks(rocksalt, EVERYTHING, properties={"density_g_cm3": 2.16, "band_gap_ev": 5.0})
    assert set(row) == {f"kit.hit_rate.{name}" for name in (*asked_of(EVERYTHING), "all")}
    assert all(row.values())


@pytest.mark.parametrize(
    ("wanted", "missed"),
    [
        (Conditions(formula={"Na": 1, "Cl": 2}, spacegroup_number=225), {"formula"}),
        (Conditions(spacegroup_number=221, crystal_system="cubic"), {"spacegroup"}),
        (Conditions(elements=("K",), n_elements=2), {"elements"}),
        (Conditions(n_sites=8, anonymous_formula="AB"), {"n_sites"}),
        (Conditions(properties={"band_gap_ev": Range.exactly(1.0)}), {"band_gap_ev"}),
    ],
)
def test_each_condition_is_missed_by_itself(rocksalt, wanted, missed):
    row = asked_checks(rocksalt, wanted)
    assert {name.removeprefix("kit.hit_rate.") for name, hit in row.items() if not hit} == {*missed, "all"}


def test_a_failed_sample_misses_all_that_was_asked_of_it():
    row = asked_checks(None, EVERYTHING)
    assert set(row) == {f"kit.hit_rate.{name}" for name in (*asked_of(EVERYTHING), "all")}
    assert not any(row.values())


def test_nothing_asked_is_no_row(rocksalt):
    assert asked_checks(rocksalt, Conditions()) == {}


def test_values_are_hit_within_a_fifth_and_intervals_inside():
    assert is_hit(119.9, Range.exactly(100.0))
    assert not is_hit(120.1, Range.exactly(100.0))
    assert is_hit(-1.1, Range.exactly(-1.0))
    assert is_hit(2.0, Range(2.0, 3.0))
    assert not is_hit(3.1, Range(2.0, 3.0))
    assert is_hit(-9.0, Range(None, 0.1))
    assert not is_hit(None, Range(None, 0.1))
    assert not is_hit(float("nan"), Range(None, None))


def test_rates_are_of_those_asked():
    columns = {
        "kit.hit_rate.formula": [True, None, False, True],
        "kit.hit_rate.n_sites": [None] * 4,
        "formula": ["NaCl"] * 4,
    }
    (score,) = hit_scores(columns)
    assert (score.name, score.numerator, score.denominator, score.over) == (
        "kit.hit_rate.formula",
        2,
        3,
        "asked",
    )
