"""Candidates in order, and numbers drawn again where a geometry is impossible."""

import math
from collections import Counter

import pytest

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.generation import (
    GEOMETRY_REASONS,
    _rough,
    compiler,
    generate,
    load_model,
    ranked,
    stream,
    without_numbers,
)
from crystallm_kit.records import Conditions, Sample, Verdict
from crystallm_kit.text.wyckoff import WyckoffRepresentation

ROCK_SALT = "Na1 Cl1 225\nNa a\nCl b\n{} end"
ZINC_BLENDE = "Na1 Cl1 216\nNa a\nCl c\n{} end"
RUTILE = "Ti2 O4 136\nTi a\nO f\n{} end"
TITANIA = Conditions(formula={"Ti": 1, "O": 2}, n_sites=12)


def candidate(text, log_probability, *, name=""):
    structure = WyckoffRepresentation().decode(text).structure
    return Sample(name or text, text, structure, Verdict(True), Conditions(), log_probability, 0, "m")


def ids(samples):
    return [sample.id for sample in samples]


def test_the_type_drawn_most_often_stands_first_with_its_surest_member():
    samples = [
        candidate(ZINC_BLENDE.format("6.00"), -1.0, name="sure, but once"),
        candidate(ROCK_SALT.format("5.60"), -3.0, name="often"),
        candidate(ROCK_SALT.format("5.64"), -2.0, name="often and surest"),
    ]
    assert ids(ranked(samples))[:2] == ["often and surest", "sure, but once"]


def test_near_copies_stand_last():
    """Lengths to 1 angstrom and coordinates to 0.1 decide: 4.59 is near 4.61, .3053 near .3999, not .4001."""
    samples = [
        candidate(RUTILE.format("4.61 2.97 .3999"), -5.0, name="copy"),
        candidate(RUTILE.format("4.59 2.96 .4001"), -9.0, name="another coordinate"),
        candidate(RUTILE.format("5.01 2.96 .3053"), -7.0, name="another length"),
        candidate(RUTILE.format("4.59 2.96 .3053"), -1.0, name="best"),
        candidate(RUTILE.format("5.02 2.96 .3053"), -8.0, name="copy of another length"),
    ]
    expected = ["best", "another length", "another coordinate", "copy", "copy of another length"]
    assert ids(ranked(samples)) == expected
    assert ids(ranked(reversed(samples))) == expected


def test_other_geometries_stand_by_probability_whatever_their_type():
    samples = [candidate(ROCK_SALT.format(f"{a}.00"), -a, name=f"rock salt {a}") for a in (4, 5, 6)]
    samples += [candidate(ZINC_BLENDE.format(f"{a}.00"), -a - 0.5, name=f"zinc blende {a}") for a in (4, 5)]
    assert ids(ranked(samples)) == [
        "rock salt 4", "zinc blende 4", "rock salt 5", "zinc blende 5", "rock salt 6",
    ]  # fmt: skip


def test_unparsed_samples_are_left_out_and_none_is_none():
    lost = Sample("lost", "Na1 Cl1 2", None, Verdict(False, "truncated"), Conditions(), -0.1, 0, "m")
    kept = candidate(ROCK_SALT.format("5.64"), -2.0)
    assert ranked([lost, kept]) == [kept]
    assert ranked([lost]) == ranked([]) == []


def test_a_text_is_cut_before_its_numbers():
    assert without_numbers(RUTILE.format("4.59 2.96 .3053")) == "Ti2 O4 136\nTi a\nO f\n"
    assert _rough(RUTILE.format("4.59 2.96 .3053")) == "Ti2 O4 136\nTi a\nO f\n4 2 .3 end"


# ---------------------------------------------------------------- redraws, with the shipped model


@pytest.fixture(scope="module")
def model():
    return load_model(batch_size=64, device="cpu")


@pytest.fixture(scope="module")
def hot():
    """How numbers are drawn so badly that many geometries fail."""
    return Sampling(number_temperature=3.0)


@pytest.fixture(scope="module")
def once(model, hot):
    return list(stream([TITANIA] * 24, seed=5, model=model, sampling=hot, redraws=0))


@pytest.fixture(scope="module")
def again(model, hot):
    return list(stream([TITANIA] * 24, seed=5, model=model, sampling=hot, redraws=2))


def test_without_redraws_impossible_geometries_stay(once):
    reasons = Counter(sample.verdict.reason for sample in once)
    assert sum(reasons[reason] for reason in GEOMETRY_REASONS) >= 5
    assert not any("redraws" in sample.measures for sample in once)


def test_every_request_has_one_sample_and_those_redrawn_say_so(once, again):
    assert ids(again) == ids(once) == [f"5-{i}" for i in range(24)]
    for before, after in zip(once, again, strict=True):
        if before.verdict.reason not in GEOMETRY_REASONS:
            assert after == before
            continue
        assert after.measures["redraws"] in (1, 2)
        assert without_numbers(after.text) == without_numbers(before.text)
        assert after.conditions == before.conditions
        if after.verdict.reason in GEOMETRY_REASONS:
            assert after.measures["redraws"] == 2


def test_redraws_mend_some_geometries(once, again):
    def failures(samples):
        return sum(sample.verdict.reason in GEOMETRY_REASONS for sample in samples)

    assert failures(again) < failures(once)


def test_a_redrawn_sample_has_the_log_probability_of_its_whole_text(model, hot, again):
    """The engine scores a text that it is given whole: what redraws report is the same number."""
    sample = next(s for s in again if "redraws" in s.measures and s.structure is not None)
    other = next(s for s in again if "redraws" not in s.measures and s.structure is not None)
    request = compiler(model)(TITANIA)
    for whole in (sample, other):
        prompt = Prompt(model.template.render(TITANIA), whole.text, request)
        [scored] = model.engine.complete([prompt], hot)
        assert scored.text == whole.text
        assert scored.log_probability == pytest.approx(whole.log_probability, abs=1e-3)
        assert math.isfinite(whole.log_probability)


def test_the_same_seed_gives_the_same_redraws(model, hot, again):
    repeated = list(stream([TITANIA] * 24, seed=5, model=model, sampling=hot, redraws=2))
    assert [(s.text, s.measures) for s in repeated] == [(s.text, s.measures) for s in again]


def test_unconstrained_samples_are_not_redrawn(model, hot):
    samples = generate(TITANIA, n=8, seed=5, model=model, sampling=hot, constrained=False, redraws=2)
    assert len(samples) == 8
    assert not any("redraws" in sample.measures for sample in samples)


def test_numbers_that_were_given_stay_in_redraws(model):
    """A beginning with a cell was cut before its numbers when they were drawn again, and so given up.

    Rock salt with a = 2 angstrom overlaps whatever follows, so every sample is redrawn.
    """
    beginning = "Na1 Cl1 225\nNa a\nCl b\n2."
    samples = list(stream([Conditions()] * 3, seed=1, model=model, beginnings=[beginning] * 3))
    assert [sample.measures.get("redraws") for sample in samples] == [3, 3, 3]
    assert all(sample.text.startswith(beginning) for sample in samples)


def test_numbers_drawn_cold_are_the_same_for_the_same_sites(model):
    """With number_temperature 0 the likeliest numbers follow a prototype; what to make stays open."""
    cold = Sampling(number_temperature=0.0)
    samples = list(stream([TITANIA] * 24, seed=2, model=model, sampling=cold, redraws=0))
    numbers = {}
    for sample in samples:
        numbers.setdefault(without_numbers(sample.text), set()).add(sample.text)
    assert len(numbers) > 1
    assert len(numbers) < 24
    assert all(len(texts) == 1 for texts in numbers.values())
