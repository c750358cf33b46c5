"""All that the scores of one set are counted from, and what several of them ask for, found once.

    scene.check("cdvae.comp_valid").sum() -> 8325

Not here: the columns (view.py), the counting (summary.py).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.scores.checks import BOND_SCORES, CHECKS
from crystallm_kit.scores.coverage import MaybeFingerprints
from crystallm_kit.scores.novelty.copies import copies_by_hash
from crystallm_kit.scores.stability.sample import Judge
from crystallm_kit.scoring.copies import RULES, Copies
from crystallm_kit.scoring.fingerprinting import fingerprints_of
from crystallm_kit.scoring.pairing import Pairs
from crystallm_kit.scoring.stages import STAGES
from crystallm_kit.scoring.view import Truth, View

_FINGERPRINTED = ("cdvae", "diffcsp", "crystal_text_llm")


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The relaxed structures of a set, worked out like the set itself.

    Attributes:
        view: Their columns; a sample without a relaxed structure has none.
        copies: Among them.
        judge: Who says what is stable.
    """

    view: View
    copies: Copies
    judge: Judge


@dataclass(frozen=True, eq=False)
class Scene:
    """All that the scores of a set are counted from.

    Attributes:
        samples: The set.
        copies: Among its samples.
        reference, targets: Other sets, where they are given.
        pairs: Samples and targets.
        relaxation: Where the samples were relaxed.
        cutoffs: Of coverage, a name in scores.coverage.CUTOFFS.
    """

    samples: View
    copies: Copies
    reference: View | None = None
    targets: View | None = None
    pairs: Pairs | None = None
    relaxation: Relaxation | None = None
    cutoffs: str = "mp_20"

    @property
    def n(self) -> int:
        """Requested samples."""
        return self.samples.n

    @cached_property
    def readable(self) -> Truth:
        """Which samples have a structure."""
        return self.samples.readable()

    def check(self, name: str) -> Truth:
        """Return which samples pass a check."""
        return passes(self.samples, name)

    def unique(self, rule: str) -> Truth:
        """Return which samples take part in a rule of copies and are none."""
        return unique(self.samples, self.copies, rule)

    def known(self, column: str) -> Truth | None:
        """Return which samples are in the reference, by a column of the stage `known`; None without one."""
        return known(self.samples, column)

    @cached_property
    def same_hash(self) -> NDArray[np.int64] | None:
        """(N,) which sample of equal bonding graph is kept in place of each, -1: none; None: not hashed.

        CrystaLLM-pi keeps the lowest hull distance of the cell as it is; where there is none, the lowest
        volume of a formula unit, which among equal cell formulas is the lowest of an atom.
        """
        if not self.samples.has("hashes"):
            return None
        volume = self.samples.floats("checks", "volume_per_atom_angstrom3")
        distance = np.full(self.n, np.nan)
        if self.samples.has("stability"):
            distance = self.samples.floats("stability", "submitted_hull_distance_ev_per_atom")
        ranks = [
            (d != d, v if d != d else d) for d, v in zip(distance.tolist(), volume.tolist(), strict=True)
        ]
        of = copies_by_hash(self.samples.texts("hashes", "hash.bawl"), ranks)
        return np.array([-1 if one is None else one for one in of], dtype=np.int64)

    @cached_property
    def checks(self) -> dict[str, NDArray[Any]]:
        """Columns of the checks, None where a sample could not be parsed."""
        found = {}
        for name in (*CHECKS, *BOND_SCORES):
            if not _has(self.samples, name):
                continue
            column = passes(self.samples, name) if name in CHECKS else self.samples.floats("bonds", name)
            whole = np.array(column, dtype=object)
            whole[~self.readable] = None
            if name in CHECKS and "(text" in CHECKS[name]:
                # only what came as a CIF has said anything
                whole[[text is None for text in self.samples.texts("read", "cif_text")]] = None
                if not any(one is not None for one in whole):
                    continue
            found[name] = whole
        return found

    @cached_property
    def fingerprints(self) -> list[MaybeFingerprints]:
        """Of each sample."""
        return list(fingerprints_of(self.samples.folders["fingerprints"]))


def passes(view: View, name: str) -> Truth:
    """Return which samples of a set pass a check."""
    protocol, _, metric = name.partition(".")
    if metric == "fingerprintable":
        return view.truth("fingerprints", "fingerprintable")
    if metric == "valid" and protocol in _FINGERPRINTED:
        both = passes(view, f"{protocol}.structure_valid") & passes(view, f"{protocol}.comp_valid")
        return both & view.truth("fingerprints", "fingerprintable") if view.has("fingerprints") else both
    return view.truth("bonds" if name in STAGES["bonds"].schema.names else "checks", name)


def _has(view: View, name: str) -> bool:
    protocol, _, metric = name.partition(".")
    if metric == "fingerprintable" or (metric == "valid" and protocol in _FINGERPRINTED):
        return view.has("fingerprints")
    return name in STAGES["checks"].schema.names or view.has("bonds")


def unique(view: View, copies: Copies, rule: str) -> Truth:
    """Return which samples of a set take part in a rule of copies and are none."""
    gate = RULES[rule].gate
    takes_part = passes(view, gate) if gate else view.readable()
    return np.asarray(takes_part & (copies.of[rule] == -1))


def known(view: View, column: str) -> Truth | None:
    """Return which samples of a set are in the reference; None: there is no reference."""
    stage = "known_alloys" if column == "disordered" else "known"
    if not view.has(stage):
        return None
    # what could not be looked up is not called new
    pairs = zip(view.texts(stage, f"known_as.{column}"), view.texts(stage, "trouble"), strict=True)
    return np.array([one is not None or trouble is not None for one, trouble in pairs])
