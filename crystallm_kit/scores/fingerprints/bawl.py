"""BAWL, the hash of a crystal's bonding graph, by which CrystaLLM-pi tells which samples are unique.

    bawl_hash(cubic cell of rock salt) -> "05474a878a6c3d2c15d290446a1915b0_225_Na4Cl4"

Three parts: the hash of the graph of bonds, the space group's number, the formula of the cell as it is given.
Bonds are those of Hoppe's effective coordination numbers, pymatgen's EconNN, with weights above 0.2 within
10 angstrom. A site's label is its element, refined 100 times by the labels at the other ends of its bonds.

Strings equal those of the package material-hasher, so its traps are here too:
    - a bond is followed from the earlier site to the later one only, so the order of the sites counts;
    - another cell of the same crystal has another formula and another graph, so another hash;
    - moyo's tolerance of 1e-4 angstrom finds little in coordinates that were rounded to four digits.
The origin, and cells of equal volume, change nothing.

Not here: which samples are copies by it (novelty/copies.py), matching of structures (matcher/).
Sources: Siron et al., LeMat-Bulk (AI4Mat workshop, ICLR 2025), github.com/LeMaterial/material-hasher, whose
graph hash is that of github.com/kjappelbaum/structuregraph-helpers; Hoppe, Z. Kristallogr. 150, 23 (1979);
Shervashidze et al., J. Mach. Learn. Res. 12, 2539 (2011) (Weisfeiler-Lehman).
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Literal

from pymatgen.core import Structure

from crystallm_kit.errors import EncodeError
from crystallm_kit.scores.lemat import spglib_dataset
from crystallm_kit.scores.measures import MeasuredCrystal
from crystallm_kit.structures.symmetry import spacegroup_number

BOND_WEIGHT = 0.2  # of EconNN, above which two sites are bonded
CUTOFF_ANGSTROM = 10.0
ROUNDS = 100
SYMPREC_ANGSTROM = {"moyo": 1e-4, "spglib": 0.01}


def bawl_hash(structure: Structure, *, symmetry: Literal["moyo", "spglib"] = "moyo") -> str:
    """Return the hash of a structure, "graph_number_formula".

    Args:
        structure: Ordered; its cell and the order of its sites count.
        symmetry: Who finds the space group: moyo at 1e-4 angstrom, the package's default and CrystaLLM-pi's;
            or spglib at 0.01 angstrom, as in LeMat-Bulk's column `entalpic_fingerprint` and LeMat-GenBench.

    Raises:
        ValueError: If a site has no neighbour within 10 angstrom.
        AttributeError: If a site is disordered.
    """
    number = _moyo_number(structure) if symmetry == "moyo" else _spglib_number(structure)
    return f"{bonding_graph_hash(structure)}_{'' if number is None else number}_{_formula(structure)}"


def bonding_graph_hash(structure: Structure) -> str:
    """Return the first part of the hash: 32 hexadecimal digits, of the graph of bonds and the elements."""
    from pymatgen.core.graphs import StructureGraph
    from pymatgen.core.local_env import EconNN

    bonds = EconNN(tol=BOND_WEIGHT, cutoff=CUTOFF_ANGSTROM, use_fictive_radius=True)
    with warnings.catch_warnings():
        # EconNN says of every pair that it has no oxidation states
        warnings.simplefilter("ignore")
        graph = StructureGraph.from_local_env_strategy(structure, bonds).graph
    return refined_hash(graph, {i: site.specie.symbol for i, site in enumerate(structure)})


def refined_hash(graph: Any, labels: Mapping[int, str]) -> str:
    """Return the Weisfeiler-Lehman hash of a networkx graph with labels at its nodes.

    networkx has one, which refuses the multigraphs that StructureGraph makes, and since 3.5 follows directed
    edges both ways; this one follows them forwards, and takes parallel edges for one, as the peer's does.

    Args:
        graph: Iterates over nodes; graph[node] over the ends of its outgoing edges, each once.
        labels: Of all nodes.
    """
    counts: list[tuple[str, int]] = []
    for _ in range(ROUNDS):
        labels = {
            node: _digest(labels[node] + "".join(sorted(labels[other] for other in graph[node])))
            for node in graph
        }
        counts += sorted(Counter(labels.values()).items())
    return _digest(str(tuple(counts)))


def _formula(structure: Structure) -> str:
    """Return elements and counts by electronegativity, of equal ones that of the earlier site first.

    So did pymatgen's `Composition.formula` in 2025, with which the peers hash; in 2026.10 it has an order of
    its own for equal ones, such as Cu and Si.
    """
    counts = Counter(site.specie for site in structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noble gases have no electronegativity
        ordered = sorted(counts, key=lambda element: element.X)
    return "".join(f"{element.symbol}{counts[element]}" for element in ordered)


def _digest(text: str) -> str:
    return blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _moyo_number(structure: Structure) -> int | None:
    try:
        return spacegroup_number(structure, SYMPREC_ANGSTROM["moyo"])
    except EncodeError:
        return None


def _spglib_number(structure: Structure) -> int | None:
    found = spglib_dataset(MeasuredCrystal(structure), SYMPREC_ANGSTROM["spglib"])
    return None if found is None else int(found.number)
