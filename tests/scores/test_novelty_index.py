"""The index on disk: answers, growth, crashes, readers, damage."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import ReadError, UserError
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, fit, reduced
from crystallm_kit.scores.novelty import index as novelty_index
from crystallm_kit.scores.novelty.copies import first_copies
from crystallm_kit.scores.novelty.index import HEADER, NoveltyIndex

DEFAULT = TOLERANCES["default"]
FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def rock_salt(cation="Na", anion="Cl", a=5.64):
    return Structure(Lattice.cubic(a), [cation] * 4 + [anion] * 4, np.vstack([FCC, 0.5 - FCC]))


def form_of(*arguments, **settings):
    return reduced(rock_salt(*arguments, **settings))


@pytest.fixture(scope="module")
def halides():
    """Return forms of 20 rock salts, and their names."""
    pairs = [(c, a) for c in ("Li", "Na", "K", "Rb", "Ag") for a in ("F", "Cl", "Br", "I")]
    return [c + a for c, a in pairs], [form_of(c, a) for c, a in pairs]


def test_a_known_crystal_is_found_by_name_and_an_unknown_one_is_not(tmp_path, halides):
    index = NoveltyIndex.create(tmp_path / "known")
    index.add(*halides)
    assert len(index) == 20
    opened = NoveltyIndex.open(tmp_path / "known")
    assert len(opened) == 20
    caesium_chloride = Structure(Lattice.cubic(4.1), ["K", "Br"], [[0, 0, 0], [0.5] * 3])
    for one in (index, opened):
        assert one.find(form_of("K", "Br", a=6.7), DEFAULT) == "KBr"
        assert one.find(form_of("Cs", "Br"), DEFAULT) is None
        assert one.find(reduced(caesium_chloride), DEFAULT) is None
        assert one.has_formula("KBr")
        assert not one.has_formula("CsBr")
        assert one.has_system([35, 19, 19])
        assert not one.has_system([35, 55])
        one.verify()


def test_the_first_in_the_order_of_adding_is_named_and_all_are_listed(tmp_path):
    index = NoveltyIndex.create(tmp_path / "known")
    for name, a in (("one", 5.6), ("two", 5.7), ("three", 5.5)):
        index.add([name], [form_of(a=a)])
        index.add([f"other {name}"], [form_of("K")])
    assert index.find(form_of(), DEFAULT) == "one"
    assert index.find_all(form_of(), DEFAULT) == ["one", "two", "three"]


def test_within_equal_cell_formulas_only_cells_of_that_size_count(tmp_path):
    index = NoveltyIndex.create(tmp_path / "known")
    index.add(["primitive", "conventional"], [form_of(), form_of()], cell_sites=[2, 8])
    assert index.find(form_of(), DEFAULT, cell_sites=8) == "conventional"
    assert index.find(form_of(), DEFAULT, cell_sites=16) is None


def test_forms_come_back_bit_for_bit(tmp_path, halides):
    index = NoveltyIndex.create(tmp_path / "known")
    names, forms = halides
    index.add(names[:7], forms[:7])
    index.add(names[7:], forms[7:])
    found = {}
    for shard in NoveltyIndex.open(tmp_path / "known")._shards:
        for row in range(shard.n):
            found[shard.id(row)] = shard.form(row, "")
    for name, form in zip(names, forms, strict=True):
        assert np.array_equal(found[name].lattice, form.lattice)
        assert np.array_equal(found[name].fractional, form.fractional)
        assert np.array_equal(found[name].numbers, form.numbers)


def test_answers_are_those_of_comparing_with_every_entry(tmp_path):
    """30 distorted cells of one formula, in shards of different sizes; both orders of the arguments."""
    rng = np.random.default_rng(0)
    forms = []
    for _ in range(30):
        strain = np.eye(3) + 0.15 * rng.uniform(-1, 1, (3, 3))
        cell = rock_salt().get_primitive_structure()
        moved = cell.frac_coords + 0.2 * rng.uniform(-1, 1, (2, 3))
        forms.append(reduced(Structure(Lattice(cell.lattice.matrix @ strain), cell.species, moved)))
    index = NoveltyIndex.create(tmp_path / "known")
    index.add([str(i) for i in range(13)], forms[:13])
    index.add([str(i) for i in range(13, 20)], forms[13:20])
    known = range(20)
    answers = set()
    for name in sorted(TOLERANCES):
        tolerances = TOLERANCES[name]
        for form in forms[17:]:
            expected = [str(j) for j in known if fit(form, forms[j], tolerances)]
            assert index.find_all(form, tolerances) == expected
            assert index.find(form, tolerances) == (expected[0] if expected else None)
            backwards = [str(j) for j in known if fit(forms[j], form, tolerances)]
            assert index.find_all(form, tolerances, form_is_second=True) == backwards
            answers.add(bool(expected))
    assert answers == {True, False}


def test_many_small_additions_stay_few_files_and_keep_their_order(tmp_path, halides):
    names, forms = halides
    folder = tmp_path / "known"
    index = NoveltyIndex.create(folder)
    for turn in range(3):
        for name, form in zip(names, forms, strict=True):
            index.add([f"{name} {turn}"], [form])
    assert len(index) == 60
    assert len(list(folder.glob("*.shard"))) <= 6
    for form, name in zip(forms, names, strict=True):
        assert index.find(form, DEFAULT) == f"{name} 0"


def test_shards_are_not_merged_beyond_their_limit(tmp_path, halides, monkeypatch):
    monkeypatch.setattr(novelty_index, "MERGED_UP_TO", 30)
    index = NoveltyIndex.create(tmp_path / "known")
    for _ in range(3):
        index.add(*halides)
    assert [shard.n for shard in index._shards] == [20, 20, 20]


def test_a_reader_sees_what_was_there_until_it_refreshes(tmp_path, halides):
    names, forms = halides
    writer = NoveltyIndex.create(tmp_path / "known")
    writer.add(names[:1], forms[:1])
    reader = NoveltyIndex.open(tmp_path / "known")
    writer.add(names[1:2], forms[1:2])  # merges the shard that the reader has mapped, and removes it
    assert len(reader) == 1
    assert reader.find(forms[0], DEFAULT) == names[0]
    assert reader.find(forms[1], DEFAULT) is None
    reader.refresh()
    assert reader.find(forms[1], DEFAULT) == names[1]


def test_what_is_kept_beside_an_addition_comes_back(tmp_path, halides):
    index = NoveltyIndex.create(tmp_path / "known")
    assert index.meta == {}
    index.add(*halides, meta={"read": 20})
    assert NoveltyIndex.open(tmp_path / "known").meta == {"read": 20}


def test_a_merged_shard_that_a_killed_writer_left_is_not_read_twice(tmp_path, halides):
    names, forms = halides
    folder = tmp_path / "known"
    index = NoveltyIndex.create(folder)
    index.add(names[:3], forms[:3])
    left = folder / "000000000000-000000000003.shard"
    content = left.read_bytes()
    index.add(names[3:6], forms[3:6])
    left.write_bytes(content)
    opened = NoveltyIndex.open(folder)
    assert len(opened) == 6
    assert opened.find_all(forms[0], DEFAULT) == names[:1]


WRITER = """
import sys
import numpy as np
from crystallm_kit.scores.novelty.index import NoveltyIndex
from crystallm_kit.scores.matcher.structure_matcher import Reduced
index = NoveltyIndex.open(sys.argv[1])
rng = np.random.default_rng(len(index))
forms = [Reduced("Fe", np.array([26] * 8, np.int16), np.eye(3) * 5, rng.random((8, 3))) for _ in range(200)]
while True:
    index.add([f"{len(index)}+{i}" for i in range(200)], forms)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_additions(tmp_path):
    folder = tmp_path / "known"
    NoveltyIndex.create(folder)
    last = 0
    for wait in (0.0, 0.013, 0.031):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)])
        try:
            deadline = time.monotonic() + 60
            while len(NoveltyIndex.open(folder)) < last + 600 and time.monotonic() < deadline:
                time.sleep(0.005)  # a reader beside the writer, which merges shards all the time
            time.sleep(wait)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        index = NoveltyIndex.open(folder)
        index.verify()
        assert len(index) >= last + 600
        assert len(index) % 200 == 0
        last = len(index)
    (folder / ".left.shard.partial").write_bytes(b"half")
    index.add(["last"], [form_of()])
    assert index.find(form_of(), DEFAULT) == "last"
    assert not list(folder.glob(".*.partial"))


def test_no_index_a_foreign_folder_and_another_version_are_told(tmp_path):
    with pytest.raises(ReadError, match=r"nowhere: no novelty index .* make one with NoveltyIndex.create"):
        NoveltyIndex.open(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ReadError, match="no novelty index"):
        NoveltyIndex.open(tmp_path)
    with pytest.raises(UserError, match="not empty"):
        NoveltyIndex.create(tmp_path)
    index = tmp_path / "known"
    NoveltyIndex.create(index)
    (index / HEADER).write_text(json.dumps({"format": "crystallm-kit novelty index", "version": 2}))
    with pytest.raises(ReadError, match="version 2, 1 expected"):
        NoveltyIndex.open(index)
    (index / HEADER).write_text(json.dumps({"format": "a diary", "version": 1}))
    with pytest.raises(ReadError, match="format 'a diary'"):
        NoveltyIndex.open(index)
    (index / HEADER).write_text("{")
    with pytest.raises(ReadError, match="damaged"):
        NoveltyIndex.open(index)


def test_a_damaged_or_missing_shard_is_named(tmp_path, halides, monkeypatch):
    names, forms = halides
    folder = tmp_path / "known"
    index = NoveltyIndex.create(folder)
    monkeypatch.setattr(novelty_index, "MERGED_UP_TO", 0)
    index.add(names[:10], forms[:10])
    index.add(names[10:], forms[10:])
    first, second = sorted(folder.glob("*.shard"))
    whole = first.read_bytes()

    first.write_bytes(whole[:-100])
    with pytest.raises(ReadError, match=r"000000000000-000000000010.shard: damaged: \d+ bytes, \d+ expected"):
        NoveltyIndex.open(folder)
    first.write_bytes(whole[:40] + b"#" + whole[41:])
    with pytest.raises(ReadError, match="header's checksum"):
        NoveltyIndex.open(folder)
    first.write_bytes(b"PK" + whole)
    with pytest.raises(ReadError, match="no shard of a novelty index"):
        NoveltyIndex.open(folder)
    first.write_bytes(whole[:-70] + bytes([whole[-70] ^ 1]) + whole[-69:])
    with pytest.raises(ReadError, match="section 'systems' has another checksum"):
        NoveltyIndex.open(folder).verify()
    first.unlink()
    with pytest.raises(ReadError, match=r"0 entries, 20 expected .*restore the missing file"):
        NoveltyIndex.open(folder)
    first.write_bytes(whole)
    assert len(NoveltyIndex.open(folder)) == 20
    assert second.exists()


def test_lists_of_different_lengths_are_refused(tmp_path, halides):
    names, forms = halides
    index = NoveltyIndex.create(tmp_path / "known")
    with pytest.raises(UserError, match="19 ids, 20 forms, 20 cell sizes"):
        index.add(names[1:], forms)
    index.add([], [])
    assert len(index) == 0


def test_looking_up_earlier_ones_gives_the_copies_within_a_set(tmp_path, halides):
    """An index that grows by what is new is the streaming form of first_copies."""
    names, forms = halides
    stream = [*forms, form_of("K", "Br", a=6.7), form_of("Cu", "Br"), form_of("Cu", "Br", a=5.7)]
    index = NoveltyIndex.create(tmp_path / "seen")
    found = []
    for i, form in enumerate(stream):
        first = index.find(form, DEFAULT)
        found.append(None if first is None else int(first))
        if first is None:
            index.add([str(i)], [form])
    assert found == first_copies(stream, DEFAULT)
    assert found[-3:] == [names.index("KBr"), None, 21]


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX")
def test_two_writers_take_turns(tmp_path):
    folder = tmp_path / "known"
    NoveltyIndex.create(folder)
    program = WRITER.replace("while True:", "for _ in range(10):")
    writers = [subprocess.Popen([sys.executable, "-c", program, str(folder)]) for _ in range(2)]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0]
    index = NoveltyIndex.open(folder)
    index.verify()
    assert len(index) == 4000
