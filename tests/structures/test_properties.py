"""Columns become properties under the kit's names."""

import numpy as np
import pytest

from crystallm_kit.structures.properties import named_properties, take_id, value_of_text


def test_aliases_become_the_kits_names_and_others_stay():
    columns = {"e_above_hull": 0.1, "Band_Gap": 1, "pretty_formula": "NaCl", "k_vrh": np.float64(24.5)}
    expected = {
        "hull_distance_ev_per_atom": 0.1,
        "band_gap_ev": 1,
        "pretty_formula": "NaCl",
        "bulk_modulus_gpa": 24.5,
    }
    assert named_properties(columns) == expected | {"bulk_modulus_gpa": 24.5}


def test_the_kits_own_name_wins_over_an_alias():
    assert named_properties({"band_gap_ev": 2.0, "band_gap": 1.0}) == {"band_gap_ev": 2.0}
    assert named_properties({"band_gap": 1.0, "band_gap_ev": 2.0}) == {"band_gap_ev": 2.0}


def test_missing_and_nested_values_are_left_out():
    assert named_properties({"a": None, "b": float("nan"), "c": "", "d": [1], "e": {"x": 1}, "": 3}) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-2.5e-3", -2.5e-3), ("007", "007"), ("True", True), ("nan", None), (" ", None),
     ("mp-1", "mp-1"), ("Na", "Na"), ("1_0", "1_0"), ("1.", 1.0), ("inf", None)],
)  # fmt: skip
def test_cells_of_text_mean_what_they_say(text, value):
    assert value_of_text(text) == value
    assert type(value_of_text(text)) is type(value)


def test_the_first_id_column_with_a_value_is_taken_away():
    columns = {"material_id": None, "id": 7, "name": "halite"}
    assert take_id(columns, "x") == "7"
    assert columns == {"material_id": None, "name": "halite"}
    assert take_id({}, "x") == "x"
