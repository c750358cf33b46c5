"""Checkpoints of a run: what a killed run goes on from.

    checkpoints/00000500/  state.pt                            weights, optimizer and where the run stands
    checkpoints/00000500/  state.pt  __0_0.distcp  .metadata   the same, tensors spread over processes (FSDP2)
    checkpoints/best/      weights.pt                          the best weights by validation loss

Only weights that train are kept: a LoRA run's checkpoint has megabytes, whatever its base. A folder gets its
name when everything in it is on the disk; one without a name begins with a dot and is never read. Written by
any number of processes, a checkpoint is read by any other number.

Not here: what is in a run's state (loop.py), the finished model's folder (models/checkpoints.py).
"""

import errno
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from crystallm_kit.models.checkpoints import replace_folder
from crystallm_kit.training.distribution import Distribution, full

STATE = "state.pt"
_KEPT = 2
_FULL_DISK_BYTES = 1e8


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Return the folders of whole checkpoints, oldest first."""
    return sorted(f for f in checkpoints.iterdir() if f.name.isdecimal()) if checkpoints.is_dir() else []


def last_step(checkpoints: Path) -> int | None:
    """Return the step of the last whole checkpoint, if there is one."""
    folders = checkpoint_folders(checkpoints)
    return int(folders[-1].name) if folders else None


def save_checkpoint(
    folder: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor], distribution: Distribution
) -> None:
    """Write a checkpoint, whole or not at all, and drop all but the last two. Every process calls it.

    Args:
        folder: checkpoints/<step>.
        facts: Plain values, and small tensors; the main process's are written.
        tensors: By name. Spread ones are written by the processes that hold them.

    Raises:
        OSError: ENOSPC if the disk is full.
    """
    writing = _begin(folder) if distribution.is_main else _writing(folder)
    distribution.wait()
    try:
        if distribution.is_sharded:
            from torch.distributed.checkpoint.state_dict_saver import save

            save(tensors, checkpoint_id=writing)
        if distribution.is_main:
            content = facts if distribution.is_sharded else {**facts, "tensors": tensors}
            torch.save(content, writing / STATE)
    except (RuntimeError, OSError) as error:
        _give_up(writing, error)
        raise
    distribution.wait()
    if distribution.is_main:
        replace_folder(writing, folder)
        for old in checkpoint_folders(folder.parent)[:-_KEPT]:
            shutil.rmtree(old)
    distribution.wait()


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of a checkpoint, with its tensors under "tensors" where they are in one file.

    Raises:
        OSError, RuntimeError, EOFError, ValueError: If it cannot be read.
    """
    try:
        found: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder / STATE} cannot be read as plain values and tensors") from error
    return found


@torch.no_grad()
def read_tensors(folder: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Copy a checkpoint's tensors into these, by name, whichever way either is spread.

    Raises:
        KeyError: If the checkpoint lacks one.
    """
    if "tensors" not in facts:
        from torch.distributed.checkpoint.state_dict_loader import load

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, on purpose
            load(tensors, checkpoint_id=folder)
        return
    for name, tensor in tensors.items():
        copy_whole(tensor, facts["tensors"][name])


@torch.no_grad()
def copy_whole(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be spread over processes."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor):
        whole = whole.to(tensor.device, tensor.dtype)
        tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements))
    else:
        tensor.copy_(whole)


def save_weights(
    folder: Path, step: int, weights: dict[str, torch.Tensor], distribution: Distribution
) -> None:
    """Write whole weights as `folder`/weights.pt. Every process calls it."""
    whole = whole_on_main(weights, distribution)
    if distribution.is_main:
        writing = _begin(folder)
        try:
            torch.save({"step": step, "weights": whole}, writing / "weights.pt")
        except (RuntimeError, OSError) as error:
            _give_up(writing, error)
            raise
        replace_folder(writing, folder)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return what `save_weights` wrote, on the CPU."""
    found: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)[
        "weights"
    ]
    return found


def whole_on_main(weights: dict[str, torch.Tensor], distribution: Distribution) -> dict[str, torch.Tensor]:
    """Return copies of weights, whole and on the CPU; empty on other processes. Every process calls it.

    What is one tensor under two names (tied embeddings) is one copy under both.
    """
    copies: dict[int, torch.Tensor] = {}
    for weight in {id(weight): weight for weight in weights.values()}.values():
        gathered = full(weight.detach())
        if distribution.is_main:
            copies[id(weight)] = gathered.to("cpu", copy=True)
    return {name: copies[id(weight)] for name, weight in weights.items()} if copies else {}


def _writing(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.writing")


def _begin(folder: Path) -> Path:
    writing = _writing(folder)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    return writing


def _give_up(writing: Path, error: Exception) -> None:
    free = shutil.disk_usage(writing.parent).free
    shutil.rmtree(writing, ignore_errors=True)
    # torch reports a full disk as a RuntimeError of its zip writer
    if free < _FULL_DISK_BYTES:
        raise OSError(errno.ENOSPC, "no space left") from error
