"""Copies within a set, each rule against pymatgen's StructureMatcher called pair by pair."""

import os
from pathlib import Path

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, reduced
from crystallm_kit.scores.novelty.copies import copies_by_hash, duplicate_pairs, first_copies, later_copies
from crystallm_kit.structures.files import read

DEFAULT = TOLERANCES["default"]
FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def rock_salt(a=5.64, cation="Na"):
    """NaCl, AFLOW AB_cF8_225_a_b."""
    return Structure(Lattice.cubic(a), [cation] * 4 + ["Cl"] * 4, np.vstack([FCC, 0.5 - FCC]))


def caesium_chloride(a=4.12):
    return Structure(Lattice.cubic(a), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def near_ones(seed=0, n=30):
    """Return distorted cells of TiO2 and of four atoms of iron: pairs on both sides of the tolerances."""
    rng = np.random.default_rng(seed)
    u = 0.3053
    oxygen = [[u, u, 0], [-u, -u, 0], [0.5 - u, 0.5 + u, 0.5], [0.5 + u, 0.5 - u, 0.5]]
    rutile = Structure(
        Lattice.tetragonal(4.594, 2.959), ["Ti"] * 2 + ["O"] * 4, [[0, 0, 0], [0.5, 0.5, 0.5], *oxygen]
    )
    iron = Structure(Lattice.cubic(3.6), ["Fe"] * 4, FCC)
    made = []
    for i in range(n):
        base = (rutile, iron)[i % 2]
        strain = np.eye(3) + rng.choice([0.02, 0.1, 0.16]) * rng.uniform(-1, 1, (3, 3))
        moved = base.frac_coords + rng.choice([0.0, 0.03, 0.12]) * rng.uniform(-1, 1, (len(base), 3))
        made.append(Structure(Lattice(base.lattice.matrix @ strain), base.species, moved))
    return made


def pairwise_first(structures, tolerances):
    """Return what a loop over pymatgen's matcher gives, the later one first."""
    matcher = StructureMatcher(tolerances.length, tolerances.site, tolerances.angle_degrees)
    kept, copies = [], []
    for i, later in enumerate(structures):
        copies.append(next((j for j in kept if matcher.fit(later, structures[j])), None))
        if copies[-1] is None:
            kept.append(i)
    return copies


def test_a_translated_copy_a_supercell_and_another_setting_are_copies_of_the_first():
    moved = rock_salt()
    moved.translate_sites(range(8), [0.1, 0.2, 0.3])
    primitive = rock_salt().get_primitive_structure()
    structures = [
        rock_salt(), caesium_chloride(), moved, rock_salt() * (2, 1, 1), primitive, rock_salt(5.66),
        rock_salt(cation="K"),
    ]  # fmt: skip
    forms = [reduced(s) for s in structures]
    assert first_copies(forms, DEFAULT) == [None, None, 0, 0, 0, 0, None]


def test_what_is_no_structure_is_no_copy_and_has_none():
    form = reduced(rock_salt())
    assert first_copies([None, form, None, form], DEFAULT) == [None, None, None, 1]
    assert later_copies([None, form, None, form], DEFAULT) == [None, 3, None, None]
    assert duplicate_pairs([None, form, None, form], DEFAULT) == 2


def test_within_equal_cell_formulas_a_supercell_is_no_copy():
    structures = [rock_salt(), rock_salt() * (2, 1, 1), rock_salt(5.6)]
    forms = [reduced(s) for s in structures]
    formulas = [s.composition.formula for s in structures]
    found = first_copies(forms, DEFAULT, bucket="cell_formula", cell_formulas=formulas)
    assert found == [None, None, 0]


def test_cell_formulas_are_asked_for():
    with pytest.raises(UserError, match="no cell formulas for 1 forms"):
        first_copies([reduced(rock_salt())], DEFAULT, bucket="cell_formula")
    with pytest.raises(UserError, match="2 cell formulas for 1 forms"):
        first_copies([reduced(rock_salt())], DEFAULT, bucket="cell_formula", cell_formulas=["a", "b"])


@pytest.mark.parametrize("name", sorted(TOLERANCES))
def test_copies_are_those_of_pymatgen_pair_by_pair(name):
    structures, tolerances = near_ones(), TOLERANCES[name]
    expected = pairwise_first(structures, tolerances)
    assert 3 < expected.count(None) < 27
    forms = [reduced(s) for s in structures]
    assert first_copies(forms, tolerances) == expected
    backwards = pairwise_first(structures[::-1], tolerances)
    assert first_copies(forms[::-1], tolerances) == backwards


def test_later_copies_and_pairs_are_those_of_pymatgen_in_the_peers_orders():
    structures, tolerances = near_ones(seed=3, n=24), TOLERANCES["lemat"]
    matcher = StructureMatcher(ltol=0.1)
    same = [[matcher.fit(one, other) for other in structures] for one in structures]
    n = range(len(structures))
    expected = [next((j for j in n if j > i and same[i][j]), None) for i in n]
    forms = [reduced(s) for s in structures]
    assert later_copies(forms, tolerances) == expected
    assert duplicate_pairs(forms, tolerances) == sum(same[i][j] for i in n for j in n if i != j)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "kept", "reversed_kept", "in_cells"),
    [("default", 2196, 2198, 2300), ("lemat", 2208, 2205, 2309), ("csp", 2054, 2049, 2163)],
)
def test_published_samples_give_the_counts_of_the_peers_own_loops(name, kept, reversed_kept, in_cells):
    """Crystal-text-LLM's 3,221 samples; counts made by pymatgen, pair by pair."""
    forms, cells = _published()
    tolerances = TOLERANCES[name]
    assert first_copies(forms, tolerances).count(None) == kept
    assert first_copies(forms[::-1], tolerances).count(None) == reversed_kept
    found = first_copies(forms, tolerances, bucket="cell_formula", cell_formulas=cells)
    assert found.count(None) == in_cells


def _published():
    folder = os.environ.get("CRYSTALLM_KIT_SAMPLES")
    if not folder:
        pytest.skip("CRYSTALLM_KIT_SAMPLES is not set")
    path = Path(folder) / "metastable_structures_llama-2-7B_1.0_0.7.csv.gz"
    crystals = list(read(path))
    assert len(crystals) == 3221
    return (
        [reduced(c.structure) for c in crystals],
        [c.structure.composition.formula for c in crystals],
    )


def test_of_one_hash_the_lowest_rank_is_kept_and_of_equal_ones_the_first():
    ranks = [(True, 9.0), (False, 0.2), (True, 3.0), (True, 3.0), (True, 1.0)]
    assert copies_by_hash(["a", "a", "b", "b", None], ranks) == [1, None, None, 2, None]
