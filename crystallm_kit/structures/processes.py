"""Ending a process that is asked over its pipes, whatever it is doing."""

import contextlib
import subprocess
from typing import Any


def end(process: "subprocess.Popen[Any]") -> int:
    """Kill a process, close its pipes and return its exit code."""
    if process.poll() is None:
        process.kill()
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left in its buffer has no reader any more
                pipe.close()
    return code
