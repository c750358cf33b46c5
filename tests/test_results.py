"""results.py: a generation's folder holds the valid crystals and every request, and nobody else's files."""

import json

import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.records import Conditions, Sample, Verdict
from crystallm_kit.results import FORMATS, check_folder, write_results
from crystallm_kit.structures.files import read


def sample(name: str, element: str, reason: str | None) -> Sample:
    cell = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na", element], [[0, 0, 0], [0.5] * 3])
    structure = None if reason == "truncated" else cell
    verdict = Verdict(reason is None, reason, "as told")
    measures = {"volume_per_atom_angstrom3": 22.0, "spacegroup_number": 225}
    return Sample(name, "Na1 ...", structure, verdict, Conditions(), -2.5, 7, "toy", measures)


SAMPLES = [
    sample("7-0", "Cl", None),
    sample("7-1", "Br", "charge"),
    sample("7-2", "Cl", "duplicate"),
    sample("7-3", "F", None),
    sample("7-4", "I", "truncated"),
]


@pytest.mark.parametrize("form", FORMATS)
def test_valid_crystals_are_written_and_every_request_has_its_line(tmp_path, form):
    written = write_results(SAMPLES, tmp_path / "out", format=form)
    assert written.n_structures == 2
    assert {c.id for c in read(written.structures)} == {"NaCl-7-0", "NaF-7-3"}
    lines = [json.loads(line) for line in written.samples.read_text().splitlines()]
    assert [line["id"] for line in lines] == [s.id for s in SAMPLES]
    assert [line["reason"] for line in lines] == [None, "charge", "duplicate", None, "truncated"]
    assert lines[4]["formula"] is None


def test_one_file_formats_carry_the_measures(tmp_path):
    written = write_results(SAMPLES, tmp_path / "out", format="extxyz")
    assert {c.properties["log_probability"] for c in read(written.structures)} == {-2.5}


def test_an_earlier_generation_is_replaced_whatever_its_format(tmp_path):
    write_results(SAMPLES, tmp_path, format="json")
    write_results(SAMPLES[3:], tmp_path, format="cif")
    assert {p.name for p in tmp_path.iterdir()} == {"samples.jsonl", "structures"}
    assert [p.name for p in (tmp_path / "structures").iterdir()] == ["NaF-7-3.cif"]


def test_without_a_valid_crystal_only_the_requests_are_written(tmp_path):
    written = write_results(SAMPLES[4:], tmp_path)
    assert (written.structures, written.n_structures) == (None, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize("own", [True, False])
def test_files_that_no_generation_wrote_are_left_alone(tmp_path, own):
    if own:
        write_results(SAMPLES, tmp_path)
    (tmp_path / "structures").mkdir(exist_ok=True)
    mine = tmp_path / "structures" / "notes.txt"
    mine.write_text("mine")
    for refuse in (check_folder, lambda folder: write_results(SAMPLES, folder)):
        with pytest.raises(UserError, match="not written by a generation"):
            refuse(tmp_path)
    assert mine.read_text() == "mine"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="expected a folder"):
        check_folder(tmp_path / "out")


def test_an_unknown_format_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'poscar'"):
        write_results(SAMPLES, tmp_path, format="poscars")
