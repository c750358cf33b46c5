"""Numbers of a whole set, against the peers' formulas written out."""

import math
from collections import Counter

import numpy as np
import pytest
from pymatgen.analysis.hhi import HHIModel
from pymatgen.core import Composition, Element
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.scores.set_columns import columns_of, supply_concentration
from crystallm_kit.scores.statistics import genmetrics_validity, lemat_statistics

# (cell formula, space group at 0.01 angstrom, volume per atom, density, edges): rock salt, cesium chloride,
# silicon, quartz, anatase, iron
CRYSTALS = [
    ("Na4 Cl4", 225, 22.43, 2.16, (5.64, 5.64, 5.64)),
    ("Cs1 Cl1", 221, 35.0, 3.99, (4.12, 4.12, 4.12)),
    ("Si8", 227, 20.02, 2.33, (5.43, 5.43, 5.43)),
    ("Si3 O6", 154, 12.55, 2.65, (4.91, 4.91, 5.40)),
    ("Ti4 O8", 141, 11.36, 3.89, (3.78, 3.78, 9.51)),
    ("Fe2", 229, 11.78, 7.87, (2.87, 2.87, 2.87)),
]


def columns(crystals):
    formulas, groups, volumes, densities, edges = zip(*crystals, strict=True)
    return columns_of(
        cell_formulas=formulas, spacegroup_numbers=groups, volume_per_atom_angstrom3=volumes,
        density_g_cm3=densities, cell_lengths_angstrom=edges,
    )  # fmt: skip


def by_name(scores):
    return {score.name: score for score in scores}


@pytest.fixture
def samples():
    return columns(CRYSTALS[:4])


@pytest.fixture
def reference():
    return columns(CRYSTALS[2:])


def test_jensen_shannon_distances_are_the_peers(samples, reference):
    found = by_name(lemat_statistics(samples, reference))
    ours, theirs = CRYSTALS[:4], CRYSTALS[2:]

    def shares(crystals, labels_of):
        total = Counter(label for crystal in crystals for label in labels_of(crystal))
        return [total[label] / sum(total.values()) for label in range(300)]

    def expected(labels_of):
        return jensenshannon(shares(ours, labels_of), shares(theirs, labels_of))

    def atoms(crystal):
        return [e.Z for e, n in Composition(crystal[0]).items() for _ in range(int(n))]

    system = {225: 7, 221: 7, 227: 7, 229: 7, 154: 5, 141: 4}
    wanted = {
        "lemat.jsd_spacegroup": expected(lambda c: [c[1]]),
        "lemat.jsd_crystal_system": expected(lambda c: [system[c[1]]]),
        "lemat.jsd_composition_counts": expected(atoms),
        "lemat.jsd_composition": expected(lambda c: set(atoms(c))),
    }
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value)
        assert found[name].low <= found[name].value <= found[name].high
    assert found["lemat.jsd"].value == pytest.approx(np.mean(list(wanted.values())))


def test_mmds_are_of_cell_volume_density_and_atomic_density(samples, reference):
    found = by_name(lemat_statistics(samples, reference))

    def mmd(value):
        x, y = ([value(c) for c in part] for part in (CRYSTALS[:4], CRYSTALS[2:]))

        def kernel(a, b):
            return np.mean([math.exp(-((i - j) ** 2) / 2) for i in a for j in b])

        return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)

    wanted = [
        mmd(lambda c: c[2] * Composition(c[0]).num_atoms),
        mmd(lambda c: c[3]),
        mmd(lambda c: 1 / c[2]),
    ]
    names = ("volume", "density", "atomic_density")
    assert [found[f"lemat.mmd_{n}"].value for n in names] == pytest.approx(wanted, abs=1e-12)
    assert found["lemat.mmd"].value == pytest.approx(np.mean(wanted), abs=1e-12)


def test_a_set_compared_with_itself_is_at_no_distance(samples):
    found = by_name(lemat_statistics(samples, samples) + genmetrics_validity(samples, samples))
    for name in ("lemat.jsd", "lemat.mmd"):
        assert found[name].value == pytest.approx(0.0, abs=1e-12)
    assert found["genmetrics.validity"].value == pytest.approx(1.0)


def test_diversity_counts_what_occurs_effectively(samples):
    found = by_name(lemat_statistics(samples, None))
    atoms = np.array([4, 5, 1, 11, 6]) / 27  # Na, Cl, Cs, Si, O
    assert found["lemat.diversity_element"].value == pytest.approx(np.exp(-(atoms * np.log(atoms)).sum()))
    assert found["lemat.diversity_element_coverage"].value == 5 / 118
    assert found["lemat.diversity_spacegroup"].value == pytest.approx(4.0)
    assert found["lemat.diversity_spacegroup_coverage"].value == 4 / 230
    assert found["lemat.diversity_n_sites"].value == pytest.approx(math.exp(1.5 * math.log(2)))  # 8, 2, 8, 9


def test_physical_diversity_is_the_mean_entropy_of_five_histograms(samples):
    """Densities, three edges and packing factors in bins; two rock-salt-like cells share some of them."""
    found = by_name(lemat_statistics(samples, None))["lemat.diversity_physical"]

    def entropy(values, width):
        counts = np.array(list(Counter(int(v // width) for v in values).values())) / len(values)
        return -(counts * np.log(counts)).sum()

    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius

    packed = [
        sum(4 / 3 * math.pi * CovalentRadius.radius[e.symbol] ** 3 * n for e, n in Composition(c[0]).items())
        / (c[2] * Composition(c[0]).num_atoms)
        for c in CRYSTALS[:4]
    ]
    entropies = [
        entropy([c[3] for c in CRYSTALS[:4]], 0.5),
        *(entropy([c[4][i] for c in CRYSTALS[:4]], 0.5) for i in range(3)),
        entropy([min(p, 1.0) for p in packed], 0.05),
    ]
    assert found.value == pytest.approx(np.mean(entropies) / np.log2(4))


def test_supply_concentration_is_by_atoms(samples):
    """The peer weighs by atoms; pymatgen's own model, whose table it is, by mass."""
    found = by_name(lemat_statistics(samples, None))
    table = {"Na": 1.1, "Cl": 1.5, "Cs": 6.0, "Si": 4.7, "O": 0.5}
    by_crystal = [(1.1 + 1.5) / 2, (table["Cs"] + 1.5) / 2, 4.7, (4.7 + 2 * 0.5) / 3]
    assert found["lemat.hhi_production"].value == pytest.approx(np.mean(by_crystal))
    assert found["lemat.hhi_combined"].value == pytest.approx(
        0.25 * found["lemat.hhi_production"].value + 0.75 * found["lemat.hhi_reserve"].value
    )


def test_the_table_of_supply_is_pymatgens_and_the_rest_counts_most():
    production, reserves = supply_concentration()
    known = HHIModel().symbol_hhip_hhir
    for element in Element:
        assert (production[element.Z], reserves[element.Z]) == known.get(element.symbol, (10_000, 10_000))


def test_genmetrics_validity_is_scipys_wasserstein_over_a_dummys(samples, reference):
    found = by_name(genmetrics_validity(samples, reference))
    ours, theirs = ([c[1] for c in part] for part in (CRYSTALS[:4], CRYSTALS[2:]))
    spacegroup = 1 - wasserstein_distance(theirs, ours) / wasserstein_distance(theirs, [1])
    assert found["genmetrics.validity_spacegroup"].value == pytest.approx(spacegroup)
    # modified Pettifor numbers (Glawe et al. 2016) less 1, as the peer's table has them
    number = {"Na": 10, "Cl": 100, "Cs": 7, "Si": 84, "O": 96, "Ti": 50, "Fe": 70}

    def fractions(part):
        total = Counter()
        for crystal in part:
            for element, share in Composition(crystal[0]).fractional_composition.items():
                total[number[element.symbol]] += share
        return list(total), list(total.values())

    (u, u_weights), (v, v_weights) = fractions(CRYSTALS[2:]), fractions(CRYSTALS[:4])
    pettifor = 1 - wasserstein_distance(u, v, u_weights, v_weights) / wasserstein_distance(u, [1], u_weights)
    assert found["genmetrics.validity_pettifor"].value == pytest.approx(pettifor)
    assert found["genmetrics.validity"].value == pytest.approx((spacegroup + pettifor) / 2)


def test_numbers_that_cannot_be_had_say_why(samples):
    found = by_name(lemat_statistics(samples, None) + genmetrics_validity(samples, None))
    for name in ("lemat.jsd_spacegroup", "lemat.mmd", "genmetrics.validity"):
        assert math.isnan(found[name].value)
        assert "no reference" in found[name].note
    assert "ORB" in found["lemat.frechet_orb"].note


def test_samples_without_a_space_group_are_left_out_by_lemat_and_p1_for_genmetrics(reference):
    lost = columns([(formula, None, *rest) for formula, _, *rest in CRYSTALS[:2]])
    found = by_name(lemat_statistics(lost, reference) + genmetrics_validity(lost, reference))
    assert math.isnan(found["lemat.jsd_spacegroup"].value)
    assert found["genmetrics.validity_spacegroup"].value == pytest.approx(0.0)


def test_bad_columns_are_refused():
    with pytest.raises(EmptyInput, match="no crystals"):
        columns_of(cell_formulas=[], spacegroup_numbers=[], volume_per_atom_angstrom3=[], density_g_cm3=[])
    with pytest.raises(UserError, match="no element Xx"):
        columns([("Xx2", 1, 10.0, 1.0, (3, 3, 3))])
    with pytest.raises(UserError, match=r"columns of \[1, 2\] rows"):
        columns_of(
            cell_formulas=["Fe2"],
            spacegroup_numbers=[229, 1],
            volume_per_atom_angstrom3=[1],
            density_g_cm3=[1],
        )
