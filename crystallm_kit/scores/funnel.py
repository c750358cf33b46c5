"""How many samples pass each gate, from what was requested down to what is valid and new.

    requested 8 | finished 7 | parsed 6 | formula 6 | symmetry 5 | distances 4 | charge 4 | unique 3

Each count holds the samples that passed this gate and all before it; the denominator is always what was
requested, and every sample that is missing at the end has its one reason. "parsed" means parsed into a
crystal with a cell.

Not here: the checks (validity.py); novelty against training data (novelty/copies.py).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Molecule, Structure

from crystallm_kit.errors import DisorderedStructure, EmptyInput, UserError
from crystallm_kit.records import Sample, Verdict
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, Reduced, fit, reduced

# The gate at which a reason stops a sample; later gates are those to the right in STAGES.
STAGES = ("requested", "finished", "parsed", "formula", "symmetry", "distances", "charge", "unique")
_STOPPED_AT = {
    "truncated": "finished",
    "error": "finished",
    "cell": "parsed",
    "formula_mismatch": "formula",
    "spacegroup_mismatch": "symmetry",
    "overlap": "distances",
    "density": "distances",
    "bonds": "distances",
    "charge": "charge",
    "duplicate": "unique",
}
_MOLECULE_DISTANCE_ANGSTROM = 0.1


@dataclass(frozen=True)
class Funnel:
    """Counts of samples at each gate, in the order of `STAGES`, and what stopped the rest.

    Attributes:
        requested: All samples; the denominator of everything.
        finished: Ended by the model, not cut.
        parsed: The text is a crystal in a real cell.
        formula: Composition and number of sites are as asked, where asked.
        symmetry: Space group and crystal system are as asked and as stated, where so.
        distances: No overlap, plausible density.
        charge: Charge-balanced; so valid.
        unique: Valid and not the copy of an earlier sample.
        reasons: Reason -> samples it stopped, most frequent first; they sum to requested - unique.
    """

    requested: int
    finished: int
    parsed: int
    formula: int
    symmetry: int
    distances: int
    charge: int
    unique: int
    reasons: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return the counts and the reasons, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the text that the command prints: a line a gate, then a line a reason."""
        width = len(str(self.requested))
        gates = [
            f"{stage:<10} {getattr(self, stage):>{width}}  {getattr(self, stage) / self.requested:7.2%}"
            for stage in STAGES
        ]
        return gates + [f"  stopped by {reason}: {count}" for reason, count in self.reasons.items()]


class Tally:
    """The counts of a funnel while samples come in, one after the other."""

    def __init__(self) -> None:
        self.requested = 0
        self._stopped: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def add(self, reason: str | None, stage: str = "") -> None:
        """Count one sample: the reason of its verdict, None where it passed, and the gate (`stage_of`)."""
        self.requested += 1
        if reason is not None:
            self._reasons[reason] += 1
            self._stopped[stage] += 1

    def funnel(self) -> Funnel:
        """Return the counts so far. Raises EmptyInput if there are none (0/0 is not a rate)."""
        if not self.requested:
            raise EmptyInput(
                "funnel: no samples, so no rates; pass every request's sample, failures included"
            )
        counts, left = {}, self.requested
        for stage in STAGES:
            left -= self._stopped[stage]
            counts[stage] = left
        return Funnel(**counts, reasons=dict(self._reasons.most_common()))


def funnel(samples: Iterable[Sample]) -> Funnel:
    """Count samples through the gates. Copies count as unique until `mark_duplicates` has marked them.

    A reason that no gate knows ("known", the verdicts of another stage) stops a sample at the last one.

    Raises:
        EmptyInput: If there are no samples (0/0 is not a rate).
    """
    tally = Tally()
    for sample in samples:
        reason = sample.verdict.reason
        tally.add(reason, "" if reason is None else stage_of(reason, sample.verdict))
    return tally.funnel()


def stage_of(reason: str, verdict: Verdict | None = None) -> str:
    """Return the gate at which a reason stops a sample.

    A cell that exists, but outside the protocol's ranges ("cell" after the composition passed), stops at
    distances.
    """
    if reason.startswith("parse:"):
        return "parsed"
    if reason == "cell" and verdict is not None and verdict.checks.get("sensible_cell") is False:
        return "distances"
    return _STOPPED_AT.get(reason, "unique")


def mark_duplicates(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples in order, with every valid copy of an earlier valid one judged "duplicate".

    Two crystals are the same if pymatgen's StructureMatcher says so at its default tolerances (0.2, 0.3, 5
    degrees, primitive cells, scaled) and their reduced formulas are equal; a supercell is a copy. Two
    molecules are the same if all distances between elements agree within 0.1 angstrom (mirror images are not
    told apart). The first seen is kept; the verdict of a copy names it. StructureMatcher is neither symmetric
    (it is called with the later one first) nor transitive, so another order of the samples can change the
    count a little: 2,196 of Crystal-text-LLM's 3,221 published samples are kept, in reversed order 2,198.

    Cost: one primitive-cell reduction a sample, then one comparison for each earlier different crystal of the
    same formula and number of sites (others cannot match).
    """
    seen: dict[str, list[Form]] = {}
    marked = []
    for sample in samples:
        structure = sample.structure
        if not sample.verdict.valid or structure is None:
            marked.append(sample)
            continue
        form = form_of(sample.id, structure)
        earlier = seen.setdefault(form.kind, [])
        first = next((other.name for other in earlier if is_copy(form, other)), None)
        if first is None:
            earlier.append(form)
            marked.append(replace(sample, verdict=_with_check(sample.verdict, True)))
        else:
            marked.append(replace(sample, verdict=duplicate(sample.verdict, first)))
    return marked


def duplicate(verdict: Verdict, first: str) -> Verdict:
    """Return the verdict of a valid copy of the sample `first`."""
    marked = replace(_with_check(verdict, False), valid=False, reason="duplicate")
    return replace(marked, detail=f"same crystal as sample {first}")


@dataclass(frozen=True, eq=False)
class Form:
    """What comparing two structures needs of each, made once.

    Attributes:
        name: The sample's.
        kind: Forms of different kinds are never copies.
        content: `Reduced`; pymatgen's reduced structure where sites are shared; the sorted distances of a
            molecule; None where nothing can be compared.
    """

    name: str
    kind: str
    content: Any


def form_of(name: str, structure: Structure | Molecule) -> Form:
    """Return the form of a structure: for crystals, the primitive and Niggli-reduced cell."""
    if isinstance(structure, Molecule):
        return Form(name, f"molecule {structure.composition.formula}", _distances_of(structure))
    try:
        form = reduced(structure)
    except DisorderedStructure:
        content = _matcher()._get_reduced_structure(structure, True, True)
        return Form(name, f"disordered {structure.composition.reduced_formula} {len(content)}", content)
    except UserError:  # a needle passes every check, but no cell of it can be compared: it is no one's copy
        return Form(name, "not comparable", None)
    return Form(name, f"crystal {form.formula} {len(form.numbers)}", form)


def is_copy(later: Form, earlier: Form) -> bool:
    """Tell whether two structures are the same, as `mark_duplicates` means it."""
    if later.kind != earlier.kind or later.content is None:
        return False
    if isinstance(later.content, np.ndarray):
        return bool((np.abs(earlier.content - later.content) <= _MOLECULE_DISTANCE_ANGSTROM).all())
    if isinstance(later.content, Reduced):
        return fit(later.content, earlier.content, TOLERANCES["default"])
    return bool(_matcher().fit(later.content, earlier.content, skip_structure_reduction=True))


@cache
def _matcher() -> Any:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher()


def _with_check(verdict: Verdict, passed: bool) -> Verdict:
    return replace(verdict, checks={**verdict.checks, "unique": passed})


def _distances_of(molecule: Molecule) -> NDArray[np.float64]:
    """Return the distances between atoms, by the elements of the pair, then by length."""
    numbers = np.array([site.specie.Z for site in molecule])
    first, second = np.triu_indices(len(numbers), 1)
    offsets = molecule.cart_coords[first] - molecule.cart_coords[second]
    distance = np.sqrt((offsets * offsets).sum(1))
    low, high = np.minimum(numbers[first], numbers[second]), np.maximum(numbers[first], numbers[second])
    return np.asarray(distance[np.lexsort((distance, high, low))])
