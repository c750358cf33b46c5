"""CHGNet's message passing with a third of the arithmetic: first multiplied, then gathered.

    model = CHGNet.load(...)
    multiply_first(model)       its layers are replaced in place; energies are the same but for rounding

A layer of chgnet (Deng et al. 2023, doi:10.1038/s42256-023-00716-3) joins what it knows of an edge, say
[atom i, bond ij, atom j], and multiplies each joined row by a matrix. There are some fifty edges an atom, so
the same atom is multiplied fifty times. A matrix times joined columns is the sum of its parts times each:

    W [a_i, b_ij, a_j] = (W_1 a)_i + (W_2 b)_ij + (W_3 a)_j

so that each atom and each bond is multiplied once, and the products are gathered and added.

Only for computing with weights that stay: dropout is left out, and the matrices are those of the moment.
Legend: R rows of a kind (atoms, bonds, angles), E edges or angles, H columns of core and gate together.
Not here: graphs and gradients (chgnet_batches.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from chgnet.model.functions import GatedMLP, aggregate
from chgnet.model.layers import AngleUpdate, AtomConv, BondConv
from torch import Tensor, nn


def multiply_first(model: Any) -> None:
    """Replace the layers of a CHGNet in place. A layer of another kind than chgnet 0.4's stays."""
    kinds = {AtomConv: _AtomConv, BondConv: _BondConv, AngleUpdate: _AngleUpdate}
    for layers in (model.atom_conv_layers, model.bond_conv_layers, model.angle_layers):
        for i, layer in enumerate(layers):
            if type(layer) in kinds:
                layers[i] = kinds[type(layer)](layer)


class _Gated(nn.Module):
    """A GatedMLP of joined columns, from the columns."""

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        core, gate = (
            [layer for layer in half.layers if not isinstance(layer, nn.Dropout)]
            for half in (mlp.mlp_core, mlp.mlp_gate)
        )
        self.matrix = torch.cat([core[0].weight, gate[0].weight]).T.detach().contiguous()  # (columns, H)
        self.bias = torch.cat([core[0].bias, gate[0].bias]).detach()
        self.core, self.gate = nn.Sequential(*core[1:]), nn.Sequential(*gate[1:])
        self.mlp = mlp

    def forward(self, columns: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return (E, outputs) of parts in their order: (R, width) rows, and which (E,) row an edge has.

        None in the place of the latter: the rows are the edges'.
        """
        found_EH, start = self.bias, 0
        for rows, which_E in columns:
            product_RH = rows @ self.matrix[start : start + rows.shape[1]]
            found_EH = found_EH + (product_RH if which_E is None else product_RH.index_select(0, which_E))
            start += rows.shape[1]
        core, gate = found_EH.chunk(2, 1)
        core, gate = self.core(core), self.gate(gate)
        if self.mlp.norm is not None:
            core, gate = self.mlp.bn1(core), self.mlp.bn2(gate)
        result: Tensor = self.mlp.activation(core) * self.mlp.sigmoid(gate)
        return result


class _AtomConv(nn.Module):
    """AtomConv: what atoms hear along their bonds."""

    def __init__(self, layer: AtomConv) -> None:
        super().__init__()
        self.layer, self.gated = layer, _Gated(layer.twoBody_atom)

    def forward(
        self, atom_feas: Tensor, bond_feas: Tensor, bond_weights: Tensor, atom_graph: Tensor,
        directed2undirected: Tensor,
    ) -> Tensor:  # fmt: skip
        """As AtomConv.forward."""
        centre, neighbour = atom_graph[:, 0], atom_graph[:, 1]
        messages = self.gated([(atom_feas, centre), (bond_feas, directed2undirected), (atom_feas, neighbour)])
        messages = messages * bond_weights.index_select(0, directed2undirected)
        return _updated(self.layer, self.layer.atom_norm, messages, centre, atom_feas)


class _BondConv(nn.Module):
    """BondConv: what bonds hear along their angles."""

    def __init__(self, layer: BondConv) -> None:
        super().__init__()
        self.layer, self.gated = layer, _Gated(layer.twoBody_bond)

    def forward(
        self, atom_feas: Tensor, bond_feas: Tensor, bond_weights: Tensor, angle_feas: Tensor,
        bond_graph: Tensor,
    ) -> Tensor:  # fmt: skip
        """As BondConv.forward."""
        _, first, second = bond_graph.unbind(1)
        messages = self.gated(_of_angles(atom_feas, bond_feas, angle_feas, bond_graph))
        messages = messages * bond_weights.index_select(0, first) * bond_weights.index_select(0, second)
        return _updated(self.layer, self.layer.bond_norm, messages, first, bond_feas)


class _AngleUpdate(nn.Module):
    """AngleUpdate: what angles hear of their bonds and of the atom between them."""

    def __init__(self, layer: AngleUpdate) -> None:
        super().__init__()
        self.layer, self.gated = layer, _Gated(layer.twoBody_bond)

    def forward(self, atom_feas: Tensor, bond_feas: Tensor, angle_feas: Tensor, bond_graph: Tensor) -> Tensor:
        """As AngleUpdate.forward."""
        found = self.gated(_of_angles(atom_feas, bond_feas, angle_feas, bond_graph))
        if self.layer.resnet:
            found = found + angle_feas
        return _normalised(self.layer.angle_norm, found)


def _of_angles(
    atom_feas: Tensor, bond_feas: Tensor, angle_feas: Tensor, bond_graph: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    """Return what chgnet joins for an angle: its two bonds, itself, the atom between them."""
    centre, first, second = bond_graph.unbind(1)
    return [(bond_feas, first), (bond_feas, second), (angle_feas, None), (atom_feas, centre)]


def _updated(layer: Any, norm: Any, messages: Tensor, owner: Tensor, features: Tensor) -> Tensor:
    """Return the features with their messages."""
    heard = aggregate(messages, owner, average=False, num_owner=len(features))
    if layer.use_mlp_out:
        heard = layer.mlp_out(heard)
    return _normalised(norm, heard + features if layer.resnet else heard)


def _normalised(norm: Any, features: Tensor) -> Tensor:
    result: Tensor = features if norm is None else norm(features)
    return result
