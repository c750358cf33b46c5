"""Runs one program and takes it along when its owner goes, however that happens. Standard library only.

    python watchdog.py OWNER GRACE_SECONDS program argument ...       OWNER: process id of who starts this

The watchdog leads a process group, which the program and all that it starts belong to. When the owner is gone
(this process then has another parent), or the watchdog gets SIGTERM, the program gets SIGTERM and so many
seconds; then what is left of the group is killed. When the program ends by itself, what it left behind is
killed too. The exit code is the program's, 128 + n after signal n.

Run as a file, so that nothing of the package is imported: a few MB, some 20 ms.
Not here: when to start what (supervisor.py).
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

_LOOK_SECONDS = 0.5


def main(owner: int, grace_seconds: float, command: list[str]) -> int:
    """Run a command until it ends, the owner is gone or SIGTERM comes; return the exit code."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    try:
        program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
        return 127

    def wait() -> None:
        program.wait()
        told.set()

    ended = threading.Thread(target=wait, daemon=True)  # so that the end is seen at once
    ended.start()
    while not told.wait(_LOOK_SECONDS) and os.getppid() == owner:
        pass
    if ended.is_alive():
        program.terminate()
        ended.join(grace_seconds)
    for pid in _members(os.getpgrp()) - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ended.join()
    return program.returncode if program.returncode >= 0 else 128 - program.returncode


def _members(group: int) -> set[int]:
    """Return the processes of a group, as /proc tells them."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(entry.name)) == group:
                    found.add(int(entry.name))
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
