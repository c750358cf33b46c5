"""How far two distributions are apart: Jensen-Shannon distance, Gaussian MMD, Wasserstein distance.

    jensen_shannon([0.5, 0.5], [1.0, 0.0])      0.4645, the square root of 0.2158 nats
    gaussian_mmd([2.1, 5.3, 7.9], [2.0, 8.1])   0.1758, squared and with each point's own pair, as LeMat's

All are the libraries' (scipy.spatial.distance.jensenshannon, scipy.stats.wasserstein_distance) or the peer's
number, in forms fast enough to be repeated for an interval.

Not here: what is compared (statistics.py), the Wasserstein distances of CDVAE (distributions.py).
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

_FREQUENCY = 8.7  # standard deviations of the kernel's spectrum; beyond it lies 3e-18 of it
_PAIRS_AT_ONCE = 4_000_000


def jensen_shannon(p: ArrayLike, q: ArrayLike) -> FloatArray:
    """Return the Jensen-Shannon distance (square root of the divergence in nats) over the last axis.

    Args:
        p, q: (..., K) weights, not negative; each is divided by its sum.
    """
    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    a, b = a / a.sum(axis=-1, keepdims=True), b / b.sum(axis=-1, keepdims=True)
    middle = (a + b) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(a > 0, a * np.log(a / middle), 0.0) + np.where(b > 0, b * np.log(b / middle), 0.0)
    return np.asarray(np.sqrt(np.maximum(terms.sum(axis=-1) / 2, 0.0)))


def binned_wasserstein(p: ArrayLike, q: ArrayLike) -> FloatArray:
    """Return the Wasserstein distance of weights on the whole numbers 0, 1, ... K - 1, over the last axis."""
    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    a, b = a / a.sum(axis=-1, keepdims=True), b / b.sum(axis=-1, keepdims=True)
    return np.asarray(np.abs(np.cumsum(a - b, axis=-1)).sum(axis=-1))


def gaussian_mmd(x: ArrayLike, y: ArrayLike) -> float:
    """Return the squared maximum mean discrepancy under exp(-(a - b)^2 / 2), own pairs included.

    The kernel is the mean of cos(w (a - b)) over a normal w, so the discrepancy is the mean squared
    difference of the two sets' characteristic functions. The trapezium rule takes that mean to rounding once
    its period is wider than the data and the kernel together. Where that is more work, all pairs are summed.

    Args:
        x, y: (N,), (M,) values, finite.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    width = max(a.max(), b.max()) - min(a.min(), b.min()) + 12.0
    n_steps = math.ceil(_FREQUENCY * width / (2 * math.pi)) + 1
    if 2 * n_steps * (len(a) + len(b)) > len(a) ** 2 + len(b) ** 2 + len(a) * len(b):
        return _mean_kernel(a, a) + _mean_kernel(b, b) - 2 * _mean_kernel(a, b)
    step = 2 * math.pi / width
    frequency = step * np.arange(n_steps + 1)
    weight = step / math.sqrt(2 * math.pi) * np.exp(-(frequency**2) / 2)
    weight[1:] *= 2  # both signs
    difference = _characteristic(a, frequency) - _characteristic(b, frequency)
    return float((weight * np.abs(difference) ** 2).sum())


def _characteristic(values: FloatArray, frequency: FloatArray) -> NDArray[np.complex128]:
    found = np.empty(len(frequency), dtype=np.complex128)
    at_once = max(1, _PAIRS_AT_ONCE // len(values))
    for start in range(0, len(frequency), at_once):
        phases = np.outer(frequency[start : start + at_once], values)
        found[start : start + at_once] = np.cos(phases).mean(axis=1) + 1j * np.sin(phases).mean(axis=1)
    return found


def _mean_kernel(x: FloatArray, y: FloatArray) -> float:
    at_once = max(1, _PAIRS_AT_ONCE // len(y))
    total = 0.0
    for start in range(0, len(x), at_once):
        total += float(np.exp(-((x[start : start + at_once, None] - y) ** 2) / 2).sum())
    return total / (len(x) * len(y))
