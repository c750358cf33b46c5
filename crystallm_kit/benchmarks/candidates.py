"""Candidates for the targets of a benchmark, drawn block by block, so that a run that is killed goes on.

    samples/block-00000.jsonl.gz    a line for each request, in order: the target's id, and the sample;
                                    for a target that cannot be asked for, one line that says why

A block is a number of targets with all their candidates. Each block has a seed of its own, made of the run's
and the block's number, so its samples do not depend on what was drawn before it, nor in which run. A file
appears whole or not at all; a block whose file is there is not drawn again. Several processes may draw into
one folder, say one for each GPU: a block that one of them is at is left to it, and is free again if it dies.

Not here: what is asked (recipe.py), what matches (scores/matching.py), what order candidates stand in
(generation.ranked).
"""

import contextlib
import gzip
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pymatgen.core import Structure

from crystallm_kit.benchmark import composition_of
from crystallm_kit.errors import EncodeError, ImpossibleRequest, ReadError, UnknownName, UserError
from crystallm_kit.generation import Model, candidates, check_request, new_seed, sample_to_dict
from crystallm_kit.records import Conditions, Crystal, Sample, Verdict
from crystallm_kit.structures.elements import ATOMIC_NUMBER
from crystallm_kit.structures.symmetry import dataset
from crystallm_kit.text.conditions import conditions_from_dict
from crystallm_kit.text.parsing import parse_completion
from crystallm_kit.text.representation import Representation

GIVEN = ("composition", "spacegroup")  # what a target tells the generator
_SYMPREC_ANGSTROM = 0.1
_LOOK_AGAIN_SECONDS = 0.5  # where all that is left is with other processes


@dataclass(frozen=True)
class Asked:
    """One target, and what is asked for it.

    Attributes:
        target: Its id.
        conditions: For each of its candidates.
    """

    target: str
    conditions: Conditions


def asked_of(crystal: Crystal, given: Sequence[str]) -> Asked:
    """Return what a target's candidates are asked for.

    Args:
        crystal: With its true structure in a primitive cell.
        given: Of GIVEN: the atoms of the cell; the space group, as moyo finds it at 0.1 angstrom. With the
            group, the atoms are those of the primitive cell at that tolerance, which is smaller where the
            given cell is nearly a repetition of it: the group is of that cell, and the other may not have it.

    Raises:
        ImpossibleRequest: If it is a molecule, or disordered, or no symmetry is found.
    """
    structure = crystal.structure
    if not isinstance(structure, Structure) or not structure.is_ordered:
        raise ImpossibleRequest(f"{crystal.id}: an ordered crystal expected; leave it out of the targets")
    conditions = composition_of(crystal)
    if "spacegroup" not in given:
        return Asked(crystal.id, conditions)
    try:
        found = dataset(structure, _SYMPREC_ANGSTROM)
    except EncodeError as error:
        raise ImpossibleRequest(f"{crystal.id}: {error}; leave it out of the targets") from error
    numbers = Counter(found.prim_std_cell.numbers)
    counts = {symbol: numbers[ATOMIC_NUMBER[symbol]] for symbol in conditions.formula or {}}
    if not all(counts.values()):
        raise ImpossibleRequest(
            f"{crystal.id}: at {_SYMPREC_ANGSTROM} angstrom atoms coincide; leave it out of the targets"
        )
    return Asked(
        crystal.id,
        replace(conditions, formula=counts, n_sites=numbers.total(), spacegroup_number=int(found.number)),
    )


def draw_candidates(
    asked: Sequence[Asked],
    model: Model,
    folder: Path,
    *,
    n_drawn: int,
    seed: int,
    targets_per_block: int = 50,
    redraws: int = 3,
    say: Callable[[int, int], None] | None = None,
) -> None:
    """Draw the candidates of all targets, but for the blocks whose file is there.

    Args:
        asked: The targets, in their order.
        model: What draws.
        folder: Of the block files; made where it is missing.
        n_drawn: Candidates for each target.
        seed: Of the run.
        targets_per_block: What is lost at most when the run is killed.
        redraws: As in generation.stream.
        say: Told, after each block, how many targets of how many are done.
    """
    if n_drawn < 1:
        raise UserError(f"{n_drawn} candidates a target: 1 or more expected")
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [asked[i : i + targets_per_block] for i in range(0, len(asked), targets_per_block)]
    paths = [folder / f"block-{block:05d}.jsonl.gz" for block in range(len(blocks))]
    while missing := [block for block, path in enumerate(paths) if not path.exists()]:
        n_left_to_others = 0
        for block in missing:
            with _held(paths[block].with_suffix(".lock")) as is_ours:
                n_left_to_others += not is_ours
                if not is_ours or paths[block].exists():
                    continue
                _write(paths[block], _lines(blocks[block], model, n_drawn, new_seed(seed, block), redraws))
            if say is not None:
                done = sum(len(some) for some, path in zip(blocks, paths, strict=True) if path.exists())
                say(done, len(asked))
        if n_left_to_others == len(missing):
            time.sleep(_LOOK_AGAIN_SECONDS)


def _lines(
    asked: Sequence[Asked], model: Model, n_drawn: int, seed: int, redraws: int
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a block."""
    refused = {a.target: why for a in asked if (why := _why_not(a.conditions, model))}
    yield from ({"target": target, "refused": why} for target, why in refused.items())
    asked_for = [a for a in asked if a.target not in refused]
    found = candidates([a.conditions for a in asked_for], n_drawn, seed=seed, model=model, redraws=redraws)
    for one, samples in zip(asked_for, found, strict=True):
        for sample in samples:
            yield {"target": one.target, **sample_to_dict(sample)}


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Hold a lock while in here, if no other process has it; give whether it is ours.

    The file goes with the lock: whoever gets the lock afterwards, of that file or of a new one, has to look
    first whether the work is done.
    """
    try:
        held = FileLock(path).acquire(blocking=False)
    except Timeout:
        yield False
        return
    with held:
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _why_not(conditions: Conditions, model: Model) -> str:
    """Return why a model cannot be asked for something, "" if it can."""
    try:
        check_request(conditions, model)
    except (ImpossibleRequest, UnknownName) as error:
        return str(error)
    return ""


def _write(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.writing")
    with gzip.open(partial, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    partial.replace(path)


def candidates_of(folder: Path, representation: Representation) -> Iterator[tuple[str, list[Sample]]]:
    """Yield each target's id with its candidates as they were drawn, block after block.

    A target that could not be asked for has none.

    Raises:
        ReadError: If a file is damaged; the message says what to do.
    """
    for path in sorted(folder.glob("block-*.jsonl.gz")):
        found: dict[str, list[Sample]] = {}
        try:
            with gzip.open(path, "rt", encoding="utf-8") as handle:
                for line in handle:
                    data = json.loads(line)
                    samples = found.setdefault(data["target"], [])
                    if "refused" not in data:
                        samples.append(_sample(data, representation))
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise ReadError(
                f"{path}: damaged ({error}); remove it, and the same command draws it again"
            ) from error
        yield from found.items()


def _sample(data: dict[str, Any], representation: Representation) -> Sample:
    found = parse_completion(data["text"], representation)
    return Sample(
        id=data["id"],
        text=data["text"],
        structure=None if isinstance(found, Verdict) else found.structure,
        verdict=Verdict(data["valid"], data["reason"], data["detail"], data["checks"]),
        conditions=conditions_from_dict(data["conditions"]),
        log_probability=float("nan") if data["log_probability"] is None else data["log_probability"],
        seed=data["seed"],
        model=data["model"],
        measures=data["measures"],
    )
