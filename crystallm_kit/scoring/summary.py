"""Rows -> scores: every number of a set under its protocol's name, or why it is not there.

    scores(scene, ["cdvae"]) -> [Score("cdvae.structure_valid", 1.0, 10000 of 10000), ...]

A protocol is a line of PROTOCOLS: the functions that count its scores from the columns of a set. A new metric
is one function there. What a score needs and was not worked out (no reference, no targets, no fingerprints)
gives a score that says so.

Not here: the numbers' definitions (scores/), the columns (stages.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crystallm_kit.errors import UnknownName
from crystallm_kit.scores.score import Score, not_computed, share
from crystallm_kit.scoring.copies import RULES
from crystallm_kit.scoring.pairing import Pairs
from crystallm_kit.scoring.view import Truth, View

NO_REFERENCE = "no reference set: give --reference"
NO_TARGETS = "no targets: give --targets"


@dataclass(frozen=True, eq=False)
class Scene:
    """All that the scores of a set are counted from.

    Attributes:
        samples: The set.
        reference, targets: Other sets, where they are given.
        copies: Rule -> (N,) int64, the position of the sample that each is a copy of; -1: of none.
        pairs: Samples and targets.
        settings: Of the run.
    """

    samples: View
    reference: View | None = None
    targets: View | None = None
    copies: Mapping[str, Any] = field(default_factory=dict)
    pairs: Pairs | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self, name: str) -> Truth:
        """Return which samples pass a check."""
        return self.samples.truth("checks", name)

    def unique(self, rule: str) -> Truth:
        """Return which samples take part in a rule of copies and are none."""
        gate = RULES[rule].gate
        takes_part = self.check(gate) if gate else self.samples.readable()
        return np.asarray(takes_part & (self.copies[rule] == -1))

    def known(self, tolerances: str) -> Truth | None:
        """Return which samples are in the reference; None without one."""
        if not self.samples.has("known"):
            return None
        return np.array([one is not None for one in self.samples.texts("known", f"known_as.{tolerances}")])


Counting = Callable[[Scene], Iterator[Score]]


@dataclass(frozen=True)
class Protocol:
    """One line of the table.

    Attributes:
        title, text: For people.
        countings: What its scores are counted by.
        settings: Tolerances, tables, denominators that it stands for.
    """

    title: str
    text: str
    countings: tuple[Counting, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def scores(scene: Scene, protocols: Sequence[str]) -> list[Score]:
    """Return the scores of a set, protocol by protocol."""
    return [
        score for name in protocols for counting in PROTOCOLS[name].countings for score in counting(scene)
    ]


def check_protocols(names: Sequence[str] | None) -> list[str]:
    """Return the protocols that are asked for; None: all. Raises UnknownName with the nearest known one."""
    for name in names or ():
        if name not in PROTOCOLS:
            raise UnknownName.among("protocol", name, PROTOCOLS)
    return list(dict.fromkeys(names)) if names else list(PROTOCOLS)


# ---------------------------------------------------------------- countings


def _passed(*names: str) -> Counting:
    """Count the checks of these names."""

    def count(scene: Scene) -> Iterator[Score]:
        for name in names:
            yield share(name, int(scene.check(name).sum()), scene.samples.n)

    return count


def _both(name: str, *checks: str, note: str = "") -> Counting:
    """Count what passes several checks under one name."""

    def count(scene: Scene) -> Iterator[Score]:
        passed = np.logical_and.reduce([scene.check(check) for check in checks])
        yield share(name, int(passed.sum()), scene.samples.n, note=note)

    return count


def _kit(scene: Scene) -> Iterator[Score]:
    n, samples = scene.samples.n, scene.samples
    yield share("kit.readable", int(samples.readable().sum()), n)
    yield share("kit.valid", int(scene.check("kit.valid").sum()), n)
    unique = scene.unique("kit")
    yield share("kit.unique", int(unique.sum()), n, note="valid, and no copy of an earlier valid one")
    known = scene.known("default")
    if known is None:
        yield not_computed("kit.novel", NO_REFERENCE)
        yield not_computed("kit.unique_novel", NO_REFERENCE)
        return
    valid = scene.check("kit.valid")
    yield share("kit.novel", int((valid & ~known).sum()), n, note="valid, and not in the reference")
    yield share(
        "kit.unique_novel", int((unique & ~known).sum()), n, note="valid, no copy, not in the reference"
    )


def _asked(scene: Scene) -> Iterator[Score]:
    """Count what came out as it was asked for."""
    asked = np.array([text is not None for text in scene.samples.texts("read", "conditions")])
    if asked.any():
        hits = asked & scene.check("as_asked")
        yield share(
            "kit.as_asked", int(hits.sum()), int(asked.sum()), over="requested with conditions",
            note="composition, number of sites and symmetry, as far as they were asked for",
        )  # fmt: skip


PROTOCOLS: dict[str, Protocol] = {
    "kit": Protocol(
        "kit", "The kit's own: LeMat's distances with self-images, plausible density, SMACT charge; first "
        "seen kept; denominators are what was requested.", (_kit, _asked),
        {"matcher": "0.2 / 0.3 / 5", "smact": "2.2.1"},
    ),
    "cdvae": Protocol(
        "CDVAE", "Structures with a volume of 0.1 A^3 and no two sites within 0.5 A; compositions by SMACT; "
        "images of a site itself are not looked at.",
        (_passed("cdvae.structure_valid", "cdvae.comp_valid"),
         _both("cdvae.valid", "cdvae.structure_valid", "cdvae.comp_valid",
               note="without the fingerprint test, which no sample has been seen to fail")),
        {"smact": "2.2.1"},
    ),
    "diffcsp": Protocol(
        "DiffCSP", "As CDVAE; more than 1e7 combinations of oxidation states fail.",
        (_passed("diffcsp.structure_valid", "diffcsp.comp_valid"),), {"smact": "2.2.1"},
    ),
}  # fmt: skip
