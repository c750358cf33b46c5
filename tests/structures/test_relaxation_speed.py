"""The measurement runs at toy size on a CPU, and what it relaxes is what chgnet says."""

import json

import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.records import Crystal
from crystallm_kit.structures.relaxation_speed import main
from crystallm_kit.structures.writing import write


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_rows_run_and_agree_with_chgnet(tmp_path, capsys):
    pytest.importorskip("chgnet")
    crystals = [
        Crystal(str(a), Structure(Lattice.cubic(a), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.52]]))
        for a in (4.0, 4.1, 4.2)
    ]
    write(crystals, tmp_path / "crystals.extxyz")
    source, out = str(tmp_path / "crystals.extxyz"), tmp_path / "speed.json"
    options = "--device cpu -n 3 --max-steps 3 --peer-seconds 0.1 --workers 1 --batch-atoms 2 48".split()
    assert main([source, *options, "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    rows = [row["row"] for row in told["rows"]]
    assert rows == ["peer", "one", "evaluate", "one", "evaluate", "agreement", "agreement", "set"]
    assert told["n"] == 3
    assert told["rows"][1]["evaluations"] == 12
    assert all(r["largest_energy_ev_per_atom"] < 1e-5 for r in told["rows"] if r["row"] == "agreement")
    assert "crystals per second" in capsys.readouterr().out


def test_a_file_without_crystals_is_said(tmp_path, capsys):
    assert main([str(tmp_path / "none.extxyz")]) == 2
    assert "none.extxyz" in capsys.readouterr().err
