"""Replacing elements: likeness comes from the data, the volume fits, and nothing impossible is made."""

import numpy as np
import pytest

from crystallm_kit.errors import EmptyInput
from crystallm_kit.structures.substitution import (
    SubstitutionTable,
    learn_substitutions,
    substitute,
    volume_angstrom3,
)
from crystallm_kit.structures.symmetry import Site, SymmetricCrystal, expand
from crystallm_kit.text.wyckoff import symmetric_to_text, text_to_symmetric

NA, CL, K, BR, RB, CA, TI, OXYGEN, SR, BA = 11, 17, 19, 35, 37, 20, 22, 8, 38, 56
# Cell lengths in angstrom: Wyckoff, Crystal Structures (1963), rounded.
ROCK_SALTS = {"Na1 Cl1": 5.64, "K1 Cl1": 6.29, "Na1 Br1": 5.97, "K1 Br1": 6.60, "Rb1 Br1": 6.85}
PEROVSKITES = {"Ca1 Ti1 O3": 3.84, "Sr1 Ti1 O3": 3.91, "Ba1 Ti1 O3": 4.01}


def rock_salt(formula, a):
    cation, anion = (word[:-1] for word in formula.split())
    return text_to_symmetric(f"{formula} 225\n{cation} a\n{anion} b\n{a:.2f} end")


def perovskite(formula, a):
    cation = formula.split()[0][:-1]
    return text_to_symmetric(f"{formula} 221\n{cation} a\nTi b\nO c\n{a:.2f} end")


SALTS = [rock_salt(*item) for item in ROCK_SALTS.items()]
CRYSTALS = [*SALTS, *(perovskite(*item) for item in PEROVSKITES.items())]


@pytest.fixture(scope="module")
def table():
    return learn_substitutions(CRYSTALS)


def symbols_of(crystal):
    return frozenset(crystal.counts)


def test_elements_are_alike_where_one_stands_for_the_other():
    """By hand: Na and K stand beside Cl; Na, K and Rb beside Br, half for each other; columns add 0.1."""
    counts = learn_substitutions(SALTS).counts
    assert counts[NA, K] == pytest.approx(1 + 0.5 + 0.1)
    assert counts[K, RB] == pytest.approx(0.5 + 0.1)
    assert counts[CL, BR] == pytest.approx(1 + 1 + 0.1)  # beside Na, and beside K
    assert counts[NA, CL] == counts[NA, BR] == 0
    assert np.array_equal(counts, counts.T)
    assert not counts.diagonal().any()


def test_another_space_group_is_another_place(table):
    assert table.counts[CA, SR] == pytest.approx(0.5 + 0.1)  # Ca, Sr and Ba share one place, and a column
    assert table.counts[NA, CA] == 0  # rock salt and perovskite share no place
    assert table.counts[TI, CA] == 0  # both in one crystal, never one for the other


def test_volumes_of_atoms_add_up_to_those_of_the_cells():
    """Five equations of rank 4 (the salts are nearly additive): fitted cells are within 1 % of the real."""
    volumes = learn_substitutions(SALTS).volumes_angstrom3
    for crystal in SALTS:
        fitted = sum(n * volumes[z] for z, n in crystal.counts.items())
        assert fitted == pytest.approx(volume_angstrom3(crystal), rel=0.01)


@pytest.mark.parametrize(
    "crystal",
    [
        SALTS[0],
        text_to_symmetric("Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end"),
        SymmetricCrystal(2, (5.0, 6.0, 7.0, 80.0, 95.0, 105.0), (Site(NA, "i", (0.1, 0.2, 0.3)),)),
        SymmetricCrystal(167, (4.76, 12.99), (Site(13, "c", (0.3523,)), Site(OXYGEN, "e", (0.3064,)))),
    ],
)
def test_the_volume_is_that_of_the_expanded_cell(crystal):
    assert volume_angstrom3(crystal) == pytest.approx(expand(crystal).volume, rel=1e-6)


def test_the_new_cell_follows_the_volumes_of_its_atoms(table):
    v = table.volumes_angstrom3
    checked = 0
    for seed in range(20):
        found = substitute(SALTS[0], table, np.random.default_rng(seed), second_probability=0.0)
        assert found is not None
        ratio = sum(v[z] for z in found.counts) / (v[NA] + v[CL])
        assert volume_angstrom3(found) / volume_angstrom3(SALTS[0]) == pytest.approx(ratio)
        checked += abs(ratio - 1) > 0.02
    assert checked


def test_angles_and_coordinates_stay_and_lengths_scale_alike():
    crystal = SymmetricCrystal(
        2,
        (5.0, 6.0, 7.0, 80.0, 95.0, 105.0),
        (Site(NA, "i", (0.1, 0.2, 0.3)), Site(CL, "i", (0.4, 0.6, 0.8))),
    )
    volumes = np.full(104, 20.0)
    volumes[K] = 30.0  # 2 Na and 2 Cl take 80, 2 K and 2 Cl 100
    counts = np.zeros((104, 104))
    counts[NA, K] = 1.0
    rng = np.random.default_rng(0)
    made = [substitute(crystal, SubstitutionTable(counts, volumes), rng) for _ in range(10)]
    found = next(m for m in made if m is not None)
    scale = 1.25 ** (1 / 3)
    assert found.lattice == pytest.approx((5 * scale, 6 * scale, 7 * scale, 80, 95, 105))
    assert [(s.atomic_number, s.letter, s.free) for s in found.sites] == [
        (K, "i", (0.1, 0.2, 0.3)), (CL, "i", (0.4, 0.6, 0.8)),
    ]  # fmt: skip


def test_the_same_draws_give_the_same_crystal(table):
    def made(seed):
        rng = np.random.default_rng(seed)
        return [substitute(crystal, table, rng) for crystal in CRYSTALS]

    assert made(3) == made(3)
    assert len({str(made(seed)) for seed in range(5)}) > 1


def test_no_element_is_taken_twice_and_none_stays_the_crystal_it_was(table):
    made = 0
    for seed in range(100):
        for crystal in CRYSTALS:
            found = substitute(crystal, table, np.random.default_rng(seed), second_probability=1.0)
            if found is None:
                continue
            made += 1
            assert sorted(found.counts.values()) == sorted(crystal.counts.values())
            assert symbols_of(found) != symbols_of(crystal)
            assert len(found.sites) == len(crystal.sites)
            assert text_to_symmetric(symmetric_to_text(found)).counts == found.counts
    assert made > 200


def test_every_element_is_tried_where_the_second_is_certain(table):
    """NaCl with both replaced: K or Rb for Na, Br for Cl."""
    found = {
        symbols_of(crystal)
        for seed in range(40)
        if (crystal := substitute(SALTS[0], table, np.random.default_rng(seed), second_probability=1.0))
    }
    assert found == {frozenset((K, BR)), frozenset((RB, BR))}


def test_nothing_is_made_where_nothing_fits(table):
    unknown = SymmetricCrystal(225, (3.61,), (Site(29, "a", ()),))  # copper, which the table never saw
    assert substitute(unknown, table, np.random.default_rng(0)) is None
    alone = learn_substitutions([SALTS[0]])  # Na and Cl, neither like the other
    assert substitute(SALTS[0], alone, np.random.default_rng(0)) is None


def test_nothing_is_made_whose_volume_is_twice_or_half_the_original():
    counts = np.zeros((104, 104))
    counts[NA, K] = 1.0
    volumes = np.full(104, 20.0)
    volumes[K] = 61.0  # (61 + 20) / 40 > 2
    table = SubstitutionTable(counts, volumes)
    made = [substitute(SALTS[0], table, np.random.default_rng(seed)) for seed in range(10)]
    assert made == [None] * 10


def test_no_crystals_teach_nothing():
    with pytest.raises(EmptyInput, match="no crystals to learn from"):
        learn_substitutions([])
