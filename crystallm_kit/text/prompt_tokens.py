r"""The tokens that the kit's own prompts add to the `wyckoff` alphabet; prompts.py puts them together.

    elements=BaTiO n_elements=3 anonymous=1 1 3 sites=5 system=cubic band_gap=1.80 spacegroup=221\ncrystal\n

Element symbols, counts "3 ", space groups "221\n", integer parts "1." and hundredths "80 " are the format's
own tokens. The formation energy has a second keyword, with a minus sign, so that the sign needs no token.

Not here: what the conditions mean (records.Conditions).
"""

from crystallm_kit.records import PROPERTIES

ELEMENTS_END = " "
PROMPT_END = "crystal\n"
CRYSTAL_SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")
# Kit property name -> its word in a prompt; the order is that of the prompt.
PROPERTY_WORDS: dict[str, str] = {
    "formation_energy_ev_per_atom": "formation_energy",
    "hull_distance_ev_per_atom": "hull_distance",
    "band_gap_ev": "band_gap",
    "density_g_cm3": "density",
    "bulk_modulus_gpa": "bulk_modulus",
}

KIT_TEMPLATE_TOKENS: tuple[str, ...] = (
    ELEMENTS_END,
    "elements=",
    "contains=",
    "n_elements=",
    "anonymous=",
    "sites=",
    *(f"system={system} " for system in CRYSTAL_SYSTEMS),
    *(
        f"{word}={sign}"
        for name, word in PROPERTY_WORDS.items()
        for sign in (("", "-") if PROPERTIES[name].low < 0 else ("",))
    ),
    "spacegroup=",
    PROMPT_END,
)
