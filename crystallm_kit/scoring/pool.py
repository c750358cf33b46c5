"""Worker processes for parts of sets, killed when one structure does not end: here, or over a Ray cluster.

    with Pool(workers=2) as pool:
        future = pool.submit({"job": "crystallm_kit.scoring.stages:run_part", "part": 3, ...})
        future.result()  -> what run_part returned

A task is JSON: the name of a function, and its arguments. Contract: every task ends. The function wraps the
work on each item in `marks.item(...)`, which sets clocks of the kernel. The first, of computing, raises
TooLong inside the worker, which costs nothing but the item; being of computing, it says the same on a busy
machine. Two more end the worker: of computing, where the code does not come back to Python, and of time,
where it waits for something. The task is then given to a new worker, with the items that killed others in
`skip`, so that the function can write down why they have no result. POSIX only: Windows has no such clocks.

Not here: what is done with a part (stages.py). The pattern is that of structures/cif_pool.py.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from crystallm_kit.errors import CrystallmKitError, MissingExtra, UserError
from crystallm_kit.structures.processes import end

Task = dict[str, Any]
_GRACE_SECONDS = 2.0  # of computing, from the clock that raises to the one that kills
_WAITING = 10  # so many times the limit may go by in all: other programs compute, too
_CLOCKS = (signal.SIGVTALRM, signal.SIGALRM)
_MOST_DEATHS = 50  # of workers on one task; more is no bad structure


class TooLong(BaseException):
    """An item took longer than it may. No Exception, so that no library's handler swallows it."""


class Hand(Protocol):
    """What runs one task after the other."""

    def run(self, task: Task) -> Any:
        """Return what the task's function returned."""

    def stop(self) -> None:
        """End what it is at, from another thread."""

    def close(self) -> None:
        """Give back what it holds, once nobody waits for it."""


class Pool:
    """Up to `workers` hands, each started when there is work for it."""

    def __init__(
        self,
        workers: int,
        *,
        hand: Callable[[], Hand] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """Make a pool.

        Args:
            workers: Tasks at a time.
            hand: Starts one; None: a process of this machine.
            at_end: Called last.
        """
        self.workers, self._at_end = workers, at_end
        self._start = hand or Worker
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="scoring")
        self._local = threading.local()
        self._hands: list[Hand] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for hand in self._hands:
            hand.stop()
        self._threads.shutdown(wait=True)
        for hand in self._hands:
            hand.close()
        if self._at_end is not None:
            self._at_end()

    def submit(self, task: Task) -> "Future[Any]":
        """Return the future result of a task."""
        return self._threads.submit(self._run, task)

    def _run(self, task: Task) -> Any:
        hand: Hand | None = getattr(self._local, "hand", None)
        if hand is None:
            hand = self._local.hand = self._start()
            self._hands.append(hand)
        return hand.run(task)


class Worker:
    """One process of this machine, started anew where a structure has killed it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def run(self, task: Task) -> Any:
        """Return what the task's function returned.

        Raises:
            UserError: If it failed otherwise than by one structure, with what the worker said.
            CrystallmKitError: If the program is at fault, with the traceback.
        """
        skip: dict[str, str] = dict(task.get("skip", {}))
        for _ in range(_MOST_DEATHS):
            answer, at, code = self._ask({**task, "skip": skip})
            if answer is not None:
                if "failed" in answer:
                    raise UserError(answer["failed"])
                if "fault" in answer:
                    raise CrystallmKitError(f"a worker failed, a fault of this program:\n{answer['fault']}")
                return answer["result"]
            if self._closed:
                raise UserError("the pool was closed")
            if at is None or at in skip:
                raise UserError(
                    f"a worker ended with code {code} outside any structure (too little memory?); finished "
                    "parts are kept: run the same command again, with fewer --workers"
                )
            skip[at] = "timeout" if -code in _CLOCKS else f"its process ended with code {code}"
        raise UserError(f"{_MOST_DEATHS} structures of one part killed their processes")

    def stop(self) -> None:
        """Kill the process."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Close the pipes to a process that was stopped."""
        if self._process is not None:
            self._retire(self._process)

    def _ask(self, task: Task) -> tuple[dict[str, Any] | None, str | None, int]:
        """Return the answer; or None, the item at which the process ended, and its exit code."""
        process = self._process or self._started()
        at = None
        try:
            if process.stdin and process.stdout:
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    if line.startswith("@"):
                        at = line[1:].rstrip("\n") or None
                    elif line.endswith("\n"):
                        return json.loads(line), None, 0
        except OSError:  # it went while we wrote; its exit code says why
            at = at or None
        return None, at, self._retire(process)

    def _retire(self, process: "subprocess.Popen[str]") -> int:
        self._process = None
        return end(process)

    def _started(self) -> "subprocess.Popen[str]":
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from crystallm_kit.scoring.pool import serve; serve()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        )
        return self._process


# ---------------------------------------------------------------- inside a worker


class Marks:
    """Says to the parent at which item the worker is, and limits its time."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    @contextmanager
    def item(self, stage: str, position: int, seconds: float) -> Iterator[None]:
        """Limit the work on one item: TooLong, and where that is not heard, the end of the process."""
        self._tell(f"{stage}:{position}")
        signal.signal(signal.SIGPROF, _ring)
        for ends in _CLOCKS:
            signal.signal(ends, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds + _GRACE_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, _WAITING * seconds)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            yield
        finally:
            for clock in (signal.ITIMER_PROF, signal.ITIMER_REAL, signal.ITIMER_VIRTUAL):
                signal.setitimer(clock, 0)


def _ring(_signal: int, _frame: Any) -> None:
    raise TooLong


def serve() -> None:
    """Answer the tasks on standard input until it ends: the life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    _die_first()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(text: str) -> None:
        answers.write(f"@{text}\n")
        answers.flush()

    for line in sys.stdin:
        task = json.loads(line)
        module, _, name = task.pop("job").partition(":")
        try:
            answer = {"result": getattr(importlib.import_module(module), name)(task, Marks(tell))}
        except (UserError, MissingExtra) as error:
            answer = {"failed": str(error)}
        except (OSError, MemoryError) as error:  # a full disk, too little memory
            answer = {"failed": f"{type(error).__name__}: {error}"}
        except Exception:  # noqa: BLE001 - raised again where the task came from
            answer = {"fault": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _die_first() -> None:
    """Where memory runs out, the kernel should end a worker, which is started again, not the run."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123 - no path of ours
            file.write("900")
    except OSError:  # not Linux, or not allowed: then it chooses itself
        return


# ---------------------------------------------------------------- over a cluster


def ray_pool(address: str) -> Pool:
    """Return a pool with a worker for each core of a Ray cluster, whose nodes see the same files.

    Args:
        address: Of the cluster, such as "ray://head:10001"; "auto": the one that runs here; "local": a new
            one on this machine.

    Raises:
        MissingExtra: If ray is not installed.
        UserError: If there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra.of("--ray", "ray", "ray") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--ray {address}: no cluster ({error}); start one, or give 'local'") from error
    cores = int(ray.cluster_resources().get("CPU", 1))
    remote = ray.remote(num_cpus=1, max_restarts=3, max_task_retries=3)(Worker)

    class Far:
        """A worker somewhere in the cluster: the actor holds a process that may be killed."""

        def __init__(self) -> None:
            self._actor = remote.remote()

        def run(self, task: Task) -> Any:
            try:
                return ray.get(self._actor.run.remote(task))
            except ray.exceptions.RayTaskError as error:
                raise UserError(str(error.cause)) from error

        def stop(self) -> None:
            ray.kill(self._actor)

        def close(self) -> None:
            """Nothing is held here."""

    return Pool(max(1, cores), hand=Far, at_end=ray.shutdown if is_ours else None)
