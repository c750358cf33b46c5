"""Worker processes that read awkward CIFs and are killed when one does not end.

Contract: every text submitted gets a Structure or a ReadError, within the time allowed for one text, whatever
the text does to the parser: the kernel's alarm ends the worker, in C code too, and the next text gets a new
one. In the normal case that costs two system calls a text. POSIX only: Windows has no such alarm.

A worker is a plain child process that reads a JSON string a line and answers with one JSON object a line:
    -> "data_NaCl\\n_cell_length_a 5.64 ..."
    <- {"matrix": [[5.64, 0.0, 0.0], ...], "species": ["Na", ...], "fractional": [[0.0, 0.0, 0.0], ...]}
    <- {"error": "pymatgen reads no structure: ..."}
A child process rather than multiprocessing: it needs no `if __name__ == "__main__"` in the caller's script,
and does not fork a process that holds threads.

Not here: how a CIF is read (cif_reading.py).
"""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Structure

from crystallm_kit.errors import ReadError
from crystallm_kit.structures.cif_reading import build_structure, structure_from_any_cif
from crystallm_kit.structures.processes import end


class CifPool:
    """Up to `workers` processes, each started when there is work for it."""

    def __init__(self, workers: int, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="cif")
        self._local = threading.local()
        self._processes: set[subprocess.Popen[str]] = set()
        self._closed = False

    def __enter__(self) -> "CifPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self._processes):
            process.kill()
        self._threads.shutdown(wait=True)
        for process in list(self._processes):
            self._retire(process)

    def submit(self, text: str) -> Future[Structure]:
        """Return the future structure of a CIF text; its exception is a ReadError."""
        return self._threads.submit(self._read, text)

    def _read(self, text: str) -> Structure:
        process = self._process()
        answer = ""
        try:
            if process.stdin and process.stdout:
                process.stdin.write(json.dumps(text) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
        except OSError:  # the worker went while we wrote; its exit code says why
            answer = ""
        if answer.endswith("\n"):
            return _structure(json.loads(answer))
        self._local.process = None
        code = self._retire(process)
        if code == -signal.SIGALRM:
            raise ReadError(f"pymatgen's CIF parser did not end within {self._timeout_seconds:g} s")
        raise ReadError(f"the process that read it ended with code {code} (memory?)")

    def _process(self) -> "subprocess.Popen[str]":
        """Return this thread's worker, started if it has none."""
        process: subprocess.Popen[str] | None = getattr(self._local, "process", None)
        if self._closed:
            raise ReadError("the reader was closed")
        if process is None:
            program = (
                f"import sys; sys.path[:] = {sys.path!r}; "
                f"from crystallm_kit.structures.cif_pool import serve; serve({self._timeout_seconds!r})"
            )
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            self._processes.add(process)
            self._local.process = process
        return process

    def _retire(self, process: "subprocess.Popen[str]") -> int:
        self._processes.discard(process)
        return end(process)


def serve(timeout_seconds: float) -> None:
    """Answer the CIF texts on standard input until it ends: the life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default of an alarm is to end the process
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
        try:
            answer = _answer(structure_from_any_cif(json.loads(line)))
        except ReadError as error:
            answer = {"error": str(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(structure: Structure) -> dict[str, Any]:
    return {
        "matrix": structure.lattice.matrix.tolist(),
        "species": [
            site.specie.symbol if site.is_ordered else {e.symbol: float(x) for e, x in site.species.items()}
            for site in structure
        ],
        "fractional": structure.frac_coords.tolist(),
    }


def _structure(answer: dict[str, Any]) -> Structure:
    if "error" in answer:
        raise ReadError(answer["error"])
    return build_structure(Lattice(answer["matrix"]), answer["species"], np.array(answer["fractional"]))
