"""Any torch-sim model as a potential, many crystals in one call.

    load_potential("my_models:mace")    where my_models.py has    def mace(): return MaceModel(...)

A torch-sim model (Cohen et al. 2025; torch-sim-atomistic on PyPI) takes a state of many systems at once, and
gives energies in eV, forces in eV/angstrom and stresses in eV/angstrom^3, positive under tension as in ASE.
It knows its own device and precision.

Not here: relaxing (relaxation.py), whose optimiser moves the crystals of every potential.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Structure

from crystallm_kit.errors import ImpossibleRequest, MissingExtra
from crystallm_kit.structures.relaxation import Evaluation, batches_of


class TorchSimPotential:
    """A torch-sim model."""

    def __init__(self, model: Any, *, name: str, batch_atoms: int | None = None) -> None:
        """Take a model. Raises ImpossibleRequest if it gives no stress, MissingExtra without torch-sim."""
        if not (model.compute_stress and getattr(model, "compute_forces", True)):
            raise ImpossibleRequest(
                f"potential '{name}': gives no forces or no stress; ask the model for both"
            )
        try:
            from torch_sim import initialize_state  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise MissingExtra(
                f"potential '{name}' needs torch-sim. Run: pip install torch-sim-atomistic"
            ) from error
        self.name = name
        self.model = model
        self.batch_atoms = batch_atoms or (48 if str(model.device) == "cpu" else 4096)
        self._state_of = initialize_state

    def __call__(self, structures: Sequence[Structure]) -> list[Evaluation | str]:
        """Return one entry a crystal: its evaluation, or why there is none."""
        found: list[Evaluation | str] = [""] * len(structures)
        for batch in batches_of(range(len(structures)), [len(s) for s in structures], self.batch_atoms):
            for i, one in zip(batch, self._evaluate([structures[i] for i in batch]), strict=True):
                found[i] = one
        return found

    def _evaluate(self, structures: Sequence[Structure]) -> list[Evaluation | str]:
        try:
            state = self._state_of(list(structures), self.model.device, self.model.dtype)
            output = self.model(state)
        except Exception as error:  # noqa: BLE001 - models raise what they like, and one crystal is no reason
            if len(structures) > 1:  # the others are evaluated without it
                return [one for structure in structures for one in self._evaluate([structure])]
            return [f"error: {type(error).__name__}: {error}"]
        ends = np.cumsum([len(s) for s in structures])[:-1]
        forces = np.split(_array(output["forces"]), ends)
        stresses, energies = _array(output["stress"]), _array(output["energy"])
        return [Evaluation(float(e), f, s) for e, f, s in zip(energies, forces, stresses, strict=True)]


def _array(tensor: Any) -> NDArray[np.float64]:
    return np.asarray(tensor.detach().double().cpu().numpy())
