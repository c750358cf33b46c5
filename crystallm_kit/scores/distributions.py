"""How far the samples' densities and numbers of elements are from a reference's: 1-D Wasserstein distances.

    wasserstein_scores(samples, reference)
    [Score("cdvae.wdist_density", 0.44, "g/cm3", denominator=1000, over="valid samples drawn", ...), ...]

Only valid samples count, so the numbers are of survivors: a model that fails on dense crystals may look good.
CDVAE draws 1,000 of them, without a seed; CrystaLLM seeds with 1337; Crystal-text-LLM takes all. Here every
draw is seeded, by numpy's Generator, which no peer uses: the peers' own draw of 1,000 is not reproduced, and
what another draw would give is the interval.

Not here: fingerprints' distances (coverage.py); Jensen-Shannon distances (statistics.py).
Sources: Xie et al., arXiv:2110.06197; scipy.stats.wasserstein_distance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.score import Score, not_computed

FloatArray = NDArray[np.float64]

N_DRAWN = 1000
CRYSTALLM_SEED = 1337
_REPEATS = 200
_NO_WEIGHTS = "needs the energies of CDVAE's trained GemNet; its weights are not part of this package"


@dataclass(frozen=True)
class Distributed:
    """What is compared of one crystal.

    Attributes:
        density_g_cm3: Its density.
        n_elements: Its number of elements.
    """

    density_g_cm3: float
    n_elements: int


def wasserstein_scores(
    valid: Sequence[Distributed], reference: Sequence[Distributed], *, seed: int = 0
) -> list[Score]:
    """Return the Wasserstein distances under the protocols cdvae, crystallm and crystal_text_llm.

    Args:
        valid: Of each sample that is "cdvae.valid", in the samples' order.
        reference: Of the whole reference set.
        seed: Of the draw under "cdvae", and of the bootstrap.

    Returns:
        Distances with the 95 % percentile interval of a bootstrap of the samples, widened to hold the value
        (a resampled set is farther from the reference on average). With fewer than 1,000 valid samples, those
        that draw 1,000 are not computed.

    Raises:
        EmptyInput: Without a reference.
    """
    if not reference:
        raise EmptyInput("Wasserstein distances: the reference has no crystals; at least one expected")
    scores = list(_named("cdvae", valid, reference, draw_seed=seed, seed=seed))
    scores.append(not_computed("cdvae.wdist_prop", _NO_WEIGHTS, unit="eV/atom", better="lower"))
    scores += [not_computed(f"cdvae.opt_sr{n}", _NO_WEIGHTS, better="higher") for n in (5, 10, 15)]
    scores += _named("crystallm", valid, reference, draw_seed=CRYSTALLM_SEED, seed=seed)
    scores += _named("crystal_text_llm", valid, reference, draw_seed=None, seed=seed)
    return scores


def _named(
    protocol: str,
    valid: Sequence[Distributed],
    reference: Sequence[Distributed],
    *,
    draw_seed: int | None,
    seed: int,
) -> Iterator[Score]:
    least = 1 if draw_seed is None else N_DRAWN
    if len(valid) >= least and draw_seed is not None:
        drawn = np.random.default_rng(draw_seed).choice(len(valid), N_DRAWN, replace=False)
        valid = [valid[i] for i in drawn]
    over = "valid" if draw_seed is None else "valid samples drawn"
    for name, field, unit in (
        ("wdist_density", "density_g_cm3", "g/cm3"),
        ("wdist_num_elems", "n_elements", "elements"),
    ):
        full = f"{protocol}.{name}"
        if len(valid) < least:
            why = f"{len(valid)} valid samples; {least:,} at least expected"
            yield not_computed(full, why, unit=unit, better="lower")
            continue
        samples = np.array([getattr(one, field) for one in valid], dtype=np.float64)
        truth = np.array([getattr(one, field) for one in reference], dtype=np.float64)
        value = wasserstein(samples, truth)
        low, high = _interval(samples, truth, seed)
        yield Score(
            full, value, unit, None, len(samples), over, min(low, value), max(high, value), "bootstrap",
            "lower", "" if draw_seed is None else f"seed {draw_seed}",
        )  # fmt: skip


def wasserstein(first: FloatArray, second: FloatArray) -> float:
    """Return the 1-D Wasserstein distance of two sets of numbers, in their unit."""
    from scipy.stats import wasserstein_distance  # type: ignore[import-untyped]

    return float(wasserstein_distance(first, second))


def _interval(samples: FloatArray, reference: FloatArray, seed: int) -> tuple[float, float]:
    drawn = np.random.default_rng(seed).integers(len(samples), size=(_REPEATS, len(samples)))
    low, high = np.percentile([wasserstein(samples[row], reference) for row in drawn], [2.5, 97.5])
    return float(low), float(high)
