"""Candidates of templates and of a model for one composition, in one order.

    pooled(by_template, by_model)       -> samples, the most likely crystal first

How likely a crystal is, by each: the template engine says it itself (its share of the votes, the logarithm of
which is `log_probability`); of a model it is the share of its draws that are this crystal. Candidates that
pymatgen's matcher holds for the same at its defaults are one crystal; crystals stand in the order of the
weighted mean of the two shares. Each is shown by its template where there is one, else by its most probable
draw; the others follow when every crystal has been shown.

What it brings (mp_test whole; match rates at n = 1, 5, 20, in per cent; eval/csp-mp20*.yaml): given the
composition, templates 70.7, 86.3, 90.6; the shipped model, ranked, 62.7, 77.6, 82.3; both 70.2, 86.1, 90.0,
so nothing. With the space group told templates 83.2, 87.0, 87.4; the model 79.7, 85.9, 89.0; both 84.5, 89.6,
91.3: few templates have the group, and the model finds what they do not give.

Not here: candidates of a model alone (generation.ranked), order by energy (prediction.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pymatgen.core import Structure

from crystallm_kit.records import Sample
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, Reduced, fit, reduce_many

# Weight of the templates' share, chosen on the first 300 of mp_val, composition given: of 0.5, 0.6, 0.7, 0.8
# the best at n = 20.
_OF_TEMPLATES = 0.7


@dataclass
class _Crystal:
    """Candidates that are the same: the form of the first, all in order, and the sum of their shares."""

    form: Reduced
    samples: list[Sample] = field(default_factory=list)
    share: float = 0.0


def pooled(by_template: Sequence[Sample], by_model: Sequence[Sample]) -> list[Sample]:
    """Return the candidates of both for one composition, best first; those without a structure are left out.

    Args:
        by_template: As the template engine answered.
        by_model: As drawn, failures included: they count among the draws.
    """
    drawn = sorted(
        by_model, key=lambda s: -s.log_probability if math.isfinite(s.log_probability) else math.inf
    )
    shares = [_OF_TEMPLATES * math.exp(s.log_probability) for s in by_template if s.structure is not None]
    candidates = [s for s in (*by_template, *drawn) if s.structure is not None]
    shares += [(1 - _OF_TEMPLATES) / max(len(by_model), 1)] * (len(candidates) - len(shares))
    structures = [s.structure if isinstance(s.structure, Structure) else None for s in candidates]
    crystals: list[_Crystal] = []
    for sample, share, form in zip(candidates, shares, reduce_many(structures), strict=True):
        if form is None:
            continue
        same = next((c for c in crystals if fit(form, c.form, TOLERANCES["default"])), None)
        if same is None:
            same = _Crystal(form)
            crystals.append(same)
        same.samples.append(sample)
        same.share += share
    crystals.sort(key=lambda c: -c.share)
    deepest = max((len(c.samples) for c in crystals), default=0)
    return [c.samples[i] for i in range(deepest) for c in crystals if i < len(c.samples)]
