"""Runs side by side: differences, intervals, and that what does not compare is not compared."""

import json
import re

import pytest

from crystallm_kit.errors import ReadError, UserError
from crystallm_kit.scores.score import share
from crystallm_kit.scoring.comparison import change_of, columns_of, compare_runs, differences_of


def edit(folder, change):
    path = folder / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    return folder


def text_of(path):
    html = re.sub(r"<(script|style).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def between(text, start, end):
    return text.partition(start)[2].partition(end)[0]


def test_a_score_shows_its_change_and_whether_intervals_overlap(small_run, tmp_path):
    runs = [small_run("a", n_valid=(83, 60)), small_run("b", n_valid=(85, 90))]
    text = text_of(compare_runs(runs, tmp_path / "out"))
    line = between(text, "cdvae.comp_valid", "cdvae.wdist_density")
    assert "+2.00 points intervals overlap" in line
    assert "+30.00 points intervals apart" in line
    assert "no change same value" in between(text, "cdvae.structure_valid", "cdvae.comp_valid")


def test_the_page_is_where_it_was_asked_for(small_run, tmp_path):
    runs = [small_run("a"), small_run("b")]
    assert compare_runs(runs, tmp_path / "new").name == "comparison.html"
    assert compare_runs(runs, tmp_path / "mine.html") == tmp_path / "mine.html"


def test_equal_runs_differ_in_nothing(small_run, tmp_path):
    text = text_of(compare_runs([small_run("a"), small_run("b")], tmp_path / "c.html"))
    assert "Nothing: settings, reference and versions are the same." in text


def test_settings_and_versions_that_differ_are_named(small_run, tmp_path):
    def change(report):
        report["settings"]["seed"] = 7
        report["versions"]["pymatgen"] = "2025.1.9"

    text = text_of(compare_runs([small_run("a"), edit(small_run("b"), change)], tmp_path / "c.html"))
    assert re.search(r"seed\s+0\s+7", text)
    assert re.search(r"pymatgen\s+2026\.10\.24\s+2025\.1\.9", text)
    assert "mp_val.parquet" not in text  # the same in both


def test_other_protocols_are_not_in_one_table_and_show_no_change(small_run, tmp_path):
    def change(report):
        report["protocols"]["cdvae"]["settings"]["smact"] = "4.0.2"

    path = compare_runs([small_run("a"), edit(small_run("b", n_valid=(90, 90)), change)], tmp_path / "c.html")
    text = text_of(path)
    assert "as in a" in text
    assert "as in b" in text
    assert re.search(r"settings\.smact\s+2\.2\.1\s+4\.0\.2", text)
    assert text.count("cdvae.comp_valid") >= 2
    assert "points" not in between(text, "cdvae.comp_valid", "lemat.unique")
    # what both describe alike is still compared
    assert "points" in text.partition("lemat.unique")[2]


def test_scores_against_another_reference_show_no_difference(small_run, tmp_path):
    def change(report):
        report["reference"]["n"] = 28_000
        report["sets"][0]["scores"][2]["value"] = 0.1

    text = text_of(compare_runs([small_run("a"), edit(small_run("b"), change)], tmp_path / "c.html"))
    assert "depend on the reference" in text
    line = between(text, "cdvae.wdist_density", "cdvae.cov_recall")
    assert "other reference" in line
    assert "intervals" not in line
    assert "best" not in line


def test_sets_are_paired_by_name_and_single_ones_with_each_other(small_run):
    def read(folder):
        return json.loads((folder / "report.json").read_text())

    both = [read(small_run("a")), read(small_run("b"))]
    both[1]["sets"].reverse()
    assert [c.base for c in columns_of(both, ["a", "b"])] == [None, None, 1, 0]
    for report, name in zip(both, ("old", "new"), strict=True):
        report["sets"] = report["sets"][:1]
        report["sets"][0]["name"] = name
    assert [c.base for c in columns_of(both, ["a", "b"])] == [None, 0]


def test_a_change_is_good_or_bad_only_where_intervals_are_apart():
    low, near, high = (share("x.y", k, 1000).as_dict() for k in (500, 510, 700))
    assert (change_of(high, low).text, change_of(high, low).tone) == ("+20.00 points", "good")
    assert (change_of(low, high).text, change_of(low, high).tone) == ("−20.00 points", "bad")
    assert (change_of(near, low).tone, change_of(near, low).overlap) == ("", "intervals overlap")
    worse = {**high, "better": "lower"}
    assert change_of(worse, {**low, "better": "lower"}).tone == "bad"
    assert change_of(None, low) is None
    assert change_of({**low, "value": None}, low) is None


def test_differences_are_found_in_nested_settings():
    found = differences_of([{"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": [1, 2]}])
    assert [(one.name, one.values) for one in found] == [("a.c", ["2", "3"]), ("d", ["–", "1, 2"])]


def test_too_few_or_equal_folders_are_refused(small_run, tmp_path):
    run = small_run("a")
    with pytest.raises(UserError, match="2 or more expected"):
        compare_runs([run], tmp_path / "c.html")
    with pytest.raises(UserError, match="given twice"):
        compare_runs([run, run], tmp_path / "c.html")
    with pytest.raises(ReadError, match=r"no report\.json"):
        compare_runs([run, tmp_path / "empty"], tmp_path / "c.html")


def test_hostile_names_stay_text(small_run, tmp_path):
    def change(report):
        report["sets"][0]["name"] = "<script>alert(1)</script>"
        report["settings"]["<img src=x>"] = "<b>"

    path = compare_runs([small_run("a"), edit(small_run("b"), change)], tmp_path / "c.html")
    html = path.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "<img" not in html
    assert html.count("<script") == 1
