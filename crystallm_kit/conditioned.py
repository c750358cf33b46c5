"""Generation for target values of a property, and what the crystals turn out to have.

    python -m crystallm_kit.benchmark conditioned --adapter bulk-modulus --targets 50,150,300 --out runs/k

    series            asked                 of
    base              nothing               the base model
    adapter           nothing               the adapter, which tells what its training data alone have changed
    50, 150, 300      bulk_modulus=50 GPa   the adapter

Every valid crystal's bulk modulus is measured by a potential that knows nothing of the model or the request
(scores/bulk_modulus.py), also the copies'. In `out`: rows.jsonl, a line for each request, written as they are
measured; the same command goes on with what is missing. settings.json says what the rows are of.

Not here: counting (scores/hits.py), tables of other benchmarks (benchmark.py).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Structure

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.generation import Model, generate
from crystallm_kit.records import Conditions, Crystal, Range, Sample
from crystallm_kit.scores.bulk_modulus import BulkModulus, bulk_moduli
from crystallm_kit.scores.hits import Measured, TargetResult, target_result
from crystallm_kit.structures.relaxation import Potential
from crystallm_kit.structures.symmetry import spacegroup_number

PROPERTY = "bulk_modulus_gpa"
BASE, ADAPTER = "base", "adapter"
Row = dict[str, Any]
Known = frozenset[tuple[str, int]]


def known_crystals(reference: Iterable[Crystal]) -> Known:
    """Return (reduced formula, space group number) of each crystal."""
    return frozenset(
        (c.structure.composition.reduced_formula, spacegroup_number(c.structure))
        for c in reference
        if isinstance(c.structure, Structure)
    )


def conditioned(
    base: Model,
    adapter: Model,
    out: str | Path,
    *,
    targets: Sequence[float],
    potential: Potential,
    n: int = 200,
    seed: int = 0,
    known: Known | None = None,
    measured_together: int = 20,
    say: Callable[[str], None] | None = None,
) -> list[tuple[str, TargetResult]]:
    """Draw, judge and measure n samples of each series; return the series' results in order.

    Args:
        base: Asked for nothing.
        adapter: Asked for nothing, and for each target.
        out: Folder of the rows; those that it has are kept.
        targets: In GPa.
        potential: Measures.
        n: Samples of each series.
        seed: Of the draws; the same for all series.
        known: Crystals of the training data; None: not looked up.
        measured_together: Crystals of one call of bulk_moduli, whose rows are written together.
        say: Told of progress.

    Raises:
        EmptyInput: Without targets or samples.
        UserError: If `out` holds rows of other settings.
    """
    if not targets or n < 1:
        raise EmptyInput(f"conditioned: {len(targets)} targets, {n} samples each, so no result")
    out = Path(out)
    _check_settings(
        out,
        {
            "base": base.name, "adapter": adapter.name, "potential": potential.name, "n": n, "seed": seed,
            "targets": [float(t) for t in targets],
        },
    )  # fmt: skip
    series: list[tuple[str, Model, float | None]] = [(BASE, base, None), (ADAPTER, adapter, None)]
    series += [(f"{target:g}", adapter, float(target)) for target in targets]
    results = []
    for name, model, target in series:
        rows = _rows_of(name, model, target, out / "rows.jsonl", n=n, seed=seed, potential=potential,
                        known=known, together=measured_together, say=say)  # fmt: skip
        measured = [measured_of(row) for row in rows]
        results.append((name, target_result(measured, target, asked_about=[float(t) for t in targets])))
    return results


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    path = out / "settings.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in settings if earlier.get(key) != settings[key])
        if different:
            key = different[0]
            raise UserError(
                f"{out}: holds rows of another run ({key} {earlier.get(key)}, now {settings[key]}); "
                "name another folder."
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _rows_of(
    name: str,
    model: Model,
    target: float | None,
    path: Path,
    *,
    n: int,
    seed: int,
    potential: Potential,
    known: Known | None,
    together: int,
    say: Callable[[str], None] | None,
) -> list[Row]:
    """Return the rows of a series: those in the file, and the missing ones, which are appended to it."""
    done = {row["index"]: row for row in read_rows(path) if row["series"] == name}
    if len(done) < n:
        conditions = (
            Conditions() if target is None else Conditions(properties={PROPERTY: Range.exactly(target)})
        )
        samples = generate(conditions, n=n, seed=seed, model=model)
        for missing in _chunks([i for i in range(n) if i not in done], together):
            fresh = _measured({i: samples[i] for i in missing}, name, potential, known)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh)
            done |= {row["index"]: row for row in fresh}
            if say:
                say(f"{name}: {len(done)} of {n}")
    return [done[i] for i in range(n)]


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of a file, without a last line that was cut; none if there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole, _, cut = text.rpartition("\n")
    if cut:  # a killed run's last line; the next row must not be joined to it
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _measured(
    samples: Mapping[int, Sample], name: str, potential: Potential, known: Known | None
) -> list[Row]:
    crystals = {
        i: s.structure
        for i, s in samples.items()
        if isinstance(s.structure, Structure) and s.verdict.reason in (None, "duplicate")
    }
    moduli = dict(zip(crystals, bulk_moduli(list(crystals.values()), potential), strict=True))
    return [_row(name, i, sample, moduli.get(i), known) for i, sample in samples.items()]


def _row(name: str, index: int, sample: Sample, modulus: BulkModulus | None, known: Known | None) -> Row:
    row: Row = {
        "series": name,
        "index": index,
        "verdict": sample.verdict.reason or "valid",
        "text": sample.text,
    }
    if modulus is None or sample.structure is None:
        return row
    formula, spacegroup = sample.structure.composition.reduced_formula, sample.measures["spacegroup_number"]
    return {
        **row,
        "formula": formula,
        "spacegroup_number": spacegroup,
        "known": None if known is None else (formula, spacegroup) in known,
        "bulk_modulus_gpa": None if modulus.gpa is None else round(modulus.gpa, 2),
        "reason": modulus.reason,
        "residual": _rounded(modulus.residual),
        "volume_per_atom_angstrom3": _rounded(modulus.volume_per_atom_angstrom3),
        "energy_ev_per_atom": _rounded(modulus.relaxed.energy_ev_per_atom),
        "n_steps": modulus.relaxed.n_steps,
    }


def _rounded(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None


def measured_of(row: Row) -> Measured:
    """Return what a row says, for counting."""
    verdict = row["verdict"]
    return Measured(
        value=row.get(PROPERTY),
        valid=verdict in ("valid", "duplicate"),
        is_copy=verdict == "duplicate",
        is_known=row.get("known"),
    )


# ---------------------------------------------------------------- is the measure any good?


def calibration(crystals: Sequence[Crystal], potential: Potential) -> dict[str, float]:
    """Return how moduli measured on crystals with known ones agree with these.

    Returns:
        crystals; measured; spearman; mae_gpa; median_ratio (measured over known); median_relative_error;
        within_20_percent (of all crystals).

    Raises:
        EmptyInput: If fewer than three crystals could be measured.
        UserError: If a crystal has no bulk modulus.
    """
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    for crystal in crystals:
        if PROPERTY not in crystal.properties:
            raise UserError(f"{crystal.id}: no {PROPERTY}; it is needed to compare with")
    found = bulk_moduli([c.structure for c in crystals if isinstance(c.structure, Structure)], potential)
    pairs = [(m.gpa, float(c.properties[PROPERTY])) for m, c in zip(found, crystals, strict=True) if m.gpa]
    if len(pairs) < 3:
        raise EmptyInput(
            f"calibration: {len(pairs)} crystals measured of {len(crystals)}; 3 or more expected"
        )
    measured, truth = np.array(pairs).T
    relative = measured / truth - 1
    return {
        "crystals": len(crystals),
        "measured": len(pairs),
        "spearman": float(spearmanr(measured, truth).statistic),
        "mae_gpa": float(np.abs(measured - truth).mean()),
        "median_ratio": float(np.median(measured / truth)),
        "median_relative_error": float(np.median(np.abs(relative))),
        "within_20_percent": int((np.abs(relative) < 0.2).sum()) / len(crystals),
    }
