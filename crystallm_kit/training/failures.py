"""What ended a training run, and what to change: errors of torch, the disk and other processes, in words.

    try:
        run.train()
    except Exception as error:
        told = explain(error, recipe, out, last_step=last_step(out / "checkpoints"))
        if told is None:
            raise
        raise told from error

    runs/a: out of GPU memory (tried to allocate 2.50 GiB). The checkpoint of step 4,000 is whole and stays.
    Lower micro_tokens (now 16,384) to 8,192: a step stays the same, in more passes. Then run the same
    command: it resumes.

torch says many of these as a RuntimeError whose text alone tells them apart; the texts below were provoked
with torch 2.13, or stand in its sources. What is not known here stays as it is: None.

Not here: what is seen before the first step (preflight.py), checkpoints (run_state.py).
"""

import errno
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from crystallm_kit.errors import CrystallmKitError, TrainingError
from crystallm_kit.training.learner import BASE_MAX_LENGTH
from crystallm_kit.training.recipe import TrainingRecipe

_GPU_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "HIP out of memory",
)
_CPU_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory")
_FULL_DISK = (
    "No space left on device",  # open().write, safetensors, torch's old format
    "Disk quota exceeded",
    "PytorchStreamWriter failed",  # torch's zip writer, and what it says on closing the broken file:
    "unexpected pos",
)
_LOST_PROCESS = (
    "Connection closed by peer",  # gloo: the other process is gone
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",  # gloo: it is there, and does not answer
    "Watchdog caught collective operation timeout",  # NCCL
    "NCCL communicator was aborted",
    "ncclRemoteError",
    "remote process exited or there was a network error",
    "ncclSystemError",
    "unhandled system error",
    "failed to recv, got 0 bytes",  # the store, which rank 0 keeps
    "wait timeout",
)
_NO_MEETING = ("client socket has failed to connect", "client socket has timed out")
_BITSANDBYTES = ("CUDA Setup failed", "bitsandbytes", "libbitsandbytes")
_OUTSIDE = ("device-side assert", "index out of range in self", "indexSelect", "srcIndex < srcSelectDimSize")
_BROKEN_GPU = (
    "illegal memory access",
    "uncorrectable ECC",
    "unspecified launch failure",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "GPU has fallen off the bus",
    "misaligned address",
)


def explain(
    error: BaseException, recipe: TrainingRecipe, out: str | Path, *, last_step: int | None
) -> TrainingError | None:
    """Return what an error means for a run and what to change; None: it is none of those known here.

    Args:
        error: What ended the run. Errors that it came from are looked at too.
        recipe: Of the run; messages name its values.
        out: Folder of the run.
        last_step: Of the last whole checkpoint, if there is one.
    """
    if isinstance(error, TrainingError):
        return error
    if isinstance(error, CrystallmKitError):
        return None  # it says itself what to do
    for cause in _chain(error):
        told = _told(cause, recipe, Path(out), _kept(last_step, recipe))
        if told is not None:
            return TrainingError(f"{out}: {told}")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _kept(last_step: int | None, recipe: TrainingRecipe) -> str:
    if last_step is None:
        return f"There is no checkpoint yet (checkpoint_every: {recipe.checkpoint_every:,})."
    return f"The checkpoint of step {last_step:,} is whole and stays."


def _told(error: BaseException, recipe: TrainingRecipe, out: Path, kept: str) -> str | None:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or _has(text, _GPU_MEMORY):
        return f"out of GPU memory{_asked_for(text)}. {kept} {_less_memory(recipe, text)}"
    if _is_full_disk(error, text):
        return f"the disk is full, or a quota is. {kept} {_more_disk(out)}"
    if isinstance(error, MemoryError) or _has(text, _CPU_MEMORY) or _errno(error) == errno.ENOMEM:
        return (
            f"out of main memory{_asked_for(text)}. {kept} {_lower_micro_tokens(recipe)} Fewer processes on "
            "this machine, or a job with more memory, help too. Then run the same command: it resumes."
        )
    if _has(text, _BITSANDBYTES) and isinstance(error, ImportError | RuntimeError | OSError):
        return _without_quantisation(recipe, text)
    if _has(text, _OUTSIDE):
        return (
            "a token id lies outside the model's embedding (the GPU stopped at an index out of range). "
            f"{kept} The corpus was prepared with another tokenizer than the model has: prepare it again "
            "with the base's tokenizer. CUDA_LAUNCH_BLOCKING=1 before the same command shows the place."
        )
    if _has(text, _BROKEN_GPU):
        return (
            f"the GPU failed ({_first_line(text)}). {kept} Run the same command: it resumes. If it comes "
            "again on the same GPU, look for its Xid in `dmesg` and leave that GPU out "
            "(CUDA_VISIBLE_DEVICES); if on any, set compile: false."
        )
    if _has(text, _NO_MEETING):
        return (
            f"the processes of the run did not find each other ({_first_line(text)}). {kept} Check that all "
            "were started with the same MASTER_ADDR and MASTER_PORT, that the port is open between the "
            "nodes, and that --nnodes and --nproc-per-node are right. Then run the same command."
        )
    if _is_lost_process(error, text):
        return (
            f"another process of the run is gone or does not answer ({_first_line(text)}). {kept} Its own "
            "log, further up, says why it ended: often it was killed for its memory, or its node was taken "
            "away. Mend that, then run the same command, with as many processes or with fewer: it resumes."
        )
    return None


def _is_full_disk(error: BaseException, text: str) -> bool:
    if _errno(error) in (errno.ENOSPC, errno.EDQUOT):
        return True
    if isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", text):
        return True
    return not isinstance(error, ImportError) and _has(text, _FULL_DISK)


def _is_lost_process(error: BaseException, text: str) -> bool:
    if type(error).__name__ in (
        "SignalException",
        "ChildFailedError",
        "DistBackendError",
        "DistNetworkError",
    ):
        return True  # the first two are of torchrun's agent, which ends all processes when one has ended
    if isinstance(error, ConnectionError):
        return int(os.environ.get("WORLD_SIZE", "1")) > 1  # else a pipe that closed, for example the screen's
    return isinstance(error, RuntimeError) and _has(text, _LOST_PROCESS)


def _errno(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _has(text: str, parts: tuple[str, ...]) -> bool:
    return any(part.lower() in text.lower() for part in parts)


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no text")
    line = re.sub(r"^\[[^\]]*\]\s*", "", line)  # the file of torch's sources
    return line if len(line) <= 120 else line[:117] + "..."


def _asked_for(text: str) -> str:
    found = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", text)
    return f" (tried to allocate {found[1]})" if found else ""


# ---------------------------------------------------------------- what to change


def _lower_micro_tokens(recipe: TrainingRecipe) -> str:
    now = recipe.micro_tokens
    lower = max(128, min(now, recipe.batch_tokens) // 2 // 128 * 128)
    longest = recipe.data.max_length or (recipe.model.max_positions if recipe.model else BASE_MAX_LENGTH)
    if lower < longest:
        return (
            f"Lower data.max_length (now {longest:,}) together with micro_tokens (now {now:,}): a pass holds "
            "one example at least. Or take a GPU with more memory."
        )
    return f"Lower micro_tokens (now {now:,}) to {lower:,}: a step stays the same, in more passes."


def _less_memory(recipe: TrainingRecipe, text: str) -> str:
    said = [_lower_micro_tokens(recipe)]
    base = recipe.base
    if base and not base.gradient_checkpointing:
        said.append("Or set base.gradient_checkpointing: true.")
    said.append("Then run the same command: it resumes.")
    if base and base.method == "full":
        said.append("If that is not enough: base.method: lora in a new folder, or more GPUs with FSDP.")
    elif base and base.quantisation == "none":
        said.append("If that is not enough: base.quantisation: nf4, in a new folder.")
    unused = re.search(r"([\d.]+) GiB is reserved by PyTorch but unallocated", text)
    if unused and float(unused[1]) >= 2:
        said.append(
            f"{unused[1]} GiB were held in pieces: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before "
            "the command frees most of them."
        )
    said.append("`python -m crystallm_kit.training.preflight RECIPE` shows what needs how much.")
    return " ".join(said)


def _more_disk(out: Path) -> str:
    folder = next((parent for parent in (out, *out.parents) if parent.exists()), Path("/"))
    free = shutil.disk_usage(folder).free
    sizes = [
        sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        for checkpoint in (out / "checkpoints").glob("[0-9]*")
    ]
    room = (
        f"; a run needs room for three checkpoints of {max(sizes) / 1e9:,.2f} GB, and its model"
        if sizes
        else ""
    )
    return (
        f"There are {free / 1e9:,.2f} GB free at {folder}{room}. Free some space, or move the folder to a "
        "larger disk and name it with --out; then run the same command: it resumes."
    )


def _without_quantisation(recipe: TrainingRecipe, text: str) -> str:
    kind = recipe.base.quantisation if recipe.base else "none"
    return (
        f"bitsandbytes, which base.quantisation: {kind} needs, does not work here ({_first_line(text)}). Run "
        "`python -m bitsandbytes`, which says what is missing; pip install -U 'crystallm-kit[qlora]' brings "
        "the newest. Or set base.quantisation: none."
    )


# ---------------------------------------------------------------- losses and gradients that are lost


def diverged(
    problem: str, recipe: TrainingRecipe, out: str | Path, *, last_step: int | None
) -> TrainingError:
    """Return the error for a run whose loss or gradient went astray; `problem` says which, and when."""
    lr, clip = recipe.optimizer.lr, recipe.optimizer.gradient_clip
    return TrainingError(
        f"{out}: {problem}. {_kept(last_step, recipe)} Lower optimizer.lr (now {lr:g}) or "
        f"optimizer.gradient_clip (now {clip:g}), or raise schedule.warmup_steps "
        f"(now {recipe.schedule.warmup_steps:,}), and begin anew in another folder: the same settings would "
        "go the same way."
    )


class GradientWatch:
    """Sees a gradient explode: its norm stays far above what it was, or is no number.

    watch = GradientWatch()
    if problem := watch.see(step, norm):
        raise diverged(problem, recipe, out, last_step=last)

    A single large norm is no reason to stop: it is clipped. Norms fall while a model learns, so the bar falls
    with them; it is the median of the last norms that were below it.

    Attributes:
        limit: Norms above limit x median count.
        patience: So many of them in a row are an explosion.
    """

    def __init__(
        self, limit: float = 100.0, patience: int = 5, *, window: int = 200, first: int = 20
    ) -> None:
        """Start without norms.

        Args:
            limit: Norms above limit x median count.
            patience: So many of them in a row are an explosion.
            window: Norms that the median is taken over.
            first: Norms that are only collected: there is no median before.
        """
        self.limit, self.patience, self._first = limit, patience, first
        self._norms: deque[float] = deque(maxlen=window)
        self._n_above = 0

    def see(self, step: int, norm: float) -> str | None:
        """Take the norm of a step's gradient before it was clipped; return what is wrong, or None."""
        if not math.isfinite(norm):
            return f"the gradient is {norm} at step {step:,}"
        usual = median(self._norms) if len(self._norms) >= self._first else math.inf
        if not 0 < usual * self.limit < norm:
            self._norms.append(norm)
            self._n_above = 0
            return None
        self._n_above += 1
        if self._n_above < self.patience:
            return None
        return (
            f"gradients explode: their norm is {norm:.3g} at step {step:,}, {norm / usual:,.0f} times what "
            f"it was (median {usual:.3g}), for {self._n_above} steps"
        )
