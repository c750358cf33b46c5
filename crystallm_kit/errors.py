"""Every exception that crystallm_kit raises on purpose.

    CrystallmKitError
    ├── UserError                  the request or the input is wrong; the message says where and what to do
    │   ├── UnknownName            a format, property, element, engine, protocol ... that is in no table
    │   ├── ReadError              a file or one entry of it cannot be read
    │   │   └── DisorderedStructure    partial occupancies, which the text formats cannot carry
    │   ├── ParseError             a text is not a crystal in the format it is read as (line, reason)
    │   ├── EncodeError            a crystal cannot be written in this format
    │   ├── RecipeError            a recipe file: unknown key, wrong type, missing value
    │   ├── ImpossibleRequest      conditions that no crystal can meet
    │   ├── ModelError             a model folder: missing, truncated, of another template
    │   ├── TrainingError          a run cannot go on: NaN loss, full disk, too little memory
    │   └── EmptyInput             nothing to work on: 0/0 is not a score
    └── MissingExtra               an optional dependency is not installed; the message holds the command

A caller's mistake raises one of these. A model's mistake is data: a `records.Verdict`, never an exception.
"""

import difflib
from collections.abc import Iterable


class CrystallmKitError(Exception):
    """Base of every error below."""


class UserError(CrystallmKitError):
    """The request or the input is wrong. The command prints the message without a traceback and exits 2."""


class UnknownName(UserError):
    """A name that is in no table, with the nearest known one."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> "UnknownName":
        """Return the error for `name`, naming the nearest of `known` and all of them.

        Example: "no representation 'ciff'; did you mean 'cif'? Known: cif, compact, wyckoff, xyz."
        """
        return cls(f"no {kind} '{name}'{did_you_mean(name, known)} Known: {', '.join(sorted(known))}.")


class ReadError(UserError):
    """A file, or one entry of it, cannot be read."""


class DisorderedStructure(ReadError):
    """A structure with partial or mixed occupancies."""


class ParseError(UserError):
    """A text is not a crystal in the format it is read as.

    Attributes:
        reason: One word for tables, for example "too_few_coordinates".
        line: 1-based line of the text, 0 where the whole text is meant.
    """

    def __init__(self, reason: str, detail: str, line: int = 0) -> None:
        self.reason = reason
        self.line = line
        self.detail = detail
        super().__init__(f"line {line}: {detail}" if line else detail)


class EncodeError(UserError):
    """A crystal cannot be written in the format asked for."""


class RecipeError(UserError):
    """A recipe file has an unknown key, a wrong type or a missing value."""


class ImpossibleRequest(UserError):
    """Conditions that no crystal can meet."""


class ModelError(UserError):
    """A model folder is missing, truncated, or belongs to another template or format."""


class TrainingError(UserError):
    """A training run cannot go on; the message says what to change, and the last good checkpoint stays."""


class EmptyInput(UserError):
    """Nothing to work on."""


class MissingExtra(CrystallmKitError):
    """An optional dependency is not installed."""

    @classmethod
    def of(cls, what: str, package: str, extra: str) -> "MissingExtra":
        """Return the error for `what`, which needs `package` of the optional dependency group `extra`."""
        return cls(
            f"{what} needs {package}, which is not installed. Run: pip install 'crystallm-kit[{extra}]'"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or "." when none is near."""
    # 0.4: 'lr_rate' and 'lr' are 0.44 alike
    near = difflib.get_close_matches(name.lower(), {k.lower(): k for k in known}, n=1, cutoff=0.4)
    if not near:
        return "."
    return f"; did you mean '{next(k for k in known if k.lower() == near[0])}'?"
