"""Augmented views are the same crystal: by StructureMatcher, space group, handedness."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Molecule, Structure

from crystallm_kit.records import Crystal
from crystallm_kit.structures import augmentation as augmentation_module
from crystallm_kit.structures.augmentation import AugmentationRecipe, augment
from crystallm_kit.structures.symmetry import spacegroup_number

SAME = [
    "translated",
    "with_permuted_sites",
    "with_permuted_axes",
    "with_sheared_cell",
    "as_supercell",
    "redescribed",
    "rotated",
]


def change(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(augmentation_module, name)
    return found


# Rutile (AFLOW A2B_tP6_136_f_a), quartz (P3_121: chiral), wurtzite (AFLOW AB_hP4_186_b_b: polar), a made-up
# triclinic cell (P-1), one atom (copper, AFLOW A_cF4_225_a).
STRUCTURES = {
    "rutile": Structure.from_spacegroup(
        "P4_2/mnm", Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.3053, 0.3053, 0]]
    ),
    "quartz": Structure.from_spacegroup(
        "P3_121", Lattice.hexagonal(4.913, 5.405), ["Si", "O"], [[0.4699, 0, 1 / 3], [0.4141, 0.2681, 0.2854]]
    ),
    "wurtzite": Structure.from_spacegroup(
        "P6_3mc", Lattice.hexagonal(3.822, 6.26), ["Zn", "S"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.3748]]
    ),
    "triclinic": Structure(
        Lattice.from_parameters(5.1, 6.3, 7.2, 81, 77, 68),
        ["Cu", "Cu", "O", "O", "S", "S"],
        [[0.11, 0.27, 0.35], [0.89, 0.73, 0.65], [0.4, 0.1, 0.8],
         [0.6, 0.9, 0.2], [0.3, 0.6, 0.1], [0.7, 0.4, 0.9]],
    ),
    "copper": Structure([[0, 1.805, 1.805], [1.805, 0, 1.805], [1.805, 1.805, 0]], ["Cu"], [[0, 0, 0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("mineral", STRUCTURES)
def test_a_view_matches_its_crystal_and_keeps_space_group_and_handedness(name, mineral):
    original = STRUCTURES[mineral]
    for seed in range(4):
        view = change(name)(original, np.random.default_rng(seed))
        assert StructureMatcher().fit(original, view)
        assert spacegroup_number(view) == spacegroup_number(original)
        assert view.lattice.volume / len(view) == pytest.approx(original.lattice.volume / len(original))
        assert np.linalg.det(view.lattice.matrix) > 0
        assert (view.frac_coords >= 0).all()
        assert (view.frac_coords < 1).all()


@pytest.mark.parametrize("name", SAME)
def test_a_view_is_not_the_crystal_as_it_was_written(name):
    original = STRUCTURES["quartz"]

    def written(structure):
        return (
            np.concatenate([structure.lattice.matrix.ravel(), structure.frac_coords.ravel()])
            .round(4)
            .tolist()
        )

    views = [written(change(name)(original, np.random.default_rng(seed))) for seed in range(8)]
    assert any(view != written(original) for view in views)
    assert len({str(view) for view in views}) > 1


def test_strain_changes_lengths_by_at_most_three_times_the_stated_share():
    original = STRUCTURES["triclinic"]
    shares = []
    for seed in range(50):
        view = augmentation_module.strained(original, np.random.default_rng(seed), max_strain=0.01)
        shares += list(np.abs(np.array(view.lattice.abc) / original.lattice.abc - 1))
        assert view.frac_coords == pytest.approx(original.frac_coords)
    assert 0.005 < max(shares) <= 0.03


def test_displacement_moves_every_atom_within_the_stated_radius():
    original = STRUCTURES["quartz"]
    moved = []
    for seed in range(50):
        view = augmentation_module.displaced(
            original, np.random.default_rng(seed), max_displacement_angstrom=0.05
        )
        moved += [float(a.distance(b)) for a, b in zip(original, view, strict=True)]
    assert min(moved) > 0
    assert 0.04 < max(moved) <= 0.05 + 1e-9
    # even in the ball: the mean distance from the centre is 3/4 of the radius
    assert np.mean(moved) == pytest.approx(0.0375, abs=0.002)


EVERYTHING = AugmentationRecipe(
    **{f.name: 1.0 for f in fields(AugmentationRecipe) if f.name.endswith("_probability")}
)


def test_seed_epoch_and_index_fix_the_view():
    crystal = Crystal("quartz", STRUCTURES["quartz"], {"band_gap_ev": 5.8})
    first = augment(crystal, EVERYTHING, seed=1, epoch=2, index=3)
    again = augment(crystal, EVERYTHING, seed=1, epoch=2, index=3)
    assert first.structure == again.structure
    assert first.id == "quartz"
    assert first.properties == {"band_gap_ev": 5.8}
    others = [(2, 2, 3), (1, 3, 3), (1, 2, 4)]
    for seed, epoch, index in others:
        other = augment(crystal, EVERYTHING, seed=seed, epoch=epoch, index=index)
        assert not np.allclose(other.structure.lattice.matrix, first.structure.lattice.matrix)


def test_everything_but_strain_and_displacement_together_keeps_the_crystal():
    recipe = AugmentationRecipe(
        **{f"{n}_probability": 0.7 for n in (
            "redescribe", "supercell", "shear_cell", "permute_axes", "translate", "rotate", "permute_sites")}
    )  # fmt: skip
    for name, structure in STRUCTURES.items():
        for index in range(3):
            view = augment(Crystal(name, structure), recipe, seed=0, epoch=0, index=index)
            assert StructureMatcher().fit(structure, view.structure)
            assert spacegroup_number(view.structure) == spacegroup_number(structure)


def test_a_change_happens_as_often_as_its_probability_says():
    crystal = Crystal("copper", STRUCTURES["copper"])
    recipe = AugmentationRecipe(translate_probability=0.3)
    views = [augment(crystal, recipe, seed=0, epoch=0, index=i).structure for i in range(400)]
    changed = sum(bool(np.any(view.frac_coords != 0)) for view in views)
    assert changed == pytest.approx(120, abs=30)  # 3 standard deviations of 400 draws


def test_nothing_is_changed_by_default():
    crystal = Crystal("rutile", STRUCTURES["rutile"])
    assert augment(crystal, AugmentationRecipe(), seed=0, epoch=0, index=0).structure == crystal.structure
    assert not AugmentationRecipe().does_anything


def test_a_molecule_keeps_its_distances_under_rotation_and_reordering():
    water = Molecule(["O", "H", "H"], [[0, 0, 0.117], [0, 0.757, -0.467], [0, -0.757, -0.467]])
    recipe = AugmentationRecipe(rotate_probability=1, permute_sites_probability=1, translate_probability=1)
    view = augment(Crystal("water", water), recipe, seed=1, epoch=0, index=0).structure
    assert isinstance(view, Molecule)
    assert np.sort(view.distance_matrix, axis=None) == pytest.approx(
        np.sort(water.distance_matrix, axis=None)
    )


def test_a_left_handed_crystal_stays_left_handed():
    # P3_121 (152) and P3_221 (154) are each other's mirror image
    recipe = AugmentationRecipe(permute_axes_probability=1, rotate_probability=1, redescribe_probability=1)
    for index in range(6):
        view = augment(Crystal("quartz", STRUCTURES["quartz"]), recipe, seed=0, epoch=0, index=index)
        assert spacegroup_number(view.structure) == 152


def test_a_probability_beyond_one_is_refused():
    with pytest.raises(ValueError, match=r"translate_probability is 1\.5"):
        AugmentationRecipe(translate_probability=1.5)
