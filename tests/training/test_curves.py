"""curves.py: every number is logged once, on disk at once, and again where the trackers show it."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from crystallm_kit.errors import MissingExtra, UnknownName
from crystallm_kit.training.curves import Curves, check_track

ROOT = Path(__file__).parents[2]
needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


def log(curves: Curves, first: int, last: int) -> None:
    """Log a loss at every step and a validation loss at every fifth, as the training loop does."""
    for step in range(first, last + 1):
        curves.write([{"step": step, "loss": 1 / step, "tokens": 100}])
        if step % 5 == 0:
            curves.write([{"step": step, "validation_loss": 2 / step}])


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_of(rows: list[dict], name: str) -> list[int]:
    return [row["step"] for row in rows if name in row]


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path):
    curves = Curves(tmp_path / "run", (), {})
    curves.write([{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 0.25}])
    assert records(tmp_path / "run") == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 0.25}]


def test_a_resumed_run_logs_no_step_twice(tmp_path):
    log(Curves(tmp_path, (), {}), 1, 8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # what a killed run leaves
    log(Curves(tmp_path, (), {}, resume_step=5), 6, 12)
    assert steps_of(records(tmp_path), "loss") == list(range(1, 13))
    assert steps_of(records(tmp_path), "validation_loss") == [5, 10]


def test_a_run_that_begins_anew_keeps_nothing(tmp_path):
    log(Curves(tmp_path, (), {}), 1, 8)
    Curves(tmp_path, (), {}, resume_step=0)
    assert records(tmp_path) == []


def test_an_unknown_tracker_is_named_with_the_nearest_known_one():
    with pytest.raises(UnknownName, match="no tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_track(["tensorbord"])


def test_a_tracker_that_is_not_installed_comes_with_its_command(tmp_path, monkeypatch):
    """A folder of the library's name on the path, such as a run's own tensorboard/, is not taken for it."""
    (tmp_path / "tensorboard").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for module in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(MissingExtra, match="Run: pip install tensorboard"):
        check_track(["tensorboard"])


# ---------------------------------------------------------------- TensorBoard


def tensorboard_points(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(out / "tensorboard"))
    shown.Reload()
    return {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


@needs_tensorboard
def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    log(Curves(tmp_path, ("tensorboard",), {"seed": 1}), 1, 8)  # killed: never closed
    curves = Curves(tmp_path, ("tensorboard",), {"seed": 1}, resume_step=5)
    log(curves, 6, 12)
    curves.close()
    shown = tensorboard_points(tmp_path)
    assert shown["loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 13)]
    assert shown["validation_loss"] == [(5, pytest.approx(0.4)), (10, pytest.approx(0.2))]
    assert set(shown) == {"loss", "validation_loss", "tokens"}


@needs_tensorboard
def test_tensorboard_asked_for_in_the_middle_of_a_run_shows_it_from_the_beginning(tmp_path):
    log(Curves(tmp_path, (), {}), 1, 8)
    curves = Curves(tmp_path, ("tensorboard",), {}, resume_step=5)
    log(curves, 6, 7)
    curves.close()
    assert [step for step, _ in tensorboard_points(tmp_path)["loss"]] == list(range(1, 8))


@needs_tensorboard
def test_tensorboard_forgets_a_run_that_begins_anew(tmp_path):
    log(Curves(tmp_path, ("tensorboard",), {}), 1, 8)
    curves = Curves(tmp_path, ("tensorboard",), {})
    log(curves, 1, 2)
    curves.close()
    assert [step for step, _ in tensorboard_points(tmp_path)["loss"]] == [1, 2]


# ---------------------------------------------------------------- Weights & Biases

_PROGRAM = """
import sys, time
from pathlib import Path
from crystallm_kit.training.curves import Curves
out, resume, last, then = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
curves = Curves(out, ("wandb",), {"seed": 1}, resume_step=resume)
for step in range(resume + 1, last + 1):
    curves.write([{"step": step, "loss": 1 / step}])
    if step % 5 == 0:
        curves.write([{"step": step, "validation_loss": 2 / step}])
if then == "close":
    curves.close()
else:
    print("logged", flush=True)
    time.sleep(60)
"""


def start_tracked(*arguments: object, **environment: str) -> subprocess.Popen:
    """Run a tracked run in a process of its own, without a network and without anybody's login."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *map(str, arguments)],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wandb_rows(out: Path) -> list[dict]:
    """Return the rows that W&B's own files hold, all parts of the run together.

    The files are records in LevelDB's log format (blocks of 32 KiB; checksum, length, kind) after 7 bytes of
    W&B's own.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):
        data, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            length, kind = struct.unpack("<xxxxHB", data[position : position + 7])
            parts += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(parts)
                parts = b""
                if record.WhichOneof("record_type") == "history":
                    items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
                    rows.append({k: json.loads(v) for k, v in items.items() if not k.startswith("_")})
    return rows


@needs_wandb
@pytest.mark.slow
def test_wandb_has_every_point_once_after_a_resume_in_the_same_run(tmp_path):
    for arguments in ((0, 8, "close"), (5, 12, "close")):
        process = start_tracked(tmp_path, *arguments, WANDB_MODE="offline")
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output + errors == ""
    rows = wandb_rows(tmp_path)
    assert sorted(steps_of(rows, "loss")) == list(range(1, 13))
    assert sorted(steps_of(rows, "validation_loss")) == [5, 10]
    assert {row["loss"] for row in rows if "loss" in row} == {1 / step for step in range(1, 13)}
    state = json.loads((tmp_path / "wandb.json").read_text())
    assert state["last_steps"] == {"loss": 12, "validation_loss": 10}
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 1  # one id


@needs_wandb
@pytest.mark.slow
def test_wandb_lacks_no_point_after_a_kill(tmp_path):
    """W&B writes what it was given every 15 s: points that a kill took from it are sent again."""
    process = start_tracked(tmp_path, 0, 8, "wait", WANDB_MODE="offline")
    assert process.stdout.readline() == "logged\n", process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(1)  # folders of parts are named by the second
    process = start_tracked(tmp_path, 5, 12, "close", WANDB_MODE="offline")
    assert process.wait(timeout=120) == 0, process.communicate()[1]
    process.communicate()
    rows = wandb_rows(tmp_path)
    assert set(steps_of(rows, "loss")) == set(range(1, 13))
    assert set(steps_of(rows, "validation_loss")) == {5, 10}


@needs_wandb
@pytest.mark.slow
def test_wandb_without_a_login_says_what_to_do_and_shows_no_key(tmp_path):
    # W&B finds a key too short before it asks anybody
    process = start_tracked(tmp_path, 0, 8, "close", HOME=str(tmp_path), WANDB_API_KEY="0123secret")
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "or WANDB_MODE=offline to send the curves later" in errors
    assert "0123secret" not in output + errors
