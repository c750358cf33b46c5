"""scores/stability/, sample.py, scores.py and element_references.py: denominators and guards by hand."""

import math

import numpy as np
import pytest
from pymatgen.core import Composition, Lattice, Structure

from crystallm_kit.errors import EmptyInput, ImpossibleRequest, ReadError, UserError
from crystallm_kit.scores.stability.element_references import (
    Check,
    ElementReferences,
    fit_references,
    read_references,
    shipped_references,
)
from crystallm_kit.scores.stability.hull import Hull
from crystallm_kit.scores.stability.sample import Judge, Stability, judge_of, rmsd_angstrom, stability_of
from crystallm_kit.scores.stability.scores import Standing, stability_scores
from crystallm_kit.structures.relaxation import Relaxed

CHECK = Check(
    "mp_test, 300", 300, 4, "relaxed", 0.022, 0.003, "small", 0.031, 0.002, 0.93, 0.8, "seen in training"
)
REFERENCES = ElementReferences("toy 1", {"Na": -1.3, "Cl": -1.8, "Fe": -8.0}, "three", 3, 0.0, (CHECK,))
HULL = Hull.from_formation_energies(["NaCl", "Na", "Cl2", "Fe"], [-2.1, 0, 0, 0], name="small")


def rock_salt(a=5.64, cation="Na"):
    basis = [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]]
    return Structure(basis, [cation, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def relaxed(structure, energy, *, before=None, converged=True, reason=None):
    return Relaxed(structure, energy, converged, 7, reason, 0.01, 0.0, energy if before is None else before)


# ---------------------------------------------------------------- one sample


def test_a_samples_distance_is_its_energy_less_the_elements_and_the_hull():
    found = stability_of(relaxed(rock_salt(5.7), -3.60, before=-3.5), rock_salt(), REFERENCES, HULL)
    assert found.formation_energy_ev_per_atom == pytest.approx(-3.60 + 1.55)
    assert found.hull_distance_ev_per_atom == pytest.approx(0.05)
    assert found.submitted_hull_distance_ev_per_atom == pytest.approx(0.15)
    assert (found.n_elements, found.n_sites, found.n_competing, found.n_steps) == (2, 2, 1, 7)
    assert found.reason is None


def test_what_cannot_be_had_is_nan_with_its_reason():
    failed = Relaxed(None, math.nan, False, 3, "volume")
    found = stability_of(failed, rock_salt(), REFERENCES, HULL)
    assert (found.reason, found.converged) == ("volume", False)
    assert math.isnan(found.hull_distance_ev_per_atom)
    assert math.isnan(found.rmsd_angstrom)
    strange = rock_salt(cation="K")
    found = stability_of(relaxed(strange, -3.0), strange, REFERENCES, HULL)
    assert found.reason == "references: no K"
    more = ElementReferences("toy 1", {**REFERENCES.energies_ev_per_atom, "K": -1.1}, "four", 4, 0.0)
    found = stability_of(relaxed(strange, -3.0), strange, more, HULL)
    assert found.reason == "hull: no K"
    assert found.formation_energy_ev_per_atom == pytest.approx(-3.0 + 1.45)
    assert math.isnan(found.hull_distance_ev_per_atom)


def test_rmsd_is_in_angstrom_and_sees_through_cells_and_is_half_the_spacing_without_a_match():
    start = rock_salt()
    assert rmsd_angstrom(start, start) == pytest.approx(0, abs=1e-6)
    # CsCl's arrangement, one site moved along [111] by 0.1 sqrt(3) angstrom: half of it each about the centre
    cubic = Structure(Lattice.cubic(4.1), ["Cs", "Cl"], [[0, 0, 0], [0.5] * 3])
    moved = Structure(Lattice.cubic(4.1), ["Cs", "Cl"], [[0, 0, 0], [0.5 + 0.1 / 4.1] * 3])
    assert rmsd_angstrom(moved, cubic) == pytest.approx(0.1 * 3**0.5 / 2, rel=1e-3)
    other = Structure(Lattice.cubic(4.1), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    assert rmsd_angstrom(other, cubic) == pytest.approx(0.5 * (4.1**3 / 2) ** (1 / 3))


# ---------------------------------------------------------------- all samples


def sample(distance, *, before=None, n_elements=2, n_sites=4, n_competing=3, converged=True, rmsd=0.1):
    return Stability(
        n_elements, n_sites, -1.0, -0.5, distance, distance if before is None else before, n_competing,
        converged, 5, None if converged else "volume", rmsd,
    )  # fmt: skip


ROWS = [
    sample(-0.02),  # 0 stable
    sample(-0.02),  # 1 its copy
    sample(0.0, n_elements=1),  # 2 an element, on the hull
    sample(-0.5, n_competing=0),  # 3 nothing known to compete
    sample(0.1, before=0.0),  # 4 metastable; as submitted on the hull
    sample(0.05),  # 5 metastable, known
    sample(0.11, before=0.3),  # 6 neither
    sample(math.nan, converged=False, rmsd=math.nan),  # 7 exploded
    sample(-0.1),  # 8 not valid
    None,  # 9 did not parse
]
VALID = [True] * 8 + [False, False]
COPY_OF = [None, 0, None, None, None, None, None, None, None, None]
NOVEL = [True, True, True, True, True, False, True, True, True, None]
STANDING = Standing(VALID, COPY_OF, NOVEL)


def by_name(**given):
    scores = stability_scores(ROWS, judge=judge_of(REFERENCES, HULL), relaxed=STANDING, **given)
    assert len({s.name for s in scores}) == len(scores)
    return {s.name: s for s in scores}


def counts(scores, *names):
    return [(scores[n].numerator, scores[n].denominator) for n in names]


def test_the_kits_rates_are_of_all_requested_and_of_valid_ones():
    found = by_name()
    assert counts(found, "kit.relaxed", "kit.stable", "kit.metastable", "kit.sun", "kit.msun") == [
        (8, 10), (4, 10), (6, 10), (3, 10), (4, 10),
    ]  # fmt: skip
    assert found["kit.hull_distance"].value == pytest.approx(
        np.mean([-0.02, -0.02, 0, -0.5, 0.1, 0.05, 0.11, -0.1])
    )
    assert found["kit.stable"].low < 0.4 < found["kit.stable"].high


def test_the_loopholes_stand_beside_sun():
    found = by_name()
    assert counts(found, "kit.sun_single_elements", "kit.sun_sparse_hull", "kit.sun_guarded") == [
        (1, 3), (1, 3), (1, 10),
    ]  # fmt: skip
    assert counts(found, "kit.msun_single_elements", "kit.msun_sparse_hull", "kit.msun_guarded") == [
        (1, 4), (1, 4), (2, 10),
    ]  # fmt: skip
    assert found["kit.sun_single_elements"].over == "kit.sun"


def test_mattergens_masks_are_independent_and_failed_jobs_count():
    found = by_name()
    assert counts(found, "mattergen.stable", "mattergen.unique", "mattergen.novel", "mattergen.sun") == [
        (7, 9), (7, 8), (7, 8), (5, 9),
    ]  # fmt: skip
    assert "1 failed jobs" in found["mattergen.sun"].note
    assert found["mattergen.rmsd"].value == pytest.approx(0.1)


def test_crystal_text_llms_metastable_drops_failures_and_its_limit_is_exclusive():
    assert "crystal_text_llm.metastable" not in by_name()
    found = by_name(valid_text_llm=[True] * 10)
    assert counts(found, "crystal_text_llm.metastable") == [(6, 8)]  # 0.1 itself is not


def test_lemats_parts_are_of_structures_as_submitted_and_first_seen_within_each():
    # 4 is submitted on the hull, so it is in SUN; 1 copies 0 within the same part
    found = by_name(submitted=Standing(VALID, COPY_OF, NOVEL))
    assert counts(found, "lemat.stable", "lemat.metastable", "lemat.sun", "lemat.msun") == [
        (5, 8), (6, 8), (4, 8), (0, 8),
    ]  # fmt: skip
    # a copy in the other part counts again, once
    rows = [sample(-0.1), sample(0.05), sample(0.06)]
    standing = Standing([True] * 3, [None, 0, 0], [True] * 3)
    scores = stability_scores(rows, judge=Judge("toy 1", "small"), relaxed=standing, submitted=standing)
    found = {s.name: s for s in scores}
    assert counts(found, "lemat.sun", "lemat.msun", "kit.sun", "kit.msun") == [(1, 3), (1, 3), (1, 3), (1, 3)]


def test_the_judge_and_its_error_stand_in_every_note():
    found = by_name(submitted=STANDING, valid_text_llm=VALID)
    for name in ("kit.sun", "mattergen.sun", "lemat.sun", "crystal_text_llm.metastable", "kit.hull_distance"):
        assert (
            "judge toy 1, hull small; hull distances off by 0.031 eV/atom on 300 known" in found[name].note
        ), name
    error = found["kit.hull_distance_error"]
    assert (error.value, error.denominator) == (0.031, 296)
    assert "of 0.1 eV/atom a crystal is they agree for 93.0%, of 0 for 80.0%" in error.note
    assert "seen in training" in error.note
    bare = stability_scores(ROWS, judge=Judge("toy 1", "small"), relaxed=STANDING)
    error = {s.name: s for s in bare}["kit.hull_distance_error"]
    assert math.isnan(error.value)
    assert "not measured" in error.note
    assert "by the hull other" in Judge("toy 1", "small", Check(**{**CHECK.__dict__, "hull": "other"})).note


def test_without_a_reference_set_there_is_no_sun_and_nothing_is_zero_over_zero():
    standing = Standing([False] * 2, [None] * 2)
    scores = stability_scores(
        [None] * 2,
        judge=Judge("toy", "small"),
        relaxed=standing,
        submitted=standing,
        valid_text_llm=[True] * 2,
    )
    found = {s.name: s for s in scores}
    assert found["kit.stable"].value == 0
    for name in ("kit.sun", "mattergen.stable", "lemat.stable", "crystal_text_llm.metastable", "kit.rmsd"):
        assert math.isnan(found[name].value), name
        assert found[name].note
    with pytest.raises(EmptyInput):
        stability_scores([], judge=Judge("toy", "small"), relaxed=Standing([], []))
    with pytest.raises(UserError, match=r"2 samples, but 1 values of relaxed\.copy_of"):
        stability_scores([None] * 2, judge=Judge("toy", "small"), relaxed=Standing([True] * 2, [None]))


# ---------------------------------------------------------------- element references


def test_the_fit_returns_what_the_energies_were_made_from_despite_crystals_that_are_far_off():
    generator = np.random.default_rng(0)
    truth = {"Na": -1.31, "Cl": -1.84, "Fe": -8.46}
    compositions, known, energies = [], [], []
    for _ in range(200):
        amounts = generator.integers(1, 5, 3)
        composition = Composition(dict(zip(truth, amounts.tolist(), strict=True)))
        formation = -float(generator.random())
        mixed = sum(x * e for x, e in zip(amounts / amounts.sum(), truth.values(), strict=True))
        compositions.append(composition)
        known.append(formation)
        energies.append(mixed + formation + 0.005 * float(generator.standard_normal()))
    energies[3] += 3.0  # the potential has it all wrong
    energies[4] += 2.0
    compositions.append(Composition("NaOg"))
    known.append(0.0)
    energies.append(0.0)
    found = fit_references(compositions, energies, known, potential="toy 1", fitted_on="made here")
    assert found.n_fitted == 200
    for element, energy in truth.items():
        assert found.energies_ev_per_atom[element] == pytest.approx(energy, abs=0.02)
    assert found.missing_elements(Composition("NaOg")) == ("Og",)
    with pytest.raises(ImpossibleRequest, match="no reference energy of Og under toy 1"):
        found.formation_energy(Composition("NaOg"), 0.0)
    with pytest.raises(EmptyInput, match="no element is in 5 of them"):
        fit_references(compositions[:3], energies[:3], known[:3], potential="toy 1", fitted_on="x")


def test_references_are_what_they_were_after_saving(tmp_path):
    path = tmp_path / "references.json"
    REFERENCES.save(path)
    assert read_references(path) == REFERENCES
    path.write_text('{"potential": "x"}')
    with pytest.raises(ReadError, match="no element references"):
        read_references(path)
    with pytest.raises(ReadError, match="cannot be read"):
        read_references(tmp_path / "none.json")


def test_chgnets_references_come_with_their_checks():
    shipped = shipped_references("chgnet")
    assert shipped is shipped_references("chgnet 0.3.0")
    assert len(shipped.energies_ev_per_atom) > 80
    assert {c.structures for c in shipped.checks} == {"relaxed", "as given"}
    for check in shipped.checks:
        assert 0.005 < check.formation_energy_mae < 0.05
        assert "MPtrj" in check.note
    with pytest.raises(ImpossibleRequest, match="no element references for potential 'emt'"):
        shipped_references("emt")
