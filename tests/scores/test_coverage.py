"""Coverage by fingerprints."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.scores import coverage
from crystallm_kit.scores.coverage import (
    CUTOFFS,
    NOVELTY_CUTOFFS,
    Cutoffs,
    coverage_scores,
    diversity_scores,
    fingerprint_genmetrics_scores,
    fingerprint_novelty,
    nearest,
)
from crystallm_kit.scores.fingerprints.composition import unscaled
from crystallm_kit.scores.fingerprints.crystal import FingerprintFailure, Fingerprints, fingerprints
from crystallm_kit.structures.files import read

CUTOFF = Cutoffs(0.8, 4.0)


def _some(n, seed):
    """Random fingerprints whose nearest distances lie on both sides of CUTOFF."""
    rng = np.random.default_rng(seed)
    spread = rng.choice([0.02, 0.3], size=(n, 1))
    return [
        Fingerprints(s, c)
        for s, c in zip(
            spread * rng.normal(size=(n, 61)), spread * 2 * rng.normal(size=(n, 132)), strict=True
        )
    ]


@pytest.fixture
def generated():
    samples = _some(40, 1)
    for i in (3, 17):
        samples[i] = None
    samples[21] = FingerprintFailure("fingerprint:neighbours", "site 0: ...")
    return samples


@pytest.fixture
def reference():
    return _some(50, 2)


def _by_name(scores):
    return {score.name: score for score in scores}


def _straightforward(generated, reference, cutoffs):
    """The definition as CDVAE states it, with whole distance matrices."""
    kept = [f for f in generated if isinstance(f, Fingerprints)]
    structure = cdist([f.structure for f in kept], [f.structure for f in reference])
    composition = cdist([f.composition for f in kept], [f.composition for f in reference])
    recalled = (structure.min(0) <= cutoffs.structure) & (composition.min(0) <= cutoffs.composition)
    covered = (structure.min(1) <= cutoffs.structure) & (composition.min(1) <= cutoffs.composition)
    return {
        "cdvae.cov_recall": recalled.mean(),
        "cdvae.cov_precision": covered.sum() / len(generated),
        "cdvae.amsd_recall": structure.min(0).mean(),
        "cdvae.amsd_precision": structure.min(1).mean(),
        "cdvae.amcd_recall": composition.min(0).mean(),
        "cdvae.amcd_precision": composition.min(1).mean(),
    }


@pytest.mark.parametrize("pairs_at_once", [7, 120, 2_000_000])
def test_coverage_is_cdvaes_whatever_the_blocks(generated, reference, monkeypatch, pairs_at_once):
    monkeypatch.setattr(coverage, "_PAIRS_AT_ONCE", pairs_at_once)
    expected = _straightforward(generated, reference, CUTOFF)
    found = _by_name(coverage_scores(generated, reference, cutoffs=CUTOFF, n_requested=len(generated)))
    assert 0 < expected["cdvae.cov_recall"] < 1
    assert 0 < expected["cdvae.cov_precision"] < 1
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-14), name
        assert found[name].low <= value <= found[name].high


def test_precisions_of_the_three_protocols_differ_in_their_denominators(generated, reference):
    valid = [i % 3 != 0 for i in range(40)]  # 3 and 21, without fingerprints, are not; 17 is
    sensible = [i % 5 != 0 for i in range(40)]
    scores = coverage_scores(
        generated, reference, cutoffs=CUTOFF, n_requested=45, valid=valid, sensible=sensible
    )
    found = _by_name(scores)
    kept = [i for i, f in enumerate(generated) if isinstance(f, Fingerprints)]
    distances = [
        cdist([getattr(generated[i], part) for i in kept], [getattr(f, part) for f in reference]).min(1)
        for part in ("structure", "composition")
    ]
    covered = {
        i
        for i, s, c in zip(kept, *distances, strict=True)
        if s <= CUTOFF.structure and c <= CUTOFF.composition
    }
    counts = {name: (score.numerator, score.denominator) for name, score in found.items()}
    assert counts["cdvae.cov_precision"] == (len(covered), 45)
    assert counts["crystallm.cov_precision"] == (sum(sensible[i] for i in covered), 32)
    n_valid = sum(valid) - 1
    assert counts["crystal_text_llm.cov_precision"] == (sum(valid[i] for i in covered), n_valid)


def test_what_is_not_known_is_not_computed_and_says_why(generated, reference):
    scores = coverage_scores(generated, reference, cutoffs=CUTOFFS["mp_20"], n_requested=40)
    found = _by_name(scores)
    assert np.isnan(found["crystal_text_llm.cov_precision"].value)
    assert "valid" in found["crystal_text_llm.cov_precision"].note


def test_a_set_without_fingerprints_covers_nothing(reference):
    found = _by_name(coverage_scores([None] * 5, reference, cutoffs=CUTOFF, n_requested=5))
    assert found["cdvae.cov_recall"].value == 0
    assert found["cdvae.cov_precision"].numerator == 0
    assert np.isnan(found["cdvae.amsd_recall"].value)
    assert "fingerprint" in found["cdvae.amsd_recall"].note


def test_a_set_covers_itself(reference):
    found = _by_name(coverage_scores(reference, reference, cutoffs=Cutoffs(0, 0), n_requested=50))
    assert found["cdvae.cov_recall"].value == found["cdvae.cov_precision"].value == 1
    assert found["cdvae.amcd_precision"].value == 0


def test_structure_and_composition_may_be_near_two_crystals():
    """CDVAE's definition: each nearest neighbour is looked for on its own."""
    zero, far = np.zeros(61), np.full(61, 5.0)
    sample = Fingerprints(zero, np.zeros(132))
    reference = [Fingerprints(zero, np.full(132, 9.0)), Fingerprints(far, np.zeros(132))]
    found = _by_name(coverage_scores([sample], reference, cutoffs=CUTOFF, n_requested=1))
    assert found["cdvae.cov_precision"].value == 1
    joint = _by_name(fingerprint_genmetrics_scores([sample], test=reference))
    assert joint["genmetrics.fingerprint_coverage"].value == 0


def test_nearest_is_infinite_where_there_is_nothing(reference):
    found, nothing = nearest(reference, [])
    assert np.isinf(found.structure).all()
    assert len(nothing.composition) == 0


def test_novelty_counts_samples_far_in_one_of_the_two(generated, reference):
    valid = [i % 4 != 0 for i in range(40)]
    score = fingerprint_novelty(generated, reference, valid=valid, cutoffs=CUTOFF)
    chosen = [f for f, ok in zip(generated, valid, strict=True) if ok and isinstance(f, Fingerprints)]
    structure = cdist([f.structure for f in chosen], [f.structure for f in reference]).min(1)
    composition = cdist([f.composition for f in chosen], [f.composition for f in reference]).min(1)
    expected = ((structure > CUTOFF.structure) | (composition > CUTOFF.composition)).sum()
    assert (score.numerator, score.denominator) == (expected, len(chosen))
    assert 0 < expected < len(chosen)
    assert Cutoffs(0.1, 2.0) == NOVELTY_CUTOFFS


def test_diversity_is_the_mean_of_all_pairs(generated, monkeypatch):
    monkeypatch.setattr(coverage, "_PAIRS_AT_ONCE", 100)
    kept = [f for f in generated if isinstance(f, Fingerprints)]
    found = _by_name(diversity_scores(generated, valid=[True] * 40))
    expected = pdist([f.composition for f in kept]).mean()
    assert found["crystal_text_llm.comp_div"].value == pytest.approx(expected)
    expected = pdist([f.structure for f in kept]).mean()
    assert found["crystal_text_llm.struct_div"].value == pytest.approx(expected)
    alone = diversity_scores(generated, valid=[True] + [False] * 39)
    assert all(np.isnan(score.value) and "pair" in score.note for score in alone)


def test_genmetrics_coverage_counts_copies_and_may_exceed_one(reference):
    one = reference[0]
    found = _by_name(fingerprint_genmetrics_scores([one, one, one, None], test=[one, reference[1]], n_test=3))
    coverage = found["genmetrics.fingerprint_coverage"]
    assert (coverage.numerator, coverage.denominator) == (3, 3)  # of a third test crystal there is none
    found = _by_name(fingerprint_genmetrics_scores([one, one, one, None], test=[one, reference[1]]))
    assert found["genmetrics.fingerprint_coverage"].value == 1.5
    assert found["genmetrics.fingerprint_coverage"].low is None
    assert found["genmetrics.fingerprint_uniqueness"].value == 0
    assert "no reference" in found["genmetrics.fingerprint_novelty"].note


def test_genmetrics_matches_pairs_on_unscaled_compositions():
    rng = np.random.default_rng(5)
    first, second = (
        [Fingerprints(0.05 * rng.normal(size=61), 0.003 * rng.normal(size=132)) for _ in range(30)]
        for _ in range(2)
    )

    def matches(others):
        near = cdist([f.structure for f in first], [f.structure for f in others]) <= 0.55
        return near & (cdist(*[[unscaled(f.composition) for f in side] for side in (first, others)]) <= 7)

    expected = matches(second).any(axis=1).sum()
    assert 0 < expected < 30
    settings = {"training": second, "test": second[:20], "cutoffs": Cutoffs(0.55, 7)}
    found = _by_name(fingerprint_genmetrics_scores(first, **settings))
    assert found["genmetrics.fingerprint_novelty"].numerator == 30 - expected
    assert found["genmetrics.fingerprint_coverage"].numerator == matches(second[:20]).any(axis=1).sum()
    n_copies = matches(first).sum() - 30
    assert n_copies > 0
    assert found["genmetrics.fingerprint_uniqueness"].numerator == 30 * 29 - n_copies


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([None], [], 1), EmptyInput, "reference"),
        (([], [1], 0), EmptyInput, "requested"),
        (([None, None], [1], 1), UserError, "2 samples of 1 requested"),
    ],
)
def test_bad_counts_are_refused(arguments, error, match):
    generated, reference, n_requested = arguments
    with pytest.raises(error, match=match):
        coverage_scores(generated, reference, cutoffs=CUTOFF, n_requested=n_requested)


def test_a_list_of_another_length_is_refused(generated, reference):
    with pytest.raises(UserError, match="valid has 3 entries, 40 expected"):
        coverage_scores(generated, reference, cutoffs=CUTOFF, n_requested=40, valid=[True] * 3)


@pytest.mark.slow
@pytest.mark.real_data
def test_coverage_of_diffcsps_first_samples():
    """Against the definition written out. Published for all of them and MP-20's own test split, which is not
    at hand: COV-R 99.71, COV-P 99.76 (Jiao et al., arXiv:2309.04475).
    """
    data, samples = os.environ.get("CRYSTALLM_KIT_DATA"), os.environ.get("CRYSTALLM_KIT_SAMPLES")
    if not (data and samples):
        pytest.skip("CRYSTALLM_KIT_DATA or CRYSTALLM_KIT_SAMPLES is not set")
    generated, reference = (
        [fingerprints(crystal.structure) for crystal in islice(read(path), 1000)]
        for path in (Path(samples) / "DiffCSP_mp_20.pt", Path(data) / "mp_test.parquet")
    )
    cutoffs = CUTOFFS["mp_20"]
    found = _by_name(coverage_scores(generated, reference, cutoffs=cutoffs, n_requested=1000))
    for name, value in _straightforward(generated, reference, cutoffs).items():
        assert found[name].value == pytest.approx(value, rel=1e-12), name
    assert found["cdvae.cov_recall"].numerator == 971
    assert found["cdvae.cov_precision"].numerator == 944
