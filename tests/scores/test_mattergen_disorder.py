"""MatterGen's matcher against pymatgen called as MatterGen calls it, on orderings of alloys and others."""

import os
import warnings
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import OrderDisorderElementComparator, StructureMatcher
from pymatgen.core import Element, Lattice, Structure

from crystallm_kit.scores.matcher.mattergen_disorder import (
    Alloy,
    could_alloy,
    first_copies,
    is_same,
    matches_among,
    substitutable,
)
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, fit, reduced
from crystallm_kit.scores.novelty.index import NoveltyIndex
from crystallm_kit.structures.files import read

FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def layered(elements="CuAu", a=3.9, along=2):
    """L1_0, AFLOW AB_tP2_123_a_d: layers of two elements along one axis, in a cubic cell."""
    one, other = elements[:2], elements[2:]
    return Structure(Lattice.cubic(a), [one if p[along] == 0 else other for p in FCC], FCC)


def doubled(a=3.9):
    """Layers of two and two along z: the same sites in another order, in a cell of eight."""
    sites = np.vstack([FCC, FCC + np.array([0, 0, 1])]) * [1, 1, 0.5]
    order = ["Cu" if p[2] < 0.5 else "Au" for p in sites]
    return Structure(Lattice.tetragonal(a, 2 * a), order, sites)


def caesium_chloride(elements="CuAu", a=3.1):
    return Structure(Lattice.cubic(a), [elements[:2], elements[2:]], [[0, 0, 0], [0.5, 0.5, 0.5]])


def rock_salt():
    return Structure(Lattice.cubic(5.64), ["Na"] * 4 + ["Cl"] * 4, np.vstack([FCC, 0.5 - FCC]))


def as_mattergen(first, second):
    """Return MatterGen's decision, from its published rule, with nothing reduced or compiled beforehand."""
    if first.composition.reduced_formula != second.composition.reduced_formula:
        return False
    if StructureMatcher().fit(first, second):
        return True
    groups = substitutable(tuple(first.composition.elements))
    if not groups:
        return False
    mixed = first.copy()
    for group in groups:
        counts = {e: first.composition[e] for e in group}
        total = sum(counts.values())
        text = "".join(f"{e}{n / total}" for e, n in counts.items())
        mixed.replace_species({str(e): text for e in group})
    matcher = StructureMatcher(
        attempt_supercell=True, allow_subset=True, comparator=OrderDisorderElementComparator()
    )
    return bool(matcher.fit(mixed, second))


def test_two_orderings_of_an_alloy_are_the_same_only_here():
    one, other = layered(), doubled()
    assert not fit(reduced(one), reduced(other), TOLERANCES["default"])
    assert is_same(Alloy(one), reduced(other))
    assert is_same(Alloy(other), reduced(one))
    assert first_copies([Alloy(one), None, Alloy(other), Alloy(layered("CuAg"))]) == [None, None, 0, None]


def test_elements_that_do_not_alloy_are_not_mixed():
    assert Alloy(rock_salt()).mixture is None
    other = Structure(Lattice.cubic(3.4), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    assert not is_same(Alloy(rock_salt()), reduced(other))
    assert is_same(Alloy(rock_salt()), reduced(rock_salt() * (2, 1, 1)))


def test_pairs_of_elements_by_hand():
    """Radii: Cu 1.35, Au 1.35, K 2.20, Na 1.80, Cl 1.00; electronegativities 1.90, 2.54, 0.82, 0.93, 3.16."""
    assert could_alloy(Element("Cu"), Element("Au"))
    assert could_alloy(Element("Na"), Element("K"))  # 0.4 / 2.0 = 0.2
    assert not could_alloy(Element("Cu"), Element("K"))  # 0.85 / 1.775 = 0.48; and 1.08
    assert not could_alloy(Element("Na"), Element("Cl"))
    assert not could_alloy(Element("He"), Element("H"))  # neither radius nor electronegativity


def test_groups_join_where_one_pair_leads_to_the_next():
    """Li-Na (1.45, 1.80) and Na-K (1.80, 2.20) alloy, Li-K (0.41) does not; the three are one group."""
    lithium, sodium, potassium = Element("Li"), Element("Na"), Element("K")
    assert not could_alloy(lithium, potassium)
    for order in permutations((lithium, sodium, potassium)):
        assert substitutable(order) == ((lithium, sodium, potassium),)
    assert substitutable((lithium, potassium)) == ()
    assert substitutable((potassium, Element("F"), sodium)) == ((sodium, potassium),)


def test_decisions_are_those_of_mattergen_s_rule():
    rng = np.random.default_rng(0)
    structures = [
        layered(), doubled(), layered(along=0), caesium_chloride(), layered(a=4.2), rock_salt(), doubled(4.4),
    ]  # fmt: skip
    for base in structures[:4]:
        moved = base.copy()
        moved.perturb(0.35, seed=int(rng.integers(1000)))
        structures.append(moved)
    decisions = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for first, second in permutations(structures, 2):
            expected = as_mattergen(first, second)
            assert is_same(Alloy(first), reduced(second)) == expected
            decisions.add((expected, bool(StructureMatcher().fit(first, second))))
    assert decisions == {(True, True), (True, False), (False, False)}


def test_known_alloys_are_found_in_an_index_whatever_the_size_of_their_cells(tmp_path):
    index = NoveltyIndex.create(tmp_path / "known")
    index.add(["salt", "doubled", "silver"], [reduced(s) for s in (rock_salt(), doubled(), layered("CuAg"))])
    index.add(["layered"], [reduced(layered())])
    assert list(matches_among(Alloy(layered(a=3.95)), index.entries("CuAu"))) == ["doubled", "layered"]
    assert [name for name, _ in index.entries("NaCl")] == ["salt"]
    assert list(index.entries("KCl")) == []


@pytest.mark.parametrize("elements", [["Cu"], ["He", "Ne"]])
def test_elements_and_noble_gases_mix_with_nothing(elements):
    sites = [[0, 0, 0], [0.5, 0.5, 0.5]][: len(elements)]
    assert Alloy(Structure(Lattice.cubic(4), elements, sites)).mixture is None


@pytest.mark.slow
@pytest.mark.real_data
def test_decisions_on_published_samples_are_those_of_mattergen_s_rule():
    """300 pairs of one formula whose elements could alloy and that do not match in order."""
    folder = os.environ.get("CRYSTALLM_KIT_SAMPLES")
    if not folder:
        pytest.skip("CRYSTALLM_KIT_SAMPLES is not set")
    by_formula = defaultdict(list)
    for crystal in read(Path(folder) / "metastable_structures_llama-2-7B_1.0_0.7.csv.gz"):
        structure = crystal.structure
        if substitutable(tuple(structure.composition.elements)):
            by_formula[structure.composition.reduced_formula].append(structure)
    pairs = [pair for group in by_formula.values() for pair in permutations(group[:6], 2)]
    np.random.default_rng(0).shuffle(pairs)
    decisions = []
    for first, second in pairs:
        if not fit(reduced(first), reduced(second), TOLERANCES["default"]):
            decisions.append(is_same(Alloy(first), reduced(second)))
            assert decisions[-1] == as_mattergen(first, second)
        if len(decisions) == 300:
            break
    assert 20 < sum(decisions) < 280
