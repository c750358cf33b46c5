r"""One description of a regular text, written as Lark, GBNF and a regular expression.

    >>> number = sequence(choice("0", sequence(characters("1-9"), optional(characters("0-9")))), ".5")
    >>> grammar({"root": sequence(Rule("number"), "\n"), "number": number}).regex
    '(?:0|[1-9][0-9]?)\\.5\\n'

In Lark every rule is a terminal, so that one lexeme is the whole text: the languages here are regular.
Whoever constrains by characters (xgrammar) needs a vocabulary that holds every single character, or it can
run into a dead end: after the token "N" no token continues "Na". The kit's own masks work on token ids and
cannot.

Not here: which texts a format allows (its own module), masks over token ids (tokens/masking.py).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from crystallm_kit.text.representation import Grammar, escape


@dataclass(frozen=True)
class Characters:
    """One character out of a class, "0-9"."""

    inside: str


@dataclass(frozen=True)
class Rule:
    """The named rule."""

    name: str


@dataclass(frozen=True)
class Sequence:
    """One part after the other."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True)
class Choice:
    """One of the options."""

    options: tuple["Expression", ...]


@dataclass(frozen=True)
class Repeat:
    """The item, as often as the mark says: "?" at most once, "+" at least once, "*" any number."""

    item: "Expression"
    mark: str


Expression = str | Characters | Rule | Sequence | Choice | Repeat


def sequence(*parts: Expression) -> Sequence:
    """Return the parts, one after the other."""
    return Sequence(parts)


def choice(*options: Expression) -> Choice:
    """Return one of the options; put a text before the texts that it begins."""
    return Choice(options)


def optional(item: Expression) -> Repeat:
    """Return the item or nothing."""
    return Repeat(item, "?")


def one_or_more(item: Expression) -> Repeat:
    """Return the item once or more often."""
    return Repeat(item, "+")


def characters(inside: str) -> Characters:
    """Return one character of a class, written as between the brackets of a regular expression."""
    return Characters(inside)


def number(decimals: int, *, signed: bool = False, integer: Expression | None = None) -> Sequence:
    """Return a number with exactly these decimals, 0 to 999 unless `integer` says otherwise."""
    digit = characters("0-9")
    whole = integer or choice("0", sequence(characters("1-9"), optional(digit), optional(digit)))
    sign: list[Expression] = [optional("-")] if signed else []
    fraction: list[Expression] = [".", *[digit] * decimals] if decimals else []
    return sequence(*sign, whole, *fraction)


def grammar(rules: Mapping[str, Expression]) -> Grammar:
    """Return the grammar whose start is the rule "root". Rules must not be recursive."""
    lark = ["start: ROOT", *(f"{_lark_name(name)}: {_lark(body)}" for name, body in rules.items())]
    gbnf = [f"{name} ::= {_gbnf(body)}" for name, body in rules.items()]
    return Grammar("\n".join(lark) + "\n", "\n".join(gbnf) + "\n", regex(rules["root"], rules))


def regex(expression: Expression, rules: Mapping[str, Expression] | None = None) -> str:
    """Return an expression as a regular expression that any engine reads, its rules written out."""
    match expression:
        case str():
            return escape(expression).replace("\n", r"\n")
        case Characters(inside):
            return f"[{inside}]"
        case Rule(name):
            return regex((rules or {})[name], rules)
        case Sequence(parts):
            return "".join(regex(part, rules) for part in parts)
        case Choice(options):
            return f"(?:{'|'.join(regex(option, rules) for option in options)})"
        case Repeat(item, mark):
            inner = regex(item, rules)
            single = isinstance(item, Characters) or re.fullmatch(r"\\?.", inner)
            return inner + mark if single else f"(?:{inner}){mark}"


def _lark_name(name: str) -> str:
    return name.upper().replace("-", "_")


def _lark(expression: Expression) -> str:
    match expression:
        case str():
            return json.dumps(expression)
        case Characters(inside):
            return f"/[{inside}]/"
        case Rule(name):
            return _lark_name(name)
        case Sequence(parts):
            return " ".join(_lark(part) for part in parts)
        case Choice(options):
            return f"({' | '.join(_lark(option) for option in options)})"
        case Repeat(item, mark):
            return f"({_lark(item)}){mark}"


def _gbnf(expression: Expression) -> str:
    match expression:
        case str():
            return json.dumps(expression)
        case Characters(inside):
            return f"[{inside}]"
        case Rule(name):
            return name
        case Sequence(parts):
            return " ".join(_gbnf(part) for part in parts)
        case Choice(options):
            return f"({' | '.join(_gbnf(option) for option in options)})"
        case Repeat(item, mark):
            return f"({_gbnf(item)}){mark}"
