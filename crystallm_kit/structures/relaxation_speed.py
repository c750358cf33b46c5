"""How fast crystals relax with CHGNet, beside chgnet's own optimiser, and whether both say the same.

    python -m crystallm_kit.structures.relaxation_speed DiffCSP_mp_20.pt -n 1000 --out speed.json

One run, the same crystals, prints and writes:
    peer        chgnet's StructOptimizer, one crystal after the other, for --peer-seconds
    one         relax in this process, all crystals together, once for each of --batch-atoms
    evaluate    CHGNet alone on all crystals as they are, best of three; once for each of --batch-atoms
    set         relax_set, once for each of --workers, which share the device; processes start anew, and what
                a set of one crystal takes is told beside it
    agreement   the largest differences of energies, forces and stresses from chgnet's predict_structure, on
                the first crystals as they are and as they have relaxed
An evaluation is energy, forces and stress of one crystal once; a relaxation of n steps has n + 1. It exits 1
where energies differ by more than 2e-5 eV/atom.

Not here: relaxing (relaxation.py), graphs (chgnet_batches.py).
"""

import argparse
import contextlib
import io
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Structure

from crystallm_kit.errors import UserError
from crystallm_kit.structures.files import read
from crystallm_kit.structures.relaxation import (
    EV_PER_ANGSTROM3_IN_GPA,
    ChgnetPotential,
    CrystalArrays,
    Relaxed,
    best_device,
    relax,
)
from crystallm_kit.structures.relaxation_workers import RelaxSettings
from crystallm_kit.structures.relaxed_set import relax_set

SAME_ENERGY_EV_PER_ATOM = 2e-5
_FORCE = 0.05  # eV/angstrom, as relax has it
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    asked = _parser().parse_args(argv)
    warnings.simplefilter("ignore")
    try:
        crystals = read(asked.source)
        structures = list(
            islice((c.structure for c in crystals if isinstance(c.structure, Structure)), asked.n)
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if not structures:
        print(f"{asked.source}: holds no ordered crystal", file=sys.stderr)
        return 2
    rows = []
    for row in measured(structures, asked):
        print(line_of(row), flush=True)
        rows.append(row)
    if asked.out:
        asked.out.write_text(json.dumps(_told(structures, asked) | {"rows": rows}, indent=1) + "\n", "utf-8")
    largest = max(r["largest_energy_ev_per_atom"] for r in rows if r["row"] == "agreement")
    return 1 if largest > SAME_ENERGY_EV_PER_ATOM else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="relaxation_speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="crystals")
    parser.add_argument("-n", type=int, default=1000, help="crystals, from the first")
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--batch-atoms", type=int, nargs="*", help="default: as load_potential has it")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="none: no sets")
    parser.add_argument("--together", type=int, help="crystals of one batch of a set")
    parser.add_argument("--peer-seconds", type=float, default=40.0, help="0: no peer")
    parser.add_argument("--checked", type=int, default=100, help="crystals compared with chgnet's prediction")
    parser.add_argument("--threads", type=int, help="of this process, on a CPU")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser


def measured(structures: Sequence[Structure], asked: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows that were asked for, as they are measured."""
    import torch

    if asked.threads:
        torch.set_num_threads(asked.threads)
    potential = ChgnetPotential(device=asked.device)
    relax(structures[:4], potential, max_steps=2)  # loading kernels is not what is measured
    if asked.peer_seconds > 0:
        yield peer_row(structures, asked)
    relaxed: list[Relaxed] = []
    for batch_atoms in asked.batch_atoms or [potential.batch_atoms]:
        potential.batch_atoms = batch_atoms
        row, relaxed = _one_row(structures, potential, asked)
        yield row
        yield evaluate_row(structures, potential)
    yield agreement_row(structures[: asked.checked], potential, "given")
    done = [one.structure for one in relaxed if one.structure is not None]
    if done:
        yield agreement_row(done[: asked.checked], potential, "relaxed")
    for workers in asked.workers:
        yield set_row(structures, workers, asked)


def peer_row(structures: Sequence[Structure], asked: argparse.Namespace) -> Row:
    """Relax crystals by chgnet's optimiser until the time is up, the last one to its end."""
    from chgnet.model import StructOptimizer

    with contextlib.redirect_stdout(io.StringIO()):
        model = _chgnet(asked.device)
        optimiser = StructOptimizer(model, use_device=asked.device, on_isolated_atoms="ignore")
    optimiser.relax(structures[0], steps=2, verbose=False)
    began, n_crystals, n_evaluations, n_failed = time.perf_counter(), 0, 0, 0
    for structure in structures:
        try:
            found = optimiser.relax(structure, fmax=_FORCE, steps=asked.max_steps, verbose=False)
            n_evaluations += len(found["trajectory"]) - 1  # it takes down the last one twice
        except Exception:  # noqa: BLE001 - as a loop over many crystals would have to
            n_failed += 1
        n_crystals += 1
        if time.perf_counter() - began > asked.peer_seconds:
            break
    return _speed("peer", n_crystals, n_evaluations, time.perf_counter() - began) | {"failed": n_failed}


def _one_row(
    structures: Sequence[Structure], potential: ChgnetPotential, asked: argparse.Namespace
) -> tuple[Row, list[Relaxed]]:
    _forget_memory(potential)
    began = time.perf_counter()
    found = relax(structures, potential, max_steps=asked.max_steps, max_force_ev_per_angstrom=_FORCE)
    row = _relaxed_speed("one", found, time.perf_counter() - began)
    return row | {"batch_atoms": potential.batch_atoms} | _memory(potential), found


def evaluate_row(structures: Sequence[Structure], potential: ChgnetPotential) -> Row:
    """Evaluate all crystals as they are, three times, and take the fastest."""
    crystals = CrystalArrays.of(structures)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        potential.of_arrays(crystals)
        seconds.append(time.perf_counter() - began)
    return {
        "row": "evaluate",
        "evaluations": len(structures),
        "seconds": min(seconds),
        "evaluations_per_second": len(structures) / min(seconds),
        "batch_atoms": potential.batch_atoms,
    }


def set_row(structures: Sequence[Structure], workers: int, asked: argparse.Namespace) -> Row:
    """Relax the crystals by relax_set; the start of its processes counts, and is told."""
    settings = RelaxSettings(max_steps=asked.max_steps, max_force_ev_per_angstrom=_FORCE)
    together = asked.together or min(1024, -(-len(structures) // workers))
    named = [(str(i), structure) for i, structure in enumerate(structures)]
    seconds, found = [], {}
    for some in (named[:1], named):
        began = time.perf_counter()
        found = relax_set(some, settings=settings, workers=workers, device=asked.device, together=together)
        seconds.append(time.perf_counter() - began)
    row = _relaxed_speed("set", list(found.values()), seconds[1])
    return row | {"workers": workers, "together": together, "seconds_of_one_crystal": seconds[0]}


def _chgnet(device: str) -> Any:
    """Return CHGNet as chgnet has it."""
    from chgnet.model import CHGNet

    with contextlib.redirect_stdout(io.StringIO()):
        model = CHGNet.load(use_device=device, verbose=False)
    model.graph_converter.set_isolated_atom_response("ignore")
    return model


def agreement_row(structures: Sequence[Structure], potential: ChgnetPotential, what: str) -> Row:
    """Compare energies, forces and stresses with chgnet's own prediction."""
    found = potential(structures)
    pairs = [(s, f) for s, f in zip(structures, found, strict=True) if not isinstance(f, str)]
    theirs = _chgnet(potential.device).predict_structure([s for s, _ in pairs], task="efs")
    theirs = [theirs] if isinstance(theirs, dict) else theirs
    off = np.array(
        [
            (
                abs(ours.energy_ev / len(structure) - float(their["e"])),
                np.abs(ours.forces - their["f"]).max(),
                np.abs(ours.stress * EV_PER_ANGSTROM3_IN_GPA - their["s"]).max(),
            )
            for (structure, ours), their in zip(pairs, theirs, strict=True)
            # atoms on top of each other have no energy, here and there
            if not (math.isnan(ours.energy_ev) and math.isnan(float(their["e"])))
        ]
    ).reshape(-1, 3)
    names = ("largest_energy_ev_per_atom", "largest_force_ev_per_angstrom", "largest_stress_gpa")
    largest = np.where(np.isnan(off), np.inf, off).max(axis=0, initial=0.0).tolist()
    return {"row": "agreement", "crystals": len(off), "of": what} | dict(zip(names, largest, strict=True))


def _relaxed_speed(row: str, found: Sequence[Relaxed], seconds: float) -> Row:
    n_evaluations = sum(one.n_steps + 1 for one in found)
    converged = sum(one.converged for one in found)
    return _speed(row, len(found), n_evaluations, seconds) | {"converged": converged}


def _speed(row: str, n_crystals: int, n_evaluations: int, seconds: float) -> Row:
    return {
        "row": row,
        "crystals": n_crystals,
        "evaluations": n_evaluations,
        "seconds": seconds,
        "crystals_per_second": n_crystals / seconds,
        "evaluations_per_second": n_evaluations / seconds,
    }


def _forget_memory(potential: ChgnetPotential) -> None:
    import torch

    if potential.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _memory(potential: ChgnetPotential) -> Row:
    import torch

    if not potential.device.startswith("cuda"):
        return {}
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def _told(structures: Sequence[Structure], asked: argparse.Namespace) -> Row:
    """Return what the rows are of."""
    import torch

    return {
        "file": asked.source.name,
        "n": len(structures),
        "atoms": sum(map(len, structures)),
        "device": torch.cuda.get_device_name() if asked.device.startswith("cuda") else asked.device,
        "threads": torch.get_num_threads(),
        "max_steps": asked.max_steps,
        "max_force_ev_per_angstrom": _FORCE,
        "versions": {name: version(name) for name in ("torch", "chgnet", "numpy")},
    }


def line_of(row: Row) -> str:
    """Return a row for people."""
    told = {k: v for k, v in row.items() if k != "row"}
    return f"{row['row']:<10}" + ", ".join(
        f"{k.replace('_', ' ')} {v:.3g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
        for k, v in told.items()
    )


if __name__ == "__main__":
    sys.exit(main())
