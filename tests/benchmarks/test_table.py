"""Tables: a number of ours only stands beside published ones of the same measure."""

import math

import pytest

from crystallm_kit.benchmarks.table import OwnRow, as_json, markdown, number_text
from crystallm_kit.scores.score import Score, not_computed, share
from crystallm_kit.scoring.published import published_table

ROW = OwnRow(
    "ours, drawn",
    {
        s.name: s
        for s in (
            share("diffcsp.match_rate@1", 202, 300),
            Score("diffcsp.rmse@1", 0.0412, "(V/N)^(1/3)", over="matched"),
            share("kit.match_rate@1", 210, 300, note="no gate"),
            not_computed("kit.rmse@20", "no candidate was drawn"),
        )
    },
    about="trained on something else",
)


def test_a_share_shows_its_interval_and_counts():
    assert number_text(ROW.scores["diffcsp.match_rate@1"]) == "67.33 (61.8 to 72.4; 202/300)"
    assert number_text(ROW.scores["diffcsp.rmse@1"]) == "0.0412"
    assert number_text(ROW.scores["kit.rmse@20"]) == ""


def test_our_row_stands_only_in_columns_of_the_same_measure():
    text = markdown("CSP", [ROW], [published_table("csp_comp_mp20")], ["on a half of the split"])
    table = text.partition("## Beside published results")[2]
    own = next(line for line in table.splitlines() if line.startswith("| **ours, drawn**"))
    assert own == "| **ours, drawn** | 67.33 (61.8 to 72.4; 202/300) | 0.0412 |  |  |"
    diffcsp = next(line for line in table.splitlines() if line.startswith("| DiffCSP"))
    assert diffcsp == "| DiffCSP (2023) | 51.49 | 0.0631 | 77.93 | 0.0492 |"
    recalled = next(line for line in table.splitlines() if line.startswith("| EquiCSP"))
    assert recalled == "| EquiCSP (2024) | 57.59 † | 0.051 † | 82.02 † |  |"


def test_a_table_that_no_score_of_ours_belongs_in_has_no_row_of_ours():
    text = markdown("CSP", [ROW], [published_table("csp_comp_rerun_mp20")], [])
    assert "**ours" not in text.partition("## Beside published results")[2]


def test_what_has_to_be_known_stands_with_the_numbers():
    text = markdown("CSP", [ROW], [published_table("csp_comp_mp20")], ["on a half of the split"])
    for words in ("on a half of the split", "trained on something else", "no gate", "Protocol `csp_comp`"):
        assert words in text
    assert "binary and ternary half" in text, "the published table's own note"


def test_json_has_no_nan():
    rows = as_json("CSP", [ROW], [])["rows"][0]["scores"]
    values = {score["name"]: score["value"] for score in rows}
    assert values["kit.rmse@20"] is None
    assert values["kit.match_rate@1"] == pytest.approx(0.7)
    assert not any(isinstance(v, float) and math.isnan(v) for s in rows for v in s.values())
