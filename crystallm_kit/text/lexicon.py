"""The words that words.py knows: elements, kinds of compounds, numbers, hints for what has no meaning here.

    ELEMENT_NAMES["sulphur"] == "S"
    COMPOUND_CLASSES["phosphate"] == ("P", "O")
    COUNT_WORDS["dozen"] == 12

Not here: structure types (structures/prototypes.py), space groups (structures/spacegroups.py), properties
(records.PROPERTIES).
"""

from pymatgen.core import Element

from crystallm_kit.structures.elements import ELEMENTS

ELEMENT_NAMES: dict[str, str] = {Element(symbol).long_name.lower(): symbol for symbol in ELEMENTS} | {
    "aluminium": "Al",
    "caesium": "Cs",
    "sulphur": "S",
    "wolfram": "W",
}
# Symbols that are also words; taken as elements only beside other elements or where an element must follow.
SYMBOLS_THAT_ARE_WORDS = frozenset({"In", "As", "At", "I", "No", "He", "Be", "Am"})

_ANIONS = {
    "oxide": "O", "nitride": "N", "fluoride": "F", "chloride": "Cl", "bromide": "Br", "iodide": "I",
    "sulfide": "S", "sulphide": "S", "selenide": "Se", "telluride": "Te", "carbide": "C", "hydride": "H",
    "phosphide": "P", "arsenide": "As", "antimonide": "Sb", "bismuthide": "Bi", "silicide": "Si",
    "germanide": "Ge", "boride": "B", "aluminide": "Al", "stannide": "Sn", "polonide": "Po",
    "astatide": "At",
}  # fmt: skip
_OXYANIONS = {
    "phosphate": "P", "sulfate": "S", "sulphate": "S", "carbonate": "C", "nitrate": "N", "silicate": "Si",
    "borate": "B", "titanate": "Ti", "zirconate": "Zr", "hafnate": "Hf", "vanadate": "V", "niobate": "Nb",
    "tantalate": "Ta", "chromate": "Cr", "chromite": "Cr", "molybdate": "Mo", "tungstate": "W",
    "manganate": "Mn", "manganite": "Mn", "ferrite": "Fe", "cobaltate": "Co", "cobaltite": "Co",
    "nickelate": "Ni", "cuprate": "Cu", "aluminate": "Al", "gallate": "Ga", "germanate": "Ge",
    "stannate": "Sn", "arsenate": "As", "antimonate": "Sb", "selenate": "Se", "tellurate": "Te",
    "iodate": "I", "hydroxide": "H", "bismuthate": "Bi", "iridate": "Ir", "ruthenate": "Ru",
}  # fmt: skip
# Word -> elements that a compound of that kind contains.
COMPOUND_CLASSES: dict[str, tuple[str, ...]] = {
    **{word: (symbol,) for word, symbol in _ANIONS.items()},
    **{word: (symbol, "O") for word, symbol in _OXYANIONS.items()},
    **{f"oxy{word}": ("O", symbol) for word, symbol in _ANIONS.items() if word != "oxide"},
    "peroxide": ("O",),
}
# Only these prefixes fix a formula beside one element: "pentoxide" is V2O5, "trioxide" may be WO3 or Sb2O3.
EXACT_PREFIXES = {"mono": 1, "di": 2}
OTHER_PREFIXES = ("sesqui", "tri", "tetra", "penta", "pent", "hexa", "hepta", "octa", "sub")

_NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
COUNT_WORDS: dict[str, int] = {word: n for n, word in enumerate(_NUMBERS, start=1)} | {
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
}
ELEMENT_COUNT_WORDS: dict[str, int] = {
    "unary": 1, "elemental": 1, "monoelemental": 1, "binary": 2, "binaries": 2, "ternary": 3, "ternaries": 3,
    "quaternary": 4, "quaternaries": 4, "quinary": 5, "quinaries": 5, "senary": 6,
}  # fmt: skip

_GROUP = "name its elements instead, for example 'containing lithium'"
# Hint -> words and phrases that it answers.
_HINTS = {
    _GROUP: (
        "halide", "halides", "chalcogenide", "chalcogenides", "pnictide", "pnictides", "intermetallic",
        "intermetallics", "alloy", "alloys", "transition metal", "transition metals", "alkali",
        "alkaline earth", "rare earth", "rare earths", "lanthanide", "lanthanides", "actinide", "actinides",
        "noble gas", "noble metal", "halogen", "metal", "metals",
    ),
    "give a band gap, for example 'band gap between 0.5 and 3 eV'": (
        "semiconductor", "semiconductors", "semiconducting", "insulator", "insulators", "insulating",
        "wide-gap", "narrow-gap", "transparent",
    ),
    "give a bulk modulus, for example 'bulk modulus above 300 GPa'": (
        "hard", "superhard", "stiff", "incompressible", "soft",
    ),
    "give a density, for example 'density below 3 g/cm3'": ("light", "lightweight", "heavy", "dense"),
    "give a hull distance, for example 'hull distance above 0.1 eV/atom'": ("unstable", "stability"),
    "give the space group, for example 'in Fm-3m'": (
        "fcc", "bcc", "hcp", "face-centered", "body-centered", "face-centred", "body-centred", "close-packed",
    ),
    "what is new is told after generation, from a reference": (
        "novel", "new", "unknown", "undiscovered", "unreported",
    ),
    "nothing in the data says so": (
        "cheap", "abundant", "synthesizable", "synthesisable", "toxic", "superconducting", "superconductor",
        "superconductors",
    ),
}  # fmt: skip
# Word or phrase -> why it has no meaning here, or what to say instead.
HINTS: dict[str, str] = {word: hint for hint, words in _HINTS.items() for word in words}

# Words that carry no condition in any sentence.
FILLERS = frozenset(
    (
        "a", "all", "also", "an", "and", "any", "anything", "are", "as", "at", "be", "build", "by", "can",
        "candidate", "candidates", "cell", "cells", "chemical", "chemistry", "composition", "compositions",
        "compound", "compounds", "contain", "containing", "contains", "could", "create", "crystal",
        "crystalline", "crystals", "design", "different", "distinct", "each", "element", "elements",
        "example", "examples", "find", "for", "formula", "formulae", "formulas", "framework", "from",
        "generate", "give", "group", "had", "has", "have", "having", "i", "i'd", "in", "include",
        "includes", "including", "inorganic", "is", "it", "its", "kind", "kinds", "lattice", "let", "let's",
        "like", "looking", "made", "make", "material", "materials", "me", "must", "need", "of", "on",
        "phase", "phases", "please", "polymorph", "polymorphs", "possible", "predict", "produce", "propose",
        "prototype", "sample", "samples", "should", "show", "solid", "solids", "some", "something", "sort",
        "structure", "structures", "such", "suggest", "symmetry", "system", "that", "the", "their", "there",
        "thing", "to", "type", "types", "unit", "us", "various", "want", "we", "where", "which", "who",
        "whose", "with", "would", "you",
    )
)  # fmt: skip
CANDIDATE_NOUNS = (
    r"candidates?|structures?|crystals?|materials?|compounds?|samples?|polymorphs?|examples?|phases?|variants?|"
    r"versions?"
)
