"""A composition as 132 numbers: statistics of Magpie's element properties, scaled as CDVAE does.

    composition_fingerprint({"Na": 1, "Cl": 1})[:4]    ->  [-0.62, -2.04, -1.51, -1.34]
    of the atomic numbers 11 and 17: minimum, maximum, range, mean, each less its mean over MP-20 and in units
    of its standard deviation

22 properties, each as minimum, maximum, range, mean, average deviation and mode over the elements, weighted
by their counts: matminer's ElementProperty.from_preset("magpie"). An element without a value (13 up to Lr,
all from Rf) makes the six statistics of that property NaN, and after scaling 0, as under the matminer that
CDVAE pins (0.7.3). From 0.10 on matminer fills such gaps by default; ask it for impute_nan=False to compare.

Not here: distances between fingerprints (coverage.py). Sources: magpie.json names them.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Composition, Element

from crystallm_kit.errors import UserError

FloatArray = NDArray[np.float64]
LENGTH = 132


class MagpieTables(NamedTuple):
    """Magpie's properties and CDVAE's scaling.

    Attributes:
        properties: Names, 22 of them.
        elements: (119, 22) by atomic number; NaN where unknown, as the whole of row 0.
        means, deviations: (132,) over MP-20; six statistics of the first property, then of the next.
    """

    properties: tuple[str, ...]
    elements: FloatArray
    means: FloatArray
    deviations: FloatArray


@cache
def magpie_tables() -> MagpieTables:
    """Return the frozen tables."""
    path = resources.files("crystallm_kit.scores.fingerprints").joinpath("magpie.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    elements = np.full((119, len(data["properties"])), np.nan)
    for symbol, row in data["elements"].items():
        elements[Element(symbol).Z] = [np.nan if value is None else value for value in row]
    return MagpieTables(
        tuple(data["properties"]),
        elements,
        np.array(data["means"]).ravel(),
        np.array(data["deviations"]).ravel(),
    )


def magpie_features(composition: Composition | Mapping[str, float]) -> FloatArray:
    """Return the 132 statistics without scaling; NaN where an element's value is unknown.

    Args:
        composition: Element symbol -> atoms; any multiple of the formula unit.

    Raises:
        UserError: If it is empty, or has a dummy species.
    """
    amounts = Composition(composition).element_composition
    if not amounts:
        raise UserError("fingerprint of a composition: it has no elements; at least one expected")
    try:
        numbers = [Element(element.symbol).Z for element in amounts]
    except ValueError as error:
        raise UserError(f"fingerprint of {composition}: {error}; elements 1 to 118 expected") from error
    counts = np.array(list(amounts.values()), dtype=np.float64)
    values = magpie_tables().elements[numbers]  # (elements, properties)
    low, high = values.min(axis=0), values.max(axis=0)
    mean = np.average(values, axis=0, weights=counts)
    deviation = np.average(np.abs(values - mean), axis=0, weights=counts)
    mode = values[np.isclose(counts, counts.max())].min(axis=0)
    # a property has a mode where its most frequent elements have values, whatever the others lack
    return np.stack([low, high, high - low, mean, deviation, mode], axis=1).ravel()


def composition_fingerprint(composition: Composition | Mapping[str, float]) -> FloatArray:
    """Return the scaled fingerprint of a composition, (132,); 0 where a value is unknown.

    Raises:
        UserError: As magpie_features.
    """
    return scaled(magpie_features(composition))


def scaled(features: FloatArray) -> FloatArray:
    """Return Magpie features (..., 132) in CDVAE's units, unknown ones at the mean of MP-20."""
    tables = magpie_tables()
    found = (features - tables.means) / tables.deviations
    return np.where(np.isnan(found), 0.0, found)


def unscaled(fingerprints: FloatArray) -> FloatArray:
    """Return the Magpie features (..., 132) of scaled fingerprints; unknown ones are MP-20's mean."""
    tables = magpie_tables()
    return fingerprints * tables.deviations + tables.means
