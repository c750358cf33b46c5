"""What a model wrote -> a crystal, or the verdict that says why not.

Contract: never raises, whatever the text. A format's `decode` is strict; this module is tolerant only where
no number and no site can be lost or invented by it:

    the end token is taken off, or put back where the engine took it off although the model did end ("stop")
    blank lines and a Markdown fence around the crystal are dropped
    words around the crystal are dropped if they are set apart from it: by a blank line, by a fence, or,
    before it, by a line that ends in a colon. What was dropped is counted: `chatter_characters` in the
    crystal's properties

    Sure! Here is rock salt:           dropped, 20 characters
    3.99 3.99 3.99                     kept
    ...

Words are what the format has no tokens for. A neighbouring line that the format could have written makes the
text fail, set apart or not: it may be a site, and a text that breaks off must not pass as a smaller crystal.

Not here: whether the crystal makes sense (scores/validity.py).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from crystallm_kit.errors import ParseError
from crystallm_kit.records import Crystal, StopReason, Verdict
from crystallm_kit.text.representation import Alphabet, Representation, cut

CHATTER = "chatter_characters"

# Blocks tried per text: a text of many paragraphs has quadratically many.
_MAX_BLOCKS = 40


@dataclass(frozen=True)
class _Block:
    """A run of lines of a text: the lines, the 0-based position of the first, and what lies outside."""

    text: str
    first_line: int
    n_dropped: int  # characters, white space and fences not counted


def parse_completion(
    text: str, representation: Representation, *, stop_reason: StopReason = "stop", n_given: int = 0
) -> Crystal | Verdict:
    """Return the crystal in a model's text, or a verdict with one reason.

    Args:
        text: Prompt and completion joined, as far as the prompt is part of the crystal's text.
        representation: The format to read.
        stop_reason: As in records.Completion: "length" means that the text was cut.
        n_given: So many characters of the text are the prompt's: no end in them is the model's.

    Returns:
        The crystal; or an invalid verdict with reason "truncated" (cut before the end), "error" (the engine
        failed), or "parse:<reason>" with the reason of the ParseError that got furthest into the text.
    """
    if stop_reason == "error":
        return Verdict(False, "error", "the engine returned an error for this request")
    alphabet = representation.alphabet()
    end = _end_of(text, alphabet, n_given)
    if stop_reason == "length" and end is None:
        return Verdict(False, "truncated", f"cut after {len(text)} characters, before the end of the crystal")
    furthest, furthest_line = ParseError("empty", "no text"), -1
    for block in islice(_blocks(text, end, alphabet), _MAX_BLOCKS):
        for candidate in _endings(block.text, end, alphabet):
            try:
                crystal = representation.decode(candidate)
            except ParseError as error:
                if error.reason == "no_end" and candidate != block.text:
                    continue  # it was taken off here, for formats that carry none
                if block.first_line + error.line > furthest_line:
                    furthest, furthest_line = error, block.first_line + error.line
                continue
            if block.n_dropped:
                return replace(crystal, properties={**crystal.properties, CHATTER: block.n_dropped})
            return crystal
    return Verdict(False, f"parse:{furthest.reason}", str(furthest))


def _end_of(text: str, alphabet: Alphabet, n_given: int) -> re.Match[str] | None:
    """Return where the first end stands; an end that is a word ("end") has to be the last of its line."""
    if alphabet.end is None:
        return re.compile(re.escape(alphabet.stop)).search(text, n_given) if alphabet.stop else None
    is_word = alphabet.end.isalnum()
    pattern = (r"\b%s(?=[ \t]*(?:\n|<|\Z))" if is_word else "%s") % re.escape(alphabet.end)
    return re.compile(pattern).search(text, n_given)


def _blocks(text: str, end: re.Match[str] | None, alphabet: Alphabet) -> Iterator[_Block]:
    """Yield the runs of lines that may be the crystal: the earliest first, of these the longest first."""
    n_all = _n_characters(text.replace(alphabet.pad, "") if alphabet.pad else text)
    if end is not None and alphabet.end is not None:
        text = text[: end.end()]  # with no end token, the stop string may stand in the chatter before
    lines = text.split("\n")
    is_fence = [line.lstrip().startswith("```") for line in lines]
    is_gap = [not line.strip() or fence for line, fence in zip(lines, is_fence, strict=True)]
    n_fences = sum(_n_characters(line) for line, fence in zip(lines, is_fence, strict=True) if fence)
    starts = [0, *(i + 1 for i, line in enumerate(lines) if is_gap[i] or line.rstrip().endswith(":"))]
    stops = [len(lines), *(i for i in reversed(range(len(lines))) if is_gap[i])]
    tokens = frozenset(alphabet.tokens) - {alphabet.unknown}

    def may_be_crystal(indices: range) -> bool:
        """Return whether the nearest line that is no gap could have been written by the format."""
        line = next((lines[i] for i in indices if not is_gap[i]), None)
        if line is None:
            return False
        pieces = cut(line, alphabet)
        return "".join(pieces) == line and tokens.issuperset(pieces)

    for start in starts:
        for stop in stops:
            if stop <= start or is_gap[start] or is_gap[stop - 1]:
                continue
            if may_be_crystal(range(start - 1, -1, -1)) or may_be_crystal(range(stop, len(lines))):
                continue
            block = "\n".join(lines[start:stop])
            yield _Block(block, start, max(0, n_all - _n_characters(block) - n_fences))


def _endings(block: str, end: re.Match[str] | None, alphabet: Alphabet) -> Iterator[str]:
    """Yield the block as it is, without its end token, and with the end token that the engine took off."""
    yield block
    if alphabet.end is None:
        return
    if block.endswith(alphabet.end):
        yield block.removesuffix(alphabet.end).rstrip()
    elif end is None:
        yield block + alphabet.end
        yield block.rstrip() + " " + alphabet.end


def _n_characters(text: str) -> int:
    return len("".join(text.split()))
