"""Candidates of templates and of a model in one order: by the weighted mean of what each gives a crystal."""

import math

import pytest

from crystallm_kit.records import Conditions, Sample, Verdict
from crystallm_kit.scores.pooled import pooled
from crystallm_kit.text.wyckoff import WyckoffRepresentation

# Barium and titanium on each other's places: two crystals to the matcher.
CUBIC = "Ba1 Ti1 O3 221\nBa a\nTi b\nO c\n{a:.2f} end"
SWAPPED = "Ba1 Ti1 O3 221\nTi a\nBa b\nO c\n{a:.2f} end"


def sample(name, text=None, log_probability=math.nan):
    structure = None if text is None else WyckoffRepresentation().decode(text).structure
    verdict = Verdict(text is not None, None if text else "error")
    return Sample(name, text or "", structure, verdict, Conditions(), log_probability, 0, "")


def names(samples):
    return [s.id for s in samples]


def test_crystals_stand_in_the_order_of_both_shares_together():
    by_template = [
        sample("t cubic", CUBIC.format(a=4.0), math.log(0.5)),
        sample("t swapped", SWAPPED.format(a=4.0), math.log(0.3)),
    ]
    by_model = [sample(f"m swapped {i}", SWAPPED.format(a=4.0 + 0.1 * i), -5.0 - i) for i in range(3)]
    by_model.append(sample("m failed"))
    # cubic 0.7 * 0.5; swapped 0.7 * 0.3 + 0.3 * 3/4
    assert names(pooled(by_template, by_model))[:2] == ["t swapped", "t cubic"]
    # of 30 draws, 3 are a tenth
    more = [*by_model, *(sample("m failed") for _ in range(26))]
    assert names(pooled(by_template, more))[:2] == ["t cubic", "t swapped"]


def test_every_candidate_with_a_structure_is_there_once_the_likeliest_draw_first():
    by_model = [
        sample("m 1", CUBIC.format(a=3.9), -9.0), sample("m 2", CUBIC.format(a=4.1), -3.0), sample("m 3"),
        sample("m 4", SWAPPED.format(a=4.1), -1.0),
    ]  # fmt: skip
    assert names(pooled([], by_model)) == ["m 2", "m 4", "m 1"]
    with_template = pooled([sample("t", CUBIC.format(a=4.0), math.log(0.9)), sample("t none")], by_model)
    assert names(with_template) == ["t", "m 4", "m 2", "m 1"]


@pytest.mark.parametrize("by_model", [[], [sample("failed")]])
def test_no_structure_is_no_candidate(by_model):
    assert pooled([sample("none")], by_model) == []
