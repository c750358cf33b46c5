"""Denominators of uniqueness and novelty, by hand."""

import math

import numpy as np
import pytest

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.matching import wilson
from crystallm_kit.scores.novelty.scores import (
    crystallm_pi_scores,
    crystallm_scores,
    genmetrics_scores,
    kit_scores,
    lemat_scores,
    mattergen_scores,
)

# Ten requested; the last two are no structures. Of the valid first six, two are copies and three are known.
VALID = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
SCORED = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], dtype=bool)
UNIQUE = np.array([1, 1, 1, 1, 0, 0, 1, 1, 1, 1], dtype=bool)
KNOWN = np.array([1, 1, 0, 0, 1, 0, 0, 0, 0, 0], dtype=bool)


def counts(scores):
    return {score.name: (score.numerator, score.denominator) for score in scores}


def test_the_kit_counts_over_what_was_requested():
    scores = kit_scores(VALID, UNIQUE, KNOWN)
    assert counts(scores) == {"kit.unique": (4, 10), "kit.novel": (3, 10), "kit.unique_novel": (2, 10)}
    assert (scores[0].low, scores[0].high) == wilson(4, 10)


def test_without_a_reference_novelty_says_so():
    for scores in (
        kit_scores(VALID, UNIQUE, None),
        crystallm_scores(VALID, UNIQUE, None),
        lemat_scores(VALID, UNIQUE, None),
        mattergen_scores(SCORED, UNIQUE, None, matcher="ordered"),
        crystallm_pi_scores(VALID, None, None),
    ):
        missing = [score for score in scores if "novel" in score.name]
        assert missing
        assert all(math.isnan(s.value) and s.note == "no reference set" for s in missing)


def test_crystallm_counts_the_novel_among_the_unique_and_prints_no_rate():
    unique, novel = crystallm_scores(VALID, UNIQUE, KNOWN)
    assert (unique.value, novel.value) == (4, 2)
    assert (unique.unit, unique.denominator) == ("crystals", None)


def test_crystallm_pi_counts_what_is_new_among_the_kept_and_divides_by_all_generated():
    known_formula = KNOWN | (np.arange(10) == 2)
    assert counts(crystallm_pi_scores(VALID & UNIQUE, KNOWN, known_formula)) == {
        "crystallm_pi.unique": (4, 10), "crystallm_pi.novel": (2, 10), "crystallm_pi.comp_novel": (1, 10),
    }  # fmt: skip


def test_mattergen_divides_by_what_was_scored_and_names_its_matcher():
    systems = ["Na-Cl", "Na-Cl", "K-Cl", "K-Cl", "K-Cl", "Rb-Cl", "Li-F", None, None, None]
    settings = {"systems": systems, "known_system": KNOWN, "found_in_reference": 2, "n_reference": 40}
    scores = mattergen_scores(SCORED, UNIQUE, KNOWN, matcher="disordered", **settings)
    assert counts(scores) == {
        "mattergen.unique": (6, 8), "mattergen.novel": (5, 8), "mattergen.unique_novel": (4, 8),
        "mattergen.precision": (3, 8), "mattergen.recall": (2, 40), "mattergen.novel_systems": (3, 8),
    }  # fmt: skip
    ordered = mattergen_scores(SCORED, UNIQUE, KNOWN, matcher="ordered")
    assert counts(ordered)["mattergen.ordered_unique"] == (6, 8)
    assert math.isnan(ordered[-1].value)
    with pytest.raises(EmptyInput, match="nothing scored"):
        mattergen_scores(np.zeros(3, bool), np.ones(3, bool), None, matcher="ordered")


def test_lemat_divides_by_the_valid_ones_and_novelty_by_those_compared():
    compared = np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 1], dtype=bool)
    scores = lemat_scores(VALID, UNIQUE, KNOWN, compared=compared)
    assert counts(scores) == {"lemat.unique": (4, 6), "lemat.novel": (3, 5)}
    assert all(math.isnan(s.value) for s in lemat_scores(np.zeros(10, bool), UNIQUE, KNOWN))


def test_genmetrics_counts_pairs_and_lets_coverage_exceed_1():
    scores = genmetrics_scores(4, duplicate_pairs=2, known=1, covering=4, n_test=2)
    assert counts(scores) == {
        "genmetrics.uniqueness": (10, 12), "genmetrics.novelty": (3, 4), "genmetrics.coverage": (4, 2),
    }  # fmt: skip
    assert scores[0].value == pytest.approx(1 - 2 / 12)
    assert scores[2].value == 2.0
    assert all(math.isnan(s.value) for s in genmetrics_scores(1))
    with pytest.raises(EmptyInput):
        genmetrics_scores(0)
