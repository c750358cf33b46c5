r"""The templates cif-crystallm and cif-crystallm-pi, for the `cif` format: the first lines of the text.

    data_Na4Cl4\nloop_\n ... _symmetry_space_group_name_H-M Fm-3m\n

Sources: CrystaLLM (Antunes et al. 2024, doi:10.1038/s41467-024-54639-7), CrystaLLM-pi
(https://github.com/C-Bone-UCL/CrystaLLM-pi).
Not here: other templates, and their table (prompts.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crystallm_kit.errors import ImpossibleRequest, ParseError
from crystallm_kit.records import Conditions
from crystallm_kit.structures.spacegroups import spacegroup_number, spacegroup_symbol
from crystallm_kit.structures.symmetry import space_group
from crystallm_kit.text.conditions import check_conditions, conditions_set, parse_formula, reduced_formula
from crystallm_kit.text.template import refuse_unsayable, sha256_of


@dataclass(frozen=True)
class CifCrystallmTemplate:
    r"""The prompts of CrystaLLM v1, which are the first lines of its CIF.

        data_                                         any crystal
        data_Na4Cl4\n                                 a composition
        data_Na4Cl4\nloop_\n ... _symmetry_space_group_name_H-M Fm-3m\n       a composition and a space group

    The formula names the content of the conventional cell. With `spacegroup_number` and `n_sites` set it is
    worked out from them (atoms in the primitive cell times the lattice points of the conventional one); else
    the counts are taken as they are given.
    """

    name: str = "cif-crystallm"
    begins_the_text: bool = True
    tasks: frozenset[str] = frozenset(("generate",))

    heads = (
        "_atom_type_symbol",
        "_atom_type_electronegativity",
        "_atom_type_radius",
        "_atom_type_ionic_radius",
    )
    spacegroup_key = "_symmetry_space_group_name_H-M"

    @cached_property
    def hash(self) -> str:
        """Return the sha256 of the lines and of the frozen property table that they hold."""
        from crystallm_kit.text.cif import atom_properties

        return sha256_of(self.name, self.heads, self.spacegroup_key, atom_properties())

    @property
    def says(self) -> frozenset[str]:
        """Return formula and space group; the number of sites serves to work out the cell's content."""
        return frozenset(("formula", "spacegroup_number", "n_sites"))

    def render(
        self,
        conditions: Conditions,
        rng: np.random.Generator | None = None,  # noqa: ARG002 - nothing is left open
        *,
        quantiles: Mapping[str, Sequence[float]] | None = None,  # noqa: ARG002
    ) -> str:
        """Return the prompt; see Template. Raises EncodeError for what CrystaLLM has no token for."""
        from crystallm_kit.text import cif

        check_conditions(conditions)
        refuse_unsayable(self, conditions)
        if not conditions.formula:
            if conditions_set(conditions):
                raise ImpossibleRequest(
                    f"template '{self.name}': a space group or number of sites needs a formula."
                )
            return "data_"
        content = _conventional_content(conditions)
        elements = cif.by_electronegativity(content)
        cif.check_elements(elements)
        lines = ["data_" + "".join(f"{element}{content[element]}" for element in elements)]
        if conditions.spacegroup_number is not None:
            symbol = spacegroup_symbol(conditions.spacegroup_number)
            cif.check_spacegroup(symbol)
            lines += ["loop_", *self.heads]
            lines += [" ".join((element, *cif.atom_properties()[element])) for element in elements]
            lines.append(f"{self.spacegroup_key} {symbol}")
        return "\n".join(lines) + "\n"

    def parse(self, prompt: str) -> Conditions:
        """Return formula (content of the conventional cell) and space group of a prompt."""
        if prompt == "data_":
            return Conditions()
        lines = prompt.split("\n")
        if not re.fullmatch(r"data_(?:[A-Z][a-z]?\d+)+", lines[0]) or lines[-1] != "":
            raise ParseError("prompt", f"'{lines[0]}': no prompt of template '{self.name}'", 1)
        formula = parse_formula(lines[0].removeprefix("data_"))
        if len(lines) == 2:
            return Conditions(formula=formula)
        key, _, symbol = lines[-2].partition(" ")
        if key != self.spacegroup_key:
            raise ParseError("prompt", f"'{lines[-2]}': {self.spacegroup_key} expected", len(lines) - 1)
        return Conditions(formula=formula, spacegroup_number=spacegroup_number(symbol))


@dataclass(frozen=True)
class CifCrystallmPiTemplate(CifCrystallmTemplate):
    r"""The prompts of CrystaLLM-pi: those of CrystaLLM v1 in its dialect, see text/cif_pi.py.

    <bos>\ndata_[                 any crystal; its "level 1"
    <bos>\ndata_[Na4Cl4]\n        a composition; "level 2"
    <bos>\ndata_[Na4Cl4]\nloop_\n ... _symmetry_space_group_name_H-M [Fm-3m]\n       "level 4"
    """

    name: str = "cif-crystallm-pi"

    def render(
        self,
        conditions: Conditions,
        rng: np.random.Generator | None = None,
        *,
        quantiles: Mapping[str, Sequence[float]] | None = None,
    ) -> str:
        """Return the prompt; see CifCrystallmTemplate."""
        from crystallm_kit.text.cif_pi import BEGIN, bracketed

        plain = super().render(conditions, rng, quantiles=quantiles)
        if plain == "data_":
            return f"{BEGIN}\ndata_["
        return "\n".join((BEGIN, *bracketed(plain.rstrip("\n").split("\n")), ""))

    def parse(self, prompt: str) -> Conditions:
        """Return formula (content of the conventional cell) and space group of a prompt."""
        from crystallm_kit.text.cif_pi import BEGIN, without_brackets

        if prompt == f"{BEGIN}\ndata_[":
            return Conditions()
        if not (prompt.startswith(f"{BEGIN}\n") and prompt.endswith("\n")):
            raise ParseError("prompt", f"'{prompt}': no prompt of template '{self.name}'")
        return super().parse(without_brackets(prompt)[0].rstrip("\n") + "\n")


def _conventional_content(conditions: Conditions) -> dict[str, int]:
    formula = dict(conditions.formula or {})
    if conditions.n_sites is None or conditions.spacegroup_number is None:
        return formula
    reduced = reduced_formula(formula)
    times = (
        conditions.n_sites // sum(reduced.values()) * space_group(conditions.spacegroup_number).n_centering
    )
    return {element: n * times for element, n in reduced.items()}
