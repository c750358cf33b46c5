"""How long uniqueness, novelty and match rates take, beside pymatgen pair by pair, in one run.

    python -m crystallm_kit.scores.novelty.speed --samples DiffCSP_mp_20.pt \\
        --reference mp_train.parquet wbm_train.parquet --targets mp_test.parquet --million 1000000

pymatgen's side is timed on a random sample of the comparisons that its own loop would make (`--timed`), with
structures as they are read, and extrapolated; the decisions of that sample are compared. The loop is
MatterGen's and CrystaLLM's: within one reduced formula, until the first match. Ratios are of CPU seconds per
core: both sides run in this process, but the reduction of the reference where `--processes` says more.

Candidates for targets are made here: 20 of each, ten of them the truth with moved atoms, strain, another
cell, ten other crystals of the same anonymous formula with the target's elements. The million entries are the
reference's with permuted elements, each formula four times (as it is, three times with moved atoms).

Not here: pairs compared one by one (matcher/speed.py).
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pymatgen.core import Composition, Element, Lattice, Structure

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.match_scores import match_scores
from crystallm_kit.scores.matcher.pairs import perturbed
from crystallm_kit.scores.matcher.reduced_forms import reduced_forms
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, Reduced, Tolerances, fit, reduced
from crystallm_kit.scores.novelty.copies import first_copies
from crystallm_kit.scores.novelty.index import NoveltyIndex
from crystallm_kit.scores.novelty.reference_index import reference_index
from crystallm_kit.scores.target_distances import distances_to_targets
from crystallm_kit.structures.files import read

_PER_TARGET = 20
_PER_ADDITION = 20_000
_LOOKED_UP = 1000
Say = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="novelty.speed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=Path, help="generated crystals: uniqueness, novelty")
    parser.add_argument("--reference", type=Path, nargs="+", help="known crystals: novelty, the million")
    parser.add_argument("--targets", type=Path, help="truths of structure prediction")
    parser.add_argument("--limit", type=int, help="crystals of each file")
    parser.add_argument("--timed", type=int, default=300, help="comparisons that pymatgen is timed on")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--million", type=int, help="entries of the big index")
    parser.add_argument("--folder", type=Path, help="where indexes are kept; else they are temporary")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    _warm()
    with TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        samples = _timed("read samples", lambda: _structures(options.samples, options.limit))
        if samples:
            uniqueness(samples, options.timed, options.seed)
        if samples and options.reference:
            novelty(samples, options.reference, folder, options)
        if options.targets:
            library = _structures_of(options.reference or [options.targets], options.limit)
            match_rates(_structures(options.targets, options.limit), library, options)
        if options.million:
            million(options.reference, folder, options)
    return 0


def uniqueness(samples: Sequence[Structure], timed: int, seed: int) -> None:
    """Measure first_copies against pymatgen's loop."""
    start = time.process_time()
    forms = list(reduced_forms(samples))
    ready = time.process_time()
    copies = first_copies(forms, TOLERANCES["default"])
    ours = time.process_time() - start
    kept = sum(form is not None and copy is None for form, copy in zip(forms, copies, strict=True))
    _say(f"uniqueness: {kept:,} of {len(samples):,} kept; {ours:.2f} s, {ready - start:.2f} of it reduction")
    pairs = []
    by_formula: dict[str, list[int]] = defaultdict(list)
    for i, (form, copy) in enumerate(zip(forms, copies, strict=True)):
        if form is not None:
            for j in by_formula[form.formula]:
                pairs.append((i, j))
                if j == copy:
                    break
            if copy is None:
                by_formula[form.formula].append(i)
    _against_pymatgen(pairs, samples, samples, forms, forms, ours, timed, seed)


def novelty(
    samples: Sequence[Structure], reference: Sequence[Path], folder: Path, options: argparse.Namespace
) -> None:
    """Measure the way from files to novelty, first and second time, against pymatgen's loop."""
    start, cpu = time.perf_counter(), time.process_time()
    made = reference_index(reference, folder / "references", processes=options.processes)
    built = time.perf_counter() - start
    _say(f"reference: {len(made.index):,} entries, {len(made.failures)} left out; indexed in {built:.2f} s")
    start = time.perf_counter()
    index = reference_index(reference, folder / "references").index
    opened = time.perf_counter() - start
    cpu = time.process_time()
    forms = list(reduced_forms(samples))
    known = [None if form is None else index.find(form, TOLERANCES["default"]) for form in forms]
    ours = time.process_time() - cpu
    n = sum(one is not None for one in known)
    _say(f"novelty: {n:,} of {len(samples):,} known; {ours:.2f} s; index opened in {opened:.2f} s")
    _say(f"novelty, whole, the first time: {built + ours:.1f} s; again: {opened + ours:.1f} s")
    references = _structures_of(reference, None)
    by_formula: dict[str, list[int]] = defaultdict(list)
    for j, one in enumerate(references):
        by_formula[one.composition.reduced_formula].append(j)
    at = {identity: j for j, identity in enumerate(_ids(reference))}
    pairs = []
    for i, (form, match) in enumerate(zip(forms, known, strict=True)):
        for j in by_formula[form.formula] if form is not None else []:
            pairs.append((i, j))
            if match is not None and at[match] == j:
                break
    wanted = sorted({j for _, j in pairs})
    their_forms: list[Reduced | None] = [None] * len(references)
    for j in wanted:
        their_forms[j] = reduced(references[j])
    _against_pymatgen(pairs, samples, references, forms, their_forms, ours, options.timed, options.seed)


def match_rates(
    targets: Sequence[Structure], library: Sequence[Structure], options: argparse.Namespace
) -> None:
    """Measure distances_to_targets against get_rms_dist."""
    rng = np.random.default_rng(options.seed)
    candidates = list(_candidates(targets, library, rng))
    cpu, start = time.process_time(), time.perf_counter()
    distances = distances_to_targets(targets, candidates, processes=options.processes)
    wall = time.perf_counter() - start
    ours = time.process_time() - cpu if options.processes == 1 else wall * options.processes
    n = sum(map(len, candidates))
    rates = match_scores(distances, [1, _PER_TARGET])
    _say(f"match rate: {len(targets):,} targets, {n:,} candidates; {wall:.1f} s wall, {ours:.1f} core s")
    _say("  made candidates match: " + ", ".join(f"{s.name} {s.value:.4f}" for s in rates))
    # Whole targets, as a peer's loop goes: pymatgen then finds the truth's reduced cell in its cache.
    few = rng.choice(len(targets), min(len(targets), max(1, options.timed // _PER_TARGET)), replace=False)
    chosen = [(int(i), j) for i in few for j in range(len(candidates[i]))]
    matcher = _pymatgen(TOLERANCES["csp"])
    theirs, disagree = 0.0, 0
    for i, j in chosen:
        cpu = time.process_time()
        found = matcher.get_rms_dist(candidates[i][j], targets[i])
        theirs += time.process_time() - cpu
        mine = distances[i][j]
        same = (found is None) == (mine is None)
        disagree += not (same and (found is None or mine is None or abs(found[0] - mine) < 1e-6))
    _ratio(theirs / len(chosen), len(chosen), n, ours, disagree)


def million(reference: Sequence[Path], folder: Path, options: argparse.Namespace) -> None:
    """Measure an index of that many entries: size, opening, looking up one structure."""
    rng = np.random.default_rng(options.seed)
    path = folder / f"million-{options.million}"
    forms = [form for form in reduced_forms(_structures_of(reference, options.limit)) if form is not None]
    if not path.exists():
        start = time.perf_counter()
        index = NoveltyIndex.create(path)
        for ids, batch in _entries(forms, options.million, rng):
            index.add(ids, batch)
        _say(f"index of {len(index):,} entries: built in {time.perf_counter() - start:.0f} s")
    size = sum(one.stat().st_size for one in path.iterdir())
    opening = [_seconds(lambda: NoveltyIndex.open(path)) for _ in range(20)]
    index = NoveltyIndex.open(path)
    _say(
        f"{len(index):,} entries, {size / 1e6:,.0f} MB, {len(list(path.glob('*.shard')))} shards; "
        f"opened in {1e3 * np.median(opening):.2f} ms (longest of 20: {1e3 * max(opening):.2f})"
    )
    hits = [_structure_of(forms[int(k)], rng, 0.02) for k in rng.integers(len(forms), size=_LOOKED_UP)]
    misses = [_structure_of(forms[int(k)], rng, 0.6) for k in rng.integers(len(forms), size=_LOOKED_UP)]
    for name, asked in (("moved by 0.02 angstrom", hits), ("moved by 0.6 angstrom", misses)):
        alone, whole, cpu, found = [], [], [], 0
        for structure in asked:
            start, processor = time.perf_counter(), time.process_time()
            form = reduced(structure)
            middle = time.perf_counter()
            found += index.find(form, TOLERANCES["default"]) is not None
            whole.append(time.perf_counter() - start)
            alone.append(time.perf_counter() - middle)
            cpu.append(time.process_time() - processor)
        _say(f"look-up, {name}: {found} of {len(asked)} known")
        for what, seconds in (("alone", alone), ("from the structure", whole), ("the same, CPU", cpu)):
            _say(f"  {what}: {_spread(seconds)}")


def _entries(
    forms: Sequence[Reduced], n: int, rng: np.random.Generator
) -> Iterator[tuple[list[str], list[Reduced]]]:
    """Yield batches of entries: the forms, then with permuted elements; each formula four times."""
    made = turn = 0
    ids: list[str] = []
    batch: list[Reduced] = []
    while made < n:
        if turn % 4 == 0:
            table = (
                np.arange(119)
                if turn == 0
                else np.concatenate([[0], 1 + rng.permutation(94), range(95, 119)])
            )
        for k, form in enumerate(forms):
            if made == n:
                break
            numbers = table[form.numbers].astype(np.int16)
            fractional = form.fractional
            if turn % 4:
                moves = 0.3 * rng.normal(size=fractional.shape) @ np.linalg.inv(form.lattice)
                fractional = (fractional + moves) % 1
            ids.append(f"{k}-{turn}")
            batch.append(Reduced(_formula(numbers), numbers, form.lattice, fractional))
            made += 1
            if len(batch) == _PER_ADDITION or made == n:
                yield ids, batch
                ids, batch = [], []
        turn += 1


def _formula(numbers: Any) -> str:
    found, counts = np.unique(numbers, return_counts=True)
    pairs = zip(found.tolist(), counts.tolist(), strict=True)
    return Composition({Element.from_Z(z): c for z, c in pairs}).reduced_formula


def _structure_of(form: Reduced, rng: np.random.Generator, move_angstrom: float) -> Structure:
    moves = move_angstrom * rng.normal(size=form.fractional.shape) @ np.linalg.inv(form.lattice)
    return Structure(Lattice(form.lattice), form.numbers.tolist(), form.fractional + moves)


def _candidates(
    targets: Sequence[Structure], library: Sequence[Structure], rng: np.random.Generator
) -> Iterator[list[Structure]]:
    """Yield 20 candidates a target: ten near the truth, ten of other prototypes where there are any."""
    prototypes: dict[tuple[float, ...], list[Structure]] = defaultdict(list)
    for one in library:
        prototypes[tuple(sorted(one.composition.values()))].append(one)
    for target in targets:
        others = prototypes[tuple(sorted(target.composition.values()))]
        row = [perturbed(target, rng) for _ in range(_PER_TARGET // 2 if others else _PER_TARGET)]
        for _ in range(_PER_TARGET - len(row)):
            other = others[int(rng.integers(len(others)))]
            order = [
                sorted(s.composition.items(), key=lambda p: (p[1], p[0].X, p[0].Z)) for s in (other, target)
            ]
            mapping = {mine: theirs for (mine, _), (theirs, _) in zip(*order, strict=True)}
            row.append(Structure(other.lattice, [mapping[site.specie] for site in other], other.frac_coords))
        yield row


def _against_pymatgen(
    pairs: Sequence[tuple[int, int]], firsts: Sequence[Structure], seconds: Sequence[Structure],
    forms: Sequence[Reduced | None], others: Sequence[Reduced | None], ours: float, timed: int, seed: int,
) -> None:  # fmt: skip
    """Time pymatgen's fit on some of the pairs, and compare its decisions with ours."""
    if not pairs:
        _say("  no pair shares a formula: pymatgen would compare nothing")
        return
    rng = np.random.default_rng(seed)
    chosen = [pairs[k] for k in rng.choice(len(pairs), min(timed, len(pairs)), replace=False)]
    matcher = _pymatgen(TOLERANCES["default"])
    theirs, disagree = 0.0, 0
    for i, j in chosen:
        start = time.process_time()
        same = matcher.fit(firsts[i], seconds[j])
        theirs += time.process_time() - start
        form, other = forms[i], others[j]
        mine = form is not None and other is not None and fit(form, other, TOLERANCES["default"])
        disagree += bool(same) != mine
    _ratio(theirs / len(chosen), len(chosen), len(pairs), ours, disagree)


def _ratio(seconds: float, n_timed: int, n: int, ours: float, disagree: int) -> None:
    _say(
        f"  pymatgen: {n:,} comparisons of {1e3 * seconds:.2f} ms (timed on {n_timed}), extrapolated "
        f"{seconds * n:.1f} s: {seconds * n / ours:.1f} times ours; other decisions: {disagree} of {n_timed}"
    )


def _pymatgen(tolerances: Tolerances) -> Any:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(tolerances.length, tolerances.site, tolerances.angle_degrees)


def _warm() -> None:
    """Load the compiled code, so that nobody pays for it in a measurement."""
    form = reduced(Structure(Lattice.cubic(4.1), ["Cs", "Cl"], np.array([[0.0] * 3, [0.5] * 3])))
    for tolerances in TOLERANCES.values():
        fit(form, form, tolerances)


def _structures(path: Path | None, limit: int | None) -> list[Structure]:
    found: list[Structure] = []
    for crystal in read(path) if path else ():
        if isinstance(crystal.structure, Structure):
            found.append(crystal.structure)
        if limit is not None and len(found) == limit:
            break
    return found


def _structures_of(paths: Sequence[Path] | None, limit: int | None) -> list[Structure]:
    found = [structure for path in paths or () for structure in _structures(path, limit)]
    if not found:
        raise EmptyInput("novelty.speed: no reference; give --reference")
    return found


def _ids(paths: Sequence[Path]) -> list[str]:
    return [crystal.id for crystal in read(list(paths)) if isinstance(crystal.structure, Structure)]


def _timed(what: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    _say(f"{what}: {time.perf_counter() - start:.2f} s")
    return result


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _spread(seconds: Sequence[float]) -> str:
    middle, late = np.percentile(seconds, [50, 99])
    return f"median {1e3 * middle:.2f} ms, 99 % within {1e3 * late:.2f}, longest {1e3 * max(seconds):.2f}"


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
