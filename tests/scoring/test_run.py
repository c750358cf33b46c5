"""scoring/run.py: sample sets to scores, resumable, bad structures included."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.cli import main
from crystallm_kit.errors import EmptyInput, UnknownName, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.scoring import intake, run
from crystallm_kit.scoring.pool import Marks
from crystallm_kit.scoring.rows import part_path, read_part, structure_columns, write_part
from crystallm_kit.scoring.stages import READ, STAGES, run_part
from crystallm_kit.structures.files import write

SALTS = [(a, b) for a in ("Li", "Na", "K", "Rb") for b in ("F", "Cl", "Br", "I")]


FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def rocksalt(cation: str, anion: str, length: float = 5.69, primitive: bool = False) -> Structure:
    if primitive:
        return Structure(Lattice(length * FCC[1:]), [cation, anion], [[0, 0, 0], [0.5] * 3])
    return Structure(Lattice.cubic(length), [cation] * 4 + [anion] * 4, np.vstack([FCC, (FCC + 0.5) % 1]))


def score(samples, **options):
    """Score with one worker, which takes half the time to start."""
    return run.score(samples, workers=1, **options)


@pytest.fixture
def generated(tmp_path) -> Path:
    """Eight samples, judged by hand: see the test below."""
    tiny = Structure(Lattice.cubic(0.48), ["Fe"], [[0, 0, 0]])  # passes cdvae: images of itself do not count
    structures = [
        rocksalt("Na", "Cl"),
        rocksalt("Na", "Cl", 5.70, primitive=True),  # a copy of the first
        rocksalt("K", "Br", 6.6),
        rocksalt("Na", "Na", 4.2),  # an element: bcc-like, passes the charge rule
        Structure(
            Lattice.cubic(4.0),
            ["Na", "Cl", "Cl", "Cl"],
            [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
        ),
        Structure(Lattice.cubic(5.0), ["Na", "Cl"], [[0, 0, 0], [0.05, 0, 0]]),  # 0.25 angstrom apart
        tiny,
        rocksalt("Rb", "I", 7.3),
    ]
    path = tmp_path / "generated.extxyz"
    write([Crystal(f"s{i}", s) for i, s in enumerate(structures)], path)
    path.write_text(path.read_text() + '2\nLattice="3 0 0 0 3 0 0 0 3"\nNa 0 0 0\n')  # a short frame
    return path


def by_name(scores):
    return {one.name: one for one in scores}


def test_counts_are_those_made_by_hand(tmp_path, generated):
    known = tmp_path / "known.extxyz"
    write([Crystal("mp-23251", rocksalt("K", "Br", 6.65))], known)
    found = by_name(
        score(f"mine={generated}", reference=known, out=tmp_path / "out", requested=["10"])["mine"]
    )
    assert found["kit.readable"].numerator == 8
    assert {
        found[name].denominator for name in ("kit.valid", "kit.unique", "kit.novel", "cdvae.comp_valid")
    } == {10}
    # valid: both rock salts, KBr, RbI; Na alone where it is dense enough
    assert found["cdvae.structure_valid"].numerator == 7  # all read but the overlapping pair
    assert found["cdvae.comp_valid"].numerator == 7  # all read but NaCl3
    rows = pq.read_table(tmp_path / "out" / "rows" / "mine.parquet").to_pylist()
    assert [row["reason"] for row in rows][4:] == [
        "charge",
        "overlap",
        "overlap",
        None,
        "unreadable",
        "missing",
    ]
    assert [row["copy_of.kit"] for row in rows][:3] == [None, "s0", None]
    assert [row["known_as.default"] for row in rows][:3] == [None, None, "mp-23251"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    counts = dict(report["sets"][0]["funnel"])
    assert (counts["requested"], counts["finished"], counts["parsed"]) == (10, 9, 8)
    assert report["sets"][0]["reasons"]["duplicate"] == 1
    assert sum(report["sets"][0]["reasons"].values()) == 10 - counts["unique"]


def test_the_part_of_the_reference_that_was_found_is_counted_once_an_entry(tmp_path):
    """Two samples of NaCl find both entries of it; nobody finds LiF."""
    write(
        [Crystal(f"s{i}", rocksalt("Na", "Cl", a)) for i, a in enumerate((5.6, 5.7))], tmp_path / "s.extxyz"
    )
    known = [
        ("mp-1", rocksalt("Na", "Cl")),
        ("mp-2", rocksalt("Na", "Cl", 5.8)),
        ("mp-3", rocksalt("Li", "F", 4.0)),
    ]
    write([Crystal(name, one) for name, one in known], tmp_path / "known.extxyz")
    options = {"reference": tmp_path / "known.extxyz", "out": tmp_path / "out", "protocols": ["mattergen"]}
    found = by_name(score(tmp_path / "s.extxyz", **options)["s"])
    for name in ("mattergen.recall", "mattergen.ordered_recall"):
        assert (found[name].numerator, found[name].denominator) == (2, 3)


def test_a_run_that_is_done_is_not_done_again(tmp_path, generated):
    first = score(generated, out=tmp_path / "out")
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "work").rglob("*.parquet")}
    assert score(generated, out=tmp_path / "out") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "work").rglob("*.parquet")} == parts


RUN = """
import sys
from crystallm_kit.scoring import intake
intake.PART = 4
from crystallm_kit.scoring.run import score
score("many=" + sys.argv[1], reference=sys.argv[1], out=sys.argv[2], workers=1)
"""


def test_a_killed_run_goes_on_to_the_same_rows(tmp_path, monkeypatch):
    many = tmp_path / "many.extxyz"
    write([Crystal(f"{a}{b}-{n}", rocksalt(a, b, 5 + n / 10)) for n in range(2) for a, b in SALTS], many)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setattr(intake, "PART", 4)
    score(f"many={many}", reference=many, out=whole)
    killed_run = subprocess.Popen([sys.executable, "-c", RUN, many, killed], start_new_session=True)
    until = time.monotonic() + 60
    while len(list(killed.rglob("forms-*/part-*"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(killed_run.pid, signal.SIGKILL)
    killed_run.wait()
    kept = {p: p.stat().st_mtime_ns for p in killed.rglob("part-*.parquet")}
    assert 3 <= len(kept) < len(list(whole.rglob("part-*.parquet")))
    assert not (killed / "report.json").exists()
    score(f"many={many}", reference=many, out=killed)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    tables = [pq.read_table(one / "rows" / "many.parquet") for one in (whole, killed)]
    assert tables[0].equals(tables[1])
    reports = [json.loads((one / "report.json").read_text())["sets"][0] for one in (whole, killed)]
    assert reports[0]["scores"] == reports[1]["scores"]


def test_a_folder_of_other_inputs_is_refused(tmp_path, generated):
    out = tmp_path / "out"
    score(generated, out=out, limit=2)
    with pytest.raises(
        UserError, match=r"holds the scores of other inputs \(sets generated limit: 2 there, 3"
    ):
        score(generated, out=out, limit=3)
    score(generated, out=out, limit=3, fresh=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that no scoring run wrote"):
        score(generated, out=tmp_path / "notes", fresh=True)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "mine"


def test_targets_give_match_rates(tmp_path):
    truth, guesses = tmp_path / "truth.extxyz", tmp_path / "guesses.extxyz"
    write([Crystal("mp-1", rocksalt("Na", "Cl")), Crystal("mp-2", rocksalt("K", "Br", 6.6))], truth)
    cscl = Structure(Lattice.cubic(4.1), ["K", "Br"], [[0, 0, 0], [0.5] * 3])
    guessed = [("mp-1__1", rocksalt("Na", "Cl", 5.5)), ("mp-1__2", rocksalt("Na", "Cl"))]
    guessed += [("mp-2__1", cscl), ("mp-2__2", rocksalt("K", "Br", 6.5))]
    write([Crystal(name, one) for name, one in guessed], guesses)
    found = by_name(score(guesses, targets=truth, out=tmp_path / "out")["guesses"])
    rows = pq.read_table(tmp_path / "out" / "rows" / "guesses.parquet").to_pylist()
    assert [row["target"] for row in rows] == ["mp-1", "mp-1", "mp-2", "mp-2"]
    assert [row["candidate"] for row in rows] == [0, 1, 0, 1]
    assert [row["rms_distance.csp"] is not None for row in rows] == [True, True, False, True]
    rates = {name: (found[name].numerator, found[name].denominator) for name in found if "match_rate" in name}
    assert rates["kit.match_rate@1"] == (1, 2)
    assert rates["kit.match_rate@2"] == rates["diffcsp.match_rate@2"] == (2, 2)
    assert found["kit.metre@2"].numerator == 2
    assert (found["genmetrics.coverage"].numerator, found["genmetrics.coverage"].denominator) == (3, 2)


def test_a_test_set_is_covered_by_samples_that_predict_none_of_it(tmp_path, generated):
    """Both NaCl and the one KBr match; nobody finds LiF, and of the unreadable entry nothing is known."""
    test = tmp_path / "test"
    test.mkdir()
    for name, one in (
        ("a", rocksalt("Na", "Cl")),
        ("b", rocksalt("K", "Br", 6.6)),
        ("c", rocksalt("Li", "F", 4)),
    ):
        one.to(filename=str(test / f"{name}.cif"))
    (test / "d.cif").write_text("data_x\n_cell_length_a 3\n")
    options = {
        "targets": test,
        "pairing": "none",
        "out": tmp_path / "out",
        "protocols": ["kit", "genmetrics"],
    }
    found = by_name(score(generated, **options)["generated"])
    assert (found["genmetrics.coverage"].numerator, found["genmetrics.coverage"].denominator) == (3, 3)
    assert "not paired" in found["kit.match_rate@1"].note
    assert "--fingerprints" in found["genmetrics.fingerprint_coverage"].note
    rows = pq.read_table(tmp_path / "out" / "rows" / "generated.parquet").to_pylist()
    assert [row["covers.genmetrics"] for row in rows][:4] == [True, True, True, False]


def test_candidates_of_targets_are_drawn_beside_them_with_how_far_they_agree(tmp_path):
    """Of five candidates of NaCl four are one structure, and right; of KBr's one is right, three agree on
    another, and one is unreadable."""
    truth, guesses = tmp_path / "truth.extxyz", tmp_path / "guesses.extxyz"
    write([Crystal("mp-1", rocksalt("Na", "Cl")), Crystal("mp-2", rocksalt("K", "Br", 6.6))], truth)
    cscl = {
        ions: Structure(Lattice.cubic(4.1), list(ions), [[0, 0, 0], [0.5] * 3])
        for ions in (("Na", "Cl"), ("K", "Br"))
    }
    guessed = [cscl["Na", "Cl"], *(rocksalt("Na", "Cl", a) for a in (5.5, 5.6, 5.7, 5.8))]
    guessed += [cscl["K", "Br"]] * 3 + [rocksalt("K", "Br", 6.5)]
    write([Crystal(f"guess {i}", one) for i, one in enumerate(guessed)], guesses)
    with guesses.open("a") as file:
        file.write('2\nLattice="3 0 0 0 3 0 0 0 3"\nK 0 0 0\n')
    score(guesses, targets=truth, out=tmp_path / "out")
    plots = json.loads((tmp_path / "out" / "report.json").read_text())["sets"][0]["parity"]
    volume, agreement = plots
    assert volume["x"] == pytest.approx([5.69**3 / 8, 6.6**3 / 8], abs=1e-3)
    assert volume["y"] == pytest.approx([4.1**3 / 2] * 2, abs=1e-3)
    assert agreement["kind"] == "calibration"
    assert sorted(zip(agreement["x"], agreement["y"], strict=True)) == [
        (0.2, 0),
        (0.2, 1),
        (0.6, 0),
        (0.8, 1),
    ]


@pytest.mark.slow
def test_matters_of_order_are_nothing_to_mattergens_matcher(tmp_path):
    """CuAu as L1_0 and as L1_1 (Strukturbericht), one lattice: two crystals, one disordered alloy."""
    first = Structure(Lattice.tetragonal(2.8, 3.96), ["Cu", "Au"], [[0, 0, 0], [0.5] * 3])
    fcc = Structure(Lattice(3.96 * FCC[1:]), ["Cu"], [[0, 0, 0]])
    fcc.make_supercell([[2, 0, 0], [1, 1, 0], [1, 0, 1]])
    fcc.replace(1, "Au")
    write([Crystal("L1_0", first), Crystal("L1_1", fcc)], tmp_path / "cuau.extxyz")
    write([Crystal("known", first)], tmp_path / "known.extxyz")
    options = {"reference": tmp_path / "known.extxyz", "out": tmp_path / "out", "protocols": ["mattergen"]}
    found = by_name(score(tmp_path / "cuau.extxyz", **options)["cuau"])
    assert (found["mattergen.ordered_unique"].numerator, found["mattergen.unique"].numerator) == (2, 1)
    assert (found["mattergen.ordered_novel"].numerator, found["mattergen.novel"].numerator) == (1, 0)


def test_targets_that_do_not_pair_are_told(tmp_path, generated):
    write(
        [Crystal("mp-1", rocksalt("Na", "Cl")), Crystal("mp-2", rocksalt("Cs", "F"))], tmp_path / "t.extxyz"
    )
    with pytest.raises(UserError, match=r"sample 's2' \(KBr\) has the composition of no target"):
        score(generated, targets=tmp_path / "t.extxyz", out=tmp_path / "out")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of spglib, as pymatgen's CifWriter asks it
def test_crystallm_pi_keeps_the_densest_of_one_bonding_graph(tmp_path):
    """Of three NaCl the first of the two smallest is kept; KBr is known; one is unreadable."""
    cells = {"a": rocksalt("Na", "Cl", 5.7), "b": rocksalt("Na", "Cl", 5.6), "c": rocksalt("Na", "Cl", 5.6)}
    cells["d"] = rocksalt("K", "Br", 6.6)
    path = tmp_path / "samples"
    path.mkdir()
    for name, cell in cells.items():
        (path / f"{name}.cif").write_text(str(CifWriter(cell, symprec=0.1)))
    (path / "e.cif").write_text("data_NaCl\n_cell_length_a 5.6\n")
    write([Crystal("mp-23251", rocksalt("K", "Br", 6.65))], tmp_path / "known.extxyz")
    options = {"reference": tmp_path / "known.extxyz", "out": tmp_path / "out"}
    found = by_name(score(path, **options, protocols=["crystallm_pi"])["samples"])
    assert {name: (one.numerator, one.denominator) for name, one in found.items() if "novel" in name} == {
        "crystallm_pi.novel": (1, 5), "crystallm_pi.comp_novel": (1, 5),
    }  # fmt: skip
    assert found["crystallm_pi.unique"].numerator == 2
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "out/rows/samples.parquet").to_pylist()}
    copies = {name: row["copy_of.crystallm_pi"] for name, row in rows.items()}
    assert {name: of for name, of in copies.items() if of} == {"a": "b", "c": "b"}
    assert rows["a"]["hash.bawl"] == "05474a878a6c3d2c15d290446a1915b0_225_Na4Cl4"
    without = by_name(score(path, **options)["samples"])
    assert "named with --protocol" in without["crystallm_pi.unique"].note  # the same folder, asked for less


def test_a_structure_whose_hash_fails_is_a_row_with_its_trouble(tmp_path):
    cells = [rocksalt("Na", "Cl"), Structure(Lattice.cubic(12), ["Na"], [[0, 0, 0]]), rocksalt("K", "Br")]
    write_part(part_path(tmp_path / "read", 0), [structure_columns(cell) for cell in cells], READ)
    valid = [{"crystallm_pi.valid": i < 2} for i in range(3)]
    write_part(part_path(tmp_path / "bonds", 0), valid, STAGES["bonds"].schema)
    stages = [[name, str(tmp_path / name), {}, {}] for name in ("bonds", "hashes")]
    found = run_part({"part": 0, "read": str(tmp_path / "read"), "stages": stages}, Marks(lambda text: None))
    assert found["stages"]["hashes"]["troubles"] == 1
    first, alone, invalid = read_part(part_path(tmp_path / "hashes", 0))
    assert first["hash.bawl"].endswith("_225_Na4Cl4")
    assert "ValueError" in alone["trouble"]
    assert invalid == {"hash.bawl": None, "trouble": None}


def test_a_set_that_came_without_cifs_is_not_judged_by_its_text(tmp_path, generated):
    found = by_name(score(generated, out=tmp_path / "out", protocols=["crystallm_pi"])["generated"])
    assert "came as a CIF" in found["crystallm_pi.unique"].note


@pytest.mark.slow
def test_fingerprints_make_coverage_and_cdvae_valid(tmp_path, generated):
    salts = tmp_path / "salts.extxyz"
    write([Crystal(f"{a}{b}", rocksalt(a, b)) for a, b in SALTS[:6]], salts)
    options = {"reference": salts, "targets": salts, "out": tmp_path / "out"}
    found = by_name(score(salts, **options, fingerprints=True)["salts"])
    assert found["cdvae.valid"].numerator == 6
    assert found["cdvae.cov_recall"].numerator == found["cdvae.cov_precision"].numerator == 6
    assert found["cdvae.amsd_recall"].value == pytest.approx(0.0, abs=1e-9)
    shares = {
        name: (found[name].numerator, found[name].denominator) for name in found if "fingerprint_" in name
    }
    assert shares["genmetrics.fingerprint_coverage"] == (6, 6)
    assert shares["genmetrics.fingerprint_novelty"] == (0, 6)
    assert shares["genmetrics.fingerprint_uniqueness"] == (30, 30)
    without = by_name(score(salts, **options)["salts"])
    assert "--fingerprints" in without["cdvae.cov_recall"].note  # the same folder, asked for less


def test_conditions_that_are_missed_count_as_misses(tmp_path):
    """Of four requests one came out as asked, one otherwise, one was cut; of one nothing was asked."""
    salt = rocksalt("Na", "Cl").to(fmt="cif")
    asked = {"conditions": {"formula": {"Na": 1, "Cl": 1}}}
    lines = [
        {"id": "a", "cif": salt, **asked},
        {"id": "b", "cif": rocksalt("K", "Cl").to(fmt="cif"), **asked},
        {"id": "c", "text": "Na1", "formula": None, "reason": "truncated", "detail": "", **asked},
        {"id": "d", "cif": salt},
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = by_name(score(path, out=tmp_path / "out")["samples"])
    assert (found["kit.hit_rate.formula"].numerator, found["kit.hit_rate.formula"].denominator) == (1, 3)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sets"][0]["reasons"] == {"formula_mismatch": 1, "truncated": 1, "duplicate": 1}


def test_a_density_that_was_asked_for_stands_beside_the_one_that_came(tmp_path):
    """An interval is no value, and what could not be read has no density."""
    salt = rocksalt("Na", "Cl")
    exactly, between = ({"properties": {"density_g_cm3": {"low": 2.0, "high": high}}} for high in (2.0, 3.0))
    lines = [
        {"id": "a", "cif": salt.to(fmt="cif"), "conditions": exactly},
        {"id": "b", "cif": salt.to(fmt="cif"), "conditions": between},
        {
            "id": "c",
            "text": "Na1",
            "formula": None,
            "reason": "truncated",
            "detail": "",
            "conditions": exactly,
        },
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    score(path, out=tmp_path / "out")
    (plot,) = json.loads((tmp_path / "out" / "report.json").read_text())["sets"][0]["parity"]
    assert plot["title"] == "Density asked for and found"
    assert plot["x"] == [2.0]
    assert plot["y"] == pytest.approx([float(salt.density)], rel=1e-6)


@pytest.mark.slow
def test_stability_comes_with_the_judges_error_and_names_what_the_hull_lacks(tmp_path):
    pytest.importorskip("chgnet")
    cells = [rocksalt("Na", "Cl", 5.6, True), rocksalt("K", "Br", 6.6, True), rocksalt("Rb", "I", 7.3, True)]
    write([Crystal(f"s{i}", cell) for i, cell in enumerate(cells)], tmp_path / "salts.extxyz")
    hull = tmp_path / "hull.csv"
    hull.write_text("formula,formation_energy_per_atom\n" + "Na,0\nCl,0\nNaCl,-2.1\nK,0\nBr,0\nKBr,-1.9\n")
    write([Crystal("known", rocksalt("K", "Br", 6.65))], tmp_path / "known.extxyz")
    out = tmp_path / "out"
    options = {"relax": True, "hull": hull, "reference": tmp_path / "known.extxyz", "out": out}
    found = by_name(score(tmp_path / "salts.extxyz", **options)["salts"])
    assert found["kit.relaxed"].numerator == 3
    assert found["kit.metastable"].numerator == 2  # of RbI no distance is known
    assert found["kit.msun"].numerator == 1  # KBr is in the reference
    assert "hull distances off by" in found["kit.metastable"].note
    report = json.loads((out / "report.json").read_text())
    assert any("no I, Rb" in note and "hull.csv" in note for note in report["notes"])
    assert (out / "relaxed" / "salts" / "relaxed.extxyz").is_file()
    rows = pq.read_table(out / "rows" / "salts.parquet").to_pylist()
    assert abs(rows[0]["hull_distance_ev_per_atom"]) < 0.1
    assert rows[2]["hull_distance_ev_per_atom"] is None
    assert rows[2]["relaxed"]
    told = {card["id"]: card["measures"] for card in report["sets"][0]["gallery"]}
    assert told["s0"]["hull_distance_ev_per_atom"] == pytest.approx(
        rows[0]["hull_distance_ev_per_atom"], abs=1e-4
    )
    assert "hull_distance_ev_per_atom" not in told["s2"]


def test_stability_needs_a_hull(tmp_path, generated):
    with pytest.raises(UserError, match="--relax: above which hull"):
        score(generated, relax=True, out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif("CRYSTALLM_KIT_SAMPLES" not in os.environ, reason="CRYSTALLM_KIT_SAMPLES is not set")
def test_the_published_figures_of_diffcsp_to_the_digit(tmp_path):
    """As published for DiffCSP; of Crystal-text-LLM's file two collapsed, and 2,196 are first seen."""
    home = Path(os.environ["CRYSTALLM_KIT_SAMPLES"])
    paths = [f"D={home / 'DiffCSP_mp_20.pt'}"]
    paths.append(f"L={home / 'metastable_structures_llama-2-7B_1.0_0.7.csv.gz'}")
    found = {name: by_name(scores) for name, scores in score(paths, out=tmp_path / "out").items()}
    of_diffcsp = {
        "cdvae.structure_valid": 10_000, "cdvae.comp_valid": 8_325, "lemat.valid": 9_576,
        "crystallm_pi.structure_valid_xrd": 9_979,
    }  # fmt: skip
    assert {name: found["D"][name].numerator for name in of_diffcsp} == of_diffcsp
    assert found["L"]["cdvae.structure_valid"].numerator == 3_219
    assert found["L"]["mattergen.ordered_unique"].numerator == 2_196


def test_empty_and_unknown_things_are_told(tmp_path, generated):
    empty = tmp_path / "samples.jsonl"
    empty.write_text("")
    with pytest.raises(EmptyInput, match="holds no samples; 0/0 is not a score"):
        score(empty, out=tmp_path / "a")
    with pytest.raises(UnknownName, match="no protocol 'cdvea'; did you mean 'cdvae'"):
        score(generated, out=tmp_path / "b", protocols=["cdvea"])
    with pytest.raises(UserError, match="9 samples in it, but --requested 5"):
        score(generated, out=tmp_path / "c", requested=["5"])


def test_a_reference_may_have_bad_entries_but_not_only_those(tmp_path, generated, capsys):
    known = tmp_path / "known"
    known.mkdir()
    (known / "a.cif").write_text("data_x\n_cell_length_a 3\n")
    with pytest.raises(EmptyInput, match="reference: none of its 1 entries could be read"):
        score(generated, reference=known, out=tmp_path / "a")
    rocksalt("K", "Br", 6.6).to(filename=str(known / "b.cif"))
    score(generated, reference=known, out=tmp_path / "b", progress=True)
    assert "reference: 1 of 2 entries are left out (unreadable: 1)" in capsys.readouterr().err


def test_the_command_prints_sets_side_by_side(tmp_path, generated, capsys):
    arguments = [
        "score",
        f"one={generated}",
        f"two={generated}",
        "--protocol",
        "cdvae",
        "--workers",
        "1",
        "--out",
    ]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "one (9)" in said
    assert "two (9)" in said
    assert "comp_valid" in said
    assert main([*arguments, str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in report["sets"]] == ["one", "two"]
    assert main(["score", str(generated), "--protocol", "lemta", "--out", str(tmp_path / "x")]) == 2
