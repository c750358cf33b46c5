"""structures/relaxed_set.py, relaxation_workers.py: every crystal gets its record, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import MissingExtra, UnknownName, UserError
from crystallm_kit.structures.files import read
from crystallm_kit.structures.relaxation import load_potential, relax
from crystallm_kit.structures.relaxation_workers import RelaxSettings
from crystallm_kit.structures.relaxed_set import relax_set

EMT = RelaxSettings(potential="ase.calculators.emt:EMT")
# Effective medium theory with three faults: it never answers for Pt, ends its process for Pd, and is slow.
FAULTY = """
import os, time
from ase.calculators.emt import EMT

class Faulty(EMT):
    def calculate(self, atoms=None, *rest, **more):
        symbols = set(atoms.get_chemical_symbols())
        if "Pt" in symbols:
            time.sleep(3600)
        if "Pd" in symbols:
            os._exit(3)
        super().calculate(atoms, *rest, **more)

class Slow(EMT):
    def calculate(self, atoms=None, *rest, **more):
        time.sleep(0.02)
        super().calculate(atoms, *rest, **more)
"""


def fcc(element, a):
    return Structure([[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]], [element], [[0, 0, 0]])


def alloy():
    """L1_2 Cu3Au, sheared."""
    lattice = Lattice([[3.7, 0.1, 0], [0, 3.9, 0.05], [0.1, 0, 4.0]])
    return Structure(
        lattice, ["Au", "Cu", "Cu", "Cu"], [[0, 0, 0], [0.5, 0.52, 0], [0.49, 0, 0.5], [0, 0.5, 0.47]]
    )


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    (tmp_path / "faulty_potentials.py").write_text(FAULTY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "faulty_potentials"


def test_a_set_is_relaxed_as_its_crystals_are_alone_and_saved(tmp_path):
    crystals = [("copper", fcc("Cu", 3.8)), ("alloy", alloy()), ("salt", fcc("Na", 5.0))]
    told = []
    found = relax_set(
        crystals, tmp_path / "r", settings=EMT, workers=1, device="cpu", say=lambda *n: told.append(n)
    )
    assert list(found) == ["copper", "alloy", "salt"]
    assert told == [(1, 3), (2, 3), (3, 3)]
    for name, structure in crystals[:2]:
        (alone,) = relax([structure], load_potential(EMT.potential))
        assert found[name].energy_ev_per_atom == pytest.approx(alone.energy_ev_per_atom, abs=1e-12)
        assert found[name].initial_energy_ev_per_atom > found[name].energy_ev_per_atom
        assert found[name].n_steps == alone.n_steps
    assert found["salt"].reason.startswith("error: NotImplementedError")  # EMT knows no Na
    saved = {c.id: c for c in read(tmp_path / "r" / "relaxed.extxyz")}
    assert set(saved) == {"copper", "alloy"}
    assert saved["alloy"].structure.volume == pytest.approx(found["alloy"].structure.volume, rel=1e-6)

    # again: nothing is made again, and a line that was cut, or of another crystal, is
    rows = tmp_path / "r" / "relaxed.jsonl"
    whole = rows.read_text()
    assert relax_set(crystals, tmp_path / "r", settings=EMT)["alloy"] == found["alloy"]
    assert rows.read_text() == whole
    rows.write_text(whole[:-20])
    other = [("copper", fcc("Cu", 3.7)), *crystals[1:]]
    again = relax_set(other, tmp_path / "r", settings=EMT, workers=1, device="cpu")
    assert again["copper"].initial_energy_ev_per_atom != found["copper"].initial_energy_ev_per_atom
    assert again["alloy"] == found["alloy"]
    ids = [json.loads(line)["id"] for line in rows.read_text().splitlines()]
    assert sorted(ids) == ["alloy", "copper", "copper", "salt"]


def test_one_that_hangs_and_one_that_kills_have_reasons_and_the_others_are_relaxed(tmp_path, faulty):
    settings = RelaxSettings(potential=f"{faulty}:Faulty", seconds_per_crystal=1.0)
    crystals = [
        ("a", fcc("Cu", 3.7)),
        ("hangs", fcc("Pt", 3.9)),
        ("b", fcc("Au", 4.1)),
        ("kills", fcc("Pd", 3.9)),
    ]
    found = relax_set(crystals, settings=settings, workers=1, device="cpu")
    assert found["hangs"].reason == "timeout"
    assert found["kills"].reason == "error: the process ended with code 3 (memory?)"
    assert found["a"].converged
    assert found["b"].converged
    assert found["hangs"].structure is None


def test_a_killed_run_goes_on_where_it_was(tmp_path, faulty):
    """kill -9 of the whole process: what was written stays, and is not made again."""
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from pymatgen.core import Structure\n"
        "from crystallm_kit.structures.relaxed_set import relax_set, RelaxSettings\n"
        "from crystallm_kit.structures.relaxation_workers import RelaxSettings\n"
        "f = lambda a: Structure([[0,a/2,a/2],[a/2,0,a/2],[a/2,a/2,0]], ['Cu'], [[0,0,0]])\n"
        f"relax_set([(str(i), f(3.5 + i / 50)) for i in range(12)], {str(tmp_path / 'r')!r}, "
        f"settings=RelaxSettings(potential='{faulty}:Slow'), workers=1, device='cpu', together=1)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)})
    rows = tmp_path / "r" / "relaxed.jsonl"
    deadline = time.monotonic() + 60
    while (not rows.exists() or rows.read_text().count("\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = rows.read_text().splitlines()
    assert 3 <= len(before) < 12
    settings = RelaxSettings(potential=f"{faulty}:Slow")
    crystals = [(str(i), fcc("Cu", 3.5 + i / 50)) for i in range(12)]
    found = relax_set(crystals, tmp_path / "r", settings=settings, workers=1, device="cpu", together=4)
    after = rows.read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == 12
    assert all(r.converged for r in found.values())


def test_what_cannot_be_begun_is_said(tmp_path):
    copper = fcc("Cu", 3.7)
    with pytest.raises(UserError, match="2 crystals have 1 different ids"):
        relax_set([("a", copper), ("a", copper)], settings=EMT)
    with pytest.raises(UnknownName, match="no potential 'chgnett'"):
        relax_set([("a", copper)], settings=RelaxSettings(potential="chgnett"), workers=1, device="cpu")
    with pytest.raises(MissingExtra, match="needs no_such_library"):
        relax_set(
            [("a", copper)], settings=RelaxSettings(potential="no_such_library:x"), workers=1, device="cpu"
        )
    assert relax_set([], tmp_path / "none") == {}
    relax_set([], tmp_path / "r", settings=EMT)
    with pytest.raises(UserError, match=r"relaxed with max_steps 300, now 5; name another folder"):
        relax_set([("a", copper)], tmp_path / "r", settings=RelaxSettings(EMT.potential, max_steps=5))
