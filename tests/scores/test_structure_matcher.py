"""The matcher against pymatgen's own: reductions, decisions, RMS distances, ties, and what is no cell."""

import itertools
import os
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import DisorderedStructure, UserError
from crystallm_kit.scores.matcher import compiled, speed
from crystallm_kit.scores.matcher.pairs import Pair, Pool, perturbed, pool_of, real_pairs
from crystallm_kit.scores.matcher.structure_matcher import (
    TOLERANCES,
    Reduced,
    fit,
    is_undecided,
    reduce_many,
    reduced,
    rms_distance,
    rms_distances,
)

DEFAULT, CSP = TOLERANCES["default"], TOLERANCES["csp"]


def rock_salt():
    """NaCl, AFLOW AB_cF8_225_a_b, as its cubic cell of 8 sites."""
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def perovskite(a_site="Ba", b_site="Ti"):
    """Cubic BaTiO3, a = 4.00 angstrom."""
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.cubic(4.0), [a_site, b_site, "O", "O", "O"], sites)


def wurtzite():
    """ZnO, a = 3.25, c = 5.21 angstrom: hexagonal, so that rounding chooses its reduced basis."""
    lattice = Lattice.hexagonal(3.25, 5.21)
    return Structure.from_spacegroup(
        "P6_3mc", lattice, ["Zn", "O"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.382]]
    )


def a15():
    """Cr3Si, a = 4.56 angstrom: 8 sites in a cube, where the csp tolerance is half an edge exactly."""
    return Structure.from_spacegroup("Pm-3n", Lattice.cubic(4.56), ["Cr", "Si"], [[0.25, 0, 0.5], [0, 0, 0]])


def triclinic():
    """Albite-like NaAlSi3O8 of 13 sites in a triclinic cell; the sites are random but for their distances."""
    lattice = Lattice.from_parameters(7.3, 7.7, 8.1, 115.1, 107.2, 100.7)
    sites = np.array(list(itertools.product((0.1, 0.6), (0.1, 0.4, 0.7), (0.05, 0.3, 0.65))))[:13]
    return Structure(lattice, ["Na", "Al", *["Si"] * 3, *["O"] * 8], sites + 0.01 * np.sin(sites * 40))


def iron():
    return Structure(Lattice.cubic(2.87), ["Fe"] * 2, [[0, 0, 0], [0.5, 0.5, 0.5]])


CRYSTALS = [rock_salt, perovskite, wurtzite, a15, triclinic, iron]


def arrays(form: Reduced):
    return form.numbers, form.lattice, form.fractional


def agrees(pairs, **at_least):
    """Compare with pymatgen; `at_least` guards against a set on which agreeing would mean nothing."""
    found = speed.compare(pairs)
    assert found.differ == 0, "\n".join(found.lines())
    for what, least in at_least.items():
        assert sum(found.counts[name, what] for name in TOLERANCES) >= least
    return found


def test_perturbed_copies_are_judged_as_by_pymatgen():
    rng = np.random.default_rng(3)
    pairs = [
        Pair("perturbed", perturbed(make(), rng), perturbed(make(), rng))
        for make in CRYSTALS
        for _ in range(5)
    ]
    agrees(pairs, fit=20, rms=25)


def test_crystals_whose_elements_change_places_are_judged_as_by_pymatgen():
    """Half of all comparisons are then between equally good images and assignments."""
    swapped = [Pair("substituted", perovskite(), perovskite("Ti", "Ba"))]
    rng = np.random.default_rng(0)
    swapped += [Pair("substituted", perturbed(perovskite(), rng), perovskite("Ti", "Ba")) for _ in range(5)]
    swapped += [Pair("substituted", a15(), a15().apply_strain(0.01, inplace=False))]
    agrees(swapped)


def test_a_supercell_a_scaled_and_a_moved_crystal_are_copies():
    truth = reduced(rock_salt())
    supercell = rock_salt()
    supercell.make_supercell([[2, 0, 0], [0, 1, 1], [0, 0, 1]])
    larger, moved = rock_salt().scale_lattice(400) or rock_salt(), rock_salt()
    moved.translate_sites(range(8), [0.123, 0.4, 0.7])
    assert [len(reduced(s).numbers) for s in (supercell, larger, moved)] == [2, 2, 2]
    assert all(fit(reduced(s), truth, DEFAULT) for s in (supercell, larger, moved))
    assert rms_distances([reduced(moved), None], truth, CSP) == [pytest.approx(0, abs=1e-6), None]


def test_other_elements_and_other_structures_are_no_copies():
    caesium_chloride = Structure(Lattice.cubic(3.4), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    bromide = rock_salt()
    bromide.replace_species({"Cl": "Br"})
    for other in (caesium_chloride, bromide):
        assert not fit(reduced(other), reduced(rock_salt()), CSP)
        assert rms_distance(reduced(other), reduced(rock_salt()), CSP) is None


def test_prediction_and_truth_are_not_exchangeable():
    """Protactinium, one atom a cell, from published samples: pymatgen says yes one way and no the other."""
    cells = (
        [[1.298507, 2.365288, 1.028839], [-2.839976, 0, 0.954413], [1.541469, -2.365288, 1.090577]],
        [[0.933659, 2.566543, -1.551511], [1.856702, -2.566543, -0.118589], [-2.790361, 0, -1.553749]],
    )
    first, second = (Structure(Lattice(cell), ["Pa"], [[0, 0, 0]]) for cell in cells)
    assert (StructureMatcher().fit(first, second), StructureMatcher().fit(second, first)) == (True, False)
    assert fit(reduced(first), reduced(second), DEFAULT)
    assert not fit(reduced(second), reduced(first), DEFAULT)


def test_where_rounding_decides_pymatgen_is_asked():
    """A cell length that lies on the tolerance: 3 angstrom against 3.9, with csp's 30 %."""
    first = Reduced("Fe", np.array([26], np.int16), np.diag([3.0, 3.0, 3.9]), np.zeros((1, 3)))
    second = Reduced("Fe", np.array([26], np.int16), np.diag([3.0, 3.0, 3.0]), np.zeros((1, 3)))
    scaled = Reduced("Fe", first.numbers, np.diag([1.3, 1.0, 1.0]) * 3, first.fractional)
    stretched = Reduced("Fe", first.numbers, np.diag([1.3**1.5, 1.0, 1.0]) * 3, first.fractional)
    matcher = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10)
    seen = False
    for one, other in itertools.permutations((first, second, scaled, stretched), 2):
        structures = [Structure(Lattice(f.lattice), f.numbers.tolist(), f.fractional) for f in (one, other)]
        expected = matcher.get_rms_dist(*structures)
        assert (rms_distance(one, other, CSP) is None) == (expected is None)
        seen = seen or is_undecided(one, other, CSP)
    assert seen


def test_the_reduced_form_is_pymatgens():
    """One atom less in the cell, or another of the equal cells, would change decisions later."""
    structure = wurtzite()
    structure.make_supercell([[2, 1, 0], [0, 1, 0], [0, 0, 2]])
    form, expected = reduced(structure), StructureMatcher._get_reduced_structure(structure)
    assert form.formula == "ZnO"
    assert form.numbers.tolist() == [site.specie.Z for site in expected] == [8, 8, 30, 30]
    np.testing.assert_allclose(form.lattice, expected.lattice.matrix, atol=1e-12)
    off = form.fractional - expected.frac_coords
    np.testing.assert_allclose(off - np.rint(off), 0, atol=1e-12)


@pytest.mark.parametrize("formula", ["O", "N", "Na2O2", "CsCl", "Li2SO4", "H2O"])
def test_formulas_are_pymatgens(formula):
    from pymatgen.core import Composition

    composition = Composition(formula)
    species = [element for element, count in composition.items() for _ in range(int(count))]
    structure = Structure(Lattice.cubic(9), species, np.linspace([0, 0, 0], [0.8, 0.7, 0.6], len(species)))
    assert reduced(structure).formula == structure.composition.reduced_formula


def test_what_is_no_cell_is_refused_at_once_and_left_out_of_many():
    flat = Structure(Lattice([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), ["Fe"], [[0, 0, 0]])
    not_finite = Structure(Lattice.cubic(3), ["Fe"], [[0, np.nan, 0]])
    no_number = Structure(Lattice([[np.nan, 0, 0], [0, 3, 0], [0, 0, 3]]), ["Fe"], [[0, 0, 0]])
    needle = Structure(Lattice.orthorhombic(0.01, 0.01, 1000), ["Fe"], [[0, 0, 0]])
    began = time.perf_counter()
    for wrong in (flat, not_finite, no_number, needle):
        with pytest.raises(UserError, match=r"Fe: lattice vectors .* leave it out"):
            reduced(wrong)
    found = reduce_many([flat, iron(), None, needle])
    assert [form is None for form in found] == [True, False, True, True]
    assert time.perf_counter() - began < 20  # compiling included


def test_a_disordered_structure_is_refused():
    mixed = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    partly = Structure(Lattice.cubic(3), [{"Fe": 0.5}], [[0, 0, 0]])
    for structure in (mixed, partly):
        with pytest.raises(DisorderedStructure, match="atom by atom"):
            reduced(structure)


def test_forms_answer_the_same_after_a_file_and_a_pickle(tmp_path):
    """Arrays of a mapped file cannot be written to, for which compiled code is another type."""
    rng = np.random.default_rng(1)
    forms = [reduced(perturbed(triclinic(), rng)) for _ in range(4)]
    mapped = []
    for number, form in enumerate(forms):
        loaded = []
        for part, array in enumerate(arrays(form)):
            np.save(tmp_path / f"{number}_{part}.npy", array)
            loaded.append(np.load(tmp_path / f"{number}_{part}.npy", mmap_mode="r"))
        mapped.append(Reduced(form.formula, *loaded))
    pickled = pickle.loads(pickle.dumps(forms))  # noqa: S301 - our own
    expected = [rms_distance(one, other, CSP) for one in forms for other in forms]
    assert [rms_distance(one, other, CSP) for one in mapped for other in pickled] == expected
    assert sum(value is not None for value in expected) > 4


def test_threads_get_the_answers_of_one_thread():
    rng = np.random.default_rng(2)
    forms = [reduced(perturbed(make(), rng)) for make in CRYSTALS for _ in range(6)]
    pairs = list(itertools.product(forms, forms))
    alone = [rms_distance(*pair, CSP) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: rms_distance(*pair, CSP), pairs)) == alone


def test_the_cache_is_made_anew_where_any_part_changes():
    """Each file of compiled functions counts: numba looks at the one of the entries only."""
    folder = Path(compiled.__file__).parent
    parts = {
        path.stem
        for path in folder.glob("*.py")
        if re.search(r"^@?(kernel|def kernel)\b", path.read_text(), re.MULTILINE)
    }
    assert parts == set(compiled._SOURCES)


def test_two_hundred_sites_take_no_longer_than_a_second():
    rng = np.random.default_rng(5)
    sites = np.array(list(itertools.product(range(6), repeat=3))) / 6 + rng.normal(size=(216, 3)) * 0.02
    species = ["Fe"] * 72 + ["Al"] * 72 + ["Ni"] * 72
    truth = Structure(Lattice.cubic(15), species, sites % 1)
    moved = Structure(Lattice.cubic(15), species, (sites + rng.normal(size=(216, 3)) * 0.002) % 1)
    began = time.process_time()
    first, second = reduced(moved), reduced(truth)
    assert fit(first, second, DEFAULT)
    assert rms_distance(first, second, DEFAULT) < 0.05
    assert time.process_time() - began < 10


def data_folder(name):
    if name not in os.environ:
        pytest.skip(f"{name} names no folder")
    return Path(os.environ[name])


@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore:No Pauling electronegativity")
def test_real_pairs_are_judged_as_by_pymatgen():
    pool = pool_of(data_folder("CRYSTALLM_KIT_DATA"), data_folder("CRYSTALLM_KIT_SAMPLES"), limit=150)
    agrees(real_pairs(pool, 100, seed=7), fit=60, rms=80)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore:No Pauling electronegativity")  # pymatgen's formulas of noble gases
def test_more_real_pairs_are_judged_as_by_pymatgen_and_twenty_times_faster():
    pool = pool_of(data_folder("CRYSTALLM_KIT_DATA"), data_folder("CRYSTALLM_KIT_SAMPLES"), limit=2000)
    agrees(real_pairs(pool, 1500, seed=8), fit=1500, rms=1700)
    _, theirs, mine, differ = speed.match_rate_speed(pool, 30)
    assert differ == 0
    assert theirs / mine > 20


@pytest.mark.slow
def test_several_processes_give_the_forms_of_one():
    structures = [make() for make in CRYSTALS] * 30 + [None]
    alone, shared = reduce_many(structures), reduce_many(structures, processes=2)
    assert shared[-1] is None
    for one, other in zip(alone[:-1], shared[:-1], strict=True):
        assert one.formula == other.formula
        for mine, theirs in zip(arrays(one), arrays(other), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_the_command_prints_both_tables_and_refuses_a_folder_without_data(capsys, tmp_path):
    assert speed.main([str(tmp_path)]) == 2
    assert "none of mp_test" in capsys.readouterr().err
    found = agrees(real_pairs(Pool([make() for make in CRYSTALS], []), 4, seed=1))
    text = "\n".join(found.lines())
    assert "lemat" in text
    assert "times faster" in text
