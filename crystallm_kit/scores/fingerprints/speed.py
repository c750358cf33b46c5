"""How long fingerprints take, beside the peers' way, on the same crystals in one run.

    python -m crystallm_kit.scores.fingerprints.speed samples/DiffCSP_mp_20.pt --n 100
    samples/DiffCSP_mp_20.pt: 100 crystals, 1037 sites
      pymatgen's classes, as matminer calls them   156.9 ms a crystal
      fingerprints                                   4.3 ms a crystal, 36.4 times as fast
      largest difference                           3e-16

Both run in one process, turn by turn, crystal by crystal, so what else the machine does falls on both. The
processor's time counts, not the clock's. Compiling, once an installation, is not counted.

Not here: whether matminer gives the same (tests/scores/test_fingerprints.py).
"""

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
from pymatgen.core import Structure

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.scores.fingerprints.crystal import structure_fingerprint
from crystallm_kit.scores.fingerprints.plain import site_fingerprint
from crystallm_kit.structures.files import read


def report(path: Path, n: int) -> str:
    """Return the lines of the docstring for the first n crystals of a file."""
    seconds = np.zeros(2)
    largest = 0.0
    n_crystals = n_sites = 0
    for crystal in islice(read(path), n):
        structure = crystal.structure
        if not isinstance(structure, Structure):
            continue
        if not n_crystals:
            structure_fingerprint(structure)  # compiled from here on
            site_fingerprint(structure, 0)  # and its parameters are read
        start = time.process_time()
        plain = np.mean([site_fingerprint(structure, i) for i in range(len(structure))], axis=0)
        middle = time.process_time()
        quick = structure_fingerprint(structure)
        seconds += middle - start, time.process_time() - middle
        largest = max(largest, np.inf if quick is None else float(np.abs(plain - quick).max()))
        n_crystals += 1
        n_sites += len(structure)
    if not n_crystals:
        raise EmptyInput(f"{path}: no crystals to time")
    plain_ms, quick_ms = 1000 * seconds / n_crystals
    return "\n".join(
        (
            f"{path}: {n_crystals} crystals, {n_sites} sites",
            f"  pymatgen's classes, as matminer calls them {plain_ms:7.1f} ms a crystal",
            f"  fingerprints {quick_ms:37.1f} ms a crystal, {plain_ms / quick_ms:.1f} times as fast",
            f"  largest difference {largest:31.0e}",
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="fingerprints.speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--n", type=int, default=100, help="structures, from the first")
    asked = parser.parse_args(argv)
    try:
        print(report(asked.source, asked.n))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
