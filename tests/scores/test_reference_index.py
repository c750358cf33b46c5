"""Indexes of files: made once, found by content, grown, resumed, honest about what could not be read."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import ReadError, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, reduced
from crystallm_kit.scores.novelty import reference_index as module
from crystallm_kit.scores.novelty.index import NoveltyIndex
from crystallm_kit.scores.novelty.reference_index import content_hash, reference_index
from crystallm_kit.structures.files import read
from crystallm_kit.structures.writing import write

DEFAULT = TOLERANCES["default"]


def caesium_chloride(cation, a=4.1):
    return Structure(Lattice.cubic(a), [cation, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def written(path, *cations):
    write((Crystal(cation, caesium_chloride(cation)) for cation in cations), path)
    return path


@pytest.fixture
def reads(monkeypatch):
    """Return the list of files that are read."""
    seen = []

    def reading(path, **settings):
        seen.append(path.name)
        return original(path, **settings)

    original = module.read
    monkeypatch.setattr(module, "read", reading)
    return seen


def test_a_second_run_reads_nothing_whatever_the_file_is_called(tmp_path, reads):
    path = written(tmp_path / "known.parquet", "Cs", "Tl")
    first = reference_index([path], tmp_path / "indexes")
    assert (len(first.index), first.n_entries, first.failures, first.was_there) == (2, 2, [], False)
    again = reference_index(path, tmp_path / "indexes")
    renamed = reference_index(path.rename(tmp_path / "other.parquet"), tmp_path / "indexes")
    assert again.was_there
    assert renamed.was_there
    assert reads == ["known.parquet"]
    assert renamed.index.find(reduced(caesium_chloride("Tl", 3.9)), DEFAULT) == "Tl"


def test_changed_data_give_another_index(tmp_path, reads):
    path = written(tmp_path / "known.parquet", "Cs")
    reference_index(path, tmp_path / "indexes")
    written(path, "Tl")
    reference = reference_index(path, tmp_path / "indexes")
    assert reads == ["known.parquet"] * 2
    assert reference.index.find(reduced(caesium_chloride("Cs")), DEFAULT) is None


def test_a_longer_list_grows_from_the_shorter_one_which_stays(tmp_path, reads):
    one, other = written(tmp_path / "one.parquet", "Cs"), written(tmp_path / "two.parquet", "Tl", "Cs")
    reference_index([one], tmp_path / "indexes")
    both = reference_index([one, other], tmp_path / "indexes")
    assert reads == ["one.parquet", "two.parquet"]
    assert both.index.find_all(reduced(caesium_chloride("Cs")), DEFAULT) == ["Cs", "Cs"]
    alone = reference_index([one], tmp_path / "indexes")
    assert alone.was_there
    assert len(alone.index) == 1


def test_what_cannot_be_read_or_reduced_is_reported_and_not_fatal(tmp_path, caplog):
    folder = tmp_path / "files"
    folder.mkdir()
    written(folder / "good.extxyz", "Cs")
    (folder / "bad.cif").write_text("data_x\n_cell_length_a nonsense\n")
    Molecule(["O", "H"], [[0, 0, 0], [0, 0, 1]]).to(str(folder / "oh.xyz"))
    tiny = Structure(Lattice.cubic(0.05), ["Na"], [[0, 0, 0]])
    (folder / "tiny.json").write_text(json.dumps(tiny.as_dict()))
    for _ in range(2):
        reference = reference_index(folder, tmp_path / "indexes")
        assert len(reference.index) == 1
        assert reference.n_entries == 4
        reasons = sorted(failure.reason for failure in reference.failures)
        assert len(reasons) == 3
        assert "a molecule, no crystal" in reasons
        assert "its cell cannot be reduced" in reasons
    assert reference.was_there
    assert "3 of 4 entries left out" in caplog.text


def test_nothing_readable_no_file_and_no_list_are_errors(tmp_path):
    (tmp_path / "bad.cif").write_text("data_x\n_cell_length_a nonsense\n")
    (tmp_path / "worse.cif").write_text("data_x\n_cell_length_a nonsense\n")
    with pytest.raises(ReadError, match=r"none of 2 entries could be read; the first: .*bad.cif"):
        reference_index([tmp_path], tmp_path.with_name("indexes"))
    with pytest.raises(ReadError, match=r"nowhere.parquet: No such file"):
        reference_index(tmp_path / "nowhere.parquet", tmp_path)
    with pytest.raises(UserError, match="no files"):
        reference_index([], tmp_path)


def test_a_folder_s_hash_is_that_of_its_files_and_their_names(tmp_path):
    written(tmp_path / "a.parquet", "Cs")
    before = content_hash(tmp_path)
    (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
    assert content_hash(tmp_path) != before


PROGRAM = """
import sys
from crystallm_kit.scores.novelty import reference_index as module
module._PER_ADDITION = 64
module.reference_index(sys.argv[1], sys.argv[2], processes=1, say=lambda text: print(text, flush=True))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    cations = ["Li", "Na", "K", "Rb", "Cs", "Tl", "Ag", "Cu"] * 40
    path = written(tmp_path / "known.parquet", *cations)
    indexes = tmp_path / "indexes"
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, path, indexes], stdout=subprocess.PIPE, text=True)
    try:
        assert "64 crystals" in run.stdout.readline()
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
    (target,) = [one for one in indexes.iterdir() if one.is_dir()]
    begun = len(NoveltyIndex.open(target))
    assert begun % 64 == 0
    assert 64 <= begun <= 320
    started = time.monotonic()
    reference = reference_index(path, indexes, processes=1)
    assert time.monotonic() - started < 120
    assert (len(reference.index), reference.n_entries) == (320, 320)
    assert len(reference.index.find_all(reduced(caesium_chloride("Tl")), DEFAULT)) == 40


@pytest.mark.slow
@pytest.mark.real_data
def test_novelty_of_published_samples_is_that_of_pymatgen_s_loop(tmp_path):
    """3,221 samples of Crystal-text-LLM against 10,918 known crystals: the first match is the same."""
    for name in ("CRYSTALLM_KIT_DATA", "CRYSTALLM_KIT_SAMPLES"):
        if name not in os.environ:
            pytest.skip(f"{name} is not set")
    data = Path(os.environ["CRYSTALLM_KIT_DATA"])
    files = [data / "mp_val.parquet", data / "wbm_train.parquet"]
    reference = reference_index(files, tmp_path, processes=1)
    assert (len(reference.index), reference.failures) == (10_918, [])
    by_formula = defaultdict(list)
    for crystal in read(files):
        by_formula[crystal.structure.composition.reduced_formula].append(crystal)
    matcher, n_known, n_pairs = StructureMatcher(), 0, 0
    samples = Path(os.environ["CRYSTALLM_KIT_SAMPLES"])
    for sample in read(samples / "metastable_structures_llama-2-7B_1.0_0.7.csv.gz"):
        structure = sample.structure
        others = by_formula[structure.composition.reduced_formula]
        n_pairs += len(others)
        expected = next((one.id for one in others if matcher.fit(structure, one.structure)), None)
        assert reference.index.find(reduced(structure), DEFAULT) == expected
        n_known += expected is not None
    assert n_known > 30
    assert n_pairs > 2 * n_known
