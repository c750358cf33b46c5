"""Template libraries on disk: learned once for the same bytes, read back exactly, made anew when damaged."""

import os

import pytest

from crystallm_kit.errors import ReadError, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.structures import template_files
from crystallm_kit.structures.files import write
from crystallm_kit.structures.template_files import load_templates
from crystallm_kit.text.wyckoff import WyckoffRepresentation

# Cell lengths in angstrom: Wyckoff, Crystal Structures (1963), rounded.
TEXTS = (
    "Na1 Cl1 225\nNa a\nCl b\n5.64 end", "K1 Br1 225\nK a\nBr b\n6.60 end",
    "Cs1 Cl1 221\nCs a\nCl b\n4.12 end", "Sr1 Ti1 O3 221\nSr a\nTi b\nO c\n3.91 end",
    "Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end",
)  # fmt: skip
CRYSTALS = [Crystal(str(i), WyckoffRepresentation().decode(text).structure) for i, text in enumerate(TEXTS)]
RBCL, SNO2, BAZRO3 = {37: 1, 17: 1}, {50: 2, 8: 4}, {56: 1, 40: 1, 8: 3}


@pytest.fixture
def known_file(tmp_path):
    path = tmp_path / "known.extxyz"
    write(iter(CRYSTALS), path)
    return path


def test_a_library_is_learned_once_for_the_same_bytes(known_file, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load_templates(known_file, cache_folder=cache)
    (kept,) = cache.glob("*.npz")

    def forbidden(*_, **__):
        raise AssertionError("learned again")

    with monkeypatch.context() as patched:
        patched.setattr(template_files, "learn_templates", forbidden)
        again = load_templates([known_file], cache_folder=cache)
    for asked in (RBCL, SNO2, BAZRO3):
        assert again.guesses(asked) == first.guesses(asked)
    write(iter(CRYSTALS[:-1]), known_file)
    assert load_templates(known_file, cache_folder=cache).guesses(SNO2) == []
    assert len(list(cache.glob("*.npz"))) == 2
    assert kept.exists()


def test_a_damaged_file_in_the_cache_is_made_anew(known_file, tmp_path):
    cache = tmp_path / "cache"
    first = load_templates(known_file, cache_folder=cache)
    (kept,) = cache.glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:1000])
    again = load_templates(known_file, cache_folder=cache)
    assert again.guesses(RBCL) == first.guesses(RBCL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_folder_that_cannot_be_written_costs_no_library(known_file, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert load_templates(known_file, cache_folder=closed / "cache").guesses(RBCL)


def test_no_library_and_a_missing_one_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="--library"):
        load_templates([], cache_folder=tmp_path)
    with pytest.raises(ReadError, match=r"absent\.parquet"):
        load_templates(tmp_path / "absent.parquet", cache_folder=tmp_path)
