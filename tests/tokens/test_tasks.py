"""Tasks beside generation: as often as asked, true of the crystal, refused where they cannot be said."""

import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.errors import ImpossibleRequest, RecipeError, UserError
from crystallm_kit.recipes import from_dict
from crystallm_kit.records import Crystal
from crystallm_kit.text.infilling import mask_element
from crystallm_kit.text.prompts import template_named
from crystallm_kit.text.representation import REPRESENTATIONS, representation
from crystallm_kit.tokens.corpus import CorpusRecipe, prepare
from crystallm_kit.tokens.drawing import (
    ConditionDropping,
    Sequences,
    StoredCorpus,
    draw_examples,
)
from crystallm_kit.tokens.encoding import CrystalEncoder, EncodingRecipe, check_pair, write_tokenizer
from crystallm_kit.tokens.tasks import answers_of, pairs_of
from crystallm_kit.tokens.tokenizer import load_tokenizer

CARBIDE = Crystal(
    "CaC2",  # AFLOW A2B_tI6_139_e_a
    Structure.from_spacegroup(139, Lattice.tetragonal(3.89, 6.38), ["Ca", "C"], [[0, 0, 0], [0, 0, 0.4]]),
    {"band_gap_ev": 1.234, "bulk_modulus_gpa": 49.6},
)
COPPER = Crystal("Cu", Structure.from_spacegroup(225, Lattice.cubic(3.615), ["Cu"], [[0, 0, 0]]))
MIXTURE = {"generate": 0.5, "infill": 0.3, "property": 0.2}


def encoder_of(base, folder, form="compact", **settings) -> CrystalEncoder:
    recipe = EncodingRecipe(
        **{"format": form, "template": "words-1", "tokenizer": str(base), "tasks": MIXTURE, **settings}
    )
    write_tokenizer(recipe, folder / "tokenizer")
    return CrystalEncoder(recipe, seed=1, tokenizer_folder=folder / "tokenizer")


def drawn(encoder, crystals, seed=0):
    """Return (prompt, completion) of one epoch, as texts."""
    by_id = {crystal.id: crystal for crystal in crystals}
    known = {name: encoder(crystal) for name, crystal in by_id.items()}
    encoded = [known[crystal.id] for crystal in crystals]
    examples = draw_examples(
        Sequences.of([e.texts for e in encoded], dtype=np.int32),
        Sequences.of([e.prompts for e in encoded], [e.prompt_kinds for e in encoded], dtype=np.int32),
        np.random.default_rng(seed),
        dropping=ConditionDropping(), other_description_probability=1.0, tasks=encoder.recipe.tasks,
    )  # fmt: skip
    tokenizer, found = encoder.tokenizer, []
    for i, n in enumerate(examples.prompt_lengths):
        ids = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        found.append((tokenizer.decode(ids[1:n]), tokenizer.decode(ids[n:-1])))
    return found


@pytest.mark.parametrize("form", sorted(REPRESENTATIONS))
def test_examples_of_every_task_are_true_of_the_crystal(form, byte_level, tmp_path):
    encoder = encoder_of(byte_level, tmp_path, form)
    template = template_named("words-1", format=form)
    text = representation(form).encode(CARBIDE)
    texts = (
        encoder.format.encode_descriptions(CARBIDE) if form == "wyckoff" else [text]
    )  # equivalent ones are drawn too
    answers = answers_of(CARBIDE, 139)
    seen = Counter()
    for prompt, completion in drawn(encoder, [CARBIDE] * 300):
        if completion in texts:
            seen["generate"] += 1
            template.parse(prompt)  # raises if it is none
        elif "[MASK]" in prompt:
            seen["infill"] += 1
            element = template.infill_answer(completion)
            assert any(mask_element(t, element, form) in prompt for t in texts)
        else:
            seen["property"] += 1
            assert any(t in prompt for t in texts)
            read = {
                name: template.property_answer(completion, name)
                for name in answers
                if any(prompt == template.property_prompt(t, name, np.random.default_rng(s))
                       for t in texts for s in range(12))
            }  # fmt: skip
            ((name, value),) = read.items()
            known = answers[name]
            assert value == (pytest.approx(known, abs=0.51) if isinstance(known, float) else known)
    # three standard deviations of 300 draws
    for name, share in MIXTURE.items():
        assert seen[name] == pytest.approx(300 * share, abs=3 * (300 * share * (1 - share)) ** 0.5)


def test_a_crystal_that_cannot_be_asked_takes_another_task(byte_level, tmp_path):
    """Of copper no bulk modulus is known."""
    settings = {"tasks": {"generate": 0.2, "property": 0.8}, "properties": ("bulk_modulus_gpa",)}
    encoder = encoder_of(byte_level, tmp_path, **settings)
    found = drawn(encoder, [COPPER, CARBIDE] * 100)
    assert all(completion == representation("compact").encode(COPPER) for _, completion in found[::2])
    asked = [completion for _, completion in found[1::2] if completion == "50 GPa"]
    assert 65 < len(asked) < 95


def test_what_can_be_asked_follows_from_the_crystal():
    answers = answers_of(CARBIDE, 139)
    assert list(answers) == ["band_gap_ev", "density_g_cm3", "bulk_modulus_gpa", "is_metal", "crystal_system"]
    # Ca2C4 in 96.54 A^3: (2 * 40.078 + 4 * 12.011) u = 128.2 u, 2.205 g/cm3
    assert answers["density_g_cm3"] == pytest.approx(2.205, abs=0.002)
    assert (answers["is_metal"], answers["crystal_system"]) == (False, "tetragonal")
    metal = Crystal("Cu", COPPER.structure, {"band_gap": 0.0})
    assert answers_of(metal, None)["is_metal"] is True
    assert "is_metal" not in answers_of(COPPER, 225)


def test_there_is_a_pair_for_every_element_and_property():
    template = template_named("words-1", format="compact")
    text = representation("compact").encode(CARBIDE)
    pairs = pairs_of(CARBIDE, [text], template, np.random.default_rng(0), tasks=MIXTURE, spacegroup=139)
    assert sorted(answer for _, prompt, answer in pairs if "[MASK]" in prompt) == ["C", "Ca"]
    assert len(pairs) == 2 + 5
    only = pairs_of(CARBIDE, [text], template, np.random.default_rng(0), tasks={"infill": 1.0})
    assert len(only) == 2


def test_crystal_text_llms_infilling_is_the_published_prompt(byte_level, tmp_path):
    encoder = encoder_of(
        byte_level, tmp_path, template="crystal-text-llm", tasks={"generate": 2, "infill": 1},
        format_settings={"length_decimals": 1, "angle_decimals": 0, "coordinate_decimals": 2},
    )  # fmt: skip
    template = template_named("crystal-text-llm")
    infill = [(p, c) for p, c in drawn(encoder, [CARBIDE] * 200) if "[MASK]" in p]
    assert 45 < len(infill) < 90
    assert {c for _, c in infill} == {"C", "Ca"}
    for prompt, completion in infill:
        assert prompt == template.infill_prompt(encoder.format.encode(CARBIDE), completion)


def test_seed_and_epoch_fix_the_tasks_of_a_stored_corpus(byte_level, tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["a"], "cif": [str(CifWriter(CARBIDE.structure))], "gap": [1.5]}), path)
    encoding = EncodingRecipe(format="compact", template="words-1", tokenizer=str(byte_level), tasks=MIXTURE)
    recipe = CorpusRecipe(seed=1, encoding=encoding, validation_fraction=0.0, max_tokens=4096)
    prepare([path], recipe, tmp_path / "out")
    corpus, again = (StoredCorpus(tmp_path / "out" / "corpus.npz") for _ in range(2))
    assert corpus.tasks == MIXTURE
    epochs = [corpus.examples(epoch).tokens.tolist() for epoch in range(40)]
    assert epochs == [again.examples(epoch).tokens.tolist() for epoch in range(40)]
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    texts = [tokenizer.decode(ids) for ids in epochs]
    n_infill = sum("[MASK]" in text for text in texts)
    n_property = sum(bool(re.search(r"(eV|g/cm3|metal|onal)<\|end\|>$", text)) for text in texts)
    assert n_infill
    assert n_property
    assert n_infill + n_property < 40


def test_tasks_that_do_not_fit_leave_the_crystal_in(byte_level, tmp_path):
    encoded = encoder_of(byte_level, tmp_path)(CARBIDE)
    assert encoded.has_pairs
    without = encoded.without_long_pairs(20)
    assert not without.has_pairs
    assert without.prompts == encoded.prompts[:16]
    assert encoded.without_long_pairs(encoded.longest) == encoded


def test_a_crystal_that_no_task_can_be_asked_of_is_left_out_with_its_reason(byte_level, tmp_path):
    path = tmp_path / "in.parquet"
    cifs = [str(CifWriter(crystal.structure)) for crystal in (CARBIDE, COPPER)]
    pq.write_table(pa.table({"id": ["CaC2", "Cu"], "cif": cifs, "bulk_modulus": [49.6, None]}), path)
    encoding = EncodingRecipe(
        format="compact", template="words-1", tokenizer=str(byte_level), tasks={"property": 1.0},
        properties=("bulk_modulus_gpa",),
    )  # fmt: skip
    recipe = CorpusRecipe(seed=1, encoding=encoding, validation_fraction=0.0, max_tokens=4096)
    report = prepare([path], recipe, tmp_path / "out")
    assert report.n_rows["train"] == 1
    assert "it can be asked none of the tasks property" in (tmp_path / "out" / "dropped.jsonl").read_text()


def test_data_without_the_property_are_refused_before_the_work(byte_level, tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(
        pa.table({"id": ["a"], "cif": [str(CifWriter(CARBIDE.structure))], "e_form": [-1.5]}), path
    )
    encoding = EncodingRecipe(
        format="compact", template="words-1", tokenizer=str(byte_level), properties=("bulk_modulus_gpa",)
    )
    with pytest.raises(UserError, match="no entry has the property 'bulk_modulus_gpa'") as caught:
        prepare([path], CorpusRecipe(seed=1, encoding=encoding), tmp_path / "out")
    assert str(path) in str(caught.value)
    assert "Columns found: formation_energy_ev_per_atom." in str(caught.value)
    assert "bulk_modulus, bulk_modulus_vrh, k_vrh" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ({"tasks": {"infil": 1.0}}, "no task 'infil'; did you mean 'infill'"),
        ({"tasks": {"generate": 0, "infill": 0.0}}, "all shares are 0"),
        ({"tasks": {"generate": -0.5}}, "the share of 'generate' is -0.5"),
        ({"properties": ["bulk_modulus"]}, "did you mean 'bulk_modulus_gpa'"),
    ],
)
def test_a_recipe_of_unknown_tasks_is_refused_with_the_nearest_name(encoding, message):
    with pytest.raises(RecipeError, match=message):
        from_dict({"seed": 1, "encoding": encoding}, CorpusRecipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "kit-1", "tasks": {"infill": 1.0}}, "has no prompts for the task 'infill'"),
        (
            {"format": "compact", "template": "crystal-text-llm", "tasks": {"property": 1.0}},
            "has no prompts for the task 'property'; it has them for generate, infill",
        ),
        (
            {"format": "compact", "template": "crystal-text-llm", "properties": ("bulk_modulus_gpa",)},
            "cannot say 'bulk_modulus_gpa'; it can say band_gap_ev",
        ),
    ],
)
def test_a_template_that_cannot_say_it_is_refused(settings, message):
    with pytest.raises(ImpossibleRequest, match=message):
        check_pair(EncodingRecipe(tokenizer="x", **settings))
