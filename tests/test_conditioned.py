"""conditioned.py: every request is a row, rows are kept and go on, and the table counts them."""

import json
from dataclasses import replace

import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit import conditioned as module
from crystallm_kit.conditioned import calibration, conditioned, known_crystals, measured_of, read_rows
from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.generation import load_model
from crystallm_kit.records import Conditions, Crystal, Range
from crystallm_kit.scores.bulk_modulus import bulk_moduli
from crystallm_kit.structures.relaxation import load_potential

EMT = "ase.calculators.emt:EMT"  # knows seven metals; of most samples it says that it does not know them


def fcc(element, a):
    basis = [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]]
    return Structure(basis, [element], [[0, 0, 0]])


@pytest.fixture(scope="module")
def model():
    return load_model(batch_size=16, device="cpu")


@pytest.fixture(scope="module")
def potential():
    return load_potential(EMT)


@pytest.fixture(scope="module")
def finished(model, potential, tmp_path_factory):
    """Return a finished run's folder, results, settings, and what `generate` was asked for, which ran."""
    out, asked = tmp_path_factory.mktemp("conditioned"), []
    generate = module.generate

    def recorded(conditions, **settings):
        asked.append(conditions)
        return generate(conditions, **settings)

    settings = {"targets": [100.0], "n": 4, "seed": 4, "potential": potential, "known": frozenset()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "generate", recorded)
        results = conditioned(model, replace(model, name="adapter"), out, **settings)
    return out, results, settings, asked


def test_every_request_of_every_series_is_a_row(finished):
    out, results, *_ = finished
    rows = read_rows(out / "rows.jsonl")
    assert [name for name, _ in results] == ["base", "adapter", "100"]
    assert [(row["series"], row["index"]) for row in rows] == [
        (name, i) for name, _ in results for i in range(4)
    ]
    assert [r.requested for _, r in results] == [4, 4, 4]
    valid = sum(row["verdict"] in ("valid", "duplicate") for row in rows if row["series"] == "base")
    assert results[0][1].valid == valid
    assert valid > 0  # so that something was handed to the potential
    assert all("reason" in row for row in rows if row["verdict"] == "valid")


def test_targets_are_asked_for_and_nothing_where_there_is_none(finished):
    *_, asked = finished
    assert [dict(c.properties) for c in asked] == [{}, {}, {"bulk_modulus_gpa": Range.exactly(100.0)}]
    assert all(replace(c, properties={}) == Conditions() for c in asked)


def test_an_interrupted_run_goes_on_where_it_was(finished, model, tmp_path):
    out, results, settings, _ = finished
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "settings.json").write_text((out / "settings.json").read_text())
    (tmp_path / "rows.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # cut in the middle of a row
    said = []
    again = conditioned(
        model, replace(model, name="adapter"), tmp_path, **settings, measured_together=2, say=said.append
    )
    assert [repr(r) for _, r in again] == [repr(r) for _, r in results]
    assert read_rows(tmp_path / "rows.jsonl") == [json.loads(line) for line in lines]
    assert said[0] == "adapter: 3 of 4"


def test_rows_of_other_settings_are_refused(finished, model):
    out, _, settings, _ = finished
    with pytest.raises(UserError, match="holds rows of another run \\(seed 4, now 5\\)"):
        conditioned(model, replace(model, name="adapter"), out, **{**settings, "seed": 5})
    with pytest.raises(EmptyInput, match="0 targets"):
        conditioned(model, model, out, **{**settings, "targets": []})


def test_a_row_counts_as_its_verdict_says():
    assert measured_of({"verdict": "overlap"}) == module.Measured(None, False)
    row = {"verdict": "duplicate", "bulk_modulus_gpa": 90.0, "known": True}
    assert measured_of(row) == module.Measured(90.0, True, True, True)


def test_known_crystals_are_told_by_formula_and_space_group():
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    assert known_crystals([Crystal("a", salt), Crystal("b", fcc("Cu", 3.6))]) == {("NaCl", 225), ("Cu", 225)}


def test_calibration_against_the_measure_itself_is_perfect(potential):
    structures = [fcc("Cu", 3.6), fcc("Al", 4.0), fcc("Au", 4.1), fcc("Ag", 4.1)]
    moduli = [m.gpa for m in bulk_moduli(structures, potential)]
    crystals = [
        Crystal(str(i), s, {"bulk_modulus_gpa": 2 * gpa if i == 3 else gpa})
        for i, (s, gpa) in enumerate(zip(structures, moduli, strict=True))
    ]
    found = calibration(crystals, potential)
    assert (found["crystals"], found["measured"], found["within_20_percent"]) == (4, 4, 0.75)
    assert found["mae_gpa"] == pytest.approx(moduli[3] / 4)
    assert found["median_ratio"] == pytest.approx(1.0)
    assert 0 < found["spearman"] <= 1


def test_calibration_needs_values_to_compare_with(potential):
    with pytest.raises(UserError, match="no bulk_modulus_gpa"):
        calibration([Crystal("x", fcc("Cu", 3.6))], potential)
    with pytest.raises(EmptyInput, match="1 crystals measured of 1"):
        calibration([Crystal("x", fcc("Cu", 3.6), {"bulk_modulus_gpa": 1.0})], potential)
