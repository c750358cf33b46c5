"""prediction.py and the verb `predict`: candidates relaxed once, copies dropped, the best first."""

import json
import math

import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit import generation
from crystallm_kit.cli import main
from crystallm_kit.engines.engine import ScriptedEngine
from crystallm_kit.errors import ImpossibleRequest, UserError
from crystallm_kit.generation import Model
from crystallm_kit.prediction import polymorphs_by_energy, predict
from crystallm_kit.records import Conditions, Sample, Verdict
from crystallm_kit.scores.stability.element_references import ElementReferences
from crystallm_kit.scores.stability.hull import Hull
from crystallm_kit.structures.files import read
from crystallm_kit.structures.relaxation_workers import RelaxSettings
from crystallm_kit.text.prompts import template_named
from crystallm_kit.text.representation import representation

EMT = "ase.calculators.emt:EMT"  # effective medium theory of Cu, Au and others: a millisecond a crystal
CUAU = Conditions(formula={"Cu": 1, "Au": 1})
# B2, which pymatgen's matcher takes for L1_0; L1_0 (AFLOW AB_tP2_123_a_d) in two cells, and off its centre,
# which relaxes to it; B1; and what is no crystal.
TEXTS = (
    "Cu1 Au1 221\nCu a\nAu b\n3.15 end",
    "Cu1 Au1 123\nCu a\nAu d\n2.80 3.66 end",
    "Cu1 Au1 123\nCu a\nAu d\n2.80 3.66 end",
    "Cu1 Au1 123\nCu a\nAu d\n2.90 3.45 end",
    "Cu1 Au1 225\nCu a\nAu b\n5.40 end",
    "Cu1 Au1 221\nCu a\nAu b\n",
    "Cu1 Au1 99\nCu a\nAu b\n2.80 3.66 .0000 .5800 end",
)


@pytest.fixture
def scripted():
    template = template_named("kit-1")
    engine = ScriptedEngine({template.render(CUAU): TEXTS})
    return Model("script", engine, representation("wyckoff"), template, ("Cu", "Au"), {})


def test_polymorphs_are_relaxed_merged_and_ranked_and_the_files_are_there(scripted, tmp_path):
    out = tmp_path / "CuAu"
    told = []
    found = predict("CuAu", n=7, model=scripted, relaxation=RelaxSettings(EMT), out=out, workers=1,
                    say=lambda *what: told.append(what))  # fmt: skip
    assert (found.formula, found.n_requested, found.n_valid, found.n_relaxed) == ("CuAu", 7, 6, 4)
    assert [p.spacegroup_number for p in found.polymorphs] == [123, 221, 225]
    best = found.polymorphs[0]
    assert (best.n_found, best.above_best_mev_per_atom, best.converged) == (4, 0.0, True)
    assert set(best.samples) == {"0-1", "0-2", "0-3", "0-6"}
    energies = [p.energy_ev_per_atom for p in found.polymorphs]
    assert energies == sorted(energies)
    assert found.polymorphs[2].above_best_mev_per_atom == pytest.approx(1000 * (energies[2] - energies[0]))
    assert math.isnan(best.hull_distance_ev_per_atom)
    assert told[6] == ("generated", 7, 7)
    assert told[-1] == ("relaxed", 4, 4)

    names = sorted(path.name for path in (out / "polymorphs").iterdir())
    assert names == ["01-CuAu-123.cif", "02-CuAu-221.cif", "03-CuAu-225.cif"]
    (first,) = read(out / "polymorphs" / names[0])
    assert first.structure.volume / 2 == pytest.approx(best.volume_per_atom_angstrom3, rel=1e-5)
    saved = json.loads((out / "prediction.json").read_text())
    assert [p["rank"] for p in saved["polymorphs"]] == [1, 2, 3]
    assert saved["polymorphs"][0]["hull_distance_ev_per_atom"] is None
    assert len((out / "samples.jsonl").read_text().splitlines()) == 7

    # again, with a hull: nothing is relaxed again, and distances come with it
    relaxed = (out / "relaxed" / "relaxed.jsonl").read_text()
    hull = Hull.from_formation_energies(["Cu", "Au", "CuAu3"], [0, 0, -0.02], name="alloys")
    references = ElementReferences(EMT, {"Cu": -0.007, "Au": 0.0}, "two elements", 2, 0.0)
    again = predict(CUAU, n=7, model=scripted, relaxation=RelaxSettings(EMT), out=out, hull=hull,
                    references=references)  # fmt: skip
    assert (out / "relaxed" / "relaxed.jsonl").read_text() == relaxed
    one = again.polymorphs[0]
    assert one.formation_energy_ev_per_atom == pytest.approx(one.energy_ev_per_atom + 0.0035)
    # the hull at CuAu: 2/3 of the atoms CuAu3, 1/3 Cu
    assert one.hull_distance_ev_per_atom == pytest.approx(one.formation_energy_ev_per_atom + 0.02 * 2 / 3)
    assert "judge ase.calculators.emt:EMT, hull alloys" in again.judge
    with pytest.raises(UserError, match="relaxed with max_steps 300, now 3"):
        predict(CUAU, n=7, model=scripted, relaxation=RelaxSettings(EMT, max_steps=3), out=out)


def sample(name, structure, reason=None):
    return Sample(name, "", structure, Verdict(reason is None, reason), CUAU, -1.0, 0, "made here")


def test_one_that_collapses_or_explodes_is_named_and_not_ranked():
    cell = [[0, 1.9, 1.9], [1.9, 0, 1.9], [1.9, 1.9, 0]]
    gold = Structure(Lattice.tetragonal(2.8, 3.66), ["Cu", "Au"], [[0, 0, 0], [0.5] * 3])
    odd = Structure(cell, ["Na"], [[0, 0, 0]])
    found = polymorphs_by_energy(
        [sample("a", gold), sample("b", odd), sample("c", None, "truncated"), sample("d", gold, "overlap")],
        relaxation=RelaxSettings(EMT), workers=1,
    )  # fmt: skip
    assert (found.n_requested, found.n_valid, found.n_relaxed) == (4, 2, 2)
    assert list(found.failed) == ["b"]
    assert found.failed["b"].startswith("error: NotImplementedError")
    assert [p.samples for p in found.polymorphs] == [("a",)]
    assert found.stopped == {"truncated": 1, "overlap": 1}
    assert "not ranked: 1 error" in found.lines()
    assert "not valid: 1 truncated, 1 overlap" in found.lines()


def test_without_relaxation_the_likelier_stands_first(scripted):
    found = predict("CuAu", n=7, model=scripted, relaxes=False)
    assert found.ranked_by == "likelihood"
    assert found.polymorphs[0].spacegroup_number == 123  # written three times
    assert sum(p.n_found for p in found.polymorphs) == 6
    assert all(math.isnan(p.energy_ev_per_atom) for p in found.polymorphs)


def test_nothing_valid_is_an_empty_ranking(tmp_path):
    template = template_named("kit-1")
    engine = ScriptedEngine({template.render(CUAU): ["Cu1 Au1 221\n"]})
    empty = Model("script", engine, representation("wyckoff"), template, ("Cu", "Au"), {})
    found = predict("CuAu", n=1, model=empty, relaxation=RelaxSettings(EMT), out=tmp_path / "out")
    assert (found.polymorphs, found.n_valid) == ((), 0)
    assert (tmp_path / "out" / "prediction.json").exists()


def test_what_cannot_be_predicted_is_refused_before_any_work(scripted, tmp_path):
    with pytest.raises(ImpossibleRequest, match="give a formula, such as TiO2"):
        predict(Conditions(elements=("Cu",)), model=scripted)
    with pytest.raises(UserError, match="n = 0"):
        predict("CuAu", n=0, model=scripted)
    hull = Hull.from_formation_energies(["Cu", "Au"], [0, 0], name="elements")
    with pytest.raises(ImpossibleRequest, match="no element references for potential 'ase"):
        predict("CuAu", model=scripted, relaxation=RelaxSettings(EMT), hull=hull)
    (tmp_path / "polymorphs").mkdir()
    with pytest.raises(UserError, match="not written by a prediction"):
        predict("CuAu", model=scripted, out=tmp_path)


def test_the_command_shows_a_table_or_json(scripted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "load_model", lambda *_, **__: scripted)
    (tmp_path / "hull.csv").write_text("formula,e_form\nCu,0\nAu,0\n")
    ElementReferences(EMT, {"Cu": 0.0, "Au": 0.0}, "two elements", 2, 0.0).save(tmp_path / "references.json")
    energies = ["--potential", EMT, "--workers", "1", "--hull", "hull.csv", "--references", "references.json"]
    assert main(["predict", "CuAu", "-n", "7", *energies]) == 0
    shown = capsys.readouterr().out
    assert "P4/mmm (123)" in shown
    assert "hull meV/atom" in shown
    assert "7 samples, 6 valid, 3 different of 4 relaxed; ranked by energy" in shown
    assert (tmp_path / "predictions" / "CuAu" / "polymorphs" / "01-CuAu-123.cif").exists()
    assert main(["predict", "--formula", "CuAu", "-n", "7", "--json", *energies]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [p["spacegroup_number"] for p in document["polymorphs"]] == [123, 221, 225]
    assert main(["predict", "--elements", "Cu,Au"]) == 2
    assert "give a formula, such as Sn5S4Cl2" in capsys.readouterr().err
