"""scoring/sample_sets.py: every requested sample keeps its place, read or not."""

import gzip
import json

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import ReadError, UserError
from crystallm_kit.generation import write_samples
from crystallm_kit.records import Completion, Conditions, Crystal
from crystallm_kit.scoring.sample_sets import content_hash, named_sets, samples_of
from crystallm_kit.structures.files import write
from crystallm_kit.text.representation import representation


@pytest.fixture
def rocksalt():
    """NaCl, mp-22862 (https://next-gen.materialsproject.org/materials/mp-22862)."""
    return Structure(Lattice(2.845 * (np.ones((3, 3)) - np.eye(3))), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])


def samples(path, **options):
    return list(samples_of(named_sets([path], **options)[0]))


def test_names_come_from_arguments_and_files(tmp_path, rocksalt):
    write([Crystal("a", rocksalt)], tmp_path / "salt.extxyz")
    sets = named_sets([tmp_path / "salt.extxyz", f"other={tmp_path / 'salt.extxyz'}"], requested=["other=7"])
    assert [(one.name, one.n_requested) for one in sets] == [("salt", None), ("other", 7)]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "no samples"),
        (["{0}", "salt={0}"], {}, "two sets are called 'salt'"),
        (["{0}"], {"requested": ["many"]}, "--requested many: a number of samples expected"),
        (["{0}"], {"requested": ["x=3"]}, "no set 'x'; sets: salt"),
        (["{0}"], {"limit": 0}, "--limit 0: 1 or more expected"),
        (["{0}.gone"], {}, "no such file"),
    ],
)
def test_wrong_arguments_are_told(tmp_path, rocksalt, arguments, options, message):
    write([Crystal("a", rocksalt)], tmp_path / "salt.extxyz")
    given = [one.format(tmp_path / "salt.extxyz") for one in arguments]
    with pytest.raises((UserError, ReadError), match=message):
        named_sets(given, **options)


def test_what_cannot_be_read_keeps_its_place_and_its_reason(tmp_path, rocksalt):
    path = tmp_path / "three.extxyz"
    write([Crystal("a", rocksalt), Crystal("b", rocksalt)], path)
    good = path.read_text()
    path.write_text(good.replace("Cl", "Xx", 1))
    found = samples(path)
    assert [one.reason for one in found] == ["unreadable", None]
    assert "'Xx'" in found[0].detail
    assert next(samples_of(named_sets([path])[0], 1)).id == "b"


def test_our_own_samples_bring_their_verdicts_and_what_was_asked(tmp_path, rocksalt):
    from crystallm_kit.generation import Judging, judge_by

    form = representation("wyckoff")
    judging = Judging("a model", form, False)
    asked = Conditions(formula={"Na": 1, "Cl": 1})
    texts = [form.encode(Crystal("", rocksalt)), "Na1 Cl1 225\nNa a\n"]
    judged = [
        judge_by(judging, Completion("", text, (), stop, -2.5, 0, i), asked, index=i, seed=0)
        for i, (text, stop) in enumerate(zip(texts, ("stop", "length"), strict=True))
    ]
    write_samples(judged, tmp_path / "samples.jsonl")
    good, cut = samples(tmp_path)  # the folder of a generation
    assert good.structure.matches(rocksalt)
    assert (good.stated_spacegroup, good.properties["log_probability"]) == (225, -2.5)
    assert json.loads(good.conditions) == {"formula": {"Na": 1, "Cl": 1}}
    assert (cut.structure, cut.reason) == (None, "truncated")


def test_lines_of_other_text_formats_and_broken_lines(tmp_path, rocksalt):
    lines = [
        json.dumps({"id": "c", "text": representation("compact").encode(Crystal("", rocksalt))}),
        "{broken",
        json.dumps([1]),
        json.dumps({"id": "d", "text": "no crystal at all"}),
        json.dumps({"id": "e", "cif": rocksalt.to(fmt="cif")}),
    ]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = samples(path)
    assert [one.structure is not None for one in found] == [True, False, False, False, True]
    assert [one.reason for one in found][1:3] == ["unreadable"] * 2
    assert found[3].reason.startswith("parse:")


def test_molecules_and_disorder_are_reasons(tmp_path):
    path = tmp_path / "odd"
    path.mkdir()
    (path / "a.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.74\n")
    mixed = Structure(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    mixed.to(filename=str(path / "b.cif"))
    assert [(one.reason, one.structure) for one in samples(path)] == [
        ("molecule", None),
        ("disordered", None),
    ]


def test_the_hash_is_of_the_content(tmp_path, rocksalt):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.cif").write_text(rocksalt.to(fmt="cif"))
    assert content_hash([tmp_path / "one"]) == content_hash([tmp_path / "two"])
    (tmp_path / "two" / "a.cif").write_text(rocksalt.to(fmt="cif").replace("Cl", "Br"))
    assert content_hash([tmp_path / "one"]) != content_hash([tmp_path / "two"])
