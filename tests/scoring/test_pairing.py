"""scoring/pairing.py: samples find their targets, or the first that does not is named."""

import pytest

from crystallm_kit.errors import UserError
from crystallm_kit.scoring.pairing import pair

IDS, FORMULAS = ["mp-1", "mp-2"], ["NaCl", "Fe"]


def test_by_id_with_the_candidates_number_behind_it():
    found = pair(["mp-2__1", "mp-1__1", "mp-2__2", "mp-1"], [None] * 4, IDS, FORMULAS)
    assert found.way == "id"
    assert found.target.tolist() == [1, 0, 1, 0]
    assert found.candidate.tolist() == [0, 0, 1, 1]


def test_by_place_where_there_are_as_many_for_each():
    found = pair(["a", "b", "c", "d"], ["NaCl", None, "Fe", "Fe"], IDS, FORMULAS)
    assert (found.way, found.target.tolist(), found.candidate.tolist()) == (
        "index", [0, 0, 1, 1], [0, 1, 0, 1],
    )  # fmt: skip


def test_by_composition_where_places_do_not_fit():
    found = pair(["a", "b", "c"], ["Fe", "NaCl", None], IDS, FORMULAS, asked=[None, None, "Fe"])
    assert (found.way, found.target.tolist(), found.candidate.tolist()) == (
        "composition", [1, 0, 1], [0, 0, 1],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "formulas", "way", "message"),
    [
        (["mp-1", "mp-2", "mp-3"], [None] * 3, "auto", "sample 'mp-3' has the id of no target .* 1 of 3"),
        (
            ["a", "b"],
            ["NaCl", "NaCl"],
            "index",
            "sample 'b' is NaCl, but the target at its place, 'mp-2', is Fe",
        ),
        (["a", "b", "c"], ["NaCl"] * 3, "index", "3 samples are no multiple of 2 targets"),
        (["a"], ["KCl"], "auto", r"sample 'a' \(KCl\) has the composition of no target"),
        (["a"], [None], "auto", r"sample 'a' \(no structure, and no record of what was asked\)"),
    ],
)
def test_the_first_that_does_not_pair_is_named(ids, formulas, way, message):
    with pytest.raises(UserError, match=message):
        pair(ids, formulas, IDS, FORMULAS, way=way)


def test_targets_of_one_composition_are_not_told_apart_by_it():
    with pytest.raises(UserError, match="'mp-1' and 'mp-2' are both NaCl"):
        pair(["a"], ["NaCl"], IDS, ["NaCl", "NaCl"])
