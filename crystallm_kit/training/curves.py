"""Curves of a run: metrics.jsonl always; TensorBoard and Weights & Biases where the recipe names them.

    {"step": 120, "loss": 0.7312, "gradient_norm": 0.61, "lr": 0.00098, "tokens": 65102}
    {"step": 120, "validation_loss": 0.742}
    {"step": 120, "sample_validity": 0.71, "sample_parse": 0.94, "sample_unique": 0.69}

metrics.jsonl is the truth: one JSON object a line, at least one line a step, in the order of the steps. A
resumed run drops the lines after its checkpoint before it goes on, so no step stands there twice. The others
mirror its numbers under the same names:

    tensorboard   <run>/tensorboard; what TensorBoard had of the dropped steps is hidden (its "purge step")
    wandb         one W&B run for the whole training run: its id is kept in <run>/wandb.json, with the steps
                  that it has. These are not sent again, for W&B cannot take back a point; only after SIGKILL
                  may those of the last half minute come twice. WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY
                  are obeyed; after WANDB_MODE=offline, `wandb sync <run>/wandb/offline-run-*` sends it

Not here: progress on the screen (progress.py), what is measured (loop.py, fine_tuning.py).
Sources: https://docs.wandb.ai/guides/runs/resuming; torch.utils.tensorboard.SummaryWriter (`purge_step`).
"""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from crystallm_kit.errors import MissingExtra, UnknownName, UserError

METRICS = "metrics.jsonl"
TRACKERS = ("tensorboard", "wandb")
_TENSORBOARD, _WANDB = "tensorboard", "wandb.json"
_SECONDS_TO_DISK = 30.0  # W&B writes what it was given every 15 s; a kill before that loses it


def check_track(track: Iterable[str]) -> None:
    """Check that every tracker is known and installed.

    Raises:
        UnknownName: If one is not.
        MissingExtra: If its library is not installed; the message has the command.
    """
    for name in track:
        if name not in TRACKERS:
            raise UnknownName.among("tracker", name, TRACKERS)
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as a run's, is no library
            raise MissingExtra(f"track: {name} needs {name}, which is not installed. Run: pip install {name}")


class Curves:
    """Where the numbers of a run go. For the main process only."""

    def __init__(
        self, out: Path, track: Sequence[str], recipe: Mapping[str, Any], *, resume_step: int = 0
    ) -> None:
        """Open the curves, and drop what was logged after the step that the run resumes at.

        Args:
            out: Folder of the run.
            track: Names out of TRACKERS.
            recipe: As plain data; W&B shows it.
            resume_step: Step of the checkpoint; 0: the run begins.

        Raises:
            UnknownName, MissingExtra: As check_track.
            UserError: If W&B is asked for and cannot begin a run (nobody is logged in, no network).
        """
        check_track(track)
        self.path = Path(out) / METRICS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.trim(resume_step)
        mirrors: dict[str, type[_TensorBoard] | type[_WandB]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
        self._mirrors = [mirrors[name](Path(out), recipe, kept, resume_step) for name in dict.fromkeys(track)]

    def trim(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines after a step, and a half-written one, and return the records that stay."""
        if not self.path.exists():
            return []
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # cut short when the run was killed
                record = json.loads(line)
                if record["step"] <= step:
                    kept.append(record)
        writing = self.path.with_suffix(".writing")
        writing.write_text(_lines(kept), encoding="utf-8")
        writing.replace(self.path)
        return kept

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records: each has "step" and what was measured there. They are on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(records))
        for mirror in self._mirrors:
            mirror.write(records)

    def close(self) -> None:
        """Finish what the trackers have under way."""
        for mirror in self._mirrors:
            mirror.close()
        self._mirrors = []


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the curves that a record has a point of."""
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class _TensorBoard:
    """Event files in <run>/tensorboard."""

    def __init__(
        self, out: Path, recipe: Mapping[str, Any], kept: Sequence[Mapping[str, Any]], resume_step: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = out / _TENSORBOARD
        if not resume_step:
            shutil.rmtree(folder, ignore_errors=True)
        is_first = not folder.is_dir()
        self._writer = SummaryWriter(str(folder), purge_step=None if is_first else resume_step + 1)
        if is_first:
            text = json.dumps(recipe, indent=2, default=str)
            self._writer.add_text("recipe", f"```json\n{text}\n```", 0)
            self.write(kept)  # a run that had no TensorBoard until now

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            for name, value in _numbers(record).items():
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """One W&B run, and <run>/wandb.json with its id and the last step of each of its curves.

    Every record is a row of its own with "step" as the axis of all curves: W&B's own counter of rows would
    refuse a validation loss that comes after the loss of the same step.
    """

    def __init__(
        self, out: Path, recipe: Mapping[str, Any], kept: Sequence[Mapping[str, Any]], resume_step: int
    ) -> None:
        import wandb

        self._state = out / _WANDB
        if not resume_step:
            self._state.unlink(missing_ok=True)
        known = _read_state(self._state)
        self._id, self._sent = known or (secrets.token_hex(4), {})  # curve -> step of the last point
        self._waiting: deque[tuple[float, dict[str, int]]] = deque()
        try:
            self._run = wandb.init(
                id=self._id,
                # offline, W&B says that it cannot look for the run; the id alone joins the parts when synced
                resume="allow" if known and os.environ.get("WANDB_MODE") != "offline" else None,
                project=os.environ.get("WANDB_PROJECT", "crystallm-kit"),
                name=out.resolve().name,
                dir=str(out),
                config=dict(recipe),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"track: wandb: {_without_key(error)}. Run `wandb login` once on this machine, or set "
                "WANDB_API_KEY, or WANDB_MODE=offline to send the curves later; or take wandb out of 'track'."
            ) from None  # W&B's own message may quote the key
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._note({} if known is None else known[1])
        self.write(kept)  # what W&B lacks of it

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        before = dict(self._sent)
        for record in records:
            step = record["step"]
            row = {name: x for name, x in _numbers(record).items() if step > before.get(name, -1)}
            if row:
                self._run.log({"step": step, **row})
                self._sent |= dict.fromkeys(row, step)
        now = time.monotonic()
        self._waiting.append((now, dict(self._sent)))
        written = None
        while self._waiting[0][0] < now - _SECONDS_TO_DISK:
            _, written = self._waiting.popleft()
        if written is not None:
            self._note(written)

    def close(self) -> None:
        self._run.finish()
        self._note(self._sent)

    def _note(self, written: Mapping[str, int]) -> None:
        writing = self._state.with_suffix(".writing")
        writing.write_text(json.dumps({"id": self._id, "last_steps": written}) + "\n", encoding="utf-8")
        writing.replace(self._state)


def _read_state(path: Path) -> tuple[str, dict[str, int]] | None:
    """Return the W&B run's id, and curve -> step of the last point that it has."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return str(state["id"]), {str(name): int(step) for name, step in state["last_steps"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _without_key(error: Exception) -> str:
    """Return what an error says on one line, without the API key."""
    text = " ".join(str(error).split()).rstrip(".")
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "(key)") if key else text
