"""The template engine: the k-th best answer, its own score, and what it says where it has none."""

import json
import math
from collections.abc import Iterator

import pytest

from crystallm_kit import cli
from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.template import TemplateEngine
from crystallm_kit.errors import ImpossibleRequest, UserError
from crystallm_kit.generation import (
    candidates,
    complete_crystal,
    generate,
    infill,
    load_model,
    stream,
    template_model,
)
from crystallm_kit.records import Conditions, Crystal
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, fit, reduced
from crystallm_kit.structures.files import write
from crystallm_kit.structures.templates import learn_templates
from crystallm_kit.text.wyckoff import WyckoffRepresentation
from crystallm_kit.tokens.requests import compile_request

# Cell lengths in angstrom: Wyckoff, Crystal Structures (1963), rounded.
TEXTS = {
    "NaCl": "Na1 Cl1 225\nNa a\nCl b\n5.64 end",
    "KBr": "K1 Br1 225\nK a\nBr b\n6.60 end",
    "CsCl": "Cs1 Cl1 221\nCs a\nCl b\n4.12 end",
    "ZnS": "Zn1 S1 216\nZn a\nS c\n5.41 end",
    "ZnS wurtzite": "Zn2 S2 186\nZn b\nS b\n3.82 6.26 .0000 .3748 end",
    "SrTiO3": "Sr1 Ti1 O3 221\nSr a\nTi b\nO c\n3.91 end",
    # a cubic perovskite that is a little long: to the matcher the same crystal
    "PbTiO3": "Ti1 Pb1 O3 99\nTi b\nPb a\nO b\nO c\n3.90 4.15 .5377 .0000 .1118 .6174 end",
    "TiO2": "Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end",
}
CRYSTALS = [Crystal(name, WyckoffRepresentation().decode(text).structure) for name, text in TEXTS.items()]
SAMPLING = Sampling()
RBCL = compile_request(Conditions(formula={"Rb": 1, "Cl": 1}, n_sites=2))


@pytest.fixture(scope="module")
def engine():
    return TemplateEngine(learn_templates(CRYSTALS))


@pytest.fixture(scope="module")
def known_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "known.extxyz"
    write(iter(CRYSTALS), path)
    return path


@pytest.fixture(scope="module")
def model(known_file, tmp_path_factory) -> Iterator:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield template_model(known_file)


def answers(engine, request, n, **prompt):
    return list(engine.complete([Prompt("crystal\n", request=request, **prompt)] * n, SAMPLING))


def test_the_answers_to_a_prompt_are_its_best_guesses_in_order(engine):
    found = answers(engine, RBCL, 3)
    assert found[0].text.startswith("Rb1 Cl1 225\n")
    assert {c.text.split("\n")[0] for c in found} == {f"Rb1 Cl1 {g}" for g in (225, 221, 216)}
    scores = [c.log_probability for c in found]
    assert scores == sorted(scores, reverse=True)
    assert sum(math.exp(score) for score in scores) == pytest.approx(1.0)


def test_each_of_equal_requests_gets_the_best_guesses(model):
    """Two targets of one composition, as polymorphs are: none takes the other's."""
    asked = Conditions(formula={"Rb": 1, "Cl": 1}, n_sites=2)
    first, second = candidates([asked, asked], 2, model=model)
    assert [s.text for s in first] == [s.text for s in second]
    assert first[0].text.startswith("Rb1 Cl1 225\n")
    assert len({s.id for s in first + second}) == 4


def test_the_answers_do_not_depend_on_seed_temperature_or_what_is_asked_beside(engine):
    other = compile_request(Conditions(formula={"Sn": 2, "O": 4}))
    prompts = [Prompt("a", request=r) for r in (RBCL, other, RBCL, RBCL)]
    mixed = [c.text for c in engine.complete(prompts, Sampling(seed=9, temperature=2.0))]
    alone = [c.text for c in answers(engine, RBCL, 3)]
    assert [mixed[0], *mixed[2:]] == alone
    assert [c.text for c in answers(engine, RBCL, 1)] == alone[:1]


def test_no_two_answers_are_the_same_to_the_matcher(engine):
    """Cubic and tetragonal PbTiO3 are one answer, with the votes of both."""
    request = compile_request(Conditions(formula={"Ba": 1, "Ti": 1, "O": 3}, n_sites=5))
    found = [c for c in answers(engine, request, 20) if c.stop_reason == "stop"]
    forms = [reduced(WyckoffRepresentation().decode(c.text).structure) for c in found]
    pairs = [(a, b) for i, a in enumerate(forms) for b in forms[i + 1 :]]
    assert pairs
    assert not any(fit(a, b, TOLERANCES["default"]) for a, b in pairs)
    assert sum(math.exp(c.log_probability) for c in found) == pytest.approx(1.0)
    assert len(engine.library.guesses({56: 1, 22: 1, 8: 3})) > len(found)


def test_a_space_group_that_is_asked_for_is_that_of_every_answer(engine):
    request = compile_request(Conditions(formula={"Rb": 1, "Cl": 1}, spacegroup_number=221))
    first, second = answers(engine, request, 2)
    assert first.text.startswith("Rb1 Cl1 221\n")
    assert (second.stop_reason, second.text) == ("error", "")


def test_without_a_number_of_sites_templates_of_every_size_answer(engine):
    request = compile_request(Conditions(formula={"Cd": 1, "S": 1}))
    heads = {c.text.split("\n")[0] for c in answers(engine, request, 10)}
    assert {"Cd2 S2 186", "Cd1 S1 216"} <= heads


def test_where_there_is_no_answer_the_completion_says_why(engine):
    nothing = compile_request(Conditions(formula={"Na": 3, "P": 7}))
    (none,) = answers(engine, nothing, 1)
    assert (none.stop_reason, none.text, none.detail.startswith("no template for ")) == ("error", "", True)
    assert math.isnan(none.log_probability)
    *_, beyond = answers(engine, RBCL, 4)
    assert beyond.detail == "no more than 3 different guesses for this"
    (free,) = answers(engine, None, 1)
    assert "needs a composition" in free.detail


def test_answers_begin_as_the_prompt_says(engine):
    found = answers(engine, RBCL, 2, beginning="Rb1 Cl1 221\n")
    assert found[0].text.startswith("Rb1 Cl1 221\n")
    assert found[1].stop_reason == "error"
    (first,) = answers(engine, None, 1, beginning="K1 I1 225\n")
    assert first.text.startswith("K1 I1 225\nK a\nI b\n")


def test_what_only_a_model_can_do_is_refused(engine, model):
    with pytest.raises(ImpossibleRequest, match="no probabilities"):
        answers(engine, RBCL, 1, is_whole=True)
    with pytest.raises(UserError, match="no adapters"):
        answers(engine, RBCL, 1, adapter="bulk-modulus")
    with pytest.raises(ImpossibleRequest, match="no probabilities"):
        infill(CRYSTALS[0], "Na", model=model)


# ---------------------------------------------------------------- as a model is asked


def test_samples_are_judged_as_those_of_a_model(model):
    first, second, third = generate(Conditions(formula={"Rb": 1, "Cl": 1}, n_sites=2), n=3, model=model)
    assert first.verdict.valid
    assert first.measures["spacegroup_number"] == 225
    assert first.model == "template"
    assert second.structure is not None
    assert third.structure is not None


def test_a_request_without_a_template_is_a_verdict(model):
    (sample,) = generate(Conditions(formula={"Na": 3, "P": 7}), model=model)
    assert sample.structure is None
    assert sample.verdict.reason == "error"
    assert "no template" in sample.verdict.detail


def test_requests_of_one_target_may_lie_far_apart(model, monkeypatch):
    """A target's candidates used to begin anew where the stream's chunk of 1,024 requests ended."""
    monkeypatch.setattr("crystallm_kit.generation.CHUNK", 2)
    asked = [Conditions(formula={"Rb": 1, "Cl": 1}, n_sites=2)] * 3
    texts = [sample.text for sample in stream(asked, model=model)]
    assert len(set(texts)) == 3
    unconstrained = [sample.text for sample in stream(asked, model=model, constrained=False)]
    assert unconstrained == texts


def test_the_beginning_of_a_crystal_is_completed(model):
    (sample,) = complete_crystal("Rb1 F1 225\nRb a\n", model=model)
    assert sample.text.startswith("Rb1 F1 225\nRb a\nF b\n")


def test_the_command_generates_from_a_library(known_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = str(tmp_path / "out")
    arguments = ["generate", "--formula", "BaTiO3", "--sites", "5", "-n", "2", "--out", out, "--json"]
    assert cli.main([*arguments, "--engine", "template", "--library", str(known_file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["formula"] for s in found["samples"]] == ["BaTiO3", "BaTiO3"]
    assert found["model"] == "template"
    assert cli.main([*arguments, "--engine", "template"]) == 2
    assert "--library" in capsys.readouterr().err


def test_a_library_goes_with_templates_and_a_model_does_not(known_file):
    with pytest.raises(UserError, match="go together"):
        load_model(library=known_file)
    with pytest.raises(UserError, match="no model"):
        load_model("somewhere", engine="template", library=known_file)
