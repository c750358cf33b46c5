"""The report as HTML: all that the run found is in it, nothing is loaded, hostile text stays text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crystallm_kit.errors import ReadError
from crystallm_kit.scoring.failed_rows import MOST
from crystallm_kit.scoring.published import rows_for_report
from crystallm_kit.scoring.report import write_report
from crystallm_kit.scoring.wording import measure_label, spacegroup_text, when

HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>'
ADDRESSES = ("src", "href", "action", "formaction", "srcset", "poster", "data", "xlink:href", "background")


class Page(HTMLParser):
    """The page as a browser would see it: elements, attributes, texts, scripts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.scripts, self.styles, self.words = [], [], [], []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside = tag
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "style":
            self.styles[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def edit(folder, change):
    path = folder / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    return folder


# ---------------------------------------------------------------- what is in it


def test_every_score_of_every_set_is_there_with_counts_and_interval(small_run):
    folder = small_run()
    text = page_of(folder).text
    for one in json.loads((folder / "report.json").read_text())["sets"]:
        for score in one["scores"]:
            assert score["name"] in text
    for said in (
        "83.0 %",
        "60.0 %",
        "83 of 100 requested",
        "81 of 83 valid",
        "0.3021 g/cm³",
        "over 3 scored",
    ):
        assert said in text
    # Wilson, 83 of 100: 74.5 to 89.1, from Wilson 1927's formula by hand
    assert "74.5 to 89.1 %" in text


def test_what_was_not_computed_says_why(small_run):
    text = page_of(small_run("both")).text
    assert re.search(r"Not computed\s+no reference set: give --reference\s*:\s+cdvae\.cov_recall", text)

    def of_one_set(report):
        report["sets"][0]["scores"][0].update(value=None, note="its file has no cells")
        del report["sets"][1]["scores"][1]

    text = page_of(edit(small_run("one"), of_one_set)).text
    line = text.partition("cdvae.structure_valid")[2].partition("cdvae.comp_valid")[0]
    assert re.search(r"not computed\s+its file has no cells\s+100\.0 %", line)
    line = text.partition("cdvae.comp_valid")[2].partition("cdvae.wdist")[0]
    assert re.search(r"83\.0 %.*not computed\s+not part of this set's run", line)


def test_the_best_is_marked_and_sets_that_are_not_told_apart_from_it_too(small_run):
    apart = page_of(small_run("apart", n_valid=(83, 60))).text
    assert re.search(r"83\.0 % best(?! of)", apart)
    assert "≈ best : its interval" not in apart.partition("cdvae.comp_valid")[2].partition("cdvae.wdist")[0]
    near = page_of(small_run("near", n_valid=(83, 80))).text
    assert (
        "≈ best : its interval overlaps" in near.partition("cdvae.comp_valid")[2].partition("cdvae.wdist")[0]
    )


def test_equal_values_leave_none_best(small_run):
    text = page_of(small_run()).text
    assert "best" not in text.partition("cdvae.structure_valid")[2].partition("cdvae.comp_valid")[0]


def test_funnel_reasons_protocols_and_how_it_was_made_are_told(small_run):
    page = page_of(small_run())
    assert "Funnel of DiffCSP: requested 100, parsed 100, charge 83, unique 81" in page.text
    for said in (
        "What stopped the others", "charge", "crystallm-kit score a.pt b.pt", "mp_val.parquet", "2026.10.24",
        "No two sites within 0.5 A.", "smact", "Half of the official split.", "2026-11-28 23:41 UTC",
    ):  # fmt: skip
        assert said in page.text
    anchors = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert anchors <= {attributes.get("id") for _, attributes in page.elements}


def test_sections_that_the_run_has_nothing_for_are_left_out(small_run):
    def bare(report):
        report["reference"] = None
        for one in report["sets"]:
            one.update(distributions={}, gallery=[], parity=[], reasons={})

    page = page_of(edit(small_run(), bare))
    sections = {a["id"] for a in page.all("section")}
    assert sections == {"glance", "scores", "method"}
    assert len(page.scripts) == 2  # the page's own, and data: no viewer is carried
    assert len("".join(page.scripts)) < 20_000


def test_the_first_failures_of_each_reason_are_listed_and_the_rest_counted(small_run):
    page = page_of(small_run())
    rows = [a for a in page.all("tr") if "data-reason" in a]
    by_set = [a["data-set"] for a in rows if a["data-reason"] == "charge"]
    assert by_set.count("DiffCSP") == 16
    assert by_set.count("the kit") == MOST == 40
    assert len([a for a in rows if a["data-reason"] == "overlap"]) == 2
    assert "first 40 of each reason and set" in page.text
    assert "sample:fine" not in page.text


@pytest.mark.parametrize("path", ["rows/gone.parquet", "../rows/a.parquet", "/etc/passwd"])
def test_rows_that_are_not_in_the_folder_are_said_to_be_missing(small_run, path):
    page = page_of(edit(small_run(), lambda report: report["sets"][0].update(rows=path)))
    assert f"DiffCSP: the rows {path} are not in this folder" in page.text
    assert "the kit" in {a["data-set"] for a in page.all("tr") if "data-set" in a}


def test_rows_that_are_no_parquet_do_not_stop_the_report(small_run):
    folder = small_run()
    (folder / "rows" / "a.parquet").write_bytes(b"PAR1 but not really")
    assert "DiffCSP: rows/a.parquet cannot be read" in page_of(folder).text


def test_structures_are_drawn_still_and_given_to_the_viewer(small_run):
    page = page_of(small_run())
    stills = [a for a in page.all("svg") if a.get("class") == "still"]
    assert len(stills) == 4
    structures = json.loads(next(s for s in page.scripts if s.startswith("[")))
    # drawn in the conventional cell, though the CIF holds the primitive one
    assert [len(one.get("sites", [])) for one in structures] == [8, 5, 0, 8, 5, 0]
    assert structures[0]["cif"].count("Na+") + structures[0]["cif"].count("  Na") >= 1
    assert "no structure to show" in page.text
    assert "parse:cell" in page.text


def test_a_cif_that_is_none_says_so_on_its_card(small_run):
    def spoil(report):
        report["sets"][0]["gallery"][0]["cif"] = "data_x\n_cell_length_a nonsense"

    assert "the CIF cannot be read" in page_of(edit(small_run(), spoil)).text


# ---------------------------------------------------------------- published rows


def test_published_rows_stand_beside_ours_with_marks_and_flags(small_run):
    page = page_of(small_run(published=rows_for_report("cdvae_panel_mp20")))
    text = page.text.partition("Published, beside ours")[2]
    assert re.search(r"DiffCSP\s+2023\s+100\.00 ✓ read word for word in the source\s+83\.25", text)
    assert re.search(r"LM-CH.{0,600}recalled\s+to be re-checked", text)
    assert "83.00 74.45 to 89.11" in text.partition("FTCP")[0]  # ours, in percent, on top
    assert "NeurIPS 2023, arXiv 2309.04475" in text


def test_a_table_of_another_judge_holds_no_number_of_ours(small_run):
    rows = rows_for_report("sun_chgnet_mp20")
    assert all(not row["scores"] for row in rows)
    page = page_of(small_run(published=rows))
    text = page.text.partition("Published, beside ours")[2].partition("How it was made")[0]
    assert "CrysLLMGen 7B" in text
    assert "this run" not in text


def test_rows_that_name_no_table_of_the_kit_stand_by_protocol(small_run):
    mine = {"value": 0.5149, "mark": "recalled", "source": "a talk"}
    published = [
        {"system": "X", "scores": {"cdvae.comp_valid": mine, "lemat.unique": {**mine, "value": 0.9}}}
    ]
    page = page_of(small_run(published=published))
    text = page.text.partition("Published, beside ours")[2]
    assert len(page.all("table", **{"class": "published"})) == 2  # one protocol a table
    assert "51.49" in text
    assert "to be re-checked" in text
    assert "a talk" in text


# ---------------------------------------------------------------- one file, safe


def test_nothing_is_loaded_from_anywhere(small_run):
    page = page_of(small_run(published=rows_for_report("cdvae_panel_mp20")))
    for _, attributes in page.elements:
        for name in ADDRESSES:
            assert re.match(r"#|data:image/svg\+xml;base64,", attributes.get(name) or "#"), attributes
    assert not re.search(r"@import|url\((?!#)", "".join(page.styles))
    assert not page.all("link", rel="stylesheet")
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"]
    assert "http" not in policy["content"]


def test_only_the_pages_own_scripts_may_run(small_run):
    page = page_of(small_run())
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    kinds = [attributes.get("type") for attributes in page.all("script")]
    running = [s for s, kind in zip(page.scripts, kinds, strict=True) if kind != "application/json"]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in running]
    assert len(running) == 2
    assert re.findall(r"'sha256-([^']+)'", policy["content"]) == hashes
    assert "unsafe-inline" not in policy["content"].partition("script-src")[2].partition(";")[0]


def test_hostile_texts_are_shown_and_never_become_elements(small_run):
    plain = page_of(small_run("plain", published=rows_for_report("cdvae_panel_mp20")))
    published = rows_for_report("cdvae_panel_mp20")
    published.append({"system": HOSTILE, "scores": {"cdvae.comp_valid": {"value": 0.1, "mark": HOSTILE,
                      "source": HOSTILE, "note": HOSTILE}}})  # fmt: skip

    def poison(report):
        report.update(command=HOSTILE, notes=[HOSTILE], settings={HOSTILE: HOSTILE}, created=HOSTILE)
        report["versions"] = {HOSTILE: HOSTILE}
        report["protocols"]["cdvae"].update(title=HOSTILE, text=HOSTILE, settings={HOSTILE: [HOSTILE]})
        report["reference"]["name"] = HOSTILE
        one = report["sets"][0]
        one.update(name=HOSTILE, sources=[HOSTILE])
        one["reasons"][HOSTILE] = 3
        one["funnel"].append([HOSTILE, 1])
        one["scores"][1].update(note=HOSTILE, over=HOSTILE, interval=HOSTILE)
        one["distributions"]["spacegroup_number"]["values"][HOSTILE] = 9
        one["distributions"]["density_g_cm3"]["unit"] = HOSTILE
        one["gallery"][0].update(id=HOSTILE, formula=HOSTILE, reason=HOSTILE, detail=HOSTILE,
                                 spacegroup_number=HOSTILE, measures={HOSTILE: HOSTILE})  # fmt: skip
        one["gallery"][2].update(cif=f"data_{HOSTILE}")
        one["parity"][0].update(title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE, unit=HOSTILE)

    folder = edit(small_run("hostile", published=published), poison)
    words = dict.fromkeys(("id", "formula", "reason", "detail"), HOSTILE)
    row = {**words, "n_sites": 1, "spacegroup_number": 1}
    pq.write_table(pa.Table.from_pylist([row]), folder / "rows" / "a.parquet")
    page = page_of(folder)
    assert len(page.all("script")) == len(plain.all("script"))
    assert not page.all("img")
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert page.text.count("alert(2)") > 20
    # In the data a "<" is written as an escape, so that no text can end the script.
    assert "<" not in next(script for script in page.scripts if script.startswith("["))


def test_the_report_of_many_structures_stays_small(small_run):
    def many(report):
        for one in report["sets"]:
            one["gallery"] = one["gallery"] * 10

    path = write_report(edit(small_run(), many))
    assert path.stat().st_size < 3_000_000


def test_the_page_is_written_whole_or_not_at_all(small_run):
    folder = small_run()
    path = write_report(folder)
    before = path.read_bytes()
    edit(folder, lambda report: report["sets"][0].pop("funnel"))
    with pytest.raises(ReadError):
        write_report(folder)
    assert path.read_bytes() == before
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


# ---------------------------------------------------------------- bad input


def test_a_folder_without_a_run_says_what_was_expected(tmp_path):
    with pytest.raises(ReadError, match=r"no report\.json; expected the folder that `crystallm-kit score"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(schema=9), "schema 9, expected 1"),
        (lambda r: r.pop("versions"), "lacks versions"),
        (lambda r: r.update(sets=[]), "no sets"),
        (lambda r: r["sets"][1].pop("scores"), "set 'the kit': lacks scores"),
        (lambda r: r["sets"][1]["scores"][0].pop("value"), "set 'the kit': a score: lacks value"),
        (lambda r: r["sets"][0]["gallery"][0].pop("kind"), "structure of the gallery: lacks kind"),
        (lambda r: r["reference"].pop("n"), "reference: lacks n"),
    ],
)
def test_a_report_that_lacks_something_says_what(small_run, change, said):
    with pytest.raises(ReadError, match=said):
        write_report(edit(small_run(), change))


@pytest.mark.parametrize("text", ["{not json", "[]", '"text"'])
def test_a_report_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ReadError, match=r"report\.json"):
        write_report(tmp_path)


# ---------------------------------------------------------------- words


def test_measures_and_groups_and_times_are_said_as_people_do():
    assert measure_label("density_g_cm3") == ("Density", "g/cm³")
    assert measure_label("hull_distance_ev_per_atom") == ("Hull distance", "eV/atom")
    assert spacegroup_text(225) == "Fm-3m (225)"
    assert spacegroup_text("227.0") == "Fd-3m (227)"
    assert [spacegroup_text(x) for x in (None, 0, 231, "P1?", "inf")] == ["", "0", "231", "P1?", "inf"]
    assert when("2026-11-28T23:41:05+00:00") == "2026-11-28 23:41 UTC"
    assert when("yesterday") == "yesterday"
