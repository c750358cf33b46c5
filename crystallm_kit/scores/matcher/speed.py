"""Whether the matcher agrees with pymatgen's on real pairs, and how much faster it is.

    python -m crystallm_kit.scores.matcher.speed DATA --samples SAMPLES --pairs 35000

prints for each of the tolerances how many pairs were compared, how many of them match, how many decisions
differ, the largest difference of an RMS distance, and how often pymatgen was asked because rounding decides;
then the processor time of each step, pymatgen's and ours, measured side by side in this process; then the
match rate of targets with 20 candidates each, from structures to distances. It exits 1 where anything
differs.

With --pairs 500 --targets 40 --seed 5, pymatgen-core 2026.10.16 and numpy 2.4.6 on one core of an AMD EPYC:
reductions 24 times faster (59 us), fit 37 (41 us), RMS distance 40 (75 us), match rate 30 times (3,982
candidates a second); nothing differs.

Not here: the pairs (pairs.py), the matcher (structure_matcher.py).
"""

import argparse
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.matcher.pairs import Pair, Pool, candidates_of, pool_of, real_pairs
from crystallm_kit.scores.matcher.structure_matcher import (
    TOLERANCES,
    Reduced,
    Tolerances,
    fit,
    is_undecided,
    reduce_many,
    reduced,
    rms_distance,
    rms_distances,
)

SAME_DISTANCE = 1e-9
_STEPS = ("reduction", "fit", "rms distance")
_BATCH = 50


@dataclass
class Agreement:
    """What comparing pairs gave.

    Attributes:
        counts: (tolerances, what) -> number; what is "pairs", "fit", "rms", "differ", "undecided".
        largest: Tolerances -> largest difference of an RMS distance that both have.
        seconds: (step, "pymatgen" or "ours") -> processor time.
        calls: Step -> number of calls on each side.
        reductions_differ: Structures whose reduced cells differ.
        refused: Structures that pymatgen cannot reduce; ours refuses them too, or they count as different.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    seconds: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    calls: Counter[str] = field(default_factory=Counter)
    reductions_differ: int = 0
    refused: int = 0

    @property
    def differ(self) -> int:
        """Everything that is not as pymatgen has it."""
        return self.reductions_differ + sum(n for (_, what), n in self.counts.items() if what == "differ")

    def lines(self) -> list[str]:
        """Return the two tables."""
        out = [f"{'tolerances':<12}{'pairs':>9}{'fit':>9}{'rms':>9}{'differ':>9}{'largest':>10}{'asked':>8}"]
        for name in TOLERANCES:
            n = {what: self.counts[name, what] for what in ("pairs", "fit", "rms", "differ", "undecided")}
            out.append(
                f"{name:<12}{n['pairs']:>9,}{n['fit']:>9,}{n['rms']:>9,}{n['differ']:>9}"
                f"{self.largest.get(name, 0.0):>10.1e}{n['undecided']:>8}"
            )
        out.append(
            f"reductions: {self.calls['reduction']:,}, {self.reductions_differ} differ, "
            f"{self.refused} refused by both"
        )
        out.append(f"\n{'step':<16}{'calls':>9}{'pymatgen':>14}{'ours':>14}{'times faster':>15}")
        for step in _STEPS:
            calls = max(self.calls[step], 1)
            theirs, mine = (self.seconds[step, side] / calls * 1e6 for side in ("pymatgen", "ours"))
            out.append(
                f"{step:<16}{self.calls[step]:>9,}{theirs:>11,.0f} us{mine:>11,.1f} us"
                f"{theirs / max(mine, 1e-9):>15.0f}"
            )
        return out


def batched(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    """Yield lists of up to `size` pairs (itertools.batched is not in Python 3.11)."""
    left = iter(pairs)
    while batch := list(islice(left, size)):
        yield batch


def compare(pairs: Iterable[Pair], *, report: Callable[[int], None] = lambda _: None) -> Agreement:
    """Compare pairs at all tolerances, both ways, and return what came out.

    Each step is done for some pairs with one matcher, then with the other, as somebody who has many would.
    """
    found = Agreement()
    count = 0
    for batch in batched(pairs, _BATCH):
        structures = [(structure,) for pair in batch for structure in (pair.candidate, pair.truth)]
        theirs = _timed(found, "reduction", "pymatgen", _their_reduced, structures)
        mine = _timed(found, "reduction", "ours", _own_reduced, structures)
        found.calls["reduction"] += len(structures)
        for right, left in zip(theirs, mine, strict=True):
            if right is None and left is None:
                found.refused += 1
            elif right is None or left is None or not _is_same_cell(left, right):
                found.reductions_differ += 1
        whole = [
            ((theirs[i], theirs[i + 1]), (mine[i], mine[i + 1]))
            for i in range(0, len(structures), 2)
            if None not in (theirs[i], theirs[i + 1], mine[i], mine[i + 1])
        ]
        for name in TOLERANCES:
            _compare_batch(name, whole, found)
        count += len(batch)
        report(count)
    return found


def _their_reduced(structure: Structure) -> Structure | None:
    # the cache would answer with a structure that differs by up to 1e-5
    StructureMatcher._get_reduced_istructure.cache_clear()
    try:
        return StructureMatcher._get_reduced_structure(structure)
    except (ValueError, ArithmeticError):
        return None


def _own_reduced(structure: Structure) -> Reduced | None:
    return reduce_many([structure])[0]


def _is_same_cell(mine: Reduced, theirs: Structure) -> bool:
    if mine.numbers.tolist() != [site.specie.Z for site in theirs]:
        return False
    off = mine.fractional - theirs.frac_coords
    return bool(
        np.abs(mine.lattice - theirs.lattice.matrix).max() < SAME_DISTANCE
        and np.abs(off - np.rint(off)).max() < SAME_DISTANCE
    )


def _compare_batch(
    name: str, pairs: Sequence[tuple[tuple[Any, Any], tuple[Any, Any]]], found: Agreement
) -> None:
    tolerances = TOLERANCES[name]
    matcher = _pymatgen(tolerances)

    def their_fit(first: Structure, second: Structure) -> bool:
        return bool(matcher.fit(first, second, skip_structure_reduction=True))

    def their_rms(first: Structure, second: Structure) -> float | None:  # get_rms_dist, but for reductions
        ready = matcher._preprocess(first, second, skip_structure_reduction=True)
        match = matcher._match(*ready, use_rms=True, break_on_match=False)
        return None if match is None else float(match[0])

    def own_fit(first: Reduced, second: Reduced) -> bool:
        return fit(first, second, tolerances)

    def own_rms(first: Reduced, second: Reduced) -> float | None:
        return rms_distance(first, second, tolerances)

    theirs, mine = [right for right, _ in pairs], [left for _, left in pairs]
    answers = zip(
        _timed(found, "fit", "pymatgen", their_fit, theirs),
        _timed(found, "fit", "ours", own_fit, mine),
        _timed(found, "rms distance", "pymatgen", their_rms, theirs),
        _timed(found, "rms distance", "ours", own_rms, mine),
        strict=True,
    )
    found.calls["fit"] += len(pairs)
    found.calls["rms distance"] += len(pairs)
    found.counts[name, "pairs"] += len(pairs)
    for right_fit, left_fit, right, left in answers:
        off = 0.0 if right is None or left is None else abs(right - left)
        found.largest[name] = max(found.largest.get(name, 0.0), off)
        found.counts[name, "fit"] += right_fit
        found.counts[name, "rms"] += right is not None
        is_other = right_fit != left_fit or (right is None) != (left is None)
        found.counts[name, "differ"] += is_other or off > SAME_DISTANCE
    found.counts[name, "undecided"] += sum(is_undecided(*pair, tolerances) for pair in mine)


def match_rate_speed(pool: Pool, targets: int, *, seed: int = 0) -> tuple[int, float, float, int]:
    """Time 20 candidates for each of some targets, from structures to distances.

    Returns:
        Candidates, processor seconds of pymatgen's get_rms_dist, of ours, and distances that differ.
    """
    rng = np.random.default_rng(seed)
    matcher = _pymatgen(TOLERANCES["csp"])
    truths = [pool.known[int(rng.integers(len(pool.known)))] for _ in range(targets)]
    asked = [(candidates_of(truth, pool, rng, count=20), truth) for truth in truths]
    StructureMatcher._get_reduced_istructure.cache_clear()  # that of each target is reduced once all the same
    began = time.process_time()
    theirs = [matcher.get_rms_dist(one, truth) for candidates, truth in asked for one in candidates]
    middle = time.process_time()
    mine = [
        distance
        for candidates, truth in asked
        for distance in rms_distances(reduce_many(candidates), reduced(truth), TOLERANCES["csp"])
    ]
    end = time.process_time()
    differ = sum(
        (right is None) != (left is None)
        or (right is not None and left is not None and abs(right[0] - left) > SAME_DISTANCE)
        for right, left in zip(theirs, mine, strict=True)
    )
    return len(mine), middle - began, end - middle, differ


def _timed(
    found: Agreement, step: str, side: str, call: Callable[..., Any], given: Sequence[tuple[Any, ...]]
) -> list[Any]:
    began = time.process_time()
    answers = [call(*one) for one in given]
    found.seconds[step, side] += time.process_time() - began
    return answers


def _pymatgen(tolerances: Tolerances) -> Any:
    return StructureMatcher(ltol=tolerances.length, stol=tolerances.site, angle_tol=tolerances.angle_degrees)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="matcher.speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of mp_test.parquet and so on")
    parser.add_argument("--samples", type=Path, help="folder of what other generators wrote")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs, each compared at three tolerances")
    parser.add_argument("--targets", type=int, default=50, help="targets with 20 candidates each")
    parser.add_argument("--limit", type=int, help="crystals of each file; default: all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # pymatgen's, of rounded coordinates and electronegativities

    def report(count: int) -> None:
        print(f"{count:,} of {asked.pairs:,} pairs", end="\r", file=sys.stderr, flush=True)

    try:
        pool = pool_of(asked.data, asked.samples, limit=asked.limit)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    ready = reduced(pool.known[0])
    rms_distance(ready, ready, TOLERANCES["csp"])  # compiling, or loading, is not what is measured
    found = compare(real_pairs(pool, asked.pairs, seed=asked.seed), report=report)
    print("\n".join(found.lines()))
    count, theirs, mine, differ = match_rate_speed(pool, asked.targets, seed=asked.seed)
    print(
        f"\nmatch rate, structures to distances: {count:,} candidates of {asked.targets} targets\n"
        f"  pymatgen {count / max(theirs, 1e-9):,.0f}/s a core, ours {count / max(mine, 1e-9):,.0f}/s: "
        f"{theirs / max(mine, 1e-9):.0f} times faster; {differ} distances differ"
    )
    return 1 if found.differ or differ else 0


if __name__ == "__main__":
    sys.exit(main())
