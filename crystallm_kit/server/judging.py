"""The processes that judge samples: parsing, verdicts, measures, files, comparisons, off the server's thread.

    judges = Judges()
    await judges.start()
    for outcome in await judges.judge(task):        judge_worker.JudgeTask -> Judged for each item, in order

Contract:
    every item of a task gets its outcome, whatever its text does to the process that reads it
    a process that dies, or does not move on within the time limit, is replaced; its task is judged again,
    text by text, and a text that does it twice has the reason "error"
    a task whose waiter is gone is not begun

Not here: what is judged, and how (judge_worker.py); which samples are drawn (crystals.py).
"""

import asyncio
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from crystallm_kit.server.backend import BackendError
from crystallm_kit.server.judge_worker import BUSY, READY, CompareTask, Judged, JudgeTask, failed

BATCH = 64  # texts of a task: about 50 ms of work
SECONDS_PER_TEXT = 10.0
_GRACE_SECONDS = 5.0  # a process stops itself after the limit, unless it hangs in compiled code
_START_SECONDS = 120.0
_STARTS_TRIED = 3
_log = logging.getLogger(__name__)


class WorkerDied(Exception):
    """A process ended, or was ended, in the middle of a task."""


def default_workers() -> int:
    """Return how many processes judge where nothing else is said: one on a small machine, a quarter of the
    cores on a large one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 4)


class Judges:
    """A pool of judging processes.

    Args:
        n_workers: Processes; None: `default_workers`.
        seconds_per_text: One text may take so long.
    """

    def __init__(self, n_workers: int | None = None, *, seconds_per_text: float = SECONDS_PER_TEXT) -> None:
        self.n_workers = n_workers or default_workers()
        self.seconds_per_text = seconds_per_text
        self.n_replaced = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._processes: dict[int, _Process] = {}
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the processes that run."""
        return [process.pid for process in list(self._processes.values())]

    async def start(self) -> None:
        """Start the processes; returns when all are ready. Raises BackendError if they cannot be started."""
        if self._threads:
            return
        loop = asyncio.get_running_loop()
        ready = [loop.create_future() for _ in range(self.n_workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(number, loop, future), daemon=True, name="judge")
            for number, future in enumerate(ready)
        ]
        for thread in self._threads:
            thread.start()
        await asyncio.gather(*ready)

    async def close(self) -> None:
        """Stop the processes; tasks that run or wait fail."""
        self._is_closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for process in list(self._processes.values()):
            process.kill()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._threads = []

    async def judge(self, task: JudgeTask) -> list[Judged]:
        """Return the outcome of each item, in order. Raises BackendError if no process can be started."""
        try:
            done: list[Judged] = await self._result(task)
        except WorkerDied:
            return list(
                await asyncio.gather(*(self._judge_alone(replace(task, items=(i,))) for i in task.items))
            )
        return done

    async def compare(self, task: CompareTask) -> list[str | None]:
        """Return for each new sample the name of the one that it copies, or None; see `compared`.

        A comparison that ends its process twice counts as no copy.
        """
        for _ in range(2):
            with suppress(WorkerDied):
                done: list[str | None] = await self._result(task)
                return done
        return [None] * len(task.later)

    async def _judge_alone(self, task: JudgeTask) -> Judged:
        try:
            (found,) = await self._result(task)
        except WorkerDied as error:
            return failed(task, task.items[0], f"judging it failed twice: {error}")
        outcome: Judged = found
        return outcome

    async def _result(self, task: Any) -> Any:
        if self._is_closed or not self._threads:
            raise BackendError("the processes that judge samples do not run")
        job = _Job(task, asyncio.get_running_loop(), asyncio.get_running_loop().create_future())
        self._jobs.put(job)
        return await job.future

    # -------------------------------------------------------- one thread a process

    def _serve(self, number: int, loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[None]") -> None:
        """Keep one process running and hand it one task after the other."""
        started = _Job(None, loop, ready)
        try:
            self._process(number)
        except BackendError as error:
            started.fail(error)
            return
        started.finish(None)
        while (job := self._jobs.get()) is not None:
            if job.future.cancelled():
                continue
            try:
                job.finish(self._process(number).result(job.task, self.seconds_per_text + _GRACE_SECONDS))
            except WorkerDied as error:
                if not self._is_closed:
                    _log.warning("a judging process is replaced: %s", error)
                    self.n_replaced += 1
                self._drop(number)
                job.fail(BackendError("the server is stopping") if self._is_closed else error)
            except BackendError as error:
                job.fail(error)
        self._drop(number)

    def _process(self, number: int) -> "_Process":
        """Return the thread's process, started where there is none. Raises BackendError."""
        found = self._processes.get(number)
        if found is not None and found.is_alive():
            return found
        if found is not None:
            self.n_replaced += 1
            self._drop(number)
        last = ""
        for _ in range(_STARTS_TRIED):
            if self._is_closed:
                break
            process = _Process(self.seconds_per_text)
            self._processes[number] = process
            try:
                process.wait_until_ready()
            except WorkerDied as error:
                last = str(error)
                self._drop(number)
                continue
            return process
        raise BackendError(f"the processes that judge samples cannot be started: {last}")

    def _drop(self, number: int) -> None:
        process = self._processes.pop(number, None)
        if process is not None:
            process.kill()


@dataclass(frozen=True)
class _Job:
    """A task, and who waits for it."""

    task: Any
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"

    def finish(self, result: Any) -> None:
        self._tell(self.future.set_result, result)

    def fail(self, error: Exception) -> None:
        self._tell(self.future.set_exception, error)

    def _tell(self, settle: Callable[[Any], None], what: Any) -> None:
        def act() -> None:
            if not self.future.done():
                settle(what)

        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(act)


class _Process:
    """One process and the pipe to it."""

    def __init__(self, seconds_per_text: float) -> None:
        ours, theirs = Pipe()
        self._pipe: Connection[Any, Any] = ours
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._popen = subprocess.Popen(
            _command(theirs.fileno(), seconds_per_text),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def wait_until_ready(self) -> None:
        if self._receive(_START_SECONDS) != READY:
            raise WorkerDied("it did not say that it was ready")

    def result(self, task: Any, seconds: float) -> Any:
        """Return the result of a task. Raises WorkerDied if nothing is heard for so many seconds."""
        try:
            self._pipe.send(task)
        except OSError as error:
            raise WorkerDied("it had ended") from error
        while (answer := self._receive(seconds)) == BUSY:
            pass
        return answer

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        with suppress(OSError):
            self._pipe.close()

    def _receive(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                raise WorkerDied(f"nothing heard of it for {seconds:g} s")
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied("it ended") from error


def _command(file_number: int, seconds_per_text: float) -> Sequence[str]:
    # Not -m: its module would be __main__, and the tasks' classes others than those that are sent.
    code = "import sys; from crystallm_kit.server.judge_worker import main; main(sys.argv[1:])"
    return [sys.executable, "-c", code, str(file_number), str(seconds_per_text)]
