"""The two entries of the compiled matcher, cached between processes.

    status, numbers, lattice, fractional = reduce_cell(numbers, ranks, lattice, fractional)
    status, value = match(numbers_1, lattice_1, fractional_1, numbers_2, ..., 0.3, 0.5, 10.0, True)

numba keeps machine code beside the source, or in its folder of the user, and compiles again only where the
file of the function itself has changed. The matcher lies in several files, so their digest is part of what
the cached code is found by. Compiling takes about 20 s of one core, once; loading about 0.2 s a process.

Not here: what they do (reduction.py, kernel.py).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from crystallm_kit.scores.matcher.kernel import match_cells
from crystallm_kit.scores.matcher.lattice import Array
from crystallm_kit.scores.matcher.reduction import reduced_cell

_SOURCES = ("lattice", "niggli", "reduction", "assignment", "ties", "kernel")

Cell = tuple[int, Array, Array, Array]


def _digest() -> str:
    found = hashlib.sha256()
    for name in _SOURCES:
        found.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return found.hexdigest()


def _entries(digest: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    @njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def reduce_cell(numbers: Array, ranks: Array, lattice: Array, fractional: Array) -> Cell:
        _ = digest  # makes it part of the function, and so of the name in the cache
        return reduced_cell(numbers, ranks, lattice, fractional)

    @njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def match(
        z1: Array, l1: Array, f1: Array, z2: Array, l2: Array, f2: Array,
        length: float, site: float, angle: float, is_rms: bool,
    ) -> tuple[int, float]:  # fmt: skip
        _ = digest
        return match_cells(z1, l1, f1, z2, l2, f2, length, site, angle, is_rms)

    return reduce_cell, match


reduce_cell, match = _entries(_digest())
