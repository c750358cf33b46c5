"""generation.py: every request ends as one judged sample, failures included."""

import dataclasses
import json
import math
import shutil
from collections import Counter

import pytest
import torch
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit import generation
from crystallm_kit.engines.engine import Sampling, ScriptedEngine
from crystallm_kit.errors import ImpossibleRequest, ModelError, ParseError, UnknownName
from crystallm_kit.generation import (
    Model,
    complete_crystal,
    generate,
    infill,
    load_model,
    stream,
    write_samples,
)
from crystallm_kit.records import Conditions, Crystal, Range
from crystallm_kit.text.prompts import template_named
from crystallm_kit.text.representation import representation

NACL = Conditions(formula={"Na": 1, "Cl": 1})
PEROVSKITE = Conditions(formula={"Ba": 1, "Ti": 1, "O": 3}, spacegroup_number=221)


@pytest.fixture(scope="module")
def model(toy_model):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = load_model(toy_model, device="cpu")
    yield dataclasses.replace(loaded, max_sites=8)
    torch.set_num_threads(before)


def scripted(*texts: str) -> Model:
    template = template_named("kit-1")
    engine = ScriptedEngine({template.render(Conditions()): texts})
    return Model("script", engine, representation("wyckoff"), template, ("Na", "Cl"), {})


def rock_salt() -> Structure:
    """NaCl, AFLOW AB_cF8_225_a_b, https://aflow.org/p/AB_cF8_225_a_b-001."""
    return Structure.from_spacegroup(225, Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def essence(samples):
    return [(s.id, s.text, s.verdict, round(s.log_probability, 2)) for s in samples]


# One sample for each request


def test_every_request_ends_as_one_sample_in_order(model):
    requests = [NACL, PEROVSKITE, Conditions(), Conditions(n_sites=3)] * 3
    samples = list(stream(requests, model=model, seed=3))
    assert [s.conditions for s in samples] == requests
    assert [s.id for s in samples] == [f"3-{i}" for i in range(12)]
    for sample, asked in zip(samples, requests, strict=True):
        assert sample.structure is not None
        assert (sample.verdict.reason is None) == sample.verdict.valid
        if asked.formula:
            assert sample.structure.composition.reduced_formula == (
                "NaCl" if asked is NACL else "BaTiO3"
            )  # fmt: skip
        if asked.n_sites:
            assert len(sample.structure) == 3


def test_failures_are_samples_too():
    model = scripted(
        "Na1 Cl1 225\nNa a\nCl b\n5.64 end",
        "Na1 Cl1 225\nNa a\n",
        "Na1 Cl1 225\nNa a\nCl a\n5.64 end",
        "Na1 Cl1 225\nNa a\nCl b\n1.64 end",
    )
    samples = generate(model=model, n=4, unique=False)
    reasons = [s.verdict.reason for s in samples]
    assert reasons[:3] == [None, "truncated", "parse:letter_repeated"]
    assert reasons[3] in ("overlap", "density", "cell")
    assert [s.structure is None for s in samples] == [False, True, True, False]
    assert all(math.isnan(s.log_probability) for s in samples)


def test_copies_are_marked_where_that_is_asked_for():
    model = scripted("Na1 Cl1 225\nNa a\nCl b\n5.64 end", "Na1 Cl1 225\nNa b\nCl a\n5.65 end")
    assert [s.verdict.reason for s in generate(model=model, n=2)] == [None, "duplicate"]
    assert [s.verdict.reason for s in generate(model=model, n=2, unique=False)] == [None, None]


def test_no_request_gives_no_sample(model):
    assert generate(model=model, n=0) == []


def test_unconstrained_samples_are_judged_all_the_same(model):
    sampling = Sampling(max_new_tokens=30)
    samples = generate(NACL, model=model, n=6, sampling=sampling, constrained=False)
    assert len(samples) == 6
    assert {s.verdict.reason.split(":")[0] for s in samples} <= {"truncated", "parse", "formula_mismatch"}


def test_an_impossible_request_is_refused_before_sampling(model):
    with pytest.raises(ImpossibleRequest, match="no assignment of Wyckoff positions"):
        generate(Conditions(formula={"Na": 3, "Cl": 1}, spacegroup_number=227, n_sites=4), model=model)


def test_words_are_understood(model):
    [sample] = generate("rock salt NaCl", model=model)
    assert sample.conditions.formula == {"Na": 1, "Cl": 1}


# Seeds


def test_a_seed_repeats_and_another_does_not(model):
    one, again, other = (generate(NACL, model=model, n=6, seed=seed, unique=False) for seed in (1, 1, 2))
    assert essence(one) == essence(again)
    assert not {s.text for s in one} & {s.text for s in other}


def test_intervals_are_drawn_anew_for_each_sample_and_repeat_with_the_seed(model):
    asked = [Conditions(properties={"band_gap_ev": Range(1.0, 5.0)})] * 8
    prompts = [
        [p.text for p in generation._prompts(asked, model, seed=seed, constrained=True, beginnings=None)]
        for seed in (1, 1, 2)
    ]
    assert prompts[0] == prompts[1] != prompts[2]
    assert len(set(prompts[0])) > 4


def test_chunks_change_neither_number_nor_order_and_repeat(model, monkeypatch):
    requests = [NACL, PEROVSKITE] * 5
    monkeypatch.setattr(generation, "CHUNK", 3)
    samples = list(stream(requests, model=model, seed=4))
    assert [s.id for s in samples] == [f"4-{i}" for i in range(10)]
    assert [s.conditions for s in samples] == requests
    assert essence(samples) == essence(stream(requests, model=model, seed=4))
    # Position 0 of every chunk draws its own numbers.
    assert len({s.text for s in samples}) == 10


def test_redraws_keep_composition_group_and_sites_and_say_so(model):
    first = list(stream([PEROVSKITE] * 12, model=model, seed=2, redraws=0))
    redrawn = list(stream([PEROVSKITE] * 12, model=model, seed=2, redraws=2))
    assert not any("redraws" in s.measures for s in first)
    changed = Counter()
    for before, after in zip(first, redrawn, strict=True):
        assert before.text.rpartition("\n")[0] == after.text.rpartition("\n")[0]
        if before.verdict.reason in ("overlap", "density", "cell"):
            changed[after.measures["redraws"]] += 1
        else:
            assert essence([before]) == essence([after])
    assert changed


# Infilling and completing


def test_infill_gives_probabilities_of_all_elements_but_those_present(model):
    found = infill(Crystal("salt", rock_salt()), "Na", model=model)
    symbols = [symbol for symbol, _ in found]
    assert sum(p for _, p in found) == pytest.approx(1)
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    assert "Cl" not in symbols
    assert "Na" in symbols
    assert len(set(symbols)) == len(symbols) == len(model.known_elements) - 1


def test_infill_scores_the_text_of_each_candidate(model):
    """Against scores of the same texts, one at a time."""
    found = dict(infill(Crystal("salt", rock_salt()), "Na", model=model, candidates=["Na", "K", "Cs", "K"]))
    logs = {}
    for symbol in ("Na", "K", "Cs"):
        text = f"{symbol}1 Cl1 225\n{symbol} a\nCl b\n5.64 end"
        prompt = generation.Prompt(model.template.render(Conditions()), text)
        [scored] = model.engine.complete([prompt], Sampling())
        assert scored.text == text
        logs[symbol] = scored.log_probability
    total = sum(math.exp(v - logs["Na"]) for v in logs.values())
    assert found == pytest.approx({s: math.exp(v - logs["Na"]) / total for s, v in logs.items()}, rel=1e-3)


def test_infill_sees_through_oxidation_states(model):
    """Na+ was not found as Na, so every candidate was scored on the same unchanged crystal."""
    charged = rock_salt()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    plain, found = (
        dict(infill(Crystal("salt", s), "Na", model=model, candidates=["Na", "K"]))
        for s in (rock_salt(), charged)
    )
    assert found == pytest.approx(plain)
    assert abs(plain["Na"] - plain["K"]) > 1e-3


@pytest.mark.parametrize(
    ("crystal", "element", "candidates", "error", "said"),
    [
        (rock_salt(), "K", None, ImpossibleRequest, "holds Cl, Na, not K"),
        (rock_salt(), "Na", [], ImpossibleRequest, "no candidate"),
        (rock_salt(), "Na", ["Cl"], ImpossibleRequest, "no candidate"),
        (rock_salt(), "Na", ["Kk"], UnknownName, "no element 'Kk'"),
        (Molecule(["O"], [[0, 0, 0]]), "O", None, ImpossibleRequest, "a molecule"),
    ],
)
def test_infill_says_what_cannot_be_replaced(model, crystal, element, candidates, error, said):
    with pytest.raises(error, match=said):
        infill(Crystal("x", crystal), element, model=model, candidates=candidates)


def test_infill_does_not_compare_texts_that_were_cut(model):
    """A cut text has the fewer tokens and would have seemed the likelier."""
    points = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)).numpy()
    crystal = Structure(Lattice.cubic(20), ["Na", "Cl"] * 30, points)
    with pytest.raises(ImpossibleRequest, match="longer than the model's positions"):
        infill(Crystal("x", crystal), "Na", model=model, candidates=["Na", "K"])


def test_infill_needs_an_engine_that_shows_probabilities():
    with pytest.raises(ImpossibleRequest, match="'scripted' gives no probabilities"):
        infill(Crystal("salt", rock_salt()), "Na", model=scripted("x"))


@pytest.mark.parametrize(
    "beginning",
    ["Ba1 Ti1 O3 221\nBa a\n", "Ba1 Ti1 ", "Na1 Cl1 225\nNa b\nCl a\n5.64", "Pu1 225\n", "Si12 1\n"],
)
def test_a_crystal_is_completed_as_it_begins(model, beginning):
    """Elements and numbers of atoms beyond the model's data are let through where they are given."""
    known = dataclasses.replace(model, known_elements=("Na", "Cl", "Ba", "Ti", "O"))
    samples = complete_crystal(beginning, n=2, model=known)
    kept = beginning if beginning.endswith((" ", "\n")) else beginning[: -len("5.64")]
    for sample in samples:
        assert sample.text.startswith(kept)
        assert sample.structure is not None


@pytest.mark.parametrize(
    ("beginning", "error"),
    [
        ("", ParseError), ("Na", ParseError), ("something else ", ParseError), ("Xx1 ", ParseError),
        ("Na1 Cl1 225\nNa c\n", ImpossibleRequest), ("Na3 Cl1 230\n", ImpossibleRequest),
        ("O3 Ba1 Ti1 ", ImpossibleRequest),
    ],
)  # fmt: skip
def test_a_beginning_of_no_crystal_is_refused(model, beginning, error):
    with pytest.raises(error):
        complete_crystal(beginning, model=model)


# Files


def test_samples_are_written_one_json_line_each(model, tmp_path):
    samples = [*generate(NACL, model=model, n=3, unique=False), *generate(model=scripted("cut"), n=1)]
    path = tmp_path / "new" / "samples.jsonl"
    assert write_samples(samples, path) == 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == [s.id for s in samples]
    assert [line["text"] for line in lines] == [s.text for s in samples]
    assert [line["valid"] for line in lines] == [s.verdict.valid for s in samples]
    assert lines[0]["formula"] == "NaCl"
    assert lines[0]["conditions"] == {"formula": {"Na": 1, "Cl": 1}}
    assert lines[3]["reason"] == "truncated"
    assert lines[3]["log_probability"] is None
    for line, sample in zip(lines[:3], samples, strict=False):
        decoded = model.representation.decode(line["text"]).structure
        assert decoded == sample.structure
        assert line["log_probability"] == pytest.approx(sample.log_probability)


def test_a_run_that_breaks_leaves_no_half_file(tmp_path):
    def breaking():
        yield from generate(model=scripted("cut"), n=1)
        raise RuntimeError("gone")

    path = tmp_path / "samples.jsonl"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="gone"):
        write_samples(breaking(), path)
    assert path.read_text() == "before"


# Models


def test_a_model_folder_says_how_it_is_spoken_to(model, toy_model):
    assert model.name == str(toy_model)
    assert model.template.hash == template_named("kit-1").hash
    assert model.representation.name == "wyckoff"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"template_sha256": "ab" * 32}, "trained with abababababab"),
        ({"template": "kit-0"}, "no template 'kit-0'"),
    ],
)
def test_a_model_of_another_template_is_refused(toy_model, tmp_path, change, said):
    folder = shutil.copytree(toy_model, tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ModelError, match=said) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_without_a_manifest_is_refused(toy_model, tmp_path):
    folder = shutil.copytree(toy_model, tmp_path / "bare")
    (folder / "manifest.json").unlink()
    with pytest.raises(ModelError, match=r"manifest\.json"):
        load_model(folder)


# Infilling by models with a base's tokenizer


@pytest.mark.parametrize("tasks", [("generate", "infill"), ("generate",)])
def test_infill_asks_what_the_model_was_trained_to_answer(base_folder, tasks):
    """A base that had learned to infill was not asked to; what it drew after a text counted as part of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from crystallm_kit.engines.transformers_local import TransformersEngine
    from crystallm_kit.tokens.cutting import BaseCutter
    from crystallm_kit.tokens.tokenizer import prompt_ids

    folder = base_folder("llama")
    network, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    engine = TransformersEngine(network, tokenizer, device="cpu", threads=1)
    form, template = representation("compact"), template_named("crystal-text-llm")
    asked = Model("base", engine, form, template, ("Li", "Na", "K"), {}, tasks=frozenset(tasks))
    cell = rock_salt().get_primitive_structure()
    ranked = dict(infill(Crystal("NaCl", cell), "Na", model=asked))

    logs = {}
    for symbol in ("Li", "Na", "K"):
        if "infill" in tasks:
            prompt, answer = template.infill_prompt(form.encode(Crystal("NaCl", cell)), "Na"), symbol
        else:
            other = cell.copy()
            other.replace_species({"Na": symbol})
            prompt, answer = template.render(Conditions()), form.encode(Crystal("NaCl", other))
        before = prompt_ids(tokenizer, prompt)
        after = [*BaseCutter(tokenizer)(answer), tokenizer.eos_token_id]
        with torch.inference_mode():
            said = network(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        logs[symbol] = float(said[range(len(after)), after].sum())
    expected = torch.tensor([*logs.values()]).softmax(0).tolist()
    assert ranked == pytest.approx(dict(zip(logs, expected, strict=True)), rel=1e-2)
