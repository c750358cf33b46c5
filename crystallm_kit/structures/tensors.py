"""The tensors that CDVAE and DiffCSP write (.pt) -> entries, without executing what the file pickles.

    {"frac_coords": (A, 3), "atom_types": (A,), "num_atoms": (N,), "lengths": (N, 3), "angles": (N, 3)}
    A atoms of N crystals after one another; lengths in angstrom, angles in degrees. With a leading dimension
    E, for several evaluations of one test set, the entries carry it as the property `evaluation`.

Contract: torch's weights-only unpickler reads the file. Objects of other classes beside the tensors
(settings, input batches) become inert placeholders: their classes are neither imported nor called.

Not here: cells and coordinates as structures (entries.py). Source of the layout: CDVAE's and DiffCSP's
evaluation scripts (https://github.com/txie-93/cdvae, https://github.com/jiaor17/DiffCSP).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.errors import ReadError
from crystallm_kit.structures.entries import Entry

KEYS = ("frac_coords", "atom_types", "num_atoms", "lengths", "angles")


def entries_of_tensors(path: Path, *, file: str) -> Iterator[Entry]:
    """Yield the entries of a tensors file: evaluation by evaluation, crystal by crystal.

    Raises:
        ReadError: If it is no such file, or its shapes contradict one another.
    """
    arrays = _arrays(path)
    if arrays["num_atoms"].ndim == 1:
        yield from _entries(arrays, file, None)
        return
    for evaluation in range(len(arrays["num_atoms"])):
        yield from _entries({key: a[evaluation] for key, a in arrays.items()}, file, evaluation)


def _entries(arrays: dict[str, NDArray[Any]], file: str, evaluation: int | None) -> Iterator[Entry]:
    counts = arrays["num_atoms"]
    n_crystals, n_atoms = len(counts), int(counts.sum())
    expected = {
        "frac_coords": (n_atoms, 3),
        "atom_types": (n_atoms,),
        "num_atoms": (n_crystals,),
        "lengths": (n_crystals, 3),
        "angles": (n_crystals, 3),
    }
    for key, shape in expected.items():
        if arrays[key].shape != shape:
            raise ReadError(f"{key} has shape {arrays[key].shape}, {shape} expected from num_atoms")
    ends = np.cumsum(counts)
    parameters = np.concatenate([arrays["lengths"], arrays["angles"]], axis=1)
    where = "" if evaluation is None else f"evaluation {evaluation}, "
    prefix = f"{Path(file).name}:" if evaluation is None else f"{Path(file).name}:{evaluation}:"
    for i, (count, end) in enumerate(zip(counts.tolist(), ends.tolist(), strict=True)):
        atoms = slice(end - count, end)
        content = (parameters[i], arrays["atom_types"][atoms], arrays["frac_coords"][atoms])
        properties = {} if evaluation is None else {"evaluation": evaluation}
        yield Entry(file, f"{where}crystal {i}", f"{prefix}{i}", "cell", content, properties)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    import torch

    held = _load(path)
    if not isinstance(held, dict) or not all(isinstance(held.get(key), torch.Tensor) for key in KEYS):
        got = ", ".join(map(str, held)) if isinstance(held, dict) else type(held).__name__
        raise ReadError(f"tensors {', '.join(KEYS)} expected, got {got[:300]}")
    arrays = {key: held[key].numpy(force=True) for key in KEYS}
    if arrays["num_atoms"].ndim not in (1, 2) or arrays["num_atoms"].size == 0:
        raise ReadError(f"num_atoms has shape {arrays['num_atoms'].shape}, (N,) or (E, N) expected")
    short = [key for key in KEYS if len(arrays[key]) != len(arrays["num_atoms"])]
    if arrays["num_atoms"].ndim == 2 and short:
        raise ReadError(f"{short[0]} and num_atoms hold different numbers of evaluations")
    if (arrays["num_atoms"] < 0).any():
        raise ReadError("num_atoms holds negative counts")
    return arrays


def _load(path: Path) -> Any:
    """Return what the file holds, foreign objects as placeholders."""
    import pickle

    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError:
            foreign = get_unsafe_globals_in_checkpoint(path)
            placeholders: list[Any] = [(type("Placeholder", (_Placeholder,), {}), name) for name in foreign]
            with safe_globals(placeholders):
                return torch.load(path, weights_only=True, map_location="cpu")
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise ReadError(
            "cannot be read without executing what it pickles, or is damaged. "
            f"Save its tensors alone: torch.save({{k: d[k] for k in {KEYS}}}, path)"
        ) from error


class _Placeholder:
    """Stands where a foreign object stood: takes any arguments and state, and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        del arguments, named

    def __setstate__(self, state: Any) -> None:
        del state
