"""Numbers of a whole set: LeMat-GenBench's distances from a reference, diversity and supply; genmetrics.

    samples = columns_of(cell_formulas=["Na4 Cl4", ...], spacegroup_numbers=[225, ...], ...)
    lemat_statistics(samples, reference) -> [Score("lemat.jsd_spacegroup", 0.21, ...), ...]

LeMat takes the valid samples only ("lemat.valid"), so its numbers are of survivors: pass those, and say so.
Space groups are spglib's at 0.01 angstrom (column "lemat.spacegroup_number" of checks.py). The peer compares
with LeMat-Bulk or with MP-20's own distributions; with another reference the numbers are not the published
ones. Its Frechet distances need embeddings of ORB, MACE and UMA, and are not computed.

Intervals are percentile bootstraps over the samples, 95 %, widened to hold the value (a resampled set is
farther from a reference, and less diverse, on average).

Not here: the columns (set_columns.py), the distances themselves (divergence.py), CDVAE's Wasserstein
distances (distributions.py), coverage (coverage.py).
Sources: LeMaterial/lemat-genbench, metrics/distribution_metrics.py, diversity_metric.py, hhi_metrics.py;
sparks-baird/matbench-genmetrics, core/metrics.py.
"""

from collections.abc import Callable, Iterator

import numpy as np

from crystallm_kit.scores.distances import covalent_radii
from crystallm_kit.scores.divergence import FloatArray, binned_wasserstein, gaussian_mmd, jensen_shannon
from crystallm_kit.scores.score import Better, Score, mean, not_computed
from crystallm_kit.scores.set_columns import (
    N_ELEMENTS,
    N_SPACEGROUPS,
    SetColumns,
    one_hot,
    pettifor_shares,
    spacegroup_counts,
    spacegroups_with_p1,
    supply_concentration,
    system_counts,
)

MMD_AT_MOST = 15_000  # entries of either set; more are drawn without replacement
N_DRAWS = 200
_DENSITY_BIN, _LENGTH_BIN, _PACKING_BIN = 0.5, 0.5, 0.05  # g/cm3, angstrom, share of the cell
_LOG_OF_ZERO = 1e-12  # what the peer adds to a share before its logarithm
_HHI_PRODUCTION, _HHI_RESERVES = 0.25, 0.75
_FRECHET = "needs {}'s embeddings of the samples, and the peer's of its reference; neither is in the kit"


# -------------------------------------------------------------------------------------------- LeMat-GenBench


def lemat_statistics(
    samples: SetColumns, reference: SetColumns | None, *, over: str = "valid", seed: int = 0
) -> list[Score]:
    """Return LeMat-GenBench's numbers of a set.

    Args:
        samples: The valid ones, as the peer counts.
        reference: What they are compared with; None: the distances are not computed.
        over: What `samples` are, for the reader.
        seed: Of the bootstraps, and of the draw for the MMD.
    """
    return [
        *lemat_distances(samples, reference, over=over, seed=seed),
        *(
            not_computed(f"lemat.frechet_{name.lower()}", _FRECHET.format(name), unit="", better="lower")
            for name in ("ORB", "MACE", "UMA")
        ),
        *lemat_diversity(samples, over=over, seed=seed),
        *lemat_supply(samples, over=over, seed=seed),
    ]  # fmt: skip


def lemat_distances(
    samples: SetColumns, reference: SetColumns | None, *, over: str = "valid", seed: int = 0
) -> Iterator[Score]:
    """Yield Jensen-Shannon distances of categories, and MMDs of volume and densities, from a reference."""
    categories: dict[str, Callable[[SetColumns], FloatArray]] = {
        "spacegroup": spacegroup_counts,
        "crystal_system": system_counts,
        "composition_counts": lambda of: of.atoms[:, 1:].astype(np.float64),
        "composition": lambda of: (of.atoms[:, 1:] > 0).astype(np.float64),
    }
    values: dict[str, Callable[[SetColumns], FloatArray]] = {
        "volume": lambda of: of.volume_angstrom3,
        "density": lambda of: of.density_g_cm3,
        "atomic_density": lambda of: of.n_sites / of.volume_angstrom3,
    }
    if reference is None:
        for name in (*(f"jsd_{c}" for c in categories), "jsd", *(f"mmd_{v}" for v in values), "mmd"):
            yield not_computed(f"lemat.{name}", "no reference set to compare with", unit="", better="lower")
        return
    note = f"against a reference of {len(reference):,}"
    generator = np.random.default_rng(seed)
    drawn = _resampled(len(samples), generator)
    distances, repeats = [], []
    for name, counts in categories.items():
        ours, theirs = counts(samples), counts(reference).sum(axis=0)
        if not theirs.any() or not ours.any():
            yield not_computed(f"lemat.jsd_{name}", "no space group was found", unit="", better="lower")
            continue
        distances.append(float(jensen_shannon(ours.sum(axis=0), theirs)))
        repeats.append(jensen_shannon(drawn @ ours, theirs))
        yield _with_interval(f"lemat.jsd_{name}", distances[-1], repeats[-1], over, "lower", note)
    yield _with_interval(
        "lemat.jsd", float(np.mean(distances)), np.mean(repeats, axis=0), over, "lower",
        f"mean of {len(distances)} Jensen-Shannon distances, {note}",
    )  # fmt: skip
    found = []
    for name, value in values.items():
        x, y = (_drawn(value(of), generator) for of in (samples, reference))
        found.append(gaussian_mmd(x, y))
        yield Score(f"lemat.mmd_{name}", found[-1], "", None, len(x), over, better="lower",
                    note=f"squared, sigma 1, {note}; at most {MMD_AT_MOST:,} of each")  # fmt: skip
    yield Score("lemat.mmd", float(np.mean(found)), "", None, len(samples), over, better="lower",
                note=f"mean of the three, {note}")  # fmt: skip


def lemat_diversity(samples: SetColumns, *, over: str = "valid", seed: int = 0) -> Iterator[Score]:
    """Yield effective numbers of elements, space groups and cell sizes, and how many of all occur.

    The effective number (the peer's "Vendi score") is exp of Shannon's entropy: of all atoms by element, of
    all samples by space group and by number of sites.
    """
    drawn = _resampled(len(samples), np.random.default_rng(seed))
    for name, counts, whole in (
        ("element", samples.atoms[:, 1:].astype(np.float64), N_ELEMENTS),
        ("spacegroup", spacegroup_counts(samples), N_SPACEGROUPS),
        ("n_sites", one_hot(samples.n_sites, int(samples.n_sites.max()) + 1), None),
    ):
        totals = counts.sum(axis=0)
        if not totals.any():
            yield not_computed(f"lemat.diversity_{name}", f"no {name} was found", unit="", better="higher")
            continue
        effective = np.exp(_entropy(np.vstack([totals, drawn @ counts])))
        note = "effective number, exp of Shannon's entropy"
        yield _with_interval(
            f"lemat.diversity_{name}", float(effective[0]), effective[1:], over, "higher", note
        )
        if whole is not None:
            yield Score(f"lemat.diversity_{name}_coverage", float((totals > 0).sum()) / whole, "share",
                        int((totals > 0).sum()), whole, "all known", better="higher",
                        note="grows with the number of samples")  # fmt: skip
    yield _physical_diversity(samples, over)


def _physical_diversity(samples: SetColumns, over: str) -> Score:
    name = "lemat.diversity_physical"
    if samples.cell_lengths_angstrom is None:
        return not_computed(name, "needs the lengths of the cells", unit="", better="higher")
    if len(samples) < 2:
        return not_computed(name, "needs two samples", unit="", better="higher")
    radii = covalent_radii()
    packed = (samples.atoms * (4 / 3 * np.pi * radii**3)).sum(axis=1) / samples.volume_angstrom3
    binned = [
        (samples.density_g_cm3, _DENSITY_BIN),
        *((samples.cell_lengths_angstrom[:, i], _LENGTH_BIN) for i in range(3)),
        (np.minimum(packed, 1.0), _PACKING_BIN),
    ]
    entropies = [
        float(_entropy(np.unique(values // width, return_counts=True)[1].astype(np.float64), clipped=True))
        for values, width in binned
    ]
    value = float(np.mean(entropies) / np.log2(len(samples)))
    note = "mean entropy (nats) of binned density, edges and packing, over log2 of the samples"
    return Score(name, value, "", None, len(samples), over, better="higher", note=note)


def lemat_supply(samples: SetColumns, *, over: str = "valid", seed: int = 0) -> list[Score]:
    """Return mean supply concentration, 0 to 10: of production, of reserves, and 0.25 and 0.75 of them.

    Each crystal's is the mean over its atoms; an element that is not in the table (H among them) counts 10.
    """
    production, reserves = (supply_concentration()[column] / 1000.0 for column in (0, 1))
    shares = samples.atoms / samples.n_sites[:, None]
    of_production, of_reserves = shares @ production, shares @ reserves
    note = "Herfindahl-Hirschman index by atoms; elements that are not in the table, as H, count 10"
    return [
        mean(f"lemat.hhi_{name}", values.tolist(), unit="", over=over, better="lower", note=note, seed=seed)
        for name, values in (
            ("production", of_production),
            ("reserve", of_reserves),
            ("combined", _HHI_PRODUCTION * of_production + _HHI_RESERVES * of_reserves),
        )
    ]


# ---------------------------------------------------------------------------------------------- genmetrics


def genmetrics_validity(
    samples: SetColumns, reference: SetColumns | None, *, over: str = "requested", seed: int = 0
) -> list[Score]:
    """Return matbench-genmetrics' "validity": how near the distributions are, not whether crystals are valid.

    Mean of two terms 1 - W(reference, samples) / W(reference, dummy): space group numbers against all P1,
    modified Pettifor numbers of the elements by atomic fraction against all 1. It can be negative.

    Args:
        samples: All generated; without a space group they count as P1, as the peer has it.
        reference: Training and test set together, as the peer has it; None: not computed.
        over: What `samples` are, for the reader.
        seed: Of the bootstrap.
    """
    names = ("genmetrics.validity", "genmetrics.validity_spacegroup", "genmetrics.validity_pettifor")
    if reference is None:
        return [not_computed(n, "no reference set to compare with", unit="", better="higher") for n in names]
    drawn = _resampled(len(samples), np.random.default_rng(seed))
    terms = []
    for columns in (spacegroups_with_p1, pettifor_shares):
        ours, theirs = columns(samples), columns(reference).sum(axis=0)
        dummy = np.zeros_like(theirs)
        dummy[1] = 1.0
        scale = float(binned_wasserstein(theirs, dummy))
        if not scale:
            why = "the reference is the dummy itself (all P1)"
            return [not_computed(n, why, unit="", better="higher") for n in names]
        found = np.vstack([ours.sum(axis=0), drawn @ ours])
        terms.append(1 - binned_wasserstein(found, theirs) / scale)
    note = f"distribution distance, no check of a crystal; against a reference of {len(reference):,}"
    return [
        _with_interval(name, float(values[0]), values[1:], over, "higher", note)
        for name, values in zip(names, ((terms[0] + terms[1]) / 2, *terms), strict=True)
    ]


# ----------------------------------------------------------------------------------------------- intervals


def _resampled(n: int, generator: np.random.Generator) -> FloatArray:
    """(N_DRAWS, n) how often each sample is drawn, n draws with replacement."""
    drawn = np.zeros((N_DRAWS, n))
    for row in drawn:
        row += np.bincount(generator.integers(n, size=n), minlength=n)
    return drawn


def _drawn(values: FloatArray, generator: np.random.Generator) -> FloatArray:
    if len(values) <= MMD_AT_MOST:
        return values
    return values[generator.choice(len(values), MMD_AT_MOST, replace=False)]


def _entropy(counts: FloatArray, *, clipped: bool = False) -> FloatArray:
    """Return Shannon's entropy in nats over the last axis, with the peer's guard against log 0."""
    shares = counts / counts.sum(axis=-1, keepdims=True)
    logs = np.log(np.maximum(shares, _LOG_OF_ZERO) if clipped else shares + _LOG_OF_ZERO)
    return np.asarray(-(shares * logs).sum(axis=-1))


def _with_interval(
    name: str, value: float, repeats: FloatArray, over: str, better: Better, note: str
) -> Score:
    repeats = repeats[np.isfinite(repeats)]
    ends = np.percentile(repeats, [2.5, 97.5]) if len(repeats) else (value, value)
    low, high = min(float(ends[0]), value), max(float(ends[1]), value)
    return Score(name, value, "", None, None, over, low, high, "bootstrap", better, note)
