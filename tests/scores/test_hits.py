"""scores/hits.py: hits, medians and spreads counted by hand; every request is in the denominator."""

import math

import pytest

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.hits import Measured, is_ordered, lines, target_result
from crystallm_kit.scores.matching import wilson

SAMPLES = [
    Measured(90.0, True, is_known=False),
    Measured(119.0, True, is_known=True),
    Measured(121.0, True, is_known=False),  # 21 % off
    Measured(100.0, True, is_copy=True, is_known=False),
    Measured(None, True, is_known=False),  # no curve could be fitted
    Measured(None, False),
]


def test_counts_and_quartiles_are_those_of_a_hand_count():
    found = target_result(SAMPLES, 100.0)
    assert (found.requested, found.valid, found.unique, found.measured) == (6, 5, 4, 4)
    assert (found.first_quartile, found.median, found.third_quartile) == (104.5, 119.0, 120.0)
    assert found.hits == {100.0: (3, 2, 1)}


def test_samples_without_a_target_are_asked_about_all():
    found = target_result(SAMPLES, None, asked_about=[100.0, 300.0])
    assert found.hits == {100.0: (3, 2, 1), 300.0: (0, 0, 0)}


def test_what_is_not_looked_up_is_not_called_new():
    assert target_result([Measured(100.0, True)], 100.0).hits == {100.0: (1, 1, None)}


def test_nothing_measured_has_no_median():
    found = target_result([Measured(None, False)], 100.0)
    assert math.isnan(found.median)
    assert found.hits == {100.0: (0, 0, 0)}
    with pytest.raises(EmptyInput, match="no samples"):
        target_result([], 100.0)


def test_the_table_has_denominators_and_intervals():
    results = [
        ("base", target_result(SAMPLES, None, asked_about=[100.0])),
        ("100", target_result(SAMPLES, 100.0)),
    ]
    table = lines(results)
    low, high = wilson(2, 6)
    assert len(table) == 4
    assert f"2 of 100 = 33.3% ({100 * low:.1f} to {100 * high:.1f})" in table[2]
    assert table[3].startswith("| 100 | 6 | 5 | 4 | 4 | 119 | 104 to 120 | 2 = 33.3%")
    assert len({row.count("|") for row in table}) == 1


def test_medians_in_the_order_of_the_targets_are_ordered():
    low, high = target_result([Measured(40.0, True)], 50.0), target_result([Measured(90.0, True)], 150.0)
    assert is_ordered([target_result(SAMPLES, None), high, low])
    swapped = target_result([Measured(30.0, True)], 150.0)
    assert not is_ordered([low, swapped])
    assert not is_ordered([low, target_result([Measured(None, False)], 150.0)])
