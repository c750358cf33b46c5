"""Epochs drawn from stored sequences: true of the crystal, as the template writes, repeatable."""

from collections import Counter

import numpy as np
import pytest
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Structure

from crystallm_kit.errors import EmptyInput, ReadError
from crystallm_kit.records import Crystal
from crystallm_kit.text.conditions import conditions_set
from crystallm_kit.text.prompts import template_named, training_conditions
from crystallm_kit.tokens.drawing import (
    ConditionDropping,
    Sequences,
    StoredCorpus,
    draw_examples,
    write_drawn,
    write_stored,
)
from crystallm_kit.tokens.encoding import CrystalEncoder, EncodingRecipe
from crystallm_kit.training.batches import ArraySource

PEROVSKITE = Crystal(
    "BaTiO3",  # AFLOW AB3C_cP5_221_a_c_b
    Structure(
        Lattice.cubic(4.0), ["Ba", "Ti", "O", "O", "O"],
        [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]),
    {"band_gap_ev": 1.8, "formation_energy_ev_per_atom": -3.4, "e_above_hull": 0.0},
)  # fmt: skip
WURTZITE = Crystal(
    "ZnS",  # AFLOW AB_hP4_186_b_b
    Structure.from_spacegroup(
        "P6_3mc", Lattice.hexagonal(3.822, 6.26), ["Zn", "S"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.3748]]),
)  # fmt: skip
CRYSTALS = [PEROVSKITE, WURTZITE]
ENCODER = CrystalEncoder(EncodingRecipe(), seed=5)
TOKENS = ENCODER.alphabet.tokens


def sequences(crystals, encoder=ENCODER):
    known = {id(crystal): encoder(crystal) for crystal in {id(c): c for c in crystals}.values()}
    encoded = [known[id(crystal)] for crystal in crystals]
    texts = Sequences.of([e.texts for e in encoded])
    return texts, Sequences.of([e.prompts for e in encoded], [e.prompt_kinds for e in encoded])


def drawn_texts(examples):
    """Return (prompt, text) of each example."""
    found = []
    for i, n in enumerate(examples.prompt_lengths):
        words = [TOKENS[t] for t in examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]]
        found.append(("".join(words[:n]), "".join(words[n:])))
    return found


def draw(crystals, seed, *, other=1.0, **dropping):
    rng = np.random.default_rng(seed)
    settings = {"dropping": ConditionDropping(**dropping), "other_description_probability": other}
    return draw_examples(*sequences(crystals), rng, **settings)


def test_every_drawn_prompt_is_what_the_template_renders_and_true_of_its_crystal():
    template = template_named("kit-1")
    copies = [PEROVSKITE, WURTZITE] * 200
    seen = set()
    for crystal, (prompt, _) in zip(copies, drawn_texts(draw(copies, 1)), strict=True):
        conditions = template.parse(prompt)
        assert template.render(conditions) == prompt
        known = training_conditions(
            crystal, np.random.default_rng(0),
            none_probability=0, keep_probability=1, only_elements_probability=1,
            spacegroup_number={"BaTiO3": 221, "ZnS": 186}[crystal.id],
            n_primitive_sites=len(crystal.structure),
        )  # fmt: skip
        for name in conditions_set(conditions):
            if name == "elements":
                assert set(conditions.elements) <= set(known.elements)
                assert not conditions.only_elements or set(conditions.elements) == set(known.elements)
            elif name in conditions.properties:
                value, stated = known.properties[name].low, conditions.properties[name].low
                assert stated == pytest.approx(value, abs=0.0051)
            else:
                assert getattr(conditions, name) == getattr(known, name)
        seen.add(prompt)
    assert len(seen) > 150


def test_conditions_are_drawn_as_training_conditions_draws_them():
    n = 1200
    rng = np.random.default_rng(0)
    facts = {"spacegroup_number": 221, "n_primitive_sites": 5}
    template = template_named("kit-1")

    def profile(all_conditions):
        counts = Counter()
        for c in all_conditions:
            counts.update(conditions_set(c))
            counts["none"] += not conditions_set(c)
            counts["only"] += c.only_elements
            counts[f"{len(c.elements)} named, others too"] += bool(c.elements) and not c.only_elements
            counts[f"{len(conditions_set(c))} in all"] += 1
        return counts

    expected = profile(training_conditions(PEROVSKITE, rng, **facts) for _ in range(n))
    drawn = profile(template.parse(prompt) for prompt, _ in drawn_texts(draw([PEROVSKITE] * n, 2)))
    assert set(drawn) == set(expected)
    for name, count in expected.items():
        # five standard deviations of a difference of two binomial counts
        assert abs(drawn[name] - count) < 5 * np.sqrt(2 * count) + 5, name


def test_a_text_is_one_of_the_descriptions_and_the_canonical_one_when_asked():
    descriptions = ENCODER.format.encode_descriptions(PEROVSKITE)
    assert len(descriptions) == 2
    drawn = Counter(text for _, text in drawn_texts(draw([PEROVSKITE] * 600, 3, other=0.5)))
    assert set(drawn) == set(descriptions)
    assert drawn[descriptions[0]] == pytest.approx(450, abs=50)  # one half, and half of the other half
    canonical = {text for _, text in drawn_texts(draw([PEROVSKITE] * 50, 3, other=0.0))}
    assert canonical == {descriptions[0]}


def test_texts_end_with_the_end_token():
    examples = draw(CRYSTALS, 0)
    assert [int(examples.tokens[end - 1]) for end in examples.offsets[1:]] == [ENCODER.cut.end_id] * 2


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "corpus.npz"
    train, validation = sequences(CRYSTALS * 20), sequences(CRYSTALS)
    write_stored(
        path,
        train,
        validation,
        ENCODER.info,
        seed=7,
        dropping=ConditionDropping(),
        other_description_probability=0.5,
    )
    return path


def test_seed_and_epoch_fix_an_epoch(stored):
    corpus, again = StoredCorpus(stored), StoredCorpus(stored)
    assert drawn_texts(corpus.examples(3)) == drawn_texts(again.examples(3))
    assert drawn_texts(corpus.examples(3)) != drawn_texts(corpus.examples(4))
    assert drawn_texts(corpus.examples(3)) != drawn_texts(StoredCorpus(stored, seed=8).examples(3))
    assert corpus.sha256 != StoredCorpus(stored, seed=8).sha256
    assert drawn_texts(corpus.validation()) == drawn_texts(again.validation())
    assert corpus.n_crystals == 40


def test_drawn_epochs_are_read_by_training(stored, tmp_path):
    corpus = StoredCorpus(stored)
    write_drawn(corpus, tmp_path / "drawn.npz", 2)
    source = ArraySource(tmp_path / "drawn.npz")
    assert source.n_epochs == 2
    assert drawn_texts(source.examples(1)) == drawn_texts(corpus.examples(1))
    assert drawn_texts(source.validation()) == drawn_texts(corpus.validation())
    assert source.info.vocabulary.size == len(TOKENS)
    assert TOKENS[source.info.vocabulary.eos_token_id] == "end"
    assert TOKENS[source.info.vocabulary.element_token_ids["Ba"]] == "Ba"


def test_a_file_that_is_no_corpus_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", tokens=np.arange(3))
    with pytest.raises(ReadError, match="not a stored corpus"):
        StoredCorpus(tmp_path / "other.npz")


def test_whole_prompts_are_taken_one_at_a_time():
    encoder = CrystalEncoder(EncodingRecipe(format="cif", template="cif-crystallm"), seed=5)
    texts, prompts = sequences(CRYSTALS, encoder)
    settings = {"dropping": ConditionDropping(), "other_description_probability": 0.0}
    examples = draw_examples(texts, prompts, np.random.default_rng(0), **settings)
    assert examples.prompt_lengths.tolist() == [0, 0]  # CrystaLLM's prompt is the text's own beginning
    words = [encoder.alphabet.tokens[t] for t in examples.tokens[: examples.offsets[1]]]
    assert "".join(words) == encoder.format.encode(PEROVSKITE)

    several = Sequences.of([[[1, 1], [2, 2, 2]], [[3]]], [[6, 6], [6]])
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        two = draw_examples(Sequences.of([[[8]], [[9]]]), several, rng, **settings)
        seen.add(tuple(two.tokens.tolist()))
    assert seen == {(1, 1, 8, 3, 9), (2, 2, 2, 8, 3, 9)}


# ---------------------------------------------------------------- a property in focus

STIFF = Crystal(PEROVSKITE.id, PEROVSKITE.structure, {**PEROVSKITE.properties, "bulk_modulus_gpa": 170.0})


def drawn_with_focus(crystals, seed, **dropping):
    recipe = EncodingRecipe(dropping=ConditionDropping(focus="bulk_modulus_gpa", **dropping))
    examples = draw_examples(
        *sequences(crystals, CrystalEncoder(recipe, seed=5)), np.random.default_rng(seed),
        dropping=recipe.dropping, other_description_probability=0.0,
    )  # fmt: skip
    return [template_named("kit-1").parse(prompt) for prompt, _ in drawn_texts(examples)]


def test_a_property_in_focus_is_stated_as_often_as_asked_and_often_alone():
    n = 4000
    drawn = drawn_with_focus(
        [STIFF] * n,
        1,
        none_probability=0.2,
        keep_probability=0.3,
        focus_probability=0.75,
        alone_probability=0.4,
    )
    stated = [c for c in drawn if "bulk_modulus_gpa" in c.properties]
    alone = [c for c in stated if list(conditions_set(c)) == ["bulk_modulus_gpa"]]
    spread = 4 * (0.25 / n) ** 0.5
    assert abs(len(stated) / n - 0.8 * 0.75) < spread
    # besides those drawn alone, those of which all of the ten other conditions were dropped
    assert abs(len(alone) / len(stated) - (0.4 + 0.6 * 0.7**10)) < 2 * spread
    assert {c.properties["bulk_modulus_gpa"].low for c in stated} == {170.0}


def test_values_of_a_property_in_focus_scatter_as_asked():
    drawn = drawn_with_focus(
        [STIFF] * 3000, 2, none_probability=0.0, focus_probability=1.0, focus_spread=0.1, focus_values=200
    )
    values = np.array([c.properties["bulk_modulus_gpa"].low for c in drawn])
    assert len(np.unique(values)) > 150
    logs = np.log(values / 170.0)
    assert logs.std() == pytest.approx(0.1, rel=0.2)
    assert abs(logs.mean()) < 0.03


def test_crystals_without_the_property_in_focus_are_drawn_as_ever():
    mixed = drawn_with_focus([STIFF, WURTZITE] * 500, 3, none_probability=0.0, keep_probability=1.0,
                             focus_probability=1.0, alone_probability=1.0)  # fmt: skip
    assert all(list(conditions_set(c)) == ["bulk_modulus_gpa"] for c in mixed[::2])
    assert all(
        "bulk_modulus_gpa" not in c.properties and len(list(conditions_set(c))) > 5 for c in mixed[1::2]
    )


def test_a_focus_counts_once_in_the_longest_prompt():
    def longest(**dropping):
        return CrystalEncoder(EncodingRecipe(dropping=ConditionDropping(**dropping)), seed=5)(STIFF).longest

    assert longest(focus="bulk_modulus_gpa", focus_values=20) == longest()


def test_a_focus_that_no_crystal_has_is_refused(tmp_path):
    recipe = EncodingRecipe(dropping=ConditionDropping(focus="bulk_modulus_gpa"))
    encoder = CrystalEncoder(recipe, seed=5)
    both = sequences(CRYSTALS, encoder)
    with pytest.raises(EmptyInput, match="no training crystal has the property 'bulk_modulus_gpa'"):
        write_stored(
            tmp_path / "c.npz", both, both, encoder.info, seed=1, dropping=recipe.dropping,
            other_description_probability=0.0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="did you mean 'bulk_modulus_gpa'"):
        EncodingRecipe(dropping=ConditionDropping(focus="bulk_modulus"))


def test_corpora_without_a_focus_are_what_they_were():
    """Settings that came later change neither the hash nor the draws of corpora that do without them."""
    assert set(EncodingRecipe().identity()["dropping"]) == {
        "none_probability", "keep_probability", "only_elements_probability",
    }  # fmt: skip
