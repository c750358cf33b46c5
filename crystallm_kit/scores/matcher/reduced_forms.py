"""Reduced forms of many structures, on several cores.

    for form in reduced_forms(structures, processes=2): ...      Reduced, or None where there is none

Contract: one result for each structure, in order. None stands for None, for a disordered structure, and for
one whose cell cannot be reduced (numbers that are none, no volume or hardly any), which stops nothing. Memory
stays bounded: structures are taken as they are needed.

Not here: the reduction itself (structure_matcher.py). Structures travel as plain arrays: a pickled Structure
costs more than its reduction.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.matcher.structure_matcher import Reduced, reduced_cell

Plain = tuple[Any, Any, Any] | None  # (3, 3) lattice in angstrom, (N,) atomic numbers, (N, 3) fractional
_PER_TASK = 64
_WAITING_PER_PROCESS = 4
# What a cell without volume or with wild lengths makes the reduction raise.
_NO_CELL = (UserError, ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
# Below, pymatgen's reduction may not end; the smallest cell that any protocol calls valid has 0.1 angstrom^3.
SMALLEST_VOLUME_ANGSTROM3, FLATTEST = 1e-3, 1e-6
T = TypeVar("T")
R = TypeVar("R")


def reduced_forms(
    structures: Iterable[Structure | None], *, processes: int | None = 1
) -> Iterator[Reduced | None]:
    """Yield the reduced form of each structure.

    Args:
        structures: None where there is none.
        processes: Worker processes; 1: this one; None: as many as there are usable cores.
    """
    chunks = batches((plain_of(structure) for structure in structures), _PER_TASK)
    for forms in in_processes(_forms, chunks, processes):
        yield from forms


def plain_of(structure: Structure | None) -> Plain:
    """Return what a process needs of a structure; None for None and for disordered ones."""
    if structure is None or not structure.is_ordered:
        return None
    numbers = np.array([site.specie.Z for site in structure], dtype=np.int16)
    return structure.lattice.matrix, numbers, structure.frac_coords


def form_of(plain: Plain) -> Reduced | None:
    """Return the reduced form; None where the cell has none."""
    if plain is None:
        return None
    matrix, numbers, fractional = plain
    if not (
        len(numbers) and np.isfinite(matrix).all() and np.isfinite(fractional).all() and _is_cell(matrix)
    ):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return reduced_cell(numbers, np.array(matrix), np.array(fractional))
        except _NO_CELL:
            return None


def _is_cell(matrix: NDArray[np.float64]) -> bool:
    volume = abs(float(np.linalg.det(matrix)))
    edges = float(np.prod(np.linalg.norm(matrix, axis=1)))
    return volume > SMALLEST_VOLUME_ANGSTROM3 and volume > FLATTEST * edges


def in_processes(work: Callable[[T], R], tasks: Iterable[T], processes: int | None) -> Iterator[R]:
    """Yield work(task) for each task, in order; few tasks are taken ahead of their results.

    Raises:
        UserError: If a process was killed.
    """
    n = processes or usable_cores()
    if n == 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(n, mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(work, task))
                if len(waiting) >= n * _WAITING_PER_PROCESS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {n} worker processes was killed (memory?); ask for fewer processes"
            ) from error


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of a size, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _forms(plains: Sequence[Plain]) -> list[Reduced | None]:
    return [form_of(plain) for plain in plains]
