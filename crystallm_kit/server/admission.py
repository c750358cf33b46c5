"""Who comes in: a bounded number of completions, a clear refusal beyond it, nobody once we are leaving.

    with state.admission.admit(n) as place:         raises Overloaded (429), NotReady (503)
        ...
        place.finished()                            after each of the n; what is left is given back at the end

Counted are completions, not requests: one request for 1,000 is as much work as 1,000 requests for one. The
backend keeps the order; here is only the count.

Not here: how large one request may be (ServerSettings), slow readers (local.py).
"""

import asyncio
import math
import time
from collections.abc import Callable
from types import TracebackType

from crystallm_kit.errors import CrystallmKitError
from crystallm_kit.server.backend import NotReady

_MEMORY_SECONDS = 30.0  # of busy time; how far back the measured rate looks
_LONGEST_WAIT = 120
_FIRST_WAIT = 5  # where nothing has been measured yet


class Overloaded(CrystallmKitError):
    """The queue is full (HTTP 429).

    Attributes:
        retry_after: Seconds after which there should be room.
    """

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Place:
    """The places of one request; a context manager that gives back what is left of them."""

    def __init__(self, admission: "Admission", n: int) -> None:
        self._admission = admission
        self._left = n

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        left, self._left = self._left, 0
        self._admission._give_back(left, finished=0, ends=True)

    def passed_on(self, n: int = 1) -> None:
        """Count n completions as done whose places the next ones of the same request take."""
        self._admission._give_back(0, finished=n, ends=False)

    def finished(self, n: int = 1) -> None:
        """Give back the places of n completions that are done."""
        n = min(n, self._left)
        self._left -= n
        self._admission._give_back(n, finished=n, ends=False)


class Admission:
    """The count of completions that were let in and are not done.

    Args:
        at_once: Completions that are drawn at the same time; what is beyond them waits.
        max_waiting: Completions that may wait.
        clock: Seconds; monotonic.
    """

    def __init__(
        self, *, at_once: int, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.at_once = at_once
        self.max_waiting = max_waiting
        self.is_draining = False
        self.n_inside = 0
        self.n_requests = 0
        self._clock = clock
        self._since = clock()
        self._busy_seconds = 0.0
        self._weight = 0.0  # completions, those long ago counting less
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def n_waiting(self) -> int:
        """Completions beyond those drawn at once."""
        return max(0, self.n_inside - self.at_once)

    def admit(self, n: int) -> Place:
        """Take n completions in.

        A request that is alone is taken whatever its size: how large one may be is the routes' to say.

        Raises:
            Overloaded: If more than `max_waiting` would wait.
            NotReady: If the server is leaving.
        """
        if self.is_draining:
            raise NotReady("the server is stopping and takes no new work; ask again", retry_after=10)
        beyond = self.n_inside + n - self.at_once - self.max_waiting
        if beyond > 0 and self.n_inside:
            wait = self.wait_for(beyond)
            raise Overloaded(
                f"{self.n_waiting} completions are waiting already, at most {self.max_waiting} may; "
                f"ask again in {wait} s",
                retry_after=wait,
            )
        self._pass_time()
        self.n_inside += n
        self.n_requests += 1
        self._empty.clear()
        return Place(self, n)

    def wait_for(self, n: int) -> int:
        """Return the whole seconds in which n completions should get done, as measured lately."""
        rate = self.rate()
        return _FIRST_WAIT if rate <= 0 else min(_LONGEST_WAIT, max(1, math.ceil(n / rate)))

    def rate(self) -> float:
        """Return completions per second of busy time, the last half minute counting most; 0: none yet."""
        self._pass_time()
        seen = _MEMORY_SECONDS * -math.expm1(-self._busy_seconds / _MEMORY_SECONDS)
        return self._weight / seen if seen > 0 else 0.0

    def drain(self) -> None:
        """Take nobody in any more; who is inside finishes."""
        self.is_draining = True

    async def drained(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()

    def _give_back(self, n: int, *, finished: int, ends: bool) -> None:
        self._pass_time()
        self.n_inside -= n
        self._weight += finished
        if ends:
            self.n_requests -= 1
            if self.n_requests == 0:
                self._empty.set()

    def _pass_time(self) -> None:
        """Let busy time pass: while nobody is inside, the rate keeps what it was."""
        now = self._clock()
        passed, self._since = now - self._since, now
        if self.n_inside:
            self._busy_seconds += passed
            self._weight *= math.exp(-passed / _MEMORY_SECONDS)
