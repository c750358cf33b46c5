"""Candidates of targets, drawn in blocks by a toy model: the same after a kill, and read back as drawn."""

import gzip
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.benchmarks.candidates import Asked, asked_of, candidates_of, draw_candidates
from crystallm_kit.errors import ImpossibleRequest, ReadError, UserError
from crystallm_kit.generation import load_model
from crystallm_kit.records import Conditions, Crystal

ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
RUTILE = Structure.from_spacegroup(  # TiO2, mp-2657
    "P4_2/mnm", Lattice.tetragonal(4.65, 2.97), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
)
TARGETS = [
    Crystal("mp-22862", ROCK_SALT.get_primitive_structure()),
    Crystal("mp-2657", RUTILE),
    Crystal("mp-1265", Structure(Lattice.cubic(4.2), ["Mg", "O"], [[0, 0, 0], [0.5] * 3])),
]


@pytest.fixture(scope="module")
def model(toy_model):
    return load_model(toy_model, batch_size=8)


def drawn(model, folder, **settings):
    asked = [asked_of(target, ("composition",)) for target in TARGETS]
    draw_candidates(asked, model, folder, n_drawn=3, seed=5, targets_per_block=1, redraws=1, **settings)
    return {
        target: [(s.id, s.text, s.log_probability) for s in samples]
        for target, samples in candidates_of(folder, model.representation)
    }


def test_a_target_tells_the_atoms_of_its_cell_and_the_space_group_if_wanted():
    alone = asked_of(TARGETS[1], ("composition",)).conditions
    assert dict(alone.formula) == {"Ti": 2, "O": 4}
    assert (alone.n_sites, alone.spacegroup_number) == (6, None)
    assert asked_of(TARGETS[1], ("composition", "spacegroup")).conditions.spacegroup_number == 136
    with pytest.raises(ImpossibleRequest, match="water: an ordered crystal expected"):
        asked_of(Crystal("water", Molecule("OH2", [[0, 0, 0], [1, 0, 0], [0, 1, 0]])), ("composition",))


def test_with_a_space_group_the_atoms_are_those_of_the_cell_that_has_it():
    """Two cells of CsCl type, told apart by 0.02 angstrom, have Pm-3m at 0.1 angstrom; their sum has not."""
    doubled = Structure(
        Lattice.tetragonal(3.0, 6.0), ["Mg", "Mg", "Ni", "Ni"],
        [[0, 0, 0], [0, 0, 0.502], [0.5, 0.5, 0.25], [0.5, 0.5, 0.75]],
    )  # fmt: skip
    asked = asked_of(Crystal("doubled", doubled), ("composition", "spacegroup")).conditions
    assert dict(asked.formula) == {"Mg": 1, "Ni": 1}
    assert (asked.n_sites, asked.spacegroup_number) == (2, 221)
    assert asked_of(Crystal("doubled", doubled), ("composition",)).conditions.n_sites == 4


def test_a_target_that_cannot_be_asked_for_has_no_candidates_and_the_others_have_theirs(model, tmp_path):
    asked = [asked_of(target, ("composition",)) for target in TARGETS[:2]]
    asked.insert(
        1, Asked("impossible", Conditions(formula={"Mg": 2, "Ni": 2}, n_sites=4, spacegroup_number=221))
    )
    draw_candidates(asked, model, tmp_path, n_drawn=2, seed=5)
    found = dict(candidates_of(tmp_path, model.representation))
    assert {target: len(samples) for target, samples in found.items()} == {
        "impossible": 0, TARGETS[0].id: 2, TARGETS[1].id: 2,
    }  # fmt: skip
    with gzip.open(tmp_path / "block-00000.jsonl.gz", "rt") as handle:
        assert "no assignment of Wyckoff positions adds up" in json.loads(next(handle))["refused"]


def test_a_run_that_lost_blocks_draws_the_same_again_and_no_others(model, tmp_path):
    folder = tmp_path / "samples"
    first = drawn(model, folder)
    assert list(first) == [target.id for target in TARGETS]
    assert all(len(samples) == 3 for samples in first.values())
    kept, lost, _ = sorted(folder.glob("*.gz"))
    times, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    (folder / "block-00001.jsonl.writing").write_bytes(content[:50])  # as a kill would leave it
    told = []
    assert drawn(model, folder, say=lambda done, of: told.append((done, of))) == first
    assert kept.stat().st_mtime_ns == times
    assert told == [(3, 3)]


def test_a_block_that_another_process_is_at_is_left_to_it_and_drawn_if_that_dies(model, tmp_path):
    alone = drawn(model, tmp_path / "alone")
    folder = tmp_path / "samples"
    folder.mkdir()
    told = []
    with ThreadPoolExecutor(1) as pool, FileLock(folder / "block-00001.jsonl.lock") as held:
        drawing = pool.submit(drawn, model, folder, say=lambda done, of: told.append((done, of)))
        for _ in range(600):
            if len(told) == 2:
                break
            time.sleep(0.05)
        assert told == [(1, 3), (2, 3)]
        assert [path.name for path in sorted(folder.glob("*.gz"))] == [
            "block-00000.jsonl.gz", "block-00002.jsonl.gz",
        ]  # fmt: skip
        held.release()
        assert drawing.result(60) == alone
    assert told[-1] == (3, 3)
    assert not list(folder.glob("*.lock"))


def test_several_processes_draw_one_run_once(model, toy_model, tmp_path):
    alone = drawn(model, tmp_path / "alone")
    folder = tmp_path / "samples"
    here = Path(__file__)
    code = (
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t\n"
        f"from pathlib import Path\n"
        f"t.drawn(t.load_model({str(toy_model)!r}, batch_size=8), Path({str(folder)!r}),"
        " say=lambda done, of: print(done, of))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        told = [process.communicate(timeout=240)[0].split("\n") for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    assert len(list(filter(None, told[0] + told[1]))) == len(TARGETS), told
    texts = [
        {target: [text for _, text, _ in samples] for target, samples in found.items()}
        for found in (drawn(model, folder), alone)
    ]
    assert texts[0] == texts[1]  # log-probabilities are rounded by the number of threads


def test_what_is_read_back_is_what_was_drawn(model, tmp_path):
    drawn(model, tmp_path / "samples")
    for target, samples in candidates_of(tmp_path / "samples", model.representation):
        wanted = next(t for t in TARGETS if t.id == target).structure.composition
        for sample in samples:
            if sample.structure is not None:
                assert sample.structure.composition.reduced_formula == wanted.reduced_formula
            assert sample.conditions.n_sites == sum(wanted.get_el_amt_dict().values())


def test_a_damaged_block_is_named_with_what_to_do(model, tmp_path):
    folder = tmp_path / "samples"
    drawn(model, folder)
    path = sorted(folder.glob("*.gz"))[1]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ReadError, match=r"block-00001\.jsonl\.gz: damaged .*; remove it"):
        list(candidates_of(folder, model.representation))
    with gzip.open(path, "wt") as handle:
        handle.write('{"id": 1}\n')
    with pytest.raises(ReadError, match="damaged"):
        list(candidates_of(folder, model.representation))


def test_no_candidates_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="0 candidates a target: 1 or more expected"):
        draw_candidates([], model, tmp_path, n_drawn=0, seed=0)
