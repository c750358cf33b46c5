"""Whether the matcher agrees with pymatgen's on real pairs, and how much faster it is.

    python -m crystallm_kit.scores.matcher_speed DATA --samples SAMPLES --pairs 35000

prints for each of the tolerances how many pairs were compared, how many of them match, how many decisions
differ, the largest difference of an RMS distance, and how often pymatgen was asked because rounding decides;
then the processor time of each step, pymatgen's and ours, measured side by side in this process; then the
match rate of targets with 20 candidates each, from structures to distances. It exits 1 where anything
differs.

Not here: the pairs (matcher_pairs.py), the matcher (structure_matcher.py).
"""

import argparse
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.matcher_pairs import Pair, Pool, candidates_of, pool_of, real_pairs
from crystallm_kit.scores.structure_matcher import (
    TOLERANCES,
    Reduced,
    Tolerances,
    fit,
    is_undecided,
    reduced,
    rms_distance,
    rms_distances,
)

SAME_DISTANCE = 1e-9
_STEPS = ("reduction", "fit", "rms distance")


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


def compare(pairs: Iterable[Pair], *, report: Callable[[int], None] = lambda _: None) -> Agreement:
    """Compare pairs at all tolerances, both ways, and return what came out."""
    matchers = {name: _pymatgen(tolerances) for name, tolerances in TOLERANCES.items()}
    found = Agreement()
    for count, pair in enumerate(pairs, 1):
        both = [_reduced_both(structure, found) for structure in (pair.candidate, pair.truth)]
        if all(theirs is not None and mine is not None for theirs, mine in both):
            for name, matcher in matchers.items():
                _compare_pair(name, matcher, both, found)
        report(count)
    return found


def _reduced_both(structure: Structure, found: Agreement) -> tuple[Structure | None, Reduced | None]:
    def theirs() -> Structure | None:
        # its cache would answer with a structure that differs by up to 1e-5
        StructureMatcher._get_reduced_istructure.cache_clear()
        try:
            return StructureMatcher._get_reduced_structure(structure)
        except (ValueError, ArithmeticError):
            return None

    def mine() -> Reduced | None:
        try:
            return reduced(structure)
        except UserError:
            return None

    right = _timed(found, "reduction", "pymatgen", theirs)
    left = _timed(found, "reduction", "ours", mine)
    found.calls["reduction"] += 1
    if right is None and left is None:
        found.refused += 1
    elif right is None or left is None or not _is_same_cell(left, right):
        found.reductions_differ += 1
    return right, left


def _is_same_cell(mine: Reduced, theirs: Structure) -> bool:
    if mine.numbers.tolist() != [site.specie.Z for site in theirs]:
        return False
    off = mine.fractional - theirs.frac_coords
    return bool(
        np.abs(mine.lattice - theirs.lattice.matrix).max() < SAME_DISTANCE
        and np.abs(off - np.rint(off)).max() < SAME_DISTANCE
    )


def _compare_pair(name: str, matcher: Any, both: Sequence[tuple[Any, Any]], found: Agreement) -> None:
    (first, own_first), (second, own_second) = both
    tolerances = TOLERANCES[name]

    def their_rms() -> float | None:  # get_rms_dist, but for its reductions
        ready = matcher._preprocess(first, second, skip_structure_reduction=True)
        match = matcher._match(*ready, use_rms=True, break_on_match=False)
        return None if match is None else float(match[0])

    is_fit = _timed(
        found,
        "fit",
        "pymatgen",
        lambda: bool(matcher.fit(first, second, skip_structure_reduction=True)),
    )
    own_fit = _timed(found, "fit", "ours", lambda: fit(own_first, own_second, tolerances))
    rms = _timed(found, "rms distance", "pymatgen", their_rms)
    own_rms = _timed(found, "rms distance", "ours", lambda: rms_distance(own_first, own_second, tolerances))
    found.calls["fit"] += 1
    found.calls["rms distance"] += 1
    off = 0.0 if rms is None or own_rms is None else abs(rms - own_rms)
    found.largest[name] = max(found.largest.get(name, 0.0), off)
    found.counts[name, "pairs"] += 1
    found.counts[name, "fit"] += is_fit
    found.counts[name, "rms"] += rms is not None
    found.counts[name, "differ"] += (
        is_fit != own_fit or (rms is None) != (own_rms is None) or off > SAME_DISTANCE
    )
    found.counts[name, "undecided"] += is_undecided(own_first, own_second, tolerances)


def match_rate_speed(pool: Pool, targets: int, *, seed: int = 0) -> tuple[int, float, float, int]:
    """Time 20 candidates for each of some targets, from structures to distances.

    Returns:
        Candidates, processor seconds of pymatgen's get_rms_dist, of ours, and distances that differ.
    """
    rng = np.random.default_rng(seed)
    matcher = _pymatgen(TOLERANCES["csp"])
    theirs_s, mine_s, differ, count = 0.0, 0.0, 0, 0
    for _ in range(targets):
        truth = pool.known[int(rng.integers(len(pool.known)))]
        candidates = candidates_of(truth, pool, rng, count=20)
        StructureMatcher._get_reduced_istructure.cache_clear()
        began = time.process_time()
        theirs = [matcher.get_rms_dist(candidate, truth) for candidate in candidates]
        middle = time.process_time()
        mine = rms_distances([reduced(one) for one in candidates], reduced(truth), TOLERANCES["csp"])
        theirs_s, mine_s = theirs_s + middle - began, mine_s + time.process_time() - middle
        count += len(candidates)
        for right, left in zip(theirs, mine, strict=True):
            if right is None or left is None:
                differ += (right is None) != (left is None)
            else:
                differ += abs(right[0] - left) > SAME_DISTANCE
    return count, theirs_s, mine_s, differ


def _timed(found: Agreement, step: str, side: str, call: Callable[[], Any]) -> Any:
    began = time.process_time()
    try:
        return call()
    finally:
        found.seconds[step, side] += time.process_time() - began


def _pymatgen(tolerances: Tolerances) -> Any:
    return StructureMatcher(ltol=tolerances.length, stol=tolerances.site, angle_tol=tolerances.angle_degrees)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="matcher_speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of mp_test.parquet and so on")
    parser.add_argument("--samples", type=Path, help="folder of what other generators wrote")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs, each compared at three tolerances")
    parser.add_argument("--targets", type=int, default=50, help="targets with 20 candidates each")
    parser.add_argument("--limit", type=int, help="crystals of each file; default: all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # pymatgen's, of rounded coordinates and electronegativities

    def report(count: int) -> None:
        if count % 100 == 0:
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
