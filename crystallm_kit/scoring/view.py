"""What the stages found of one set, column by column: what the scores are counted from.

    view = View("DiffCSP", {"read": ..., "checks": ...}, n=10000)
    view.truth("checks", "cdvae.comp_valid").sum() -> 8325

Columns are (N,) arrays over all requested samples, in order, each read when it is first asked for.

Not here: the counting (summary.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.scores.matcher.structure_matcher import Reduced
from crystallm_kit.scoring.rows import column_of, forms_of, n_rows, parts_of, read_part

Truth = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(eq=False)
class View:
    """A set's columns.

    Attributes:
        name: Of the set.
        folders: Stage -> folder of its parts; a stage that was not asked for is absent.
        n: Requested samples.
    """

    name: str
    folders: Mapping[str, Path]
    n: int
    _held: dict[tuple[str, str], NDArray[Any]] = field(default_factory=dict, repr=False)

    def has(self, stage: str) -> bool:
        """Tell whether a stage was worked out."""
        return stage in self.folders

    def column(self, stage: str, name: str) -> NDArray[Any]:
        """Return a column; null is NaN among floats, False among truths, None among texts."""
        key = (stage, name)
        if key not in self._held:
            self._held[key] = column_of(self.folders[stage], name)
        return self._held[key]

    def truth(self, stage: str, name: str) -> Truth:
        """Return a column of truths; what is not known is False."""
        return np.asarray(self.column(stage, name), dtype=bool)

    def floats(self, stage: str, name: str) -> Floats:
        """Return a column of numbers; NaN where there is none."""
        return np.asarray(self.column(stage, name), dtype=np.float64)

    def texts(self, stage: str, name: str) -> list[str | None]:
        """Return a column of texts."""
        return list(self.column(stage, name))

    def readable(self) -> Truth:
        """Return which samples have a structure."""
        return np.array([reason is None for reason in self.texts("read", "reason")])

    def reasons(self) -> list[str | None]:
        """Return why each sample is not valid under kit; None: it is."""
        troubles = self.texts("checks", "trouble")
        found = zip(self.texts("read", "reason"), troubles, self.texts("checks", "reason"), strict=True)
        return [read or (t and trouble_of(t)) or checked for read, t, checked in found]

    def forms(self) -> list[Reduced | None]:
        """Return the reduced forms; None where there is none."""
        return [form for part in forms_of(self.folders["forms"]) for form in part]

    def rows(self, stage: str, at: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return whole rows of a few samples, in the order of `at`."""
        paths = parts_of(self.folders[stage])
        ends = np.cumsum([n_rows(path) for path in paths])

        @lru_cache(maxsize=8)
        def part(number: int) -> list[dict[str, Any]]:
            return read_part(paths[number])

        found = []
        for i in at.tolist():
            number = int(np.searchsorted(ends, i, side="right"))
            found.append(part(number)[i - (int(ends[number - 1]) if number else 0)])
        return found


def trouble_of(text: str) -> str:
    """Return the reason that a stage's trouble is: "timeout" or "error"."""
    return "timeout" if text.startswith("timeout") else "error"
