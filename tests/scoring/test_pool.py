"""scoring/pool.py: every task ends, whatever an item does to its process."""

import time

import pytest

from crystallm_kit.errors import UserError
from crystallm_kit.scoring.pool import Pool

JOBS = """
import os, signal, time
from collections import deque
from itertools import repeat
from crystallm_kit.errors import UserError
from crystallm_kit.scoring.pool import TooLong

def squares(task, marks):
    found = []
    for i, n in enumerate(task["numbers"]):
        why = task.get("skip", {}).get(f"square:{i}")
        if why:
            found.append(why)
            continue
        try:
            with marks.item("square", i, 0.3):
                if n == "sleeps": time.sleep(60)
                while n == "computes": pass
                if n == "deaf":   # code that never comes back to Python
                    deque(repeat(1), maxlen=0)
                if n == "dies": os.kill(os.getpid(), signal.SIGKILL)
                found.append(n * n)
        except TooLong:
            found.append("too long")
    return {"found": found}

def refuses(task, marks):
    raise UserError("no such set")

def ends(task, marks):
    os._exit(3)

def chatters(task, marks):
    print("a library's words")
    return 1
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    (tmp_path / "pool_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_items_that_hang_or_kill_cost_only_themselves(jobs):
    began = time.monotonic()
    with Pool(1) as pool:
        task = {"job": "pool_jobs:squares", "numbers": [1, "computes", 2, "deaf", 3, "dies", 4, "sleeps"]}
        found = pool.submit(task).result()["found"]
        again = pool.submit({"job": "pool_jobs:squares", "numbers": [5]}).result()["found"]
    assert found == [1, "too long", 4, "timeout", 9, "its process ended with code -9", 16, "timeout"]
    assert again == [25]
    assert time.monotonic() - began < 60


def test_a_users_mistake_comes_back_as_one(jobs):
    with Pool(1) as pool, pytest.raises(UserError, match="no such set"):
        pool.submit({"job": "pool_jobs:refuses"}).result()


def test_a_process_that_ends_outside_any_item_is_said(jobs):
    with Pool(1) as pool, pytest.raises(UserError, match="code 3 outside any structure"):
        pool.submit({"job": "pool_jobs:ends"}).result()


def test_what_libraries_print_is_no_answer(jobs):
    with Pool(1) as pool:
        assert pool.submit({"job": "pool_jobs:chatters"}).result() == 1
