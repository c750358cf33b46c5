"""How long all checks of many structures take, and what they count.

    python -m crystallm_kit.scores.checks_speed DiffCSP_mp_20.pt --processes 2

prints the counts, then one line: structures, seconds of reading and checking together, processor time (what
remains on a machine with nothing else to do, times the processes). Each process reads its own part of the
file. Bonds and fingerprints are left out: they are far slower.

Not here: the checks (checks.py).
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from pymatgen.core import Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.checks import check_scores, structure_checks
from crystallm_kit.structures.files import read

Row = dict[str, bool | float]


def checked(source: Path, start: int, stop: int | None) -> list[Row]:
    """Return the checks of the structures from `start` to `stop` of a file."""
    entries = islice(read(source, start=start, workers=1), None if stop is None else stop - start)
    return [structure_checks(e.structure) for e in entries if isinstance(e.structure, Structure)]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="checks_speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--n", type=int, default=10_000, help="structures, from the first")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args(argv)
    began = time.perf_counter()
    bounds = [asked.n * i // asked.processes for i in range(asked.processes + 1)]
    try:
        with ProcessPoolExecutor(asked.processes) as pool:
            parts = pool.map(checked, [asked.source] * asked.processes, bounds[:-1], bounds[1:])
            rows = [row for part in parts for row in part]
        scores = check_scores(
            {name: [row.get(name) for row in rows] for name in rows[0]} if rows else {}, len(rows)
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    seconds = time.perf_counter() - began
    for score in scores:
        print(f"{score.name:<44} {score.numerator} of {score.denominator}")
    used = os.times().children_user + os.times().children_system
    print(
        f"{len(rows)} structures in {seconds:.1f} s by {asked.processes} processes, "
        f"{used:.1f} s of processor time: {len(rows) / seconds:.0f}/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
