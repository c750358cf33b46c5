"""Distances of distributions, against scipy and the peer's formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, jensenshannon
from scipy.stats import wasserstein_distance

from crystallm_kit.scores.divergence import binned_wasserstein, gaussian_mmd, jensen_shannon

WEIGHTS = st.lists(st.floats(0, 10), min_size=6, max_size=6).filter(lambda w: sum(w) > 0.1)


@given(WEIGHTS, WEIGHTS)
def test_jensen_shannon_is_scipys(p, q):
    # scipy takes the root of a rounded 0, so equal distributions differ by 1e-8
    assert jensen_shannon(p, q) == pytest.approx(np.nan_to_num(jensenshannon(p, q)), abs=3e-8)


@given(WEIGHTS, WEIGHTS)
def test_wasserstein_on_whole_numbers_is_scipys(p, q):
    assert binned_wasserstein(p, q) == pytest.approx(wasserstein_distance(range(6), range(6), p, q), abs=1e-9)


def test_rows_are_compared_one_by_one():
    rows, q = np.random.default_rng(0).random((4, 9)), np.ones(9)
    assert jensen_shannon(rows, q) == pytest.approx([float(jensen_shannon(row, q)) for row in rows])
    assert binned_wasserstein(rows, q) == pytest.approx([float(binned_wasserstein(row, q)) for row in rows])


def mmd_by_pairs(x, y):
    """LeMat-GenBench's formula: means over all pairs, own pairs included."""
    a, b = np.asarray(x)[:, None], np.asarray(y)[:, None]
    return sum(
        sign * np.exp(-cdist(u, v, "sqeuclidean") / 2).mean()
        for u, v, sign in ((a, a, 1), (b, b, 1), (a, b, -2))
    )


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 400), st.floats(-30, 30), st.integers(0, 10**6))
def test_mmd_is_the_sum_over_all_pairs(scale, shift, seed):
    draw = np.random.default_rng(seed)
    x, y = draw.gamma(2, scale, 400), draw.gamma(2, scale, 300) + shift
    assert gaussian_mmd(x, y) == pytest.approx(mmd_by_pairs(x, y), abs=1e-13)


def test_mmd_of_few_values():
    assert gaussian_mmd([2.1, 5.3, 7.9], [2.0, 8.1]) == pytest.approx(0.1757707, abs=1e-7)
    assert gaussian_mmd([1.0, 1e6], [1.0, 1e6]) == 0.0
