"""What a text format is, and the table of formats.

A representation turns a crystal into text and back, and says which tokens its texts are made of and which
texts are well formed. Adding a format is one module beside this one and one line in `REPRESENTATIONS`.

Contract, tested for every entry of the table:
    decode(encode(crystal)) is the crystal, within the loss that the format's docstring states
    encode is deterministic: augmentation happens before it (structures/augmentation.py)
    decode raises ParseError, naming line and reason, for anything that is not a crystal
    the tokens of `alphabet` cover every text that encode can produce

Not here: token ids (tokens/tokenizer.py), prompts (prompts.py), tolerance to raw model output (parsing.py).
"""

import importlib
import re
from dataclasses import dataclass
from typing import Any, Protocol

from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.records import Crystal

REPRESENTATIONS: dict[str, str] = {
    "cif": "crystallm_kit.text.cif:CifRepresentation",
    "compact": "crystallm_kit.text.compact:CompactRepresentation",
    "xyz": "crystallm_kit.text.xyz:XyzRepresentation",
    "wyckoff": "crystallm_kit.text.wyckoff:WyckoffRepresentation",
}


@dataclass(frozen=True)
class Alphabet:
    """The tokens of a format, in id order, and how a text is cut into them.

    Attributes:
        tokens: Token strings; position = id. Joined, the tokens of a text give the text.
        pattern: Regular expression (Rust syntax) whose matches are the tokens; None: the longest token first.
        rewrites: (pattern, replacement) applied to the text before cutting, in order.
        decoder_rewrites: (literal, replacement) applied to the joined text when decoding.
        unknown: Token that stands for anything else, or None where every text can be cut.
        end: Token after which a crystal is complete, or None where a stop string is needed (`stop`).
        pad: Padding token, or None.
        stop: Text that ends a sample, for engines that stop on strings; "" if `end` does it.
    """

    tokens: tuple[str, ...]
    pattern: str | None = None
    rewrites: tuple[tuple[str, str], ...] = ()
    decoder_rewrites: tuple[tuple[str, str], ...] = ()
    unknown: str | None = None
    end: str | None = None
    pad: str | None = None
    stop: str = ""


@dataclass(frozen=True)
class Grammar:
    """A format's well-formed texts, as text that other engines take.

    Attributes:
        lark: Lark grammar with start rule `start` (guidance, llguidance).
        gbnf: GBNF grammar with root rule `root` (llama.cpp, xgrammar).
        regex: One regular expression where the format is regular enough, else None (outlines, vLLM `regex`).
    """

    lark: str
    gbnf: str
    regex: str | None = None


def cutting_pattern(alphabet: Alphabet) -> str:
    """Return the regular expression whose matches are the tokens of a text: the one rule of cutting."""
    if alphabet.pattern is not None:
        return alphabet.pattern
    longest_first = sorted(alphabet.tokens, key=lambda token: -len(token))
    return "|".join(escape(token) for token in longest_first)


def cut(text: str, alphabet: Alphabet) -> list[str]:
    """Return the token strings of a text, as its tokenizer cuts it; what no token covers is left out."""
    for pattern, replacement in alphabet.rewrites:
        text = re.sub(pattern, lambda _, by=replacement: by, text)  # type: ignore[misc]
    return [match.group() for match in re.finditer(cutting_pattern(alphabet), text)]


def escape(text: str) -> str:
    """Return a text as a regular expression that matches it, in every engine's syntax."""
    # re.escape also escapes blanks and newlines, which other regex engines read differently or not at all.
    return re.sub(r"([.^$*+?{}\[\]\\|()\-])", r"\\\1", text)


class Representation(Protocol):
    """One text format with its settings."""

    name: str

    def encode(self, crystal: Crystal) -> str:
        """Return the text of a crystal. Raises EncodeError where the format cannot carry it."""

    def decode(self, text: str) -> Crystal:
        """Return the crystal that a text describes. Raises ParseError."""

    def alphabet(self) -> Alphabet:
        """Return the tokens that the texts of this format are made of."""

    def grammar(self) -> Grammar:
        """Return the format's grammar."""


def representation(name: str, **settings: Any) -> Representation:
    """Return the format called `name`, with settings of its own (decimals, tolerances).

    Raises:
        UnknownName: If no format has that name.
        UserError: If the format does not know a setting.
    """
    if name not in REPRESENTATIONS:
        raise UnknownName.among("representation", name, REPRESENTATIONS)
    module, _, attribute = REPRESENTATIONS[name].partition(":")
    try:
        found: Representation = getattr(importlib.import_module(module), attribute)(**settings)
    except TypeError as error:
        raise UserError(f"representation '{name}': {error}") from error
    return found
