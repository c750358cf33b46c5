"""Substitutes of a corpus: new, on the training side, in the early epochs alone, the same at every run."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.errors import EmptyInput, RecipeError, UserError
from crystallm_kit.recipes import from_dict
from crystallm_kit.records import Crystal
from crystallm_kit.text.wyckoff import text_to_symmetric
from crystallm_kit.tokens.corpus import CorpusRecipe, check_splits, load_corpus, prepare, shards_of
from crystallm_kit.tokens.drawing import StoredCorpus
from crystallm_kit.tokens.encoding import CrystalEncoder, EncodingRecipe
from crystallm_kit.tokens.splits import SPLITS
from crystallm_kit.tokens.substitutes import SUBSTITUTED, add_substitutes

RECIPE = CorpusRecipe(
    seed=1, validation_fraction=0.25, test_fraction=0.1, part_entries=8, substitutes=2, substituted_epochs=1
)


def salts():
    """Return rock salts of 12 compositions, with cells from Shannon's radii, and fluorites of 4."""
    cations = {"Li": 0.76, "Na": 1.02, "K": 1.38, "Rb": 1.52}
    anions = {"F": 1.33, "Cl": 1.81, "Br": 1.96}
    points = [[0, 0, 0], [0.5, 0.5, 0.5]]
    found = [
        (f"{c}{x}", Structure.from_spacegroup("Fm-3m", Lattice.cubic(2 * (r + s)), [c, x], points))
        for c, r in cations.items()
        for x, s in anions.items()
    ]
    for cation, a in {"Mg": 5.1, "Ca": 5.46, "Sr": 5.80, "Ba": 6.20}.items():
        fluorite = Structure.from_spacegroup(
            "Fm-3m", Lattice.cubic(a), [cation, "F"], [points[0], [0.25, 0.25, 0.25]]
        )
        found.append((f"{cation}F2", fluorite))
    return found


@pytest.fixture(scope="module")
def salt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "salts.parquet"
    names, structures = zip(*salts(), strict=True)
    properties = {"band_gap": [float(i) for i in range(len(names))]}
    pq.write_table(
        pa.table({"material_id": names, "cif": [str(CifWriter(s)) for s in structures], **properties}), path
    )
    return path


@pytest.fixture(scope="module")
def corpus(salt_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "out"
    return folder, prepare([salt_file], RECIPE, folder)


def rows(folder, split):
    return [row for shard in shards_of(folder, split) for row in pq.read_table(shard).to_pylist()]


def test_substitutes_are_written_and_counted(corpus):
    folder, report = corpus
    made = rows(folder, SUBSTITUTED)
    assert 5 < len(made) == report.n_rows[SUBSTITUTED] <= 2 * report.n_rows["train"]
    assert {row["split"] for row in made} == {"train"}
    assert all(row["id"].startswith("substitute ") for row in made)


def test_no_substitute_repeats_a_text_or_holds_out_a_composition(corpus):
    folder, report = corpus
    made = rows(folder, SUBSTITUTED)
    texts = [row["text"] for row in made] + [row["text"] for row in rows(folder, "train")]
    assert len(set(texts)) == len(texts)
    held_out = {row["composition"] for split in ("validation", "test") for row in rows(folder, split)}
    assert held_out
    assert not held_out & {row["composition"] for row in made}
    assert report.n_rows["validation"] > 0


def test_without_held_out_compositions_the_draws_would_have_made_some(corpus, tmp_path):
    """That none is held out above is the filter's doing: the same texts alone make held-out compositions."""
    folder, _ = corpus
    for shard in shards_of(folder, "train"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    add_substitutes(tmp_path, RECIPE.encoding, n_per_crystal=2, seed=1, max_tokens=512)
    held_out = {row["composition"] for split in ("validation", "test") for row in rows(folder, split)}
    assert held_out & {row["composition"] for row in rows(tmp_path, SUBSTITUTED)}


def test_a_substitute_has_the_prototype_of_its_original_and_no_property(corpus):
    folder, _ = corpus
    originals = [text_to_symmetric(row["text"]) for row in rows(folder, "train")]
    tokens = CrystalEncoder(EncodingRecipe(), seed=1).alphabet.tokens
    for row in rows(folder, SUBSTITUTED):
        position = int(row["id"].split()[1].partition("-")[0])
        made = text_to_symmetric(row["text"])
        assert made.spacegroup_number == originals[position].spacegroup_number
        assert sorted(made.counts.values()) == sorted(originals[position].counts.values())
        assert made.counts != originals[position].counts
        assert not any("gap" in tokens[i] for prompt in row["prompts"] for i in prompt)
    real = rows(folder, "train")[0]
    assert any("gap" in tokens[i] for prompt in real["prompts"] for i in prompt)


def test_epochs_hold_substitutes_only_as_long_as_the_recipe_says(corpus):
    folder, report = corpus
    stored = StoredCorpus(folder / "corpus.npz")
    n_real, n_made = report.n_rows["train"], report.n_rows[SUBSTITUTED]
    assert stored.n_crystals == n_real
    early, late = stored.examples(0), stored.examples(1)
    assert len(early.prompt_lengths) == n_real + n_made
    assert len(late.prompt_lengths) == n_real
    assert len(stored.validation().prompt_lengths) == report.n_rows["validation"]
    vocabulary = CrystalEncoder(EncodingRecipe(), seed=1).alphabet.tokens

    def compositions(examples):
        found = set()
        for i, n in enumerate(examples.prompt_lengths):
            ids = examples.tokens[examples.offsets[i] + n : examples.offsets[i + 1]]
            found.add("".join(vocabulary[t] for t in ids).partition("\n")[0])
        return found

    made = {row["text"].partition("\n")[0] for row in rows(folder, SUBSTITUTED)}
    real = {row["text"].partition("\n")[0] for row in rows(folder, "train")}
    assert compositions(early) == made | real
    assert compositions(late) == real


def test_later_epochs_are_those_of_the_corpus_without_substitutes(corpus, salt_file, tmp_path):
    folder, _ = corpus
    prepare([salt_file], replace(RECIPE, substitutes=0, substituted_epochs=0), tmp_path / "plain")
    plain, stored = StoredCorpus(tmp_path / "plain" / "corpus.npz"), StoredCorpus(folder / "corpus.npz")
    assert shards_of(tmp_path / "plain", SUBSTITUTED) == []
    for a, b in zip(plain.examples(1), stored.examples(1), strict=True):
        assert np.array_equal(a, b)


def test_a_loaded_corpus_has_its_splits_and_no_substitutes(corpus, tmp_path):
    folder, report = corpus
    loaded = load_corpus(folder, cache_dir=tmp_path)
    assert {split: loaded[split].num_rows for split in loaded} == {s: report.n_rows[s] for s in SPLITS}


def test_check_splits_counts_substitutes_as_training_crystals(corpus, tmp_path):
    folder, _ = corpus
    check_splits(folder)
    for shard in folder.glob("*.parquet"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    [shard] = shards_of(tmp_path, SUBSTITUTED)
    table = pq.read_table(shard)
    leaked = rows(tmp_path, "validation")[0]["composition"]
    column = pa.array([leaked, *table["composition"].to_pylist()[1:]])
    pq.write_table(
        table.set_column(table.schema.get_field_index("composition"), "composition", column), shard
    )
    with pytest.raises(UserError, match=f"1 compositions stand in more than one split.*{leaked}"):
        check_splits(tmp_path)


def test_another_run_makes_the_same_substitutes_in_any_number_of_processes(corpus, salt_file, tmp_path):
    folder, _ = corpus
    prepare([salt_file], RECIPE, tmp_path / "again", workers=2)
    assert rows(tmp_path / "again", SUBSTITUTED) == rows(folder, SUBSTITUTED)
    a, b = (StoredCorpus(f / "corpus.npz") for f in (folder, tmp_path / "again"))
    assert a.sha256 == b.sha256
    before = [shard.stat().st_mtime_ns for shard in shards_of(folder, SUBSTITUTED)]
    prepare([salt_file], RECIPE, folder)
    assert [shard.stat().st_mtime_ns for shard in shards_of(folder, SUBSTITUTED)] == before


def test_substitutes_of_a_killed_run_do_not_stay(corpus, salt_file, tmp_path):
    """A folder that a killed run left with substitutes gave them to a corpus whose recipe asked for none."""
    folder, _ = corpus
    [shard] = shards_of(folder, SUBSTITUTED)
    (tmp_path / "substituted-00007.parquet").write_bytes(shard.read_bytes())
    plain = replace(RECIPE, substitutes=0, substituted_epochs=0)
    report = prepare([salt_file], plain, tmp_path)
    assert shards_of(tmp_path, SUBSTITUTED) == []
    assert len(StoredCorpus(tmp_path / "corpus.npz").examples(0).prompt_lengths) == report.n_rows["train"]


def test_longer_substitutes_are_left_out(corpus, tmp_path):
    folder, _ = corpus
    for shard in shards_of(folder, "train"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    lengths = sorted(row["n_tokens"] for row in rows(folder, SUBSTITUTED))
    limit = lengths[len(lengths) // 2]
    add_substitutes(tmp_path, RECIPE.encoding, n_per_crystal=2, seed=1, max_tokens=limit)
    found = [row["n_tokens"] for row in rows(tmp_path, SUBSTITUTED)]
    assert found
    assert max(found) <= limit


def test_another_format_is_refused_before_anything_is_encoded(salt_file, tmp_path):
    with pytest.raises(ValueError, match="substitutes need the format 'wyckoff', got 'cif'"):
        CorpusRecipe(seed=1, encoding=EncodingRecipe(format="cif"), substitutes=1)
    with pytest.raises(RecipeError, match="got 'cif'; set substitutes: 0"):
        from_dict({"seed": 1, "substitutes": 1, "encoding": {"format": "cif"}}, CorpusRecipe)
    with pytest.raises(UserError, match="substitutes need the format 'wyckoff'"):
        add_substitutes(tmp_path, EncodingRecipe(format="cif"), n_per_crystal=1, seed=1, max_tokens=512)


def test_negative_numbers_of_substitutes_are_refused():
    for name in ("substitutes", "substituted_epochs"):
        with pytest.raises(ValueError, match="must not be negative"):
            CorpusRecipe(seed=1, **{name: -1})


def test_a_folder_without_training_crystals_makes_none(tmp_path):
    with pytest.raises(EmptyInput, match="no crystals to learn from"):
        add_substitutes(tmp_path, EncodingRecipe(), n_per_crystal=1, seed=1, max_tokens=512)


def test_a_crystal_encodes_alike_as_substitute_and_as_entry(corpus):
    """Its text read as a crystal and encoded again is the text."""
    folder, _ = corpus
    encoder = CrystalEncoder(EncodingRecipe(), seed=1)
    for row in rows(folder, SUBSTITUTED)[:5]:
        structure = encoder.format.decode(row["text"]).structure
        assert encoder(Crystal("x", structure)).text == row["text"]
