"""A site's fingerprint by pymatgen's own classes: the peers' way, slow.

    site_fingerprint(rock_salt, 0)    ->  (61,); 1.0 at the weight of 6 neighbours, 1.0 at "octahedral"

It decides what the fast way (neighbours.py) leaves open, and is what that is tested and timed
against. What it gives is matminer's CrystalNNFingerprint.from_preset("ops").featurize(structure, index).

Source: matminer 0.10.1, matminer/featurizers/site/fingerprint.py (BSD-style licence); the parameters are
pymatgen's own.
"""

import warnings
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Structure

from crystallm_kit.scores.fingerprints.motifs import TABLE

FloatArray = NDArray[np.float64]


def site_fingerprint(structure: Structure, index: int) -> FloatArray:
    """Return the 61 values of one site. Raises whatever pymatgen raises."""
    from pymatgen.analysis.local_env import CrystalNN

    with warnings.catch_warnings():
        # oxidation states are not there, radii may be missing, divisions by 0 have their place in the result
        warnings.simplefilter("ignore")
        # pymatgen leaves these without types
        found = CrystalNN().get_nn_data(structure, index)  # type: ignore[no-untyped-call]
        values: list[float] = []
        for n in range(1, 25):
            weight = found.cn_weights.get(n, 0)
            values.append(weight)
            near = found.cn_nninfo.get(n, ())
            parameters = _order_parameters().get(n, ())
            values.extend(_weighted(p, weight, structure, index, near) for p in parameters)
    return np.array(values, dtype=np.float64)


def _weighted(parameter: Any, weight: float, structure: Structure, index: int, near: Any) -> float:
    if weight == 0:
        return 0.0
    sites = [structure[index], *(entry["site"] for entry in near)]
    value = parameter.get_order_parameters(sites, 0, indices_neighs=list(range(1, len(sites))))[0]
    return float(weight * (value or 0))


@cache
def _order_parameters() -> dict[int, list[Any]]:
    from pymatgen.analysis.local_env import CN_OPT_PARAMS, LocalStructOrderParams

    found: dict[int, list[Any]] = {}
    for motif in TABLE:
        kind, *parameters = CN_OPT_PARAMS.get(motif.neighbours, {}).get(motif.name, [motif.name])
        found.setdefault(motif.neighbours, []).append(
            LocalStructOrderParams([kind], parameters=parameters or None)  # type: ignore[list-item, arg-type]
        )
    return found
