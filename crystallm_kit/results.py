"""The folder that a generation leaves: its crystals, and one line for every request.

    crystals/
      samples.jsonl                 every request, failures included: text, verdict, seed, model ...
      structures/NaCl-0-3.cif       the valid crystals, copies left out; named by formula and the sample's id
      structures.extxyz or .json    the same in one file, where that format is asked for

What an earlier generation left in the folder is replaced; a folder with other files in those places is
refused.

Not here: what a line of samples.jsonl holds (generation.sample_to_dict), file formats
(structures/writing.py).
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crystallm_kit.errors import UnknownName, UserError

if TYPE_CHECKING:
    from crystallm_kit.records import Crystal, Sample

FORMATS = ("cif", "extxyz", "poscar", "json")
SAMPLES = "samples.jsonl"
_STRUCTURES = "structures"
_FOLDER_SUFFIXES = (".cif", ".vasp")
_FILE_SUFFIXES = (".extxyz", ".json")


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        samples: The file with a line a request.
        structures: The folder or file with the crystals; None where none was valid.
        n_structures: How many.
    """

    samples: Path
    structures: Path | None
    n_structures: int


def check_folder(folder: str | Path) -> None:
    """Check that results can go there, before any work is done for them.

    Raises:
        UserError: If it is a file, or holds files in the places of the results that are none.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, expected a folder for the results; name another with --out")
    foreign = [path for path in _earlier(folder) if not _is_own(path, folder)]
    if foreign:
        raise UserError(
            f"{foreign[0]}: already there, and not written by a generation; name another folder with --out"
        )


def write_results(samples: "Sequence[Sample]", folder: str | Path, *, format: str = "cif") -> Written:
    """Write the valid crystals and the line of every request.

    Args:
        samples: All requests, judged; valid copies are left out where they are marked
            (funnel.mark_duplicates).
        folder: Made where it is missing.
        format: One of FORMATS.

    Raises:
        UnknownName: If no format has that name.
        UserError: As `check_folder`; or if the format cannot hold a crystal.
    """
    from crystallm_kit.generation import write_samples
    from crystallm_kit.structures.writing import write

    if format not in FORMATS:
        raise UnknownName.among("output format", format, FORMATS)
    folder = Path(folder)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    crystals = list(valid_crystals(samples))
    for path in _earlier(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    structures = folder / (_STRUCTURES if format in ("cif", "poscar") else f"{_STRUCTURES}.{format}")
    if crystals:
        write(crystals, structures, format=format)
    write_samples(samples, folder / SAMPLES)
    return Written(folder / SAMPLES, structures if crystals else None, len(crystals))


def valid_crystals(samples: "Iterable[Sample]") -> "Iterable[Crystal]":
    """Yield the valid samples as crystals, named by formula and sample, with what was measured."""
    from crystallm_kit.records import Crystal

    for sample in samples:
        if sample.verdict.valid and sample.structure is not None:
            name = f"{sample.structure.composition.reduced_formula}-{sample.id}"
            yield Crystal(
                name, sample.structure, {**sample.measures, "log_probability": sample.log_probability}
            )


def _earlier(folder: Path) -> list[Path]:
    """Return what stands where structures go."""
    names = (_STRUCTURES, *(_STRUCTURES + suffix for suffix in _FILE_SUFFIXES))
    return [folder / name for name in names if (folder / name).exists()]


def _is_own(path: Path, folder: Path) -> bool:
    if not (folder / SAMPLES).is_file():
        return False
    return not path.is_dir() or all(file.suffix in _FOLDER_SUFFIXES for file in path.iterdir())
