import pytest

from crystallm_kit.records import Crystal, Verdict
from crystallm_kit.text.compact import CompactRepresentation
from crystallm_kit.text.parsing import CHATTER, parse_completion
from crystallm_kit.text.representation import representation
from crystallm_kit.text.xyz import XyzRepresentation

COMPACT = "3.99 3.99 3.99\n60.0 60.0 60.0\nNa\n0.000 0.000 0.000\nCl\n0.500 0.500 0.500"
WYCKOFF = "Na1 Cl1 225\nNa a\nCl b\n5.64 end"
HYDROGEN = "2\n\nH 0.000 0.000 -0.370\nH 0.000 0.000 0.370"


def parsed(text, name="compact", **settings):
    return parse_completion(text, representation(name), **settings)


@pytest.mark.parametrize(
    "text", [COMPACT, COMPACT + "<eos>", COMPACT + "\n<eos><pad><pad>", "\n" + COMPACT + "\n"]
)
def test_ends_and_blank_lines_are_taken_off_without_being_counted(text):
    crystal = parsed(text)
    assert isinstance(crystal, Crystal)
    assert CHATTER not in crystal.properties


@pytest.mark.parametrize(
    "text", [WYCKOFF, WYCKOFF.removesuffix("end"), WYCKOFF.removesuffix(" end"), WYCKOFF + "<pad>"]
)
def test_an_end_word_that_the_engine_took_off_is_put_back(text):
    crystal = parsed(text, "wyckoff")
    assert isinstance(crystal, Crystal)
    assert len(crystal.structure) == 2


@pytest.mark.parametrize(
    ("before", "after", "n_characters"),
    [
        ("Sure! Here is rock salt:\n", "", 20),
        ("", "\n\nI hope it helps!", 13),
        ("Of course.\n\n```text\n", "\n```\nAnything else?", 9 + 13),
        ("Of course.\n\n", "<eos>Below is", 9 + 7),
    ],
)
def test_words_set_apart_from_the_crystal_are_dropped_and_counted(before, after, n_characters):
    crystal = parsed(before + COMPACT + after)
    assert isinstance(crystal, Crystal)
    assert len(crystal.structure) == 2
    assert crystal.properties[CHATTER] == n_characters


@pytest.mark.parametrize(
    "text",
    [
        COMPACT + "\nI hope it helps!",  # not set apart
        COMPACT + "\nCl",  # breaks off in a site
        COMPACT + "\n\nCl\n0.5",  # set apart, but it may be a site
        COMPACT + "\n\n" + COMPACT,
        "1.00 1.00 1.00\n\n" + COMPACT,
        "1.00 1.00 1.00\n" + COMPACT,
    ],
)
def test_nothing_that_may_be_a_part_of_the_crystal_is_dropped(text):
    verdict = parsed(text)
    assert isinstance(verdict, Verdict)
    assert verdict.reason.startswith("parse:")


def test_the_reason_is_that_of_the_attempt_that_got_furthest():
    verdict = parsed("Sure:\n" + COMPACT.replace("Cl", "Xx"))
    assert verdict.reason == "parse:unknown_element"
    assert verdict.detail == "line 5: 'Xx': 'Xx' is no element from H to Lr"


def test_a_molecules_empty_line_does_not_cut_it_in_two():
    crystal = parse_completion("Hydrogen:\n" + HYDROGEN + "\n\nDone.", XyzRepresentation())
    assert isinstance(crystal, Crystal)
    assert len(crystal.structure) == 2


def test_a_text_cut_by_the_token_limit_is_truncated_though_it_may_parse():
    verdict = parsed(COMPACT, stop_reason="length")
    assert verdict.reason == "truncated"
    assert not verdict.valid


def test_a_text_that_ended_before_the_token_limit_counts():
    assert isinstance(parsed(COMPACT + "<eos>", stop_reason="length"), Crystal)
    assert isinstance(parsed(WYCKOFF, "wyckoff", stop_reason="length"), Crystal)


def test_an_engines_error_is_no_parse_error():
    assert parsed("", stop_reason="error").reason == "error"


def test_no_text_is_an_empty_parse():
    assert parsed("").reason == "parse:empty"
    assert parsed(" \n\n").reason == "parse:empty"


def test_many_paragraphs_are_given_up_in_bounded_time():
    calls = []

    class Counting(CompactRepresentation):
        def decode(self, text):
            calls.append(text)
            return super().decode(text)

    assert isinstance(parse_completion("well,\n\n" * 2000, Counting()), Verdict)
    assert len(calls) < 200


def test_a_whole_wyckoff_text_is_refused_for_what_is_wrong_with_it():
    """Every damaged text that ended was said to have no end: the one tried without it got furthest."""
    wyckoff = representation("wyckoff")
    found = parse_completion("Na1 Cl1 225\nNa a\nCl a\n5.64 end", wyckoff)
    assert isinstance(found, Verdict)
    assert found.reason == "parse:letter_repeated"
    missing = parse_completion("Na1 Cl1 225\nNa a\nCl b\n5.64end", wyckoff)
    assert isinstance(missing, Verdict)
    assert missing.reason == "parse:no_end"
