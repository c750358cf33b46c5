"""scoring/potential_check.py: references that were put into the data come out, and errors too."""

import itertools

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.records import Crystal
from crystallm_kit.scores.stability.element_references import read_references
from crystallm_kit.scoring.potential_check import drawn, main
from crystallm_kit.structures.files import write
from crystallm_kit.structures.relaxation import load_potential, relax

EMT = "ase.calculators.emt:EMT"
TRUTH = {"Cu": 1.5, "Au": -0.5, "Ag": 0.25}


def alloys():
    """Cells of four atoms on fcc sites with every filling by three metals, relaxed under EMT."""
    sites = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    fillings = list(itertools.combinations_with_replacement(TRUTH, 4))
    made = [Structure(Lattice.cubic(3.95), filling, sites) for filling in fillings]
    return [r for r in relax(made, load_potential(EMT)) if r.structure is not None]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Formation energies are EMT's less TRUTH, and 0.02 eV/atom more in the test set."""
    folder = tmp_path_factory.mktemp("known")
    crystals = []
    for i, one in enumerate(alloys()):
        mixed = sum(TRUTH[s.specie.symbol] for s in one.structure) / len(one.structure)
        properties = {
            "formation_energy_ev_per_atom": one.energy_ev_per_atom - mixed, "hull_distance_ev_per_atom": 0.0,
        }  # fmt: skip
        crystals.append(Crystal(f"a{i}", one.structure, properties))
    write(crystals, folder / "fit.parquet")
    shifted = [
        Crystal(c.id, c.structure, {k: v + 0.02 if "formation" in k else v for k, v in c.properties.items()})
        for c in crystals
    ]
    write(shifted, folder / "test.parquet")
    lines = ["formula,formation_energy_per_atom"]
    lines += [
        f"{c.structure.formula.replace(' ', '')},{c.properties['formation_energy_ev_per_atom']}"
        for c in crystals
    ]
    (folder / "hull.csv").write_text("\n".join(lines))
    return folder


def run(files, tmp_path, *more):
    names = ["--fit", files / "fit.parquet", "--test", files / "test.parquet", "--hull", files / "hull.csv"]
    return main(
        [str(a) for a in ("--potential", EMT, *names, "--workers", 1, "--out", tmp_path / "r.json", *more)]
    )


def test_what_was_put_into_the_data_comes_out(files, tmp_path):
    assert run(files, tmp_path, "--n-fit", 12, "--n-test", 10, "--note", "made") == 0
    found = read_references(tmp_path / "r.json")
    assert found.potential == EMT
    for element, energy in TRUTH.items():
        assert found.energies_ev_per_atom[element] == pytest.approx(energy, abs=1e-4)
    relaxed, given = found.checks
    assert (relaxed.structures, given.structures, given.n, given.note) == ("relaxed", "as given", 10, "made")
    assert given.formation_energy_mae == pytest.approx(0.02, abs=1e-3)
    assert given.formation_energy_bias == pytest.approx(-0.02, abs=1e-3)
    assert relaxed.formation_energy_mae == pytest.approx(0.02, abs=2e-3)
    assert given.hull_distance_mae_of_hull > given.hull_distance_mae  # known energies are 0.02 too high


def test_the_draw_is_topped_up_for_rare_elements_and_repeats(files):
    from crystallm_kit.structures.files import read

    crystals = list(read(files / "fit.parquet"))
    taken = drawn(crystals, 3, 1, per_element=6)
    counts = [sum(e in {x.symbol for x in c.structure.composition} for c in taken) for e in TRUTH]
    assert min(counts) >= 6
    assert [c.id for c in taken] == [c.id for c in drawn(crystals, 3, 1, per_element=6)]
    assert len(drawn(crystals, 3, 1)) == 3
    assert len({c.id for c in taken}) == len(taken)
    assert np.isfinite([c.properties["formation_energy_ev_per_atom"] for c in taken]).all()


def test_files_without_what_is_needed_are_refused(files, tmp_path, capsys):
    bare = [Crystal("a", Structure(Lattice.cubic(3.6), ["Cu"], [[0, 0, 0]]))]
    write(bare, tmp_path / "bare.parquet")
    assert run(files, tmp_path, "--fit", tmp_path / "bare.parquet") == 2
    assert "crystals without formation_energy_ev_per_atom" in capsys.readouterr().err
