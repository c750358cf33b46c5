"""symmetry.py: the Wyckoff positions, the normalizer, and one canonical description for each crystal."""

import itertools
import json
from functools import cache
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moyopy import Cell, MoyoDataset, Setting
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import EncodeError, ParseError
from crystallm_kit.structures.symmetry import (
    LETTERS,
    Site,
    SymmetricCrystal,
    canonical,
    cell_lattice,
    crystal_system,
    dataset,
    descriptions,
    expand,
    space_group,
    spacegroup_number,
    symmetric_crystal,
)


def prototype(number: int, lattice: Lattice, symbols: list[str], sites: list[list[float]]) -> Structure:
    return Structure.from_spacegroup(number, lattice, symbols, sites)


@cache
def crystals() -> dict[str, Structure]:
    """Prototypes of the AFLOW encyclopedia (aflow.org/prototype-encyclopedia) and two made-up cells."""
    third = 1 / 3
    return {
        "rock salt AB_cF8_225_a_b": prototype(
            225, Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
        ),
        "zincblende AB_cF8_216_c_a": prototype(
            216, Lattice.cubic(5.41), ["Zn", "S"], [[0.25, 0.25, 0.25], [0, 0, 0]]
        ),
        "rutile A2B_tP6_136_f_a": prototype(
            136, Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.3053, 0.3053, 0]]
        ),
        "quartz A2B_hP9_152_c_a": prototype(
            152, Lattice.hexagonal(4.916, 5.4054), ["Si", "O"],
            [[0.4697, 0, third], [0.4135, 0.2669, 0.1191 + third]],
        ),
        "wurtzite AB_hP4_186_b_b": prototype(
            186, Lattice.hexagonal(3.8227, 6.2607), ["Zn", "S"],
            [[third, 2 * third, 0], [third, 2 * third, 0.3748]],
        ),
        "bismuth telluride A2B3_hR5_166_c_ac": prototype(
            166, Lattice.hexagonal(4.3835, 30.487), ["Bi", "Te", "Te"],
            [[0, 0, 0.4], [0, 0, 0], [0, 0, 0.2097]],
        ),
        "perovskite AB3C_oP20_62_c_cd_a": prototype(
            62, Lattice.orthorhombic(5.38, 7.64, 5.44), ["Ca", "Ti", "O", "O"],
            [[0.036, 0.25, 0.993], [0, 0, 0.5], [0.484, 0.25, 0.071], [0.289, 0.037, 0.711]],
        ),
        "spinel A2BC4_cF56_227_d_a_e": prototype(
            227, Lattice.cubic(8.08), ["Mg", "Al", "O"],
            [[0, 0, 0], [0.625, 0.625, 0.625], [0.3874, 0.3874, 0.3874]],  # about -43m
        ),
        "baddeleyite A2B_mP12_14_2e_e": prototype(
            14, Lattice.monoclinic(5.169, 5.232, 5.341, 99.2), ["Zr", "O", "O"],
            [[0.2758, 0.0411, 0.2082], [0.0703, 0.3359, 0.3406], [0.4423, 0.7549, 0.4789]],
        ),
        "triclinic with an inversion": prototype(
            2, Lattice.from_parameters(5.1, 6.3, 7.2, 83.1, 77.2, 101.4), ["K", "O", "S"],
            [[0.11, 0.23, 0.37], [0.61, 0.19, 0.83], [0.5, 0, 0]],
        ),
        "no symmetry": Structure(
            Lattice.from_parameters(4.12, 5.37, 6.81, 82.3, 97.6, 104.9), ["K", "Sb", "O", "F"],
            [[0.03, 0.11, 0.07], [0.52, 0.36, 0.71], [0.27, 0.81, 0.43], [0.77, 0.62, 0.15]],
        ),
    }  # fmt: skip


NAMES = sorted(crystals())
NUMBERS = {
    name: {"triclinic with an inversion": 2, "no symmetry": 1}.get(name) or int(name.split("_")[2])
    for name in NAMES
}


def canonical_of(structure: Structure) -> SymmetricCrystal:
    found = symmetric_crystal(structure, 0.01)
    return canonical(found, sorted(found.counts))


def are_close(one: SymmetricCrystal, other: SymmetricCrystal) -> bool:
    """Tell whether two descriptions are the same up to a last digit of the coordinates."""
    if [(s.atomic_number, s.letter) for s in one.sites] != [(s.atomic_number, s.letter) for s in other.sites]:
        return False
    off = np.subtract([v for s in one.sites for v in s.free], [v for s in other.sites for v in s.free])
    return (
        one.spacegroup_number == other.spacegroup_number
        and np.abs((off + 0.5) % 1 - 0.5).max(initial=0) < 3.1e-4
        and np.allclose(one.lattice, other.lattice, atol=2e-3)
    )


def random_crystal(number: int, letters: list[str], seed: int) -> SymmetricCrystal:
    """Return a crystal with two elements on general positions, so that its group is exactly `number`."""
    group, rng = space_group(number), np.random.default_rng((number, seed))
    elements = [14, 15, *range(20, 20 + len(letters))]
    letters = [group.positions[-1].letter] * 2 + letters
    lattice = np.array([*rng.uniform(0.9, 1.1, 3) * [1, 1.13, 1.27], *rng.uniform(80, 100, 3)])
    lattice[:3] *= (30.0 * sum(group[letter].multiplicity for letter in letters)) ** (1 / 3)
    while True:
        sites = tuple(
            Site(z, letter, tuple(int(v) / 10_000 for v in rng.integers(0, 10_000, group[letter].n_free)))
            for z, letter in zip(elements, letters, strict=True)
        )
        found = SymmetricCrystal(number, tuple(float(lattice[i]) for i in group.free_lattice), sites)
        distances = expand(found).distance_matrix
        if distances[np.triu_indices(len(distances), 1)].min() > 0.5:
            return found


# The table


@pytest.mark.parametrize("number", range(1, 231))
def test_every_position_has_as_many_atoms_as_its_label_says(number):
    group = space_group(number)
    assert len({p.letter for p in group.positions}) == len(group.positions)
    assert [p.letter for p in group.positions] == list(LETTERS[: len(group.positions)])
    for position in group.positions:
        assert position.primitive_multiplicity * group.n_centering == position.multiplicity
        p = np.array([0.1357, 0.2931, 0.4363])[: position.n_free]
        orbit = group.rotations @ (position.form_matrix @ p + position.form_offset) + group.translations
        apart = np.abs((orbit[:, None] - orbit[None] + 0.5) % 1 - 0.5).max(-1)
        assert len(np.unique((apart < 1e-6).argmax(1))) == position.multiplicity
    assert group.positions[-1].multiplicity == len(group.rotations)


def test_the_table_holds_the_1731_positions_of_the_international_tables():
    text = resources.files("crystallm_kit.structures").joinpath("wyckoff_positions.json").read_text()
    assert sum(len(entries) for entries in json.loads(text).values()) == 1731


@pytest.mark.parametrize(
    "number", [1, 2, 5, 14, 62, 88, 136, 148, 152, 166, 186, 194, 198, 216, 225, 227, 230]
)
def test_moyo_writes_every_letter_as_the_table_does(number):
    """moyo may choose another origin, so each position that it names is compared with ours of that letter."""
    entries = json.loads(
        resources.files("crystallm_kit.structures").joinpath("wyckoff_positions.json").read_text()
    )[str(number)]
    ours = {label[-1]: (int(label[:-1]), form) for label, form in (entry.split(" ") for entry in entries)}
    for seed, letter in enumerate(ours):
        found = dataset(expand(random_crystal(number, [letter], seed)), 1e-3)
        assert found.number == number
        for theirs in found.normalizer_wyckoff_positions().wyckoffs:
            assert (theirs.multiplicity, theirs.coordinates) == ours[theirs.letter]


# From a structure and back


@pytest.mark.parametrize("name", NAMES)
def test_expanding_a_symmetric_crystal_keeps_crystal_and_space_group(name):
    structure = crystals()[name]
    found = symmetric_crystal(structure, 0.01)
    expanded = expand(found)
    assert found.spacegroup_number == NUMBERS[name] == spacegroup_number(expanded, 0.01)
    assert len(expanded) == len(structure.get_primitive_structure())
    assert StructureMatcher().fit(structure, expanded)


@pytest.mark.parametrize("name", NAMES)
def test_every_description_is_the_same_crystal(name):
    found = symmetric_crystal(crystals()[name], 0.01)
    described = descriptions(found, sorted(found.counts))
    assert described[0] == canonical(found, sorted(found.counts))
    assert len(set(described)) == len(described)
    matcher = StructureMatcher(ltol=0.01, stol=0.01, angle_tol=0.1, primitive_cell=False)
    for one in described[:16]:
        assert one.counts == found.counts
        assert matcher.fit(crystals()[name].get_primitive_structure(), expand(one)), one


@pytest.mark.parametrize("name", NAMES)
def test_every_description_has_the_same_canonical_one(name):
    found = symmetric_crystal(crystals()[name], 0.01)
    first, *others = descriptions(found, sorted(found.counts))
    for other in others[:16]:
        assert are_close(canonical(other, sorted(found.counts)), first)


def unimodular(seed: int) -> np.ndarray:
    """Return a cell change of determinant 1 or -1."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(3, dtype=int)
    for _ in range(4):
        i, j = rng.choice(3, 2, replace=False)
        matrix[i] += rng.integers(-1, 2) * matrix[j]
    return matrix * [-1 if rng.random() < 0.5 else 1, 1, 1]


def view(structure: Structure, matrix: np.ndarray, shift: np.ndarray, order: list[int]) -> Structure:
    """Return the same crystal in another cell (rows of `matrix`), origin and order of sites."""
    changed = Structure(
        matrix @ structure.lattice.matrix,
        structure.species,
        (structure.frac_coords + shift) @ np.linalg.inv(matrix),
    )
    return Structure.from_sites([changed[i] for i in order])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), name=st.sampled_from(NAMES), seed=st.integers(0, 10_000))
def test_the_canonical_description_does_not_depend_on_cell_origin_and_order(data, name, seed):
    structure = crystals()[name].get_primitive_structure()
    order = data.draw(st.permutations(range(len(structure))))
    shift = np.random.default_rng(seed).random(3)
    seen = view(structure, unimodular(seed), shift, list(order))
    assert are_close(canonical_of(seen), canonical_of(structure))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scaling", [(2, 1, 1), (1, 1, 3)])
def test_the_canonical_description_of_a_supercell_is_that_of_the_crystal(name, scaling):
    structure = crystals()[name]
    assert are_close(canonical_of(structure * scaling), canonical_of(structure))


@pytest.mark.parametrize("number", range(1, 231))
def test_a_crystal_read_back_from_its_atoms_has_the_same_canonical_description(number):
    """That takes the table and the normalizer of each group: moyo chooses origin and axes anew."""
    group = space_group(number)
    letters = [p.letter for p in group.positions]
    for seed in range(2):
        rng = np.random.default_rng((number, seed))
        crystal = random_crystal(number, [str(v) for v in rng.permutation(letters)[:2]], seed)
        structure = expand(crystal)
        found = symmetric_crystal(structure, 1e-3)
        assert found.spacegroup_number == number
        order = sorted(crystal.counts)
        # moyo reduces monoclinic and triclinic cells first, so there only what it returned can be compared.
        again = canonical(symmetric_crystal(expand(found), 1e-3), order)
        assert are_close(again, canonical(found, order))
        if group.crystal_system not in ("triclinic", "monoclinic"):
            assert are_close(canonical(found, order), canonical(crystal, order))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 231))
def test_every_letter_is_found_again(number):
    group = space_group(number)
    images = [letters for _, _, letters in group.normalizer]
    for seed, position in enumerate(group.positions):
        crystal = random_crystal(number, [position.letter], seed + 10)
        found = symmetric_crystal(expand(crystal), 1e-3)
        assert found.spacegroup_number == number
        [letter] = [s.letter for s in found.sites if s.atomic_number == 20]
        index = LETTERS.index(position.letter)
        assert letter in {image[index] for image in images}


# Handedness


def cloud(structure: Structure) -> list[tuple[float, np.ndarray]]:
    """Return the neighbours of the first site at distances of their own, nearest first."""
    near = sorted(structure.get_neighbors(structure[0], 9.0), key=lambda n: n.nn_distance)
    near = [
        n for n in near if sum(abs(m.nn_distance - n.nn_distance) < 0.03 for m in near) == 1
    ]  # fmt: skip
    return [(n.nn_distance, n.coords - structure[0].coords) for n in near]


def misfit(one: Structure, other: Structure) -> float:
    """Return how badly (angstrom) a proper rotation lays the neighbours of the first sites on each other."""
    from scipy.spatial.transform import Rotation

    pairs = [
        (a, b) for d, a in cloud(one) for e, b in cloud(other) if abs(d - e) < 0.01
    ][:8]  # fmt: skip
    assert len(pairs) >= 5
    return float(Rotation.align_vectors([a for a, _ in pairs], [b for _, b in pairs])[1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("hand", ["right", "left"])
def test_handedness_is_kept_whatever_the_hand_of_the_cell(seed, hand):
    rng = np.random.default_rng(seed)
    lattice = Lattice.from_parameters(*rng.uniform(3.5, 7, 3), *rng.uniform(75, 105, 3)).matrix
    points = rng.random((4, 3))
    if hand == "left":
        lattice, points = lattice[[1, 0, 2]], points[:, [1, 0, 2]]
    structure = Structure(lattice, ["K", "Sb", "O", "F"], points)
    mirrored = Structure(lattice * [1, 1, -1], ["K", "Sb", "O", "F"], points)
    found = symmetric_crystal(structure, 0.01)
    for one in descriptions(found, [19, 51, 8, 9])[:3]:
        assert misfit(structure, expand(one)) < 0.05
        assert misfit(mirrored, expand(one)) > 0.05


def test_the_two_quartzes_stay_two():
    right = crystals()["quartz A2B_hP9_152_c_a"]
    left = Structure(right.lattice.matrix * [1, 1, -1], right.species, right.frac_coords)
    assert canonical_of(right).spacegroup_number == 152
    assert canonical_of(left).spacegroup_number == 154


# The normalizer

# (group, proper cosets at the highest metric of its type, polar shifts left out), from ITA Vol. A (2016)
# table 3.5.2: index of translations x further generators x axis permutations that keep the group's type.
NORMALIZER_SIZES = [
    (1, 1), (2, 8), (225, 2), (221, 2), (229, 1), (230, 1), (227, 2),
    (216, 8),  # F-43m: 4 translations, and the inversion, made proper by an improper operation of the group
    (47, 8 * 6), (62, 8), (139, 2), (152, 4), (194, 2), (166, 2),
]  # fmt: skip


@pytest.mark.parametrize(("number", "size"), NORMALIZER_SIZES)
def test_the_normalizer_has_as_many_cosets_as_the_international_tables_say(number, size):
    assert len(space_group(number).normalizer) == size


@pytest.mark.parametrize("number", range(1, 231))
def test_normalizer_operations_map_the_group_onto_itself_and_begin_with_the_identity(number):
    group = space_group(number)
    linear, shift, letters = group.normalizer[0]
    assert (linear == np.eye(3)).all()
    assert not shift.any()
    assert letters == "".join(p.letter for p in group.positions)
    operations = {
        (r.tobytes(), tuple(np.rint(t * 24).astype(int) % 24))
        for r, t in zip(group.rotations, group.translations, strict=True)
    }
    for linear, shift, letters in group.normalizer:
        assert round(np.linalg.det(linear)) == 1
        assert sorted(letters) == sorted(p.letter for p in group.positions)
        inverse = np.rint(np.linalg.inv(linear)).astype(int)
        for rotation, translation in zip(group.rotations, group.translations, strict=True):
            image = linear @ rotation @ inverse
            moved = linear @ translation + shift - image @ shift
            assert (image.tobytes(), tuple(np.rint(moved * 24).astype(int) % 24)) in operations


# Edges


def test_a_site_near_a_higher_symmetry_keeps_its_coordinate():
    """Points within 0.002 of a special position were written as if they stood on it."""
    group = space_group(221)
    letter = next(p for p in group.positions if p.n_free == 1 and p.multiplicity == 6)  # 6e x,0,0
    crystal = SymmetricCrystal(221, (60.0,), (Site(14, letter.letter, (0.0012,)), Site(8, "b", ())))
    assert {s.free for s in canonical(crystal, [14, 8]).sites} <= {(0.0012,), (0.5012,), (0.4988,), ()}
    assert symmetric_crystal(expand(crystal), 1e-3).counts == {14: 6, 8: 1}


def test_pseudo_translations_are_not_merged_beyond_what_is_allowed():
    structure = Structure(Lattice.tetragonal(3.0, 6.0), ["Cu", "Cu"], [[0, 0, 0], [0, 0, 0.51]])
    assert len(expand(symmetric_crystal(structure, 0.1))) == 1
    with pytest.raises(EncodeError, match="merges cells"):
        symmetric_crystal(structure, 0.1, 0.01)
    assert len(expand(symmetric_crystal(structure, 0.001, 0.01))) == 2


def test_atoms_that_coincide_are_not_merged():
    """moyo takes two atoms of one element at one place for one, so that the crystal lost an atom."""
    points = [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.6, 0.5, 0.5]]
    with pytest.raises(EncodeError, match="coincide"):
        symmetric_crystal(Structure(Lattice.orthorhombic(4, 5, 6), ["Cu", "Cu", "O"], points))
    with pytest.raises(EncodeError, match="no symmetry found"):
        symmetric_crystal(Structure(Lattice.cubic(3), ["Cu", "Cu"], [[0, 0, 0], [0, 0, 0]]))


@pytest.mark.parametrize(
    "parameters",
    [(0, 3, 3, 90, 90, 90), (3, 3, 3, 90, 180, 90), (3, 3, 3, 30, 30, 100), (3, 3, 3, 120, 120, 120)],
)
def test_a_cell_without_volume_is_refused(parameters):
    with pytest.raises(ParseError, match="span no cell"):
        cell_lattice(parameters)


def test_crystal_systems_end_where_the_tables_say():
    ends = [
        n
        for n, following in itertools.pairwise(range(1, 231))
        if crystal_system(n) != crystal_system(following)
    ]
    assert ends == [2, 15, 74, 142, 167, 194]
    with pytest.raises(ValueError, match="231"):
        crystal_system(231)


def test_moyo_is_asked_for_the_standard_setting():
    cell = crystals()["baddeleyite A2B_mP12_14_2e_e"]
    theirs = MoyoDataset(
        Cell(cell.lattice.matrix.tolist(), cell.frac_coords.tolist(), list(cell.atomic_numbers)),
        symprec=0.01,
        setting=Setting.standard(),
    )
    assert dataset(cell, 0.01).hall_number == theirs.hall_number == 81  # P 1 2_1/c 1, unique axis b
