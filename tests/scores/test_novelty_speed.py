"""The measurement runs on small files, agrees with pymatgen there, and says what it timed."""

import re

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import EmptyInput
from crystallm_kit.records import Crystal
from crystallm_kit.scores.novelty.speed import main
from crystallm_kit.structures.writing import write

FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def rock_salt(cation, a):
    return Structure(Lattice.cubic(a), [cation] * 4 + ["Cl"] * 4, np.vstack([FCC, 0.5 - FCC]))


def caesium_chloride(cation, a):
    return Structure(Lattice.cubic(a), [cation, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.fixture
def files(tmp_path):
    made = [rock_salt(c, 5.6) for c in ("Na", "K", "Ag")] + [caesium_chloride(c, 4.1) for c in ("Cs", "Na")]
    known = [rock_salt("Na", 5.7), caesium_chloride("Na", 4.0), caesium_chloride("Tl", 3.8)]
    for name, structures in (("made", [*made, *made]), ("known", known)):
        write((Crystal(f"{name}-{i}", s) for i, s in enumerate(structures)), tmp_path / f"{name}.parquet")
    return tmp_path / "made.parquet", tmp_path / "known.parquet"


def test_all_parts_run_and_agree_with_pymatgen(files, tmp_path, capsys):
    made, known = map(str, files)
    arguments = [
        "--samples",
        made,
        "--reference",
        known,
        "--targets",
        known,
        "--million",
        "20",
        "--timed",
        "40",
    ]
    assert main([*arguments, "--folder", str(tmp_path / "indexes")]) == 0
    told = capsys.readouterr().out
    assert "uniqueness: 5 of 10 kept" in told
    assert "reference: 3 entries, 0 left out" in told
    assert "novelty: 4 of 10 known" in told
    assert "match rate: 3 targets, 60 candidates" in told
    assert re.findall(r"other decisions: (\d+) of \d+", told) == ["0"] * 3
    assert "20 entries" in told
    assert "1000 of 1000 known" in told


def test_the_big_index_needs_a_reference(tmp_path):
    with pytest.raises(EmptyInput, match="give --reference"):
        main(["--million", "10", "--folder", str(tmp_path)])
