"""The nouns that travel through the kit, with their units. Read this first.

    Crystal -> text -> token ids -> model -> Completion -> text -> Crystal -> Verdict, together a Sample

Units, said once: lengths in angstrom, angles in degrees, energies in eV (formation energy and hull distance
in eV/atom), pressures and moduli in GPa, density in g/cm3; fractional coordinates in [0, 1).

Not here: anything that reads, writes, or judges; these classes only carry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pymatgen.core import Molecule, Structure

PropertyValue = float | int | str | bool


@dataclass(frozen=True)
class Property:
    """One named property that a condition can ask for.

    Attributes:
        name: The name used everywhere in the kit; carries its unit.
        unit: For people.
        description: One line.
        aliases: Column names and words under which data and people bring it.
        low, high: The range that the kit's own prompts can write.
    """

    name: str
    unit: str
    description: str
    aliases: tuple[str, ...] = ()
    low: float = -99.99
    high: float = 499.99


PROPERTIES: dict[str, Property] = {
    p.name: p
    for p in (
        Property("formation_energy_ev_per_atom", "eV/atom", "formation energy relative to the elements",
                 ("formation_energy_per_atom", "formation_energy", "e_form"), -19.99, 19.99),
        Property("hull_distance_ev_per_atom", "eV/atom", "energy above the convex hull; 0 is stable",
                 ("hull_distance", "e_above_hull", "energy_above_hull", "ehull", "e_hull"), 0.0, 19.99),
        Property("band_gap_ev", "eV", "electronic band gap", ("band_gap", "bandgap", "gap"), 0.0, 19.99),
        Property("density_g_cm3", "g/cm3", "mass density", ("density",), 0.0, 49.99),
        Property("bulk_modulus_gpa", "GPa", "bulk modulus",
                 ("bulk_modulus", "bulk_modulus_vrh", "k_vrh"), 0.0, 499.99),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Crystal:
    """One structure with its name and what is known of it.

    Attributes:
        id: Where it came from: a database id, or file and entry.
        structure: A pymatgen Structure (periodic, angstrom) or Molecule (not periodic).
        properties: Named values in the units above; names are those of the source where the kit knows no
            alias.
    """

    id: str
    structure: Structure | Molecule
    properties: Mapping[str, PropertyValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Range:
    """What is wanted of one property: a value (low == high), or an interval, open where a side is None."""

    low: float | None
    high: float | None

    @classmethod
    def exactly(cls, value: float) -> "Range":
        """Return the range that holds one value."""
        return cls(value, value)


@dataclass(frozen=True)
class Conditions:
    """What is asked of a crystal. Any subset; nothing set means "anything".

    Attributes:
        formula: Element -> count, in the order given. Counts are per formula unit unless `n_sites` is their
            sum.
        elements: Elements that must occur.
        only_elements: True: nothing but `elements` may occur (a chemical system).
        n_elements: How many different elements (2: a binary).
        anonymous_formula: Stoichiometry without names, "ABC3", as pymatgen's `anonymized_formula`.
        spacegroup_number: 1-230 (International Tables).
        crystal_system: triclinic, monoclinic, orthorhombic, tetragonal, trigonal, hexagonal or cubic.
        n_sites: Atoms in the primitive cell.
        properties: Kit property name -> Range.
    """

    formula: Mapping[str, int] | None = None
    elements: tuple[str, ...] = ()
    only_elements: bool = False
    n_elements: int | None = None
    anonymous_formula: str | None = None
    spacegroup_number: int | None = None
    crystal_system: str | None = None
    n_sites: int | None = None
    properties: Mapping[str, Range] = field(default_factory=dict)


StopReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Completion:
    """What an engine returned for one prompt.

    Attributes:
        prompt: The prompt's text.
        text: The completion alone, without the prompt.
        token_ids: Ids of the completion, the end token included where one was produced.
        stop_reason: "stop" (the model ended), "length" (cut), "error".
        log_probability: Natural-log probability of the completion, summed over tokens, under the distribution
            that the tokens were drawn from before temperature, top-p and top-k; NaN where the engine gives
            none.
        seed: Seed of the request that it belongs to.
        index: Position among the completions of that request.
        detail: For a person, of a stop reason "error": why.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason
    log_probability: float
    seed: int
    index: int
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one sample: valid, or exactly one reason why not.

    Attributes:
        valid: True if every check of the protocol passed.
        reason: None if valid, else one of: truncated, parse:<reason>, formula_mismatch, spacegroup_mismatch,
            overlap, cell, density, charge, bonds, duplicate, known, error.
        detail: For a person: where, got, expected.
        checks: Check name -> passed, in the order in which they ran; a check after the first failure that was
            not run is absent.
    """

    valid: bool
    reason: str | None = None
    detail: str = ""
    checks: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One request's outcome, failures included.

    Attributes:
        id: Unique in its run.
        text: The crystal's text, prompt and completion joined, as it is parsed.
        structure: None where parsing failed.
        verdict: Why it counts, or not.
        conditions: What was asked.
        log_probability: Of the completion; see Completion.
        seed: Seed of the run.
        model: Name or path of the model.
        measures: Named numbers measured on the structure: volume_per_atom_angstrom3,
            nearest_distance_angstrom, density_g_cm3, spacegroup_number.
    """

    id: str
    text: str
    structure: Structure | Molecule | None
    verdict: Verdict
    conditions: Conditions
    log_probability: float
    seed: int
    model: str
    measures: Mapping[str, float | int | str] = field(default_factory=dict)
