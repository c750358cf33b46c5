"""The stage `hashes`: the hash of the bonding graph of a structure that is valid under crystallm_pi.

Not here: the hash (scores/fingerprints/bawl.py), which samples share one (scores/novelty/copies.py).
"""

from collections.abc import Mapping
from typing import Any

from crystallm_kit.scores.fingerprints.bawl import bawl_hash
from crystallm_kit.scoring.stages import Item


def hash_valid(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the stage; none for what is not valid, of which the peer makes no hash either."""
    del settings, where
    if item.structure is None or not item.earlier["bonds"].get("crystallm_pi.valid"):
        return {}
    # the peer hashes what pymatgen reads from the CIF: sites by electronegativity, and their order counts
    return {"hash.bawl": bawl_hash(item.structure.get_sorted_structure())}
