"""Keeps programs running: starts them one after another, watches them, restarts them, stops them all.

    supervisor = Supervisor([Job("engine-0", command, port=8001)], folder=Path("state"))
    await supervisor.start()        when the first answers /health; the others follow
    ...
    await supervisor.close()

A program that ends, or stops answering, is started again, after a pause that doubles with each death that
follows quickly. After several of those it is given up, in words, with the end of its log. None outlives us:
see watchdog.py.

Not here: what the programs are (vllm_jobs.py), asking them for completions (upstream.py).
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from crystallm_kit.errors import CrystallmKitError

_WATCHDOG = Path(__file__).with_name("watchdog.py")
_LOOK_SECONDS = 0.2
_LOG_BYTES = 20_000_000  # a log that is longer moves aside, and one older is kept
_TAIL_LINES = 15


class EngineFailed(CrystallmKitError):
    """A program that is needed dies again and again; the message holds the end of its log."""


@dataclass(frozen=True)
class Job:
    """One program that answers /health on a port of this machine.

    Attributes:
        name: Of its log file, and in messages.
        command: What is run.
        port: Where it answers, on 127.0.0.1.
        environment: Variables that it gets beside ours; an empty one is taken away.
    """

    name: str
    command: tuple[str, ...]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self.port}"


class Supervisor:
    """Keeps jobs running.

    Args:
        jobs: In the order in which they are started.
        folder: Where the logs go, one file a job.
        side_by_side: Start all after the first at the same moment; False: each when the one before answers,
            for programs that measure the memory that is free as they start.
        start_seconds: How long a job may take to answer for the first time.
        silence_seconds: A job that does not answer for so long is killed and started again.
        quick_seconds: A job that ends without an answer, or so soon after its first, died quickly.
        most_quick_deaths: After so many in a row it is given up.
        pause_seconds: Before the first restart; doubles with each quick death, up to a minute.
        grace_seconds: Between SIGTERM and SIGKILL.
        tell: Takes lines for people.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        folder: Path,
        side_by_side: bool = False,
        start_seconds: float = 900.0,
        silence_seconds: float = 60.0,
        quick_seconds: float = 60.0,
        most_quick_deaths: int = 4,
        pause_seconds: float = 1.0,
        grace_seconds: float = 15.0,
        tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.folder = folder
        self.runs = [_Run(job, self) for job in jobs]
        self.side_by_side = side_by_side
        self.start_seconds = start_seconds
        self.silence_seconds = silence_seconds
        self.quick_seconds = quick_seconds
        self.most_quick_deaths = most_quick_deaths
        self.pause_seconds = pause_seconds
        self.grace_seconds = grace_seconds
        self.tell = tell
        self.n_restarts = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.all_failed = asyncio.Event()

    @property
    def urls(self) -> list[str]:
        """Where the jobs answer, or will."""
        return [run.job.url for run in self.runs]

    async def start(self) -> None:
        """Start the jobs; return when the first of them answers.

        Raises:
            EngineFailed: If every job was given up before one answered.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tasks = [asyncio.create_task(self._start_in_turn())]
        answered = [asyncio.create_task(run.answered.wait()) for run in self.runs]
        failed = asyncio.create_task(self.all_failed.wait())
        try:
            await asyncio.wait([*answered, failed], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self.close()
            raise
        finally:
            for task in (*answered, failed):
                task.cancel()
        if self.all_failed.is_set():
            await self.close()
            raise EngineFailed(await self.failed())

    async def failed(self) -> str:
        """Wait until every job is given up; return why."""
        await self.all_failed.wait()
        return "; ".join(dict.fromkeys(run.failure for run in self.runs))

    async def close(self) -> None:
        """Stop every job: SIGTERM, and SIGKILL to its whole group if that is not enough."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.gather(*(run.stop() for run in self.runs))

    async def _start_in_turn(self) -> None:
        for position, run in enumerate(self.runs):
            task = asyncio.create_task(run.keep())
            self._tasks.append(task)
            if position == 0 or not self.side_by_side:
                waits = [asyncio.create_task(run.answered.wait()), asyncio.create_task(run.given_up.wait())]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()

    def gave_up(self) -> None:
        """Take note that a job was given up."""
        if all(run.given_up.is_set() for run in self.runs):
            self.all_failed.set()


class _Run:
    """One job's life."""

    def __init__(self, job: Job, supervisor: Supervisor) -> None:
        self.job = job
        self.supervisor = supervisor
        self.answered = asyncio.Event()  # at least once
        self.given_up = asyncio.Event()
        self.failure = ""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.supervisor.folder / f"{self.job.name}.log"

    async def keep(self) -> None:
        """Start the job again and again until it is given up or this is cancelled."""
        n_quick = 0
        while True:
            self._spawn()
            why, seconds_well = await self._watch()
            await self.stop()
            n_quick = n_quick + 1 if seconds_well < self.supervisor.quick_seconds else 0
            if n_quick >= self.supervisor.most_quick_deaths:
                self.failure = (
                    f"{self.job.name} was started {n_quick} times in a row and {why}; it is given up. "
                    f"The end of {self.log}:\n{self.tail()}"
                )
                self.supervisor.tell(self.failure)
                self.given_up.set()
                self.supervisor.gave_up()
                return
            pause = min(60.0, self.supervisor.pause_seconds * 2 ** max(0, n_quick - 1))
            self.supervisor.tell(
                f"{self.job.name} {why}; starting it again in {pause:.3g} s (log: {self.log})"
            )
            await asyncio.sleep(pause)
            self.supervisor.n_restarts += 1

    async def _watch(self) -> tuple[str, float]:
        """Return why the job is not well any more, and for how many seconds it was."""
        began = last = time.monotonic()
        first: float | None = None
        settings = self.supervisor
        patience = min(5.0, settings.start_seconds / 2, settings.silence_seconds / 2)
        async with httpx.AsyncClient(timeout=patience, trust_env=False) as client:
            next_question = 0.0
            while True:
                code = None if self.process is None else self.process.poll()
                now = time.monotonic()
                if code is not None:
                    return _ended(code), 0.0 if first is None else now - first
                if now >= next_question:
                    next_question = now + (2.0 if first is not None else 0.5)
                    if await _is_well(client, self.job.url):
                        last = time.monotonic()
                        if first is None:
                            first = last
                            self.answered.set()
                            settings.tell(f"{self.job.name} answers after {first - began:.0f} s")
                limit = settings.start_seconds if first is None else settings.silence_seconds
                if time.monotonic() - last > limit:
                    return f"did not answer for {limit:.3g} s", 0.0 if first is None else last - first
                self._rotate()
                await asyncio.sleep(_LOOK_SECONDS)

    def _spawn(self) -> None:
        environment = {**os.environ, **self.job.environment}
        for name, value in self.job.environment.items():
            if not value:
                environment.pop(name, None)
        with self.log.open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {self.job.name} starts\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WATCHDOG), str(os.getpid()),
                 str(self.supervisor.grace_seconds), *self.job.command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    async def stop(self) -> None:
        """End the job and all that it started."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.supervisor.grace_seconds + 2.0
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the watchdog leads the group
        process.wait()

    def _rotate(self) -> None:
        """Keep the log bounded. The program holds it open to append, so it is copied and cut, not moved."""
        with contextlib.suppress(OSError):
            if self.log.stat().st_size > _LOG_BYTES:
                shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
                os.truncate(self.log, 0)

    def tail(self) -> str:
        """Return the last lines of the log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 20_000))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"  {line[:300]}" for line in lines[-_TAIL_LINES:])


async def _is_well(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/health")).status_code == 200
    except httpx.HTTPError:
        return False


def _ended(code: int) -> str:
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(code - 128).name}"
    return f"ended with code {code}"
