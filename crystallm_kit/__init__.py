"""Generate inorganic crystals with language models: data -> text -> model -> validated structures.

    import crystallm_kit as ck

    for sample in ck.generate("four candidates for a cubic perovskite of barium, titanium and oxygen", n=4):
        print(sample.verdict.reason or "valid", sample.structure)

The names below are what a notebook needs. Each is loaded when it is first used, so that importing the package
is quick and loads neither torch nor pymatgen. The nouns are in records.py, the errors in errors.py.

Not here: anything that these names do; each lives where the data is (README.md has the tree).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymatgen.core import Molecule, Structure

    from crystallm_kit.generation import generate, load_model
    from crystallm_kit.records import Conditions, Crystal, Sample, Verdict
    from crystallm_kit.scores.validity import validate
    from crystallm_kit.scoring.run import score
    from crystallm_kit.structures.augmentation import AugmentationRecipe, augment
    from crystallm_kit.structures.files import read, write
    from crystallm_kit.text.words import understand

# Public name -> module that holds it; `encode` and `decode` are below.
_HOMES = {
    "AugmentationRecipe": "structures.augmentation",
    "Conditions": "records",
    "Crystal": "records",
    "Sample": "records",
    "Verdict": "records",
    "augment": "structures.augmentation",
    "generate": "generation",
    "load_model": "generation",
    "read": "structures.files",
    "score": "scoring.run",
    "understand": "text.words",
    "validate": "scores.validity",
    "write": "structures.files",
}

__all__ = [
    "AugmentationRecipe",
    "Conditions",
    "Crystal",
    "Sample",
    "Verdict",
    "augment",
    "decode",
    "encode",
    "generate",
    "load_model",
    "read",
    "score",
    "understand",
    "validate",
    "write",
]


def encode(crystal: "Crystal | Structure | Molecule", format: str = "wyckoff", **settings: Any) -> str:
    """Return the text of a crystal.

    Args:
        crystal: A Crystal, or a pymatgen Structure or Molecule.
        format: A name in text.representation.REPRESENTATIONS: cif, compact, wyckoff, xyz.
        settings: The format's own, such as `decimals`.

    Raises:
        UnknownName: If no format has that name.
        EncodeError: If the format cannot carry the crystal.
    """
    from crystallm_kit.records import Crystal
    from crystallm_kit.text.representation import representation

    whole = crystal if isinstance(crystal, Crystal) else Crystal("", crystal)
    return representation(format, **settings).encode(whole)


def decode(text: str, format: str = "wyckoff", **settings: Any) -> "Crystal":
    """Return the crystal that a text describes.

    Args:
        text: As `encode` writes it.
        format, settings: As in `encode`.

    Raises:
        UnknownName: If no format has that name.
        ParseError: If the text is no crystal of that format; names the line and the reason.
    """
    from crystallm_kit.text.representation import representation

    return representation(format, **settings).decode(text)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'crystallm_kit' has no attribute '{name}'")
    found = getattr(importlib.import_module(f"crystallm_kit.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
