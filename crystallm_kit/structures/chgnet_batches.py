"""CHGNet on hundreds of crystals at once: their graphs and its gradients as tensor operations on one device.

    >>> evaluate(model, crystals).energies          crystals: arrays of M crystals, atoms after one another
    array([-6.72, ...])

chgnet (Deng et al. 2023, doi:10.1038/s42256-023-00716-3) makes one graph a crystal on the CPU, and joins
graphs crystal by crystal. Here neighbours are found among all crystals together, and no loop goes over them.
The graph is chgnet's:

  bonds   pairs of atoms, or of an atom and its own image, with d^2 < cutoff^2 + 1e-8 (6 angstrom; float64, as
          pymatgen's find_points_in_spheres). One of the two directions stands for both: an undirected bond.
  angles  ordered pairs of different directed bonds below 3 angstrom with the same centre; so the two
          directions of an atom's bond to its own image make two angles of 180 degrees.

A bond of 3 angstrom exactly is in angles of chgnet's, and not in ours: its weight in them is zero.

Bond vectors and angles are float64 and CHGNet is float32; chgnet has float32 throughout. Energies are
differentiated by bond vectors, and from those gradients come forces and stress.

Legend: M crystals, A atoms, P pairs of atoms, C candidates: pairs of an atom and an image of one, B
undirected bonds, S those below 3 angstrom and D = 2 S their directions, G angles.
Not here: names and devices of potentials, relaxing (relaxation.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from chgnet.model.model import BatchedGraph
from torch import Tensor

from crystallm_kit.structures.relaxation import CrystalArrays, Evaluations, FloatArray, IntArray, batches_of

_TOLERANCE = 1e-8  # angstrom^2, of find_points_in_spheres
_AT_ONCE = {"cpu": 2**16, "cuda": 2**22}  # pairs of an atom and an image: what is in the cache, 1 GB
# What autograd keeps of a directed bond is 11 kB, of an angle 13 kB; mp_test has 111 of them an atom.
_EDGES_OF_AN_ATOM = 111
# Of one crystal: 24 GB, or 18,000 ordinary atoms; and what is looked through for them, in a minute.
_MOST_EDGES, _MOST_CANDIDATES = 2_000_000, 1e9


@dataclass(frozen=True)
class Bonds:
    """Undirected bonds of all crystals, in the order of their first atoms.

    Attributes:
        first, second: (B,) int64 atoms.
        vectors: (B, 3) float64 angstrom, from the first to the image of the second.
    """

    first: Tensor
    second: Tensor
    vectors: Tensor

    def __getitem__(self, some: slice | Tensor) -> "Bonds":
        """Return some of the bonds."""
        return Bonds(self.first[some], self.second[some], self.vectors[some])


def evaluate(model: Any, crystals: CrystalArrays, *, most: int) -> Evaluations:
    """Return energies, forces and stresses of crystals, and reasons for those that have none.

    Args:
        model: CHGNet.
        crystals: In any number; their bonds are found together.
        most: Atoms of ordinary crystals that pass through CHGNet together; fewer where each has more bonds.
    """
    reasons = _refusals(model, crystals)
    kept = [i for i in range(len(crystals.counts)) if i not in reasons]
    energies = np.full(len(crystals.counts), np.nan)
    forces = np.full((len(crystals.numbers), 3), np.nan)
    stresses = np.full((len(crystals.counts), 3, 3), np.nan)
    if kept:
        asked = crystals if not reasons else crystals.some(kept)
        found = _evaluate_bonded(model, asked, most)
        atoms = np.repeat(np.isin(np.arange(len(crystals.counts)), kept), crystals.counts)
        energies[kept], forces[atoms], stresses[kept] = found[:3]
        reasons |= {kept[i]: reason for i, reason in found.reasons.items()}
        without = np.array(sorted(reasons), dtype=np.int64)  # some have passed through with the others
        energies[without], stresses[without] = np.nan, np.nan
        forces[np.repeat(np.isin(np.arange(len(crystals.counts)), without), crystals.counts)] = np.nan
    return Evaluations(energies, forces, stresses, reasons)


def _refusals(model: Any, crystals: CrystalArrays) -> dict[int, str]:
    """Return why some crystals have no graph, by index."""
    counts, n_crystals = crystals.counts, len(crystals.counts)
    owner = np.repeat(np.arange(n_crystals), counts)
    cutoff = model.graph_converter.atom_graph_cutoff
    with np.errstate(all="ignore"):
        volumes = crystals.volumes
        expected = 4 / 3 * np.pi * cutoff**3 * counts**2 / volumes
        candidates = (2.0 * images_needed(crystals.lattices, cutoff) + 1).prod(axis=1) * counts**2 / 2
    broken = ~np.isfinite(crystals.lattices).all(axis=(1, 2)) | (counts == 0)
    broken[owner[~np.isfinite(crystals.fractional).all(axis=1)]] = True
    reasons = {}
    for i in np.flatnonzero(broken).tolist():
        reasons[i] = "error: no atoms" if counts[i] == 0 else "error: numbers that are not finite"
    for i in np.flatnonzero(~broken & ~((expected < _MOST_EDGES) & (candidates < _MOST_CANDIDATES))).tolist():
        reasons[i] = f"error: {counts[i]} atoms in {volumes[i]:.3g} angstrom^3 have too many neighbours"
    n_known = model.atom_embedding.embedding.num_embeddings
    unknown = (crystals.numbers < 1) | (crystals.numbers > n_known)
    return reasons | dict.fromkeys(owner[unknown].tolist(), "element")


def _evaluate_bonded(model: Any, crystals: CrystalArrays, most: int) -> Evaluations:
    """Evaluate crystals that can have a graph; those with a reason have numbers too, that say nothing."""
    device = next(model.parameters()).device
    n_crystals, n_atoms = len(crystals.counts), len(crystals.numbers)
    bonds = find_bonds(crystals, model.graph_converter.atom_graph_cutoff, device)
    n_bonds, n_angles, n_bound = _sizes(crystals.counts, bonds, model.graph_converter.bond_graph_cutoff)
    n_edges = 2 * n_bonds + n_angles
    too_many = f"error: more than {_MOST_EDGES:,} bonds and angles"
    reasons = dict.fromkeys(np.flatnonzero(n_bound < crystals.counts).tolist(), "isolated_atoms")
    reasons |= dict.fromkeys(np.flatnonzero(n_edges > _MOST_EDGES).tolist(), too_many)
    costs = np.maximum(crystals.counts, n_edges // _EDGES_OF_AN_ATOM)
    costs = np.where(n_edges > _MOST_EDGES, most + 1, costs).tolist()  # so that each of these is alone
    parts = [(batch[0], batch[-1] + 1) for batch in batches_of(range(n_crystals), costs, most)]
    atom_ends, bond_ends = (np.concatenate([[0], np.cumsum(n)]).tolist() for n in (crystals.counts, n_bonds))
    energies = torch.zeros(n_crystals, dtype=torch.float64, device=device)
    forces = torch.zeros((n_atoms, 3), dtype=torch.float64, device=device)
    virials = torch.zeros((n_crystals, 3, 3), dtype=torch.float64, device=device)
    while parts:
        start, stop = parts.pop()
        atoms = slice(atom_ends[start], atom_ends[stop])
        own_bonds = bonds[bond_ends[start] : bond_ends[stop]]
        if len(own_bonds.first) == 0 or n_edges[start:stop].max() > _MOST_EDGES:
            continue  # one that is too large is alone
        owner = np.repeat(np.arange(stop - start), crystals.counts[start:stop])
        try:
            energies[start:stop], forces[atoms], virials[start:stop] = _gradients(
                model,
                torch.as_tensor(crystals.numbers[atoms], device=device),
                torch.as_tensor(owner, device=device),
                Bonds(own_bonds.first - atoms.start, own_bonds.second - atoms.start, own_bonds.vectors),
            )
        except torch.OutOfMemoryError:
            if stop - start == 1:
                reasons[start] = "error: the device has too little memory"
            else:
                parts += [(start, (start + stop) // 2), ((start + stop) // 2, stop)]
    flat = torch.cat([energies, forces.reshape(-1), virials.reshape(-1)]).cpu().numpy()
    energies_, forces_, virials_ = np.split(flat, [n_crystals, n_crystals + 3 * n_atoms])
    stresses = virials_.reshape(-1, 3, 3) / crystals.volumes[:, None, None]
    return Evaluations(energies_, forces_.reshape(-1, 3), stresses, reasons)


def _sizes(counts: IntArray, bonds: Bonds, bond_cutoff: float) -> tuple[IntArray, IntArray, IntArray]:
    """Return for each crystal the numbers of its bonds, of its angles, and of its atoms with any bond."""
    n_crystals, n_atoms = len(counts), int(counts.sum())
    owner = torch.as_tensor(np.repeat(np.arange(n_crystals), counts), device=bonds.first.device)
    short = torch.linalg.vector_norm(bonds.vectors, dim=1) < bond_cutoff
    n_short, n_all = (
        torch.bincount(torch.cat([some.first, some.second]), minlength=n_atoms)
        for some in (bonds[short], bonds)
    )
    per_atom = (n_all.double() / 2, (n_short * (n_short - 1)).double(), (n_all > 0).double())
    found = torch.stack([torch.bincount(owner, weights=n, minlength=n_crystals) for n in per_atom])
    n_bonds, n_angles, n_bound = found.round().long().cpu().numpy()
    return n_bonds, n_angles, n_bound


def _gradients(model: Any, numbers: Tensor, owner: Tensor, bonds: Bonds) -> tuple[Tensor, Tensor, Tensor]:
    """Return energies (M,) in eV, forces (A, 3) in eV/angstrom and virials (M, 3, 3) in eV.

    One backward pass, by bond vectors: chgnet's own prediction goes to positions and strains, and keeps a
    graph of the gradients, as training on forces needs it.
    """
    vectors = bonds.vectors.detach().requires_grad_()
    graph = graph_of(model, numbers, owner, Bonds(bonds.first, bonds.second, vectors))
    counts = torch.bincount(owner)
    energies = model._compute(graph)["e"]
    if model.composition_model is not None:
        energies = energies + _composition_energies(model.composition_model, numbers, owner, counts)
    if model.is_intensive:
        energies = energies * counts
    (by_vector,) = torch.autograd.grad(energies.sum(), vectors)
    forces = vectors.new_zeros((len(numbers), 3)).index_add_(0, bonds.first, by_vector)
    forces.index_add_(0, bonds.second, -by_vector)
    by_strain = bonds.vectors[:, :, None] * by_vector[:, None, :]  # vector -> vector (1 + strain)
    virials = vectors.new_zeros((len(counts), 3, 3)).index_add_(0, owner[bonds.first], by_strain)
    return energies.detach().double(), forces, virials


def _composition_energies(model: Any, numbers: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """Return what chgnet adds by composition: (M,) eV/atom, or eV of a model that is not intensive."""
    n_elements = model.max_num_elements
    cells = torch.bincount(owner * n_elements + numbers - 1, minlength=len(counts) * n_elements)
    compositions = cells.reshape(-1, n_elements).to(next(model.parameters()).dtype)
    if model.is_intensive:
        compositions = compositions / counts[:, None]
    energies: Tensor = model._get_energy(compositions)
    return energies


def find_bonds(crystals: CrystalArrays, cutoff: float, device: torch.device) -> Bonds:
    """Return the pairs of atoms nearer than a cutoff, over all periodic images.

    Args:
        crystals: Cells with a volume.
        cutoff: Angstrom.
        device: Where it is done, and the tensors are.
    """
    counts, n_images = crystals.counts, images_needed(crystals.lattices, cutoff)
    ends = np.cumsum(counts)
    owner = np.repeat(np.arange(len(counts)), counts)
    n_partners = np.repeat(ends, counts) - np.arange(ends[-1])  # the atom itself and those after it
    n_candidates = n_partners * np.repeat((2 * n_images + 1).prod(axis=1), counts)
    on_device = (
        torch.as_tensor(a).to(device)
        for a in (crystals.lattices, crystals.fractional, n_images, owner, n_partners)
    )
    lattices, fractional, n_images_, owner_, n_partners_ = on_device
    found = []
    at_once = _AT_ONCE.get(device.type, _AT_ONCE["cuda"])
    for start, stop in _parts(n_candidates, at_once):
        crystals_here = slice(int(owner[start]), int(owner[stop - 1]) + 1)
        found.append(
            _bonds_of_atoms(
                start, lattices[crystals_here], fractional, n_images_[crystals_here],
                owner_[start:stop] - crystals_here.start, n_partners_[start:stop], cutoff,
            )
        )  # fmt: skip
    first, second, vectors = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Bonds(first, second, vectors)


def images_needed(lattices: FloatArray, cutoff: float) -> IntArray:
    """Return how many images on each side have atoms within a cutoff: (M, 3), of (M, 3, 3) lattices.

    Between fractional coordinates that differ by half a cell at most.
    """
    a, b, c = lattices[:, 0], lattices[:, 1], lattices[:, 2]
    faces = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=1)
    volumes = np.abs(np.linalg.det(lattices))
    heights = volumes[:, None] / np.linalg.norm(faces, axis=2)
    found: IntArray = np.floor(np.minimum(cutoff / heights + 0.5 + 1e-6, 1e9)).astype(np.int64)
    return found


def _parts(sizes: IntArray, most: int) -> Iterator[tuple[int, int]]:
    """Yield starts and stops of parts whose sizes add up to at most `most`, or of one."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = ends[start] - sizes[start]
        stop = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        yield start, stop
        start = stop


def _bonds_of_atoms(
    start: int, lattices: Tensor, fractional: Tensor, n_images: Tensor, owner: Tensor, n_partners: Tensor,
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the bonds of the atoms from `start` with themselves and those after them."""
    translations, n_translations = _translations(lattices, n_images)
    last = torch.cumsum(n_translations, 0)
    first, partner = _expanded(n_partners)  # (P,)
    crystal = owner[first]
    first += start
    second = first + partner
    apart_P3 = fractional[second] - fractional[first]
    apart_P3 -= apart_P3.round()
    vectors_P3 = (apart_P3[:, :, None] * lattices[crystal]).sum(dim=1)
    # of an atom and its own images, those after the middle one are the others reversed
    n = n_translations[crystal]
    skipped = torch.where(partner == 0, n // 2 + 1, 0)
    pair, image = _expanded(n - skipped)  # (C,)
    image += (last[crystal] - n + skipped)[pair]
    vectors_C3 = vectors_P3[pair] + translations[image]
    near = ((vectors_C3**2).sum(dim=1) < cutoff**2 + _TOLERANCE).nonzero().squeeze(1)
    pair = pair[near]  # (B,)
    return first[pair], second[pair], vectors_C3[near]


def _translations(lattices: Tensor, n_images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lattice vectors of all crystals, middle one zero, and how many each has."""
    sizes = 2 * n_images + 1
    n_translations = sizes.prod(dim=1)
    crystal, left = _expanded(n_translations)
    c = left % sizes[crystal, 2]
    left = left // sizes[crystal, 2]
    cells = torch.stack([left // sizes[crystal, 1], left % sizes[crystal, 1], c], dim=1) - n_images[crystal]
    return (cells[:, :, None] * lattices[crystal]).sum(dim=1), n_translations


def _expanded(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return each index as often as it counts, and the copies' numbers: [2, 1] -> [0, 0, 1], [0, 1, 0]."""
    index = torch.repeat_interleave(counts)
    starts = torch.cumsum(counts, 0) - counts
    return index, torch.arange(len(index), device=counts.device) - starts[index]


def graph_of(model: Any, numbers: Tensor, owner: Tensor, bonds: Bonds) -> BatchedGraph:
    """Return crystals as the graph that CHGNet takes; differentiable by the bonds' vectors.

    Args:
        model: CHGNet.
        numbers: (A,) int64.
        owner: (A,) int64, the crystal of each atom.
        bonds: Theirs.
    """
    lengths = torch.linalg.vector_norm(bonds.vectors, dim=1)
    bases, dtype = model.bond_basis_expansion, model.bond_embedding.weight.dtype
    angles, bond_graph = _angles(bonds, lengths, len(numbers), model.graph_converter.bond_graph_cutoff)
    undirected = torch.arange(len(lengths), device=lengths.device)
    both = (torch.cat([bonds.first, bonds.second]), torch.cat([bonds.second, bonds.first]))
    return BatchedGraph(
        atomic_numbers=numbers,
        bond_bases_ag=bases.rbf_expansion_ag(lengths.to(dtype)),
        bond_bases_bg=bases.rbf_expansion_bg(lengths.to(dtype)),
        angle_bases=model.angle_basis_expansion.fourier_expansion(angles.to(dtype)),
        batched_atom_graph=torch.stack(both, dim=1),
        batched_bond_graph=bond_graph,
        atom_owners=owner,
        directed2undirected=undirected.repeat(2),
        atom_positions=(),
        strains=(),
        volumes=(),
    )


def _angles(bonds: Bonds, lengths: Tensor, n_atoms: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """Return the angles (G,) between bonds shorter than a cutoff, and their (atom, bond, bond) (G, 3)."""
    short = (lengths < cutoff).nonzero().squeeze(1)  # (S,)
    centre, order = torch.sort(torch.cat([bonds.first[short], bonds.second[short]]))  # (D,)
    bond = short.repeat(2)[order]
    units_S3 = bonds.vectors[short] / lengths[short, None]
    units_D3 = torch.cat([units_S3, -units_S3]).index_select(0, order)
    n_same = torch.bincount(centre, minlength=n_atoms)
    first_same = (torch.cumsum(n_same, 0) - n_same)[centre]
    own = torch.arange(len(centre), device=centre.device) - first_same
    left, other = _expanded(n_same[centre] - 1)  # (G,)
    right = first_same[left] + other + (other >= own[left])
    cosines_G = (units_D3.index_select(0, left) * units_D3.index_select(0, right)).sum(dim=1)
    # chgnet's factor: the arc cosine has no derivative at 1
    angles = torch.acos(cosines_G * (1 - 1e-6))
    return angles, torch.stack([centre[left], bond[left], bond[right]], dim=1)
