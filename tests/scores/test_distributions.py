"""Wasserstein distances of densities and numbers of elements."""

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.distributions import Distributed, wasserstein, wasserstein_scores


def _some(n, shift, seed):
    rng = np.random.default_rng(seed)
    return [
        Distributed(float(d), int(e))
        for d, e in zip(rng.gamma(4, 1.5, n) + shift, rng.integers(1, 5, n), strict=True)
    ]


@pytest.fixture
def reference():
    return _some(1500, 0.0, 1)


def _by_name(scores):
    return {score.name: score for score in scores}


def test_distance_by_hand():
    # 1 and 3 each move by 1, 5 by 0: two thirds on average
    assert wasserstein(np.array([1.0, 3, 5]), np.array([2.0, 4, 5])) == pytest.approx(2 / 3)


def test_all_valid_samples_and_the_whole_reference_count(reference):
    samples = _some(1200, 0.7, 2)
    found = _by_name(wasserstein_scores(samples, reference))
    for name, field in (("wdist_density", "density_g_cm3"), ("wdist_num_elems", "n_elements")):
        score = found[f"crystal_text_llm.{name}"]
        expected = wasserstein_distance(
            [getattr(s, field) for s in samples], [getattr(r, field) for r in reference]
        )
        assert score.value == pytest.approx(expected)
        assert score.denominator == 1200
        assert score.low <= score.value <= score.high
    assert found["cdvae.wdist_density"].denominator == 1000
    # the shift is the distance, but for noise
    assert found["cdvae.wdist_density"].value == pytest.approx(0.7, abs=0.25)


def test_draws_are_seeded(reference):
    samples = _some(2000, 0.3, 3)
    first, again = (_by_name(wasserstein_scores(samples, reference, seed=4)) for _ in range(2))
    assert {n: s.value for n, s in first.items() if s.value == s.value} == {
        n: s.value for n, s in again.items() if s.value == s.value
    }
    other = _by_name(wasserstein_scores(samples, reference, seed=5))
    assert other["cdvae.wdist_density"].value != first["cdvae.wdist_density"].value
    assert other["crystallm.wdist_density"].value == first["crystallm.wdist_density"].value
    assert "1337" in other["crystallm.wdist_density"].note


def test_fewer_than_a_thousand_valid_samples_leave_the_drawn_ones_out(reference):
    found = _by_name(wasserstein_scores(_some(999, 0, 6), reference))
    for name in ("cdvae.wdist_density", "cdvae.wdist_num_elems", "crystallm.wdist_density"):
        assert np.isnan(found[name].value)
        assert found[name].note == "999 valid samples; 1,000 at least expected"
    assert found["crystal_text_llm.wdist_density"].value > 0


def test_what_needs_gemnet_says_so(reference):
    found = _by_name(wasserstein_scores(_some(5, 0, 6), reference))
    for name in ("wdist_prop", "opt_sr5", "opt_sr10", "opt_sr15"):
        assert "GemNet" in found[f"cdvae.{name}"].note
        assert found[f"cdvae.{name}"].as_dict()["value"] is None


def test_no_valid_samples_give_reasons_and_no_reference_an_error(reference):
    assert all(np.isnan(score.value) and score.note for score in wasserstein_scores([], reference))
    with pytest.raises(EmptyInput, match="reference"):
        wasserstein_scores(_some(5, 0, 1), [])
