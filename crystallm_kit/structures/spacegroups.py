"""Space groups by name: Hermann-Mauguin symbols and numbers, each found from the other.

A symbol is read in any spelling that the field writes: "Fm-3m", "F m -3 m", "Fm3m", "F 4/m -3 2/m", "P2_1/c",
"P 21/c", "P12_1/c1", "P2_1/n" (another setting of 14), "R-3m:H", "R-3mH", "Cmca" (before 1992) and "Cmce".

    spacegroup_number("P63/mmc") == 194
    spacegroup_symbol(194) == "P6_3/mmc"      as spglib and moyo print it, and as CrystaLLM's texts have it

Not here: operations, Wyckoff positions, crystal systems (symmetry.py).
Sources: International Tables for Crystallography Vol. A, as in moyo's 530 Hall entries; the five symbols that
de Wolff et al. (Acta Cryst. A48, 727, 1992) replaced by those with the letter e.
"""

import re
from functools import lru_cache

from crystallm_kit.errors import UnknownName, did_you_mean

_BEFORE_1992 = {"abm2": 39, "aba2": 41, "cmca": 64, "cmma": 67, "ccca": 68}
_BARS = ("\u0305", "\u0304", "\u00af")  # combining overline, combining macron, macron


@lru_cache(maxsize=1)
def _numbers_by_key() -> dict[str, int]:
    from moyopy import HallSymbolEntry

    numbers = dict(_BEFORE_1992)
    for hall_number in range(1, 531):
        entry = HallSymbolEntry(hall_number)
        for symbol in (entry.hm_short, entry.hm_full):
            key = _key(symbol)
            numbers[key] = entry.number
            if 3 <= entry.number <= 15:  # P 1 2_1/n 1 is written P2_1/n
                numbers.setdefault(
                    _key("".join(part for part in symbol.split() if part != "1")), entry.number
                )
            if 200 <= entry.number <= 206 or entry.number >= 221:
                numbers.setdefault(key.replace("-3", "3"), entry.number)  # Fm3m, as written before 1983
    return numbers


def _key(symbol: str) -> str:
    """Return the symbol without what spellings differ in; injective over the 530 settings of the tables."""
    for bar in _BARS:  # a bar stands above or after its digit
        symbol = re.sub(rf"(\d){bar}", r"-\1", symbol)
    key = re.sub(r"[\s_'\"{}$]", "", symbol.replace("\u2212", "-")).lower()
    return re.sub(r":[12hrabc]\d?$", "", key)  # ":H", ":2", ":b1" name a setting of the same group


def find_spacegroup(symbol: str) -> int | None:
    """Return the number of a Hermann-Mauguin symbol in any spelling, or None if it is none."""
    key = _key(symbol)
    numbers = _numbers_by_key()
    if key in numbers:
        return numbers[key]
    if key[:1] == "r" and key[-1:] in ("h", "r"):  # R-3mH, R-3mR: hexagonal or rhombohedral axes
        return numbers.get(key[:-1])
    if key[-1:] in ("s", "z"):  # Fd-3mS, Fd-3mZ: first or second origin
        return numbers.get(key[:-1])
    return None


def spacegroup_number(name: str | int) -> int:
    """Return the number, 1-230, of a space group given by number or Hermann-Mauguin symbol.

    Args:
        name: 225, "225", "No. 225", "Fm-3m" or any other spelling of the symbol.

    Raises:
        UnknownName: If it is neither; names the nearest symbol.
    """
    text = str(name).strip()
    digits = re.fullmatch(r"(?:(?:no\.?|number|#)\s*)?(\d{1,9})", text, flags=re.IGNORECASE)
    if digits:
        number = int(digits[1])
        if 1 <= number <= 230:
            return number
        raise UnknownName(f"no space group {number}: the numbers run from 1 to 230.")
    found = find_spacegroup(text)
    if found is None:
        near = did_you_mean(re.sub(r"\s", "", text), _symbols())
        raise UnknownName(
            f"no space group '{text}'{near} Give a number from 1 to 230 or a Hermann-Mauguin symbol."
        )
    return found


@lru_cache(maxsize=256)
def spacegroup_symbol(number: int) -> str:
    """Return the short Hermann-Mauguin symbol of a space group, as spglib writes it ("P2_1/c").

    Raises:
        UnknownName: If the number is not 1-230.
    """
    from moyopy import SpaceGroupType

    if not 1 <= number <= 230:
        raise UnknownName(f"no space group {number}: the numbers run from 1 to 230.")
    symbol: str = SpaceGroupType(number).hm_short
    return symbol.replace(" ", "")


@lru_cache(maxsize=1)
def _symbols() -> tuple[str, ...]:
    return tuple(spacegroup_symbol(number) for number in range(1, 231))
