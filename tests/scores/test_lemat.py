"""LeMat-GenBench's checks: against SMACT and pymatgen step by step, and against its own counts."""

import os
import random
import warnings
from itertools import combinations_with_replacement, product
from pathlib import Path

import numpy as np
import pytest
from pymatgen.analysis.local_env import get_neighbors_of_site_with_index
from pymatgen.core import Composition, Element, Lattice, Structure
from pymatgen.core.bond_valence import ICSD_BV_DATA, BVAnalyzer, calculate_bv_sum
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
from smact.metallicity import metallicity_score

from crystallm_kit.scores.lemat import lemat_checks, lemat_spacegroup_number
from crystallm_kit.scores.lemat_charge import (
    can_be_neutral,
    lemat_tables,
    metallicity,
    neutral_by_composition,
)
from crystallm_kit.scores.measures import MeasuredCrystal
from crystallm_kit.structures.files import read

# Of the libraries that the kit is compared with: unknown electronegativities, spglib's old way to fail.
pytestmark = [
    pytest.mark.filterwarnings("ignore:No Pauling electronegativity"),
    pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING"),
]
SAMPLES = os.environ.get("CRYSTALLM_KIT_SAMPLES", "")
SYMBOLS = [symbol for symbol in lemat_tables().elements if Element(symbol).Z <= 103]


def counts_of(formula):
    return tuple((symbol, int(n)) for symbol, n in Composition(formula).get_el_amt_dict().items())


def rock_salt(a="Na", b="Cl", edge=5.64):
    fcc = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    return Structure(Lattice.cubic(edge), [a] * 4 + [b] * 4, np.vstack([fcc, 0.5 - fcc]))


def random_structures(n, seed):
    """Cells of 1 to 4 kinds of atoms, some crowded, some empty: what a bad model may write."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    for _ in range(n):
        kinds = draw.sample(SYMBOLS, draw.randint(1, 4))
        species = [kind for kind in kinds for _ in range(draw.randint(1, 3))]
        edges, angles = numbers.uniform(2.0, 9.0, 3), numbers.uniform(70, 110, 3)
        yield Structure(Lattice.from_parameters(*edges, *angles), species, numbers.random((len(species), 3)))


def neutral_choices(composition, states_of):
    """Yield mean states by element, tried out atom by atom, as the peer does."""
    reduced = composition.reduced_composition
    sums = []
    for element, n in reduced.items():
        own = {
            sum(choice)
            for choice in combinations_with_replacement(states_of(element), int(n))
            if max(choice) - min(choice) <= 1
        }
        sums.append(sorted(own - {0}))
    for choice in product(*sums):
        if sum(choice) == 0:
            yield [total / n for total, n in zip(choice, reduced.values(), strict=True)]


def is_neutral_by_the_libraries(structure):
    """All five steps of the peer's rule by SMACT and pymatgen; only the table of step 4 is the kit's."""
    composition = structure.composition
    try:
        if metallicity_score(composition) > 0.7:
            return True
        groups = SpacegroupAnalyzer(structure).get_symmetrized_structure().equivalent_indices
        if all(
            abs(calculate_bv_sum(structure[g[0]], get_neighbors_of_site_with_index(structure, g[0]))) < 1e-15
            for g in groups
        ):
            return True
    except (KeyError, ValueError):
        pass
    try:
        BVAnalyzer().get_oxi_state_decorated_structure(structure)
    except ValueError:
        pass
    else:
        return True
    tables = lemat_tables()
    if any(element.symbol in tables.without_prior for element in composition):
        return False
    if next(neutral_choices(composition, lambda e: tables.elements[e.symbol].prior), None) is not None:
        return True
    chi = [element.X for element in composition.reduced_composition]
    with np.errstate(all="ignore"):
        scores = [
            np.corrcoef(c, chi)[0, 1] for c in neutral_choices(composition, lambda e: e.oxidation_states)
        ]
    return bool(scores) and bool(min(scores) < 0)


@pytest.mark.parametrize("seed", range(3))
def test_charge_is_decided_as_by_the_libraries_step_by_step(seed):
    for structure in random_structures(25, seed):
        ours = lemat_checks(structure)["charge_neutral"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert ours == is_neutral_by_the_libraries(structure), structure.formula


@pytest.mark.parametrize(
    ("formula", "decided"),
    [
        ("NaCl", True),
        ("Fe3O4", True),
        ("Cu3Au", True),
        ("NaCl3", None),
        ("He", None),
        ("Si", None),
        ("O2", None),
    ],
)
def test_what_the_composition_decides(formula, decided):
    assert neutral_by_composition(counts_of(formula)) is decided


def test_metallicity_is_smacts():
    draw = random.Random(1)
    for _ in range(300):
        counts = tuple((symbol, draw.randint(1, 6)) for symbol in draw.sample(SYMBOLS, draw.randint(1, 5)))
        assert metallicity(counts) == pytest.approx(metallicity_score(Composition(dict(counts))), abs=1e-12)


def test_many_atoms_of_one_element_take_no_longer():
    """The peer tries 1.3e9 choices for CuSi64 (hours); only neighbouring states can be mixed."""
    assert neutral_by_composition((("Cu", 1), ("Si", 64))) in (True, None)
    assert can_be_neutral((("Fe", 200), ("O", 300)), [(2, 3), (-2,)])


def test_bond_valence_states_are_those_of_pymatgens_analyzer():
    known = {symbol: element.bond_valence for symbol, element in lemat_tables().elements.items()}
    found = dict.fromkeys(known, ())
    for species, data in ICSD_BV_DATA.items():
        if species.oxi_state and data["std"] > 0:
            found[species.symbol] = (*found[species.symbol], int(species.oxi_state))
    assert {s: tuple(sorted(v)) for s, v in found.items()} == known


def test_elements_and_alloys_without_bond_valences_are_neutral():
    silicon = Structure(Lattice.cubic(5.43), ["Si"] * 2, [[0, 0, 0], [0.25, 0.25, 0.25]])
    assert lemat_checks(silicon)["charge_neutral"]


def test_an_element_without_priors_is_not_neutral():
    """The peer's step 4 raises for astatine, which it counts as not valid. (NaAt has no bond valences.)"""
    assert not lemat_checks(rock_salt("At", "F"))["charge_neutral"]
    assert lemat_checks(rock_salt("I", "F"))["charge_neutral"]
    assert lemat_checks(rock_salt("Na", "At"))["charge_neutral"]


def test_distances_are_of_different_sites_only():
    """Loophole: lithium in a cubic cell of 1.3 angstrom."""
    lithium = Structure(Lattice.cubic(1.3), ["Li"], [[0, 0, 0]])
    assert lemat_checks(lithium)["distance"]
    near = Structure(Lattice.cubic(8), ["Na", "Cl"], [[0, 0, 0], [0.2, 0, 0]])
    assert not lemat_checks(near)["distance"]  # 1.6 angstrom, at least 1.75 expected


@pytest.mark.parametrize(
    "structure",
    [
        Structure(Lattice.cubic(0.9), ["Li"], [[0, 0, 0]]),  # edge below 1 angstrom
        rock_salt(edge=60.0),  # below 0.01 g/cm3
        rock_salt("Pt", "Au", edge=3.5),  # above 25 g/cm3
        Structure(Lattice.cubic(6), ["Na", "Na"], [[0, 0, 0], [0, 0, 0]]),  # spglib finds no symmetry
    ],
    ids=("edge", "thin", "dense", "coinciding"),
)
def test_what_is_not_plausible(structure):
    assert not lemat_checks(structure)["plausible"]


def test_cells_that_are_none_fail_everything():
    flat = Structure(Lattice([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), ["Na"], [[0, 0, 0]])
    shared = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    lost = Structure(Lattice.cubic(4), ["Na"], [[np.nan, 0, 0]])
    for structure in (flat, shared, lost):
        assert set(lemat_checks(structure).values()) == {False}


def test_space_groups_are_those_of_pymatgens_analyzer():
    for structure in (rock_salt(), rock_salt("Cs", "Br", 7.2), *random_structures(5, 9)):
        found = lemat_spacegroup_number(MeasuredCrystal(structure))
        try:
            expected = SpacegroupAnalyzer(structure).get_space_group_number()
        except ValueError:
            expected = None
        assert found == expected


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not SAMPLES, reason="CRYSTALLM_KIT_SAMPLES is not set")
def test_counts_on_diffcsps_samples_are_the_peers():
    checks = [lemat_checks(c.structure) for c in read(Path(SAMPLES) / "DiffCSP_mp_20.pt")]
    assert sum(c["charge_neutral"] for c in checks) == 9634
    assert sum(c["distance"] for c in checks) == 9940
    assert sum(c["plausible"] for c in checks) == 10_000
    valid = [all(c.values()) for c in checks]
    assert sum(valid) == 9576
    assert sum(valid[:2500]) == 2392
