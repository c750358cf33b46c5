"""What a prompt template is, and what templates share.

    template.render(Conditions(spacegroup_number=225))  ->  the prompt;  template.parse  ->  the conditions

Not here: the templates (prompt_kit.py, prompt_llm.py, prompt_cif.py), their table (prompts.py).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from crystallm_kit.errors import ImpossibleRequest
from crystallm_kit.records import PROPERTIES, Conditions, Range
from crystallm_kit.text.conditions import check_range, conditions_set

# Quantiles at 0, 5, ... 100 %, for models that bring none of their training data: Materials Project entries
# (17,738 with energies and density, 6,433 with a band gap) and 3,433 AFLOW bulk moduli.
REFERENCE_QUANTILES: dict[str, tuple[float, ...]] = {
    "formation_energy_ev_per_atom": (
        -4.47, -3.21, -2.87, -2.61, -2.38, -2.15, -1.93, -1.72, -1.51, -1.32, -1.1,
        -0.94, -0.81, -0.69, -0.59, -0.51, -0.42, -0.34, -0.25, -0.09, 5.15,
    ),
    "hull_distance_ev_per_atom": (*(0.0,) * 12, 0.01, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.21, 5.15),
    "band_gap_ev": (*(0.0,) * 15, 0.4, 1.05, 1.71, 2.44, 3.65, 7.94),
    "density_g_cm3": (
        0.15, 2.18, 2.65, 3.04, 3.39, 3.72, 4.04, 4.36, 4.7, 5.03, 5.38,
        5.75, 6.17, 6.58, 7.02, 7.49, 8.04, 8.64, 9.43, 10.89, 21.97,
    ),
    "bulk_modulus_gpa": (
        1.0, 21.0, 33.0, 43.0, 52.0, 58.0, 65.0, 73.0, 80.0, 88.0, 98.0,
        107.0, 116.0, 126.0, 137.0, 150.0, 165.0, 180.0, 200.0, 234.0, 407.0,
    ),
}  # fmt: skip


class Template(Protocol):
    """One way of writing conditions for a model.

    Attributes:
        name: Key in TEMPLATES.
        hash: sha256 of everything that decides what the prompts look like and mean.
        tasks: What it can ask for: generate, infill, property.
        says: Names of the conditions (fields of Conditions, properties) that it can write.
        begins_the_text: True: the prompt is the beginning of the crystal's own text, and is not written
            before it in training. False: prompt and text follow each other.
    """

    @property
    def name(self) -> str:
        """Return the key in TEMPLATES."""

    @property
    def begins_the_text(self) -> bool:
        """Return whether the prompt is the beginning of the crystal's own text."""

    @property
    def tasks(self) -> frozenset[str]:
        """Return what it can ask for: generate, infill, property (tokens/tasks.py)."""

    @property
    def hash(self) -> str:
        """Return the template's identity."""

    @property
    def says(self) -> frozenset[str]:
        """Return the names of what it can write."""

    def render(
        self,
        conditions: Conditions,
        rng: np.random.Generator | None = None,
        *,
        quantiles: Mapping[str, Sequence[float]] | None = None,
    ) -> str:
        """Return the prompt.

        Args:
            conditions: What is wanted.
            rng: Chooses what the conditions leave open (a value within an interval; an order of sentences).
                None: always the same choice.
            quantiles: Property name -> values at evenly spaced probabilities in the model's training data. A
                value for an interval is drawn from the part of that distribution inside it. Without:
                REFERENCE_QUANTILES.

        Raises:
            ImpossibleRequest: If conditions contradict each other, are out of range, or cannot be said.
        """

    def parse(self, prompt: str) -> Conditions:
        """Return the conditions that a prompt says. Raises ParseError."""


def value_within(
    name: str,
    asked: Range,
    rng: np.random.Generator | None = None,
    *,
    quantiles: Mapping[str, Sequence[float]] | None = None,
) -> float:
    """Return one value of a property inside what is asked, distributed as the reference data are there.

    Without `rng`, the median of that part. Where the reference has nothing inside, the value nearest to it.

    Raises:
        ImpossibleRequest: If nothing of the range can be asked for.
    """
    known = PROPERTIES[name]
    check_range(known, asked)
    low = known.low if asked.low is None else max(asked.low, known.low)
    high = known.high if asked.high is None else min(asked.high, known.high)
    if low == high:
        return low
    reference = (quantiles or {}).get(name, REFERENCE_QUANTILES[name])
    values = np.sort(np.asarray(reference, dtype=float))
    shares = np.linspace(0.0, 1.0, len(values))
    first, last = np.interp([low, high], values, shares)
    share = first + (last - first) * (0.5 if rng is None else rng.random())
    return float(np.clip(np.interp(share, shares, values), low, high))


def refuse_unsayable(template: Template, conditions: Conditions) -> None:
    """Raise ImpossibleRequest for a condition that a template cannot say."""
    unsayable = [name for name in conditions_set(conditions) if name not in template.says]
    if unsayable:
        raise ImpossibleRequest(
            f"template '{template.name}' cannot say {', '.join(unsayable)}; "
            f"it can say {', '.join(sorted(template.says))}. Drop it, or use a model of the kit's own."
        )


def sha256_of(*definition: Any) -> str:
    """Return the identity of a template: the hash of everything that defines it."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
