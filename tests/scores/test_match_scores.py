"""Match rates by hand, under each gate; METRe and cRMSE on polymorphs."""

import math

import pytest

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.scores.match_scores import GATES, all_to_all, match_scores, metre_scores
from crystallm_kit.scores.matching import match_rate, wilson

ROWS = [[None, 0.3, 0.1], [0.2, 0.4, None], [None, None, 0.05], [None, None, None], []]
PASSED = [[True] * 3, [False, True, True], [True] * 3, [True] * 3, []]


def by_name(scores):
    return {score.name: score for score in scores}


def test_without_a_gate_the_rates_are_those_of_match_rate():
    scores = by_name(match_scores(ROWS, [1, 2, 3]))
    for k in (1, 2, 3):
        expected, rate, rmse = match_rate(ROWS, k), scores[f"kit.match_rate@{k}"], scores[f"kit.rmse@{k}"]
        assert (rate.numerator, rate.denominator) == (expected.matched, 5)
        assert (rate.low, rate.high) == wilson(expected.matched, 5)
        assert rmse.value == pytest.approx(expected.rmse)
        assert rmse.over == "matched targets"


def test_a_candidate_that_fails_the_gate_matches_nothing():
    scores = by_name(match_scores(ROWS, [1, 2], protocol="kit_gated", candidate_gate=PASSED))
    assert scores["kit_gated.match_rate@1"].numerator == 0
    assert math.isnan(scores["kit_gated.rmse@1"].value)
    assert "nothing matches" in scores["kit_gated.rmse@1"].note
    assert scores["kit_gated.match_rate@2"].numerator == 2
    assert scores["kit_gated.rmse@2"].value == pytest.approx((0.3 + 0.4) / 2)


def test_diffcsp_gates_the_truth_at_1_only():
    rows, passed = [[0.1, 0.1], [0.2, 0.2]], [[True, True], [True, True]]
    scores = by_name(
        match_scores(
            rows, [1, 2], protocol="diffcsp", candidate_gate=passed, truth_gate=[False, True]
        )
    )  # fmt: skip
    assert (scores["diffcsp.match_rate@1"].numerator, scores["diffcsp.match_rate@1"].denominator) == (1, 2)
    assert scores["diffcsp.match_rate@2"].numerator == 2
    with pytest.raises(UserError, match="gates the truth too"):
        match_scores(rows, [1], protocol="diffcsp", candidate_gate=passed)


@pytest.mark.parametrize(("protocol", "denominator"), [("crystallm", 4), ("crystallm_pi", 4), ("cdvae", 5)])
def test_crystallm_leaves_targets_without_a_sample_out(protocol, denominator):
    rate = match_scores(ROWS, [3], protocol=protocol, candidate_gate=PASSED)[0]
    assert (rate.numerator, rate.denominator) == (3, denominator)


def test_gates_are_asked_for_and_have_to_fit():
    for protocol in set(GATES) - {"kit"}:
        with pytest.raises(UserError, match="a flag for each candidate is needed, got none"):
            match_scores(ROWS, [2], protocol=protocol)
    with pytest.raises(UserError, match="another shape"):
        match_scores(ROWS, [2], protocol="cdvae", candidate_gate=PASSED[:-1])
    with pytest.raises(UserError, match="1 flags for 5 targets"):
        match_scores(ROWS, [2], protocol="diffcsp", candidate_gate=PASSED, truth_gate=[True])
    with pytest.raises(EmptyInput, match="no targets"):
        match_scores([], [1])
    with pytest.raises(EmptyInput, match="no targets"):
        metre_scores([])


def test_without_any_sample_crystallm_has_no_rate():
    rate = match_scores([[], []], [1], protocol="crystallm", candidate_gate=[[], []])[0]
    assert math.isnan(rate.value)
    assert "no target has a sample" in rate.note


def test_metre_finds_polymorphs_that_came_out_for_each_other():
    """Two polymorphs, each generated for the other: match rate 0, METRe 1. A third target nothing matches."""
    formulas = ["TiO2", "TiO2", "NaCl"]
    pairs = all_to_all(formulas, [["TiO2"], ["TiO2"], [None]])
    assert pairs == [[(0, 0), (1, 0)], [(0, 0), (1, 0)], []]
    own, crossed = [[None], [None], [None]], [[None, 0.1], [0.02, None], []]
    assert match_scores(own, [1])[0].numerator == 0
    metre, crmse = metre_scores(crossed, k=1)
    assert (metre.name, metre.numerator, metre.denominator) == ("kit.metre@1", 2, 3)
    assert crmse.value == pytest.approx((0.1 + 0.02 + 0.5) / 3)
    assert crmse.name == "kit.crmse@1"
    assert metre_scores(crossed, stol=0.3)[1].value == pytest.approx((0.1 + 0.02 + 0.3) / 3)


def test_candidates_of_another_formula_count_where_they_belong_and_the_first_k_only():
    found = all_to_all(["NaCl", "KCl"], [["NaCl", "KCl", "NaCl"], ["KCl", "KCl", None]], k=2)
    assert found == [[(0, 0)], [(0, 1), (1, 0), (1, 1)]]
