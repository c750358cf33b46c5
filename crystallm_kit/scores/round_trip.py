"""What a text format loses: crystals written, read back, and compared with what they were.

    python -m crystallm_kit.scores.round_trip DATA [--formats cif xyz:decimals=4] [--limit N]

prints one Markdown row per format. Every share has all crystals read as its denominator: one that cannot be
written or read back counts as not matched. Matched is pymatgen's StructureMatcher at its default tolerances
(0.2, 0.3, 5); RMSD is its normalized one, root mean square displacement over (volume per atom)^(1/3); the
space groups are moyo's at 0.1 angstrom, before and after; tokens are those of the format's alphabet, in the
text that encode writes (an end token that is no part of the text is not counted).

Not here: the formats (text/), their tokenizers (tokens/tokenizer.py).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

from crystallm_kit.errors import EmptyInput, EncodeError, ParseError, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.files import read
from crystallm_kit.structures.symmetry import spacegroup_number
from crystallm_kit.text.representation import REPRESENTATIONS, Representation, cut, representation


@dataclass(frozen=True)
class RoundTrip:
    """The outcome for one crystal.

    Attributes:
        id: The crystal's.
        failure: Why it could not be written, read back, or matched; "" if it was matched.
        n_tokens: Tokens of its text; 0 if it could not be written.
        rmsd: Normalized root mean square distance to the original; NaN if not matched.
        volume_error: Relative error of the volume per atom, unsigned; NaN if not read back.
        is_spacegroup_kept: Whether the space group at 0.1 angstrom is the original's.
    """

    id: str
    failure: str = ""
    n_tokens: int = 0
    rmsd: float = float("nan")
    volume_error: float = float("nan")
    is_spacegroup_kept: bool = False


@dataclass(frozen=True)
class Loss:
    """Round trips of many crystals through one format.

    Attributes:
        label: The format with its settings.
        trips: One per crystal, failures included.
    """

    label: str
    trips: Sequence[RoundTrip] = field(repr=False)

    @property
    def n_matched(self) -> int:
        """Crystals that came back and matched."""
        return sum(not trip.failure for trip in self.trips)

    @property
    def n_spacegroup_kept(self) -> int:
        """Crystals that came back with their space group."""
        return sum(trip.is_spacegroup_kept for trip in self.trips)

    def quantile(self, name: str, q: float) -> float:
        """Return a quantile of "rmsd", "volume_error" or "n_tokens" over the crystals that have one."""
        values = np.array([getattr(trip, name) for trip in self.trips], dtype=float)
        known = values[np.isfinite(values)]
        return float(np.quantile(known, q)) if len(known) else float("nan")

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens over the crystals that could be written; NaN if none."""
        counts = [trip.n_tokens for trip in self.trips if trip.n_tokens]
        return float(np.mean(counts)) if counts else float("nan")

    def failures(self) -> Counter[str]:
        """Return how often each failure happened."""
        return Counter(trip.failure for trip in self.trips if trip.failure)


def measure_loss(crystals: Iterable[Crystal], text_format: Representation, *, label: str = "") -> Loss:
    """Return what a format loses on these crystals.

    Raises:
        EmptyInput: If there are none (0/0 is not a share).
    """
    matcher = StructureMatcher()
    alphabet = text_format.alphabet()
    trips = tuple(_round_trip(crystal, text_format, alphabet, matcher) for crystal in crystals)
    if not trips:
        raise EmptyInput("round trip: no crystals; expected at least one")
    return Loss(label or text_format.name, trips)


def _round_trip(crystal: Crystal, text_format: Representation, alphabet: Any, matcher: Any) -> RoundTrip:
    try:
        text = text_format.encode(crystal)
    except EncodeError as error:
        return RoundTrip(crystal.id, f"not written: {error}")
    n_tokens = len(cut(text, alphabet))
    try:
        after = text_format.decode(text).structure
    except ParseError as error:
        return RoundTrip(crystal.id, f"not read back: {error.reason}", n_tokens)
    before = crystal.structure
    if not (isinstance(before, Structure) and isinstance(after, Structure)):
        raise UserError(f"round trip: '{crystal.id}' is a molecule; give crystals only")
    per_atom = before.volume / len(before)
    distances = matcher.get_rms_dist(before, after)
    return RoundTrip(
        crystal.id,
        "" if distances else "not matched",
        n_tokens,
        float(distances[0]) if distances else float("nan"),
        abs(after.volume / len(after) - per_atom) / per_atom,
        _spacegroup(before) == _spacegroup(after),
    )


def _spacegroup(structure: Structure) -> int:
    try:
        return spacegroup_number(structure, 0.1)
    except EncodeError:
        return 0


def markdown_table(losses: Iterable[Loss]) -> str:
    """Return the table: one row per format, shares with numerator and denominator."""
    lines = [
        "| format | matched | RMSD median | p95 | volume error median | p95 | space group kept | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for loss in losses:
        n = len(loss.trips)
        cells = (
            loss.label,
            f"{loss.n_matched / n:.2%} ({loss.n_matched}/{n})",
            *(f"{loss.quantile('rmsd', q):.1e}" for q in (0.5, 0.95)),
            *(f"{loss.quantile('volume_error', q):.2%}" for q in (0.5, 0.95)),
            f"{loss.n_spacegroup_kept / n:.2%} ({loss.n_spacegroup_kept}/{n})",
            f"{loss.mean_tokens:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _named_format(words: str) -> Representation:
    """Return the format of "name" or "name:setting=number,setting=number"."""
    name, _, settings = words.partition(":")
    pairs = [pair.partition("=") for pair in settings.split(",") if pair]
    try:
        numbers = {key: float(value) if "." in value else int(value) for key, _, value in pairs}
    except ValueError as error:
        raise UserError(f"--formats {words}: {error}; expected name:setting=number,...") from error
    return representation(name, **numbers)


def _progress(crystals: Sequence[Crystal], label: str) -> Iterator[Crystal]:
    for index, crystal in enumerate(crystals):
        if index % 100 == 0:
            print(f"{label}: {index}/{len(crystals)}", file=sys.stderr)
        yield crystal


def main(arguments: list[str] | None = None) -> None:
    """Print what text formats lose on the crystals of a file, as a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m crystallm_kit.scores.round_trip", description=main.__doc__
    )
    parser.add_argument("data", type=Path, help="any file or folder of crystals")
    parser.add_argument(
        "--formats", nargs="+", default=sorted(REPRESENTATIONS), metavar="NAME[:SETTING=N,...]"
    )
    parser.add_argument("--limit", type=int, help="read no more than this many crystals")
    options = parser.parse_args(arguments)
    formats = {words: _named_format(words) for words in options.formats}
    crystals = list(islice(read(options.data), options.limit))
    losses = [measure_loss(_progress(crystals, words), f, label=words) for words, f in formats.items()]
    print(markdown_table(losses))
    for loss in losses:
        for failure, n in loss.failures().most_common():
            ids = ", ".join(trip.id for trip in loss.trips if trip.failure == failure)
            print(f"\n{loss.label}: {n} {failure}: {ids}")


if __name__ == "__main__":
    main()
