"""Who comes in: tests of server/admission.py."""

import asyncio

import pytest

from crystallm_kit.server.admission import Admission, Overloaded
from crystallm_kit.server.backend import NotReady


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_as_many_come_in_as_may_run_and_wait_and_the_next_is_refused(clock):
    admission = Admission(at_once=2, max_waiting=3, clock=clock)
    places = [admission.admit(1) for _ in range(5)]
    assert (admission.n_inside, admission.n_waiting) == (5, 3)
    with pytest.raises(Overloaded, match="3 completions are waiting already, at most 3 may"):
        admission.admit(1)
    places[0].finished()
    admission.admit(1)
    assert admission.n_inside == 5


def test_a_request_counts_as_its_completions():
    admission = Admission(at_once=1, max_waiting=9)
    with admission.admit(8):
        admission.admit(2)
        with pytest.raises(Overloaded):
            admission.admit(1)


def test_a_request_that_is_alone_is_taken_whatever_its_size():
    admission = Admission(at_once=1, max_waiting=1)
    with admission.admit(100):
        assert admission.n_inside == 100
    assert admission.n_inside == 0


def test_what_is_left_of_a_place_is_given_back_at_the_end_and_only_once():
    admission = Admission(at_once=4, max_waiting=0)
    with admission.admit(4) as place:
        place.finished(3)
        place.finished(3)
        assert admission.n_inside == 0
    assert admission.n_inside == 0
    with admission.admit(4) as place:
        place.finished()
        assert admission.n_inside == 3
    assert (admission.n_inside, admission.n_requests) == (0, 0)


def test_retry_after_is_what_the_measured_rate_says(clock):
    """10 completions in 5 seconds are 2 a second; 8 that must go first take 4 s."""
    admission = Admission(at_once=1, max_waiting=9, clock=clock)
    first = admission.admit(10)
    for _ in range(10):
        clock.now += 0.5
        first.finished()
    # the mean over busy time, the last half minute counting most: near 2 from both sides
    assert admission.rate() == pytest.approx(2, rel=0.1)
    admission.admit(10)
    with pytest.raises(Overloaded) as caught:
        admission.admit(8)
    assert caught.value.retry_after in (4, 5)


def test_idle_time_does_not_lower_the_measured_rate(clock):
    admission = Admission(at_once=1, max_waiting=0, clock=clock)
    with admission.admit(4) as place:
        clock.now += 2
        place.finished(4)
    before = admission.rate()
    clock.now += 3600
    assert admission.rate() == pytest.approx(before)


def test_retry_after_is_a_whole_number_of_seconds_within_two_minutes(clock):
    admission = Admission(at_once=1, max_waiting=1, clock=clock)
    assert admission.wait_for(1) == 5
    place = admission.admit(1)
    clock.now += 1000
    place.finished()
    assert admission.wait_for(10_000) == 120


def test_who_leaves_takes_nobody_in_and_lets_who_is_inside_finish():
    async def check():
        admission = Admission(at_once=2, max_waiting=2)
        place = admission.admit(2)
        admission.drain()
        with pytest.raises(NotReady, match="stopping"):
            admission.admit(1)
        waiting = asyncio.create_task(admission.drained())
        await asyncio.sleep(0)
        assert not waiting.done()
        place.finished(2)
        place.__exit__(None, None, None)
        await asyncio.wait_for(waiting, 1)

    asyncio.run(check())
