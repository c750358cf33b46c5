"""Processes that relax batches of crystals, and are replaced when one hangs or dies.

Contract: every crystal of every batch gets its record, whatever a potential does. A worker that is silent for
too long, or dies, is replaced, and the crystals of its batch are relaxed one by one; the one that does it
again has the reason "timeout" or "error: the process ended ...". Plain child processes rather than
multiprocessing, as in cif_pool.py: they need no guard in the caller's script, and fork no threads.

A worker reads a JSON list [id, lattice, atomic numbers, fractional coordinates] a line, a batch, and answers
    {"potential": "chgnet 0.3.0"}     when it is ready, or {"error": "MissingExtra", "message": "..."}
    "step"                            when the potential has been asked: it lives
    {"id": "a", "energy_ev_per_atom": -3.4, "reason": null, "lattice": [...], ...}, one a crystal
    "end"

Not here: the folder of a run (relaxed_set.py), how one batch relaxes (relaxation.py).
"""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

from crystallm_kit import errors
from crystallm_kit.errors import CrystallmKitError, UserError
from crystallm_kit.structures.processes import end
from crystallm_kit.structures.relaxation import Potential, Relaxed, load_potential, relax

Named = tuple[str, Structure]
Row = dict[str, Any]
_START_SECONDS = 300.0


@dataclass(frozen=True)
class RelaxSettings:
    """How a set is relaxed.

    Attributes:
        potential: As for load_potential.
        max_force_ev_per_angstrom, max_steps, cell: As for relax.
        seconds_per_crystal: A worker that says nothing for so long, or takes longer than this times its
            crystals, is replaced. CHGNet on one core of a busy machine: about 1 s for ten atoms.
    """

    potential: str = "chgnet"
    max_force_ev_per_angstrom: float = 0.05
    max_steps: int = 300
    cell: bool = True
    seconds_per_crystal: float = 120.0


def atomic_numbers(structure: Structure) -> list[int]:
    """Return the atomic numbers of the sites."""
    return [int(site.specie.Z) for site in structure]


def row_of(name: str, relaxed: Relaxed, potential: str) -> Row:
    """Return the record of a crystal for JSON; NaN as None."""
    plain = {k: v for k, v in asdict(relaxed).items() if k != "structure"}
    row: Row = {"id": name, "potential": potential}
    row |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
    structure = relaxed.structure
    if structure is not None:
        row |= {
            "formula": structure.composition.formula.replace(" ", ""),
            "lattice": structure.lattice.matrix.tolist(),
            "numbers": atomic_numbers(structure),
            "fractional": structure.frac_coords.tolist(),
        }
    return row


def relaxed_of(row: Mapping[str, Any]) -> Relaxed:
    """Return what a record says."""
    structure = None
    if row.get("lattice") is not None:
        structure = Structure(Lattice(row["lattice"]), row["numbers"], row["fractional"])

    def number(key: str) -> float:
        value = row.get(key)
        return math.nan if value is None else float(value)

    return Relaxed(
        structure,
        number("energy_ev_per_atom"),
        bool(row["converged"]),
        int(row["n_steps"]),
        row["reason"],
        number("max_force_ev_per_angstrom"),
        number("pressure_gpa"),
        number("initial_energy_ev_per_atom"),
    )


def rows_of_batches(
    batches: Sequence[Sequence[Named]], settings: RelaxSettings, n_workers: int, device: str
) -> Generator[Row, None, None]:
    """Yield the records of all batches as they come, from worker processes."""
    waiting: queue.SimpleQueue[Sequence[Named] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[list[Row] | BaseException] = queue.SimpleQueue()
    for batch in batches:
        waiting.put(batch)
    workers = [
        _Worker(settings, device, one_thread=n_workers > 1) for _ in range(min(n_workers, len(batches)))
    ]

    def work(worker: _Worker) -> None:
        try:
            while not worker.closed:
                try:
                    batch = waiting.get_nowait()
                except queue.Empty:
                    return
                if batch is not None:
                    results.put(worker.relaxed(batch))
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
            results.put(error)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for _ in batches:
            found = results.get()
            if isinstance(found, BaseException):
                raise found
            yield from found
    finally:
        for worker in workers:
            worker.close()
        for thread, worker in zip(threads, workers, strict=True):
            thread.join(timeout=10)
            worker.retire()


class _Worker:
    """A process that relaxes, and the next one when it is lost."""

    def __init__(self, settings: RelaxSettings, device: str, *, one_thread: bool) -> None:
        self._settings, self._device, self._one_thread = settings, device, one_thread
        self._process: subprocess.Popen[bytes] | None = None
        self._potential = settings.potential
        self._deadline = math.inf
        self._late = False
        self.closed = False

    def relaxed(self, batch: Sequence[Named]) -> list[Row]:
        """Return the records of a batch: together, or one by one where together the process is lost."""
        rows, lost = self._try(batch)
        if not lost or self.closed:
            return rows
        if len(batch) == 1:
            ((name, structure),) = batch
            failed = Relaxed(None, math.nan, False, 0, lost)
            return [{**row_of(name, failed, self._potential), "formula": structure.composition.formula}]
        there = {row["id"] for row in rows}
        return rows + [row for c in batch if c[0] not in there for row in self.relaxed([c])]

    def _try(self, batch: Sequence[Named]) -> tuple[list[Row], str]:
        """Return the records, and why the process was lost; "" where it was not."""
        process = self._started()
        asked = [[n, s.lattice.matrix.tolist(), atomic_numbers(s), s.frac_coords.tolist()] for n, s in batch]
        limit = self._settings.seconds_per_crystal
        latest = time.monotonic() + limit * len(batch)
        rows: list[Row] = []
        try:
            assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
            while True:
                self._deadline = min(latest, time.monotonic() + limit)
                line = process.stdout.readline()
                if not line.endswith(b"\n"):
                    break
                said = json.loads(line)
                if said == "end":
                    self._deadline = math.inf
                    return rows, ""
                if isinstance(said, dict):
                    rows.append(said)
        except OSError:  # it went while we wrote; its exit code says why
            rows = []
        self._deadline = math.inf
        late, self._late = self._late, False
        code = self.retire()
        return (
            rows,
            "timeout" if late else f"error: the process ended with code {code} (memory?)",
        )

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None:
            return self._process
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from crystallm_kit.structures.relaxation_workers import serve; "
            f"serve({asdict(self._settings)!r}, {self._device!r})"
        )
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if self._one_thread else {}
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, **threads},
        )  # fmt: skip
        self._process = process
        threading.Thread(target=self._watch, args=(process,), daemon=True).start()
        assert process.stdout is not None  # noqa: S101 - a pipe
        self._deadline = time.monotonic() + _START_SECONDS
        first = process.stdout.readline()
        self._deadline = math.inf
        if not first.endswith(b"\n"):
            late, self._late = self._late, False
            code = self.retire()
            why = f"was not ready in {_START_SECONDS:g} s" if late else f"ended with code {code}"
            raise UserError(f"potential '{self._settings.potential}': the process that loads it {why}")
        hello = json.loads(first)
        if "error" in hello:
            self.retire()
            kind = getattr(errors, hello["error"], CrystallmKitError)
            raise kind(hello["message"])
        self._potential = hello["potential"]
        return process

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill the process when its deadline has passed."""
        while process.poll() is None and process is self._process:
            if time.monotonic() > self._deadline:
                self._late = True
                process.kill()
                return
            time.sleep(0.05)

    def retire(self) -> int:
        """End the process, if there is one, and return its exit code."""
        process, self._process = self._process, None
        return 0 if process is None else end(process)

    def close(self) -> None:
        """Kill the process; what it was doing is lost, and its thread ends."""
        self.closed = True
        if self._process is not None:
            self._process.kill()


def serve(settings: Mapping[str, Any], device: str) -> None:
    """Relax the batches on standard input until it ends: the life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")

    def say(what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    how = RelaxSettings(**settings)
    try:
        potential = load_potential(how.potential, device=device)
    except CrystallmKitError as error:
        say({"error": type(error).__name__, "message": str(error)})
        return
    say({"potential": potential.name})
    for line in sys.stdin:
        batch = [(name, Structure(Lattice(m), z, np.array(x))) for name, m, z, x in json.loads(line)]
        found = _relaxed([structure for _, structure in batch], potential, how, lambda: say("step"))
        for (name, _), relaxed in zip(batch, found, strict=True):
            say(row_of(name, relaxed, potential.name))
        say("end")


def _relaxed(
    structures: Sequence[Structure], potential: Potential, how: RelaxSettings, say: Callable[[], None]
) -> list[Relaxed]:
    """Return the records of a batch; what breaks the optimiser breaks it for one crystal alone."""
    try:
        return relax(
            structures, potential, cell=how.cell, max_steps=how.max_steps,
            max_force_ev_per_angstrom=how.max_force_ev_per_angstrom, say=say,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - singular cells, memory of the GPU: each ends here
        if len(structures) > 1:
            return [one for structure in structures for one in _relaxed([structure], potential, how, say)]
        return [Relaxed(None, math.nan, False, 0, f"error: {type(error).__name__}: {error}")]
