"""The published rows: the numbers of the sources, one protocol a table, and a damaged file named."""

import math

import pytest

from crystallm_kit.errors import RecipeError, UnknownName
from crystallm_kit.scoring.published import (
    MARKS,
    published,
    published_table,
    published_tables,
    read_published,
    rows_for_report,
)

SMALL = """\
schema: 1
date: 2026-11-22
recheck_flag: "to be re-checked"
protocols: {csp_comp: "Composition only"}
sources: {paper: "A paper, Table 1"}
tables:
- name: one
  title: "One table"
  protocol: csp_comp
  columns:
    match_rate@1: {unit: "%", better: higher, beside: "diffcsp.match_rate@1"}
    rmse@1: {unit: "(V/N)^(1/3)", better: lower}
  rows:
  - {system: A, mark: verified, source: paper, values: {match_rate@1: 51.49}}
  - {system: A, mark: recalled, source: paper, values: {rmse@1: 0.06}}
"""


def write(folder, text):
    path = folder / "published.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def row_of(table, system):
    (row,) = [row for row in published(table) if row.system == system]
    return row


def test_numbers_are_those_of_the_papers():
    """DiffCSP, arXiv 2309.04475, Tables 1 and 4; Crystal-text-LLM, arXiv 2402.04379, Table 1."""
    diffcsp = row_of("csp_comp_mp20", "DiffCSP").values
    assert {name: value.value for name, value in diffcsp.items()} == {
        "match_rate@1": 51.49, "rmse@1": 0.0631, "match_rate@20": 77.93, "rmse@20": 0.0492,
    }  # fmt: skip
    panel = row_of("cdvae_panel_mp20", "DiffCSP").values
    assert (panel["structural_validity"].value, panel["compositional_validity"].value) == (100.0, 83.25)
    llama = row_of("cdvae_panel_llm_mp20", "LLaMA-2 70B T=0.7").values
    assert llama["cov_recall"].value == 85.8
    assert llama["cov_recall"].needs_recheck


def test_a_system_is_one_row_though_its_numbers_have_several_sources_and_marks():
    flowmm = row_of("csp_comp_mp20", "FlowMM").values
    assert flowmm["match_rate@1"].mark == "verified"
    assert flowmm["match_rate@1"].second_hand
    assert flowmm["match_rate@20"].mark == "recalled"
    assert flowmm["match_rate@20"].needs_recheck
    assert not flowmm["match_rate@1"].needs_recheck


def test_every_number_has_a_mark_and_a_source_and_every_column_of_ours_its_protocol():
    for table in published_tables().values():
        assert table.text
        assert table.rows
        protocols = {column.beside.partition(".")[0] for column in table.columns.values() if column.beside}
        assert len(protocols) <= 1, f"{table.name} would put {protocols} side by side"
        for row in table.rows:
            for value in row.values.values():
                assert value.mark in MARKS
                assert value.source
                assert math.isfinite(value.value)


def test_the_task_with_the_space_group_given_is_in_no_table_of_the_task_without():
    given = {row.table for row in published("csp_gtsg")}
    assert given == {"csp_sg_mp20"}
    assert not given & {row.table for row in published("csp_comp")}
    # without a validity gate in both: but kit.match_rate and diffcsp.match_rate are different measures
    assert published_table("csp_sg_mp20").columns["match_rate@1"].beside == "kit.match_rate@1"
    assert published_table("csp_comp_mp20").columns["match_rate@1"].beside == "diffcsp.match_rate@1"


def test_judges_that_are_not_ours_leave_no_column_to_a_number_of_ours():
    for name in ("mattergen_mp20", "sun_chgnet_mp20", "sun_dft_mp20", "same_judge_mp20", "cspbench_46"):
        assert not any(column.beside for column in published_table(name).columns.values())


def test_shares_of_the_report_are_shares_and_other_units_stay():
    (row,) = [row for row in rows_for_report("csp_comp_mp20") if row["system"] == "DiffCSP"]
    assert row["scores"]["diffcsp.match_rate@1"]["value"] == pytest.approx(0.5149)
    assert row["scores"]["diffcsp.rmse@1"]["value"] == 0.0631
    assert row["table"] == "csp_comp_mp20"


def test_a_name_that_is_no_table_is_named_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'csp_comp'"):
        published("csp_compp")
    with pytest.raises(UnknownName, match="csp_comp_mp20"):
        published_table("csp_comp_mp2")


def test_a_small_file_reads(tmp_path):
    table = read_published(write(tmp_path, SMALL))["one"]
    (row,) = table.rows
    assert {name: value.mark for name, value in row.values.items()} == {
        "match_rate@1": "verified",
        "rmse@1": "recalled",
    }


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("mark: recalled", "mark: remembered", r"'tables\[0\]\.rows\[1\].*verified"),
        ("mark: recalled", "marks: recalled", "unknown key 'marks'"),
        ("source: paper, values: {rmse", "source: thesis, values: {rmse", "source 'thesis' is not under"),
        ("{rmse@1: 0.06}", "{rmse@20: 0.06}", "column 'rmse@20' is not under"),
        ("{rmse@1: 0.06}", "{match_rate@1: 0.06}", "'match_rate@1' is given twice"),
        ("{rmse@1: 0.06}", "{rmse@1: .nan}", "'rmse@1' is nan"),
        ("{rmse@1: 0.06}", "{rmse@1: high}", "rmse@1"),
        ("protocol: csp_comp", "protocol: csp_sg", "protocol 'csp_sg' is not under"),
        ("schema: 1", "schema: 2", "schema"),
        ("{rmse@1: 0.06}}", "{rmse@1: 0.06}, plus_minus: {match_rate@1: 1}}", "plus_minus of 'match_rate@1'"),
    ],
)
def test_what_the_file_says_wrongly_is_named(tmp_path, old, new, said):
    assert old in SMALL
    with pytest.raises(RecipeError, match=said) as caught:
        read_published(write(tmp_path, SMALL.replace(old, new)))
    assert str(tmp_path) in str(caught.value)


def test_two_tables_of_one_name_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="'one' is there twice"):
        read_published(write(tmp_path, SMALL + SMALL[SMALL.index("- name") :]))
