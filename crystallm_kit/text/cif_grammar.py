r"""The grammar of CrystaLLM's well-formed texts.

    type-row ::= element " " decimal " " decimal " " decimal "\n"

What has to be counted (multiplicities, sums, symbol and number of the space group) is beyond it: decode
checks.

Trap: CrystaLLM's vocabulary has no letters but element symbols, x, y and z. An engine that walks the
grammar by characters can dead-end: "N" is a token and "a" is none, so after "N" there is no way to "Na".
Give the grammar to engines that walk token ids (guidance), or mask by token ids (tokens/masking.py).

Not here: the strict reader (cif_decoding.py); how rules become Lark, GBNF and regex (grammar.py).
"""

from collections.abc import Iterable
from functools import cache

from crystallm_kit.text.cif_tables import (
    ATOM_SITE_KEYS,
    ATOM_TYPE_KEYS,
    CELL_KEYS,
    IDENTITY_LOOP,
    SPACEGROUP_KEY,
    atom_properties,
    vocabulary,
)
from crystallm_kit.text.grammar import (
    Choice,
    Expression,
    Repeat,
    Rule,
    Sequence,
    characters,
    choice,
    grammar,
    one_or_more,
    optional,
    sequence,
)
from crystallm_kit.text.representation import Grammar

_DIGIT = characters("0-9")
_ELEMENT, _COUNT, _DECIMAL = Rule("element"), Rule("count"), Rule("decimal")


def _longest_first(strings: Iterable[str]) -> Choice:
    return choice(*sorted(strings, key=lambda s: (-len(s), s)))


def _line(key: str, value: Expression) -> Sequence:
    return sequence(f"{key} ", value, "\n")


@cache
def cif_grammar() -> Grammar:
    """Return the grammar as Lark, GBNF and one regular expression."""
    type_head = "\n".join(["loop_", *(f"_atom_type_{key}" for key in ATOM_TYPE_KEYS), ""])
    site_head = "\n".join([*IDENTITY_LOOP, "loop_", *(f"_atom_site_{key}" for key in ATOM_SITE_KEYS), ""])
    amount = sequence(_ELEMENT, _COUNT)
    reduced = sequence(_ELEMENT, optional(_COUNT))
    fraction = sequence(optional("-"), characters("01"), ".", *[_DIGIT] * 4)
    group = sequence("(", one_or_more(reduced), ")", optional(_COUNT))
    quoted = sequence("'", amount, one_or_more(sequence(" ", amount)), "'")
    rules: dict[str, Expression] = {
        "root": sequence(
            *("data_", one_or_more(amount), "\n", type_head, one_or_more(Rule("type-row"))),
            _line(SPACEGROUP_KEY, Rule("spacegroup")),
            *(_line(f"_cell_{key}", _DECIMAL) for key in CELL_KEYS),
            _line("_symmetry_Int_Tables_number", _COUNT),
            _line("_chemical_formula_structural", one_or_more(choice(reduced, group))),
            *("_chemical_formula_sum", choice(" ", "\n"), choice(quoted, amount), "\n"),
            _line("_cell_volume", _DECIMAL),
            _line("_cell_formula_units_Z", _COUNT),
            *(site_head, one_or_more(Rule("site-row")), "\n"),
        ),
        "type-row": sequence(_ELEMENT, *[sequence(" ", _DECIMAL)] * 3, "\n"),
        "site-row": sequence(
            *(_ELEMENT, " ", _ELEMENT, choice("0", _COUNT), " ", _COUNT),
            *[sequence(" ", fraction)] * 3,
            *(" 1", optional(".0"), "\n"),
        ),
        "decimal": sequence(one_or_more(_DIGIT), ".", one_or_more(_DIGIT)),
        "count": sequence(characters("1-9"), Repeat(_DIGIT, "*")),
        "element": _longest_first(atom_properties()),
        "spacegroup": _longest_first(t.removesuffix("_sg") for t in vocabulary() if t.endswith("_sg")),
    }
    return grammar(rules)
