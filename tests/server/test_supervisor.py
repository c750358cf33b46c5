import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from crystallm_kit.server.supervisor import EngineFailed, Job, Supervisor
from crystallm_kit.server.vllm_jobs import free_ports

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
ROOT = Path(__file__).parents[2]


def job(name="engine-0", *, arguments=(), **environment):
    port = free_ports(1)[0]
    command = (sys.executable, str(STAND_IN), "--port", str(port), *arguments)
    return Job(name, command, port, environment)


def supervisor(jobs, folder, **settings):
    said = []
    quick = {"pause_seconds": 0.05, "grace_seconds": 1.0, "quick_seconds": 0.0, "start_seconds": 20.0}
    made = Supervisor(jobs, folder=folder, tell=said.append, **(quick | settings))
    made.said = said
    return made


@contextlib.asynccontextmanager
async def running(made):
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def pid_at(url):
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"{url}/seen")).json()["pid"]


async def until(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError):
            found = condition()
            found = await found if asyncio.iscoroutine(found) else found
            if found:
                return found
        assert time.monotonic() < deadline, "it did not come to that in time"
        await asyncio.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_that_is_killed_is_started_again(tmp_path):
    async def story():
        async with running(supervisor([job()], tmp_path)) as made:
            url = made.urls[0]
            first = await pid_at(url)
            os.kill(first, signal.SIGKILL)

            async def another():
                return (found := await pid_at(url)) != first and found

            second = await until(another)
            assert "was ended by SIGKILL" in made.said[-1] or "was ended by SIGKILL" in made.said[-2]
            assert made.n_restarts == 1
        assert not is_alive(second)

    asyncio.run(story())


def test_the_second_program_starts_when_the_first_answers(tmp_path):
    async def story():
        jobs = [job("engine-0"), job("engine-1")]
        async with running(supervisor(jobs, tmp_path)) as made:
            await until(lambda: all(run.answered.is_set() for run in made.runs))
            assert [line.split()[0] for line in made.said] == ["engine-0", "engine-1"]

    asyncio.run(story())


def test_a_program_that_cannot_start_is_given_up_with_the_end_of_its_log(tmp_path):
    async def story():
        made = supervisor([job(STAND_IN_START="die")], tmp_path, quick_seconds=5.0, most_quick_deaths=3)
        with pytest.raises(EngineFailed, match="3 times in a row and ended with code 1") as caught:
            await made.start()
        assert "no memory for the key-value cache" in str(caught.value)
        assert (tmp_path / "engine-0.log").read_text().count("starts\n") == 3

    asyncio.run(story())


def test_one_program_that_is_given_up_does_not_stop_the_other(tmp_path):
    async def story():
        jobs = [job("bad", STAND_IN_START="die"), job("good")]
        made = supervisor(jobs, tmp_path, quick_seconds=5.0, most_quick_deaths=2)
        async with running(made):
            assert made.runs[0].given_up.is_set()
            assert await pid_at(jobs[1].url)

    asyncio.run(story())


@pytest.mark.parametrize("how", ["hang", "deaf"])
def test_a_program_that_never_answers_is_killed_and_given_up(tmp_path, how):
    async def story():
        made = supervisor(
            [job(STAND_IN_START=how)], tmp_path, start_seconds=1.0, quick_seconds=5.0, most_quick_deaths=2
        )
        with pytest.raises(EngineFailed, match="did not answer for 1 s"):
            await made.start()

    asyncio.run(story())


def test_a_program_that_falls_silent_is_killed_and_started_again(tmp_path):
    async def story():
        async with running(supervisor([job()], tmp_path, silence_seconds=0.5)) as made:
            first = await pid_at(made.urls[0])
            os.kill(first, signal.SIGSTOP)
            await until(lambda: not is_alive(first), 20.0)

            async def another():
                return await pid_at(made.urls[0]) != first

            await until(another)

    asyncio.run(story())


def test_what_a_program_started_ends_with_it(tmp_path):
    """A killed vllm serve leaves its engine core behind, which keeps the GPU's memory."""
    mark = tmp_path / "child"
    program = (
        "import subprocess, sys, os, time; child = subprocess.Popen(['sleep', '1000']); "
        f"open({str(mark)!r}, 'w').write(str(child.pid)); os.kill(os.getpid(), 9)"
    )

    async def story():
        dying = Job("engine-0", (sys.executable, "-c", program), free_ports(1)[0])
        with pytest.raises(EngineFailed):
            await supervisor([dying], tmp_path, quick_seconds=5.0, most_quick_deaths=1).start()
        await until(lambda: not is_alive(int(mark.read_text())))

    asyncio.run(story())


def test_a_program_that_ignores_sigterm_is_killed(tmp_path):
    program = (
        "import signal, time; signal.signal(15, lambda *_: None); print('deaf', flush=True); time.sleep(99)"
    )

    async def story():
        made = supervisor([Job("engine-0", (sys.executable, "-c", program), free_ports(1)[0])], tmp_path)
        starting = asyncio.create_task(made.start())
        await until(lambda: (tmp_path / "engine-0.log").is_file() and "deaf" in made.runs[0].tail())
        began = time.monotonic()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        assert 0.9 < time.monotonic() - began < 5.0
        found = subprocess.run(["pgrep", "-f", "print('deaf'"], capture_output=True, text=True, check=False)
        assert found.stdout == ""

    asyncio.run(story())


def test_programs_end_when_their_owner_is_killed(tmp_path):
    port = free_ports(1)[0]
    owner = f"""
import asyncio, pathlib, sys
from crystallm_kit.server.supervisor import Job, Supervisor
async def main():
    command = (sys.executable, {str(STAND_IN)!r}, "--port", "{port}")
    job = Job("engine-0", command, {port})
    made = Supervisor([job], folder=pathlib.Path({str(tmp_path)!r}), grace_seconds=1)
    await made.start()
    print("ready", flush=True)
    await asyncio.sleep(100)
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", owner], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        pid = asyncio.run(pid_at(f"http://127.0.0.1:{port}"))
        process.kill()
        process.wait()
        asyncio.run(until(lambda: not is_alive(pid)))


def test_a_log_that_grows_is_kept_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("crystallm_kit.server.supervisor._LOG_BYTES", 1000)
    program = "import time\nfor i in range(10**6): print('line', i, 'x' * 80, flush=True); time.sleep(0.005)"

    async def story():
        made = supervisor([Job("engine-0", (sys.executable, "-c", program), free_ports(1)[0])], tmp_path)
        starting = asyncio.create_task(made.start())
        await until(lambda: (tmp_path / "engine-0.log.1").is_file())
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        assert (tmp_path / "engine-0.log").stat().st_size < 100_000

    asyncio.run(story())
