"""What a scoring run says on standard error: a bar a set while it works, a line for each step that is done.

Not here: the scores (screen of the command, report.json).
"""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Telling:
    """The voice of a run; one that is not asked to speak is silent."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self.lines: list[str] = []
        columns = (
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}"), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        console = Console(file=sys.stderr, highlight=False, markup=False)
        self._shown = Progress(*columns, console=console, transient=True, disable=not speaks)

    def __enter__(self) -> "Telling":
        self._shown.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.stop()

    def say(self, line: str) -> None:
        """Say one line."""
        self.lines.append(line)
        if self._speaks:
            self._shown.console.print(line)

    def step(self, what: str) -> "Step":
        """Return a step, with its bar."""
        return Step(self, self._shown, what)


class Step:
    """Something that takes a while: a bar, and a line with its time at the end."""

    def __init__(self, telling: Telling, shown: Progress, what: str) -> None:
        self._telling, self._shown, self._what = telling, shown, what
        self._began = time.perf_counter()
        self._task = shown.add_task(what, total=0)
        self.seconds = 0.0

    def expect(self, n: int) -> None:
        """Say that n more are to be done."""
        task = self._shown.tasks[self._shown.task_ids.index(self._task)]
        self._shown.update(self._task, total=(task.total or 0) + n)

    def advance(self, n: int) -> None:
        """Say that n are done."""
        self._shown.advance(self._task, n)

    def done(self, said: str) -> None:
        """End the step with a line."""
        self.seconds = time.perf_counter() - self._began
        self._shown.remove_task(self._task)
        self._telling.say(f"{self._what}: {said} in {self.seconds:.1f} s")
