"""Preparing a corpus: duplicates, splits without leaks, shards, resuming, reasons."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.cli import main
from crystallm_kit.errors import EmptyInput, MissingExtra, ReadError, UserError
from crystallm_kit.recipes import load_recipe
from crystallm_kit.structures.augmentation import AugmentationRecipe
from crystallm_kit.text.compact import CompactRepresentation
from crystallm_kit.text.representation import REPRESENTATIONS
from crystallm_kit.tokens.corpus import (
    CorpusRecipe,
    check_splits,
    examples_dataset,
    load_corpus,
    pack,
    prepare,
    print_report,
    read_manifest,
    shards_of,
)
from crystallm_kit.tokens.drawing import (
    ConditionDropping,
    Examples,
    Sequences,
    StoredCorpus,
    StoredInfo,
    VocabularyInfo,
    write_stored,
)
from crystallm_kit.tokens.encoding import CrystalEncoder, EncodingRecipe
from crystallm_kit.tokens.parts import task_of
from crystallm_kit.tokens.splits import SPLITS, split_of_composition
from crystallm_kit.tokens.tokenizer import load_tokenizer, prompt_ids

RECIPE = CorpusRecipe(seed=1, validation_fraction=0.3, test_fraction=0.1, part_entries=8, shard_rows=10)


def rock_salt(a, cation, anion):
    basis = [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]]
    return Structure(basis, [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def caesium_chloride(a, cation, anion):
    return Structure(Lattice.cubic(a), [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def write_table(path, named, **columns):
    """Write (id, structure) pairs as a Parquet file of CIFs."""
    table = {
        "material_id": [name for name, _ in named],
        "cif": [s if isinstance(s, str) else str(CifWriter(s)) for _, s in named],
        **columns,
    }
    pq.write_table(pa.table(table), path)
    return path


def halides():
    """Return alkali halides: 20 compositions, two structures each, from Shannon's radii (angstrom)."""
    cations = {"Li": 0.76, "Na": 1.02, "K": 1.38, "Rb": 1.52, "Cs": 1.67}
    anions = {"F": 1.33, "Cl": 1.81, "Br": 1.96, "I": 2.20}
    found = []
    for cation, r in cations.items():
        for anion, s in anions.items():
            found.append((f"{cation}{anion}-B1", rock_salt(2 * (r + s), cation, anion)))
            found.append((f"{cation}{anion}-B2", caesium_chloride(1.18 * (r + s), cation, anion)))
    return found


@pytest.fixture(scope="module")
def halide_file(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data") / "halides.parquet", halides())


@pytest.fixture(scope="module")
def corpus(halide_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "out"
    return folder, prepare([halide_file], RECIPE, folder)


def rows(folder, split=None):
    shards = [shard for s in ([split] if split else SPLITS) for shard in shards_of(folder, s)]
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def test_every_crystal_is_in_one_split_and_every_composition_on_one_side(corpus):
    folder, report = corpus
    found = rows(folder)
    assert sorted(row["id"] for row in found) == sorted(name for name, _ in halides())
    assert report.n_entries == 40
    assert report.dropped == {}
    sides = {}
    for row in found:
        sides.setdefault(row["composition"], set()).add(row["split"])
    assert len(sides) == 20
    assert all(len(side) == 1 for side in sides.values())
    assert {split: len(rows(folder, split)) for split in SPLITS} == report.n_rows
    assert min(report.n_rows["train"], report.n_rows["validation"]) > 0
    assert sum(report.length_histogram.values()) == 40
    assert len(shards_of(folder, "train")) == -(-report.n_rows["train"] // 10)


def test_a_row_holds_the_ids_of_its_texts(corpus):
    folder, _ = corpus
    encoder = CrystalEncoder(EncodingRecipe(), seed=1)
    row = next(row for row in rows(folder) if row["id"] == "NaCl-B1")
    assert row["text"].startswith("Na1 Cl1 225\nNa a\nCl b\n5.66 ")
    assert "".join(encoder.alphabet.tokens[i] for i in row["texts"][0]) == row["text"]
    assert row["cell_formula"] == "Cl4 Na4"
    assert row["spacegroup_number"] == 225
    assert row["volume_per_formula_unit_angstrom3"] == pytest.approx(5.66**3 / 4, rel=1e-4)


def test_a_leak_in_the_shards_is_found(corpus, tmp_path):
    folder, _ = corpus
    check_splits(folder)
    leaked = rows(folder, "train")[0]
    for shard in [*shards_of(folder, "train"), *shards_of(folder, "validation")]:
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    schema = pq.read_schema(shards_of(folder, "train")[0])
    planted = pa.Table.from_pylist([{**leaked, "split": "validation"}], schema=schema)
    pq.write_table(planted, tmp_path / "validation-00009.parquet")
    with pytest.raises(UserError, match=leaked["composition"]):
        check_splits(tmp_path)


def test_more_data_moves_no_composition_to_another_side():
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.1}
    names = [f"X{i}" for i in range(3000)]
    sides = [split_of_composition(name, seed=3, **fractions) for name in names]
    assert sides == [split_of_composition(name, seed=3, **fractions) for name in names]
    assert sides != [split_of_composition(name, seed=4, **fractions) for name in names]
    # three standard deviations of 3,000 draws
    assert sides.count("validation") == pytest.approx(600, abs=66)
    assert sides.count("test") == pytest.approx(300, abs=50)


def test_of_duplicates_the_lowest_volume_per_formula_unit_stays(tmp_path):
    named = [("wide", rock_salt(5.8, "Na", "Cl")), ("close", rock_salt(5.6, "Na", "Cl")),
             ("supercell", rock_salt(5.7, "Na", "Cl") * (2, 1, 1)),
             ("other", caesium_chloride(3.4, "Na", "Cl")),
             ("same text", rock_salt(5.8001, "Na", "Cl"))]  # fmt: skip
    path = write_table(tmp_path / "in.parquet", named)
    kept = {}
    for rule in ("none", "formula_and_spacegroup", "canonical_text"):
        recipe = CorpusRecipe(seed=1, deduplicate=rule, validation_fraction=0, part_entries=2)
        report = prepare([path], recipe, tmp_path / rule)
        kept[rule] = [row["id"] for row in rows(tmp_path / rule)]
        assert report.dropped.get("duplicate", 0) == 5 - len(kept[rule])
    assert kept["none"] == ["wide", "close", "supercell", "other", "same text"]
    assert kept["formula_and_spacegroup"] == ["close", "other"]
    assert kept["canonical_text"] == ["wide", "close", "supercell", "other"]


def test_given_splits_are_kept_and_training_loses_what_they_share(tmp_path):
    train = write_table(tmp_path / "train.parquet", [("NaCl", rock_salt(5.6, "Na", "Cl")),
                                                     ("NaCl-B2", caesium_chloride(3.4, "Na", "Cl")),
                                                     ("KBr", rock_salt(6.6, "K", "Br"))])  # fmt: skip
    validation = write_table(tmp_path / "val.parquet", [("NaCl-val", rock_salt(5.66, "Na", "Cl"))])
    inputs = {"train": [train], "validation": [validation]}
    report = prepare(inputs, RECIPE, tmp_path / "drop")
    assert [row["id"] for row in rows(tmp_path / "drop", "train")] == ["KBr"]
    assert [row["id"] for row in rows(tmp_path / "drop", "validation")] == ["NaCl-val"]
    assert report.dropped == {"shared_composition": 2}
    with pytest.raises(UserError, match="2 rows share their composition"):
        prepare(inputs, replace(RECIPE, shared_compositions="refuse"), tmp_path / "refuse")
    prepare(inputs, replace(RECIPE, shared_compositions="keep"), tmp_path / "keep")
    assert len(rows(tmp_path / "keep", "train")) == 3


def test_what_cannot_be_used_is_counted_with_its_reason(tmp_path):
    disordered = Structure(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    many = Structure(Lattice.cubic(20), ["Li"] * 12, np.random.default_rng(0).random((12, 3)))
    named = [("good", rock_salt(5.6, "Na", "Cl")), ("mixed", disordered), ("long", many),
             ("broken", "data_x\n_cell_length_a ?")]  # fmt: skip
    path = write_table(tmp_path / "in.parquet", named)
    report = prepare([path], CorpusRecipe(seed=0, validation_fraction=0, max_tokens=60), tmp_path / "out")
    assert report.n_rows["train"] == 1
    assert report.dropped == {"not_read": 2, "too_long": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    reasons = {line["id"]: (line["reason"], line["detail"]) for line in lines}
    assert "disordered" in reasons["mixed"][1]
    assert "at most 60" in reasons["long"][1]
    assert set(reasons) == {"mixed", "broken", "long"}


def test_a_corpus_loads_as_a_dataset_dict(corpus, tmp_path):
    folder, report = corpus
    loaded = load_corpus(folder, cache_dir=tmp_path)
    assert {split: len(loaded[split]) for split in loaded} == {s: n for s, n in report.n_rows.items() if n}
    assert loaded["train"][0]["texts"] == rows(folder, "train")[0]["texts"]
    with pytest.raises(ReadError, match="no finished corpus"):
        load_corpus(tmp_path)


def test_the_arrays_for_training_hold_the_rows(corpus):
    folder, report = corpus
    stored = StoredCorpus(folder / "corpus.npz")
    assert stored.n_crystals == report.n_rows["train"]
    examples = stored.examples(0)
    for i, row in enumerate(rows(folder, "train")):
        example = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]].tolist()
        assert example[int(examples.prompt_lengths[i]) :] in row["texts"]
        assert len(example) <= row["n_tokens"]


def test_packed_rows_hold_every_example_once_and_no_loss_on_prompts():
    lengths = np.array([5, 3, 7, 2, 2, 9, 4, 30])
    packed = pack(lengths, 10)
    assert sorted(i for row in packed for i in row) == [0, 1, 2, 3, 4, 5, 6]  # the last one fits nowhere
    assert all(lengths[row].sum() <= 10 for row in packed)
    assert len(packed) == 4  # 32 tokens need at least 4 rows
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    examples = Examples(np.arange(offsets[-1]), offsets, np.full(8, 2))
    dataset = examples_dataset(examples, packed_length=10)
    assert len(dataset) == 4
    for row in dataset:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for i, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            assert label == (-100 if row["position_ids"][i] < 2 else token)
        assert all(row["input_ids"][start] in offsets for start in starts)


def test_augmented_views_become_further_texts_of_other_formats(halide_file, byte_level, tmp_path):
    augmentation = AugmentationRecipe(translate_probability=1.0, permute_sites_probability=0.5)
    encoding = EncodingRecipe(
        format="compact",
        template="crystal-text-llm",
        tokenizer=str(byte_level),
        n_texts=4,
        augmentation=augmentation,
    )
    prepare([halide_file], replace(RECIPE, encoding=encoding, max_tokens=2048), tmp_path / "out")
    assert {len(row["texts"]) for row in rows(tmp_path / "out")} == {4}


def test_a_corpus_of_a_base_tokenizer_holds_what_a_model_folder_needs(halide_file, byte_level, tmp_path):
    encoding = EncodingRecipe(
        format="compact", template="crystal-text-llm", tokenizer=str(byte_level), new_tokens="format",
    )  # fmt: skip
    out = tmp_path / "out"
    report = prepare([halide_file], replace(RECIPE, encoding=encoding, max_tokens=2048), out)
    assert sum(report.n_rows.values()) == 40
    tokenizer = load_tokenizer(out / "tokenizer")
    info = StoredCorpus(out / "corpus.npz").info
    assert info.vocabulary.size == len(tokenizer)
    assert (
        info.tokenizer_sha256 == hashlib.sha256((out / "tokenizer/tokenizer.json").read_bytes()).hexdigest()
    )
    form = CompactRepresentation()
    for row in rows(out):
        text = tokenizer.decode(row["texts"][0][:-1])
        assert text == row["text"]
        assert form.encode(form.decode(text)) == text
    examples = StoredCorpus(out / "corpus.npz").examples(0)
    ids = examples.tokens[: examples.offsets[1]].tolist()
    n = int(examples.prompt_lengths[0])
    prompt = tokenizer.decode(ids[1:n])
    assert ids[:n] == prompt_ids(tokenizer, prompt)
    assert prompt.startswith("Below is a description of a bulk material.")


def test_a_corpus_of_another_tokenizer_is_another_corpus(halide_file, byte_level, sentence_piece, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(byte_level, base)
    encoding = EncodingRecipe(format="compact", template="crystal-text-llm", tokenizer=str(base))
    recipe = replace(RECIPE, encoding=encoding, max_tokens=2048)
    first = prepare([halide_file], recipe, tmp_path / "out")
    shutil.rmtree(base)
    shutil.copytree(sentence_piece, base)
    with pytest.raises(UserError, match="other inputs"):
        prepare([halide_file], recipe, tmp_path / "out")
    assert prepare([halide_file], recipe, tmp_path / "other").sha256 != first.sha256


def test_vocabularies_beyond_uint16_keep_their_ids(tmp_path):
    texts = Sequences.of([[[128_255, 3]]], dtype=np.int32)
    prompts = Sequences.of([[[70_000]]], [[6]], dtype=np.int32)
    info = StoredInfo(VocabularyInfo(128_256, None, 3), "compact", {}, "crystal-text-llm", "0")
    write_stored(tmp_path / "x.npz", (texts, prompts), (texts, prompts), info, seed=0,
                 dropping=ConditionDropping(), other_description_probability=0)  # fmt: skip
    assert StoredCorpus(tmp_path / "x.npz").examples(0).tokens.tolist() == [70_000, 128_255, 3]


def test_a_kit_corpus_has_the_hash_and_is_found_finished_as_before_base_tokenizers(corpus, halide_file):
    """The parts' hash of the first 40 rows, and a manifest without the keys that came later."""
    folder, report = corpus
    tasks = task_of(0, [], folder=folder, recipe=RECIPE.encoding, seed=1, max_tokens=512, split="")
    assert tasks.sha256 == "b4d2d83f3ddedf9334a866afa93c20e6ab2c7354519133ce01e50b63fe9fd469"
    manifest = folder / "manifest.json"
    kept = manifest.read_text()
    old = json.loads(kept)
    del old["recipe"]["encoding"]["tokenizer"], old["recipe"]["encoding"]["new_tokens"]
    manifest.write_text(json.dumps(old))
    try:
        assert prepare([halide_file], RECIPE, folder) == report
    finally:
        manifest.write_text(kept)


def test_a_finished_corpus_is_not_made_again_and_another_one_is_refused(corpus, halide_file):
    folder, report = corpus
    shard = shards_of(folder, "train")[0]
    before = shard.stat().st_mtime_ns
    assert prepare([halide_file], RECIPE, folder) == report
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another recipe or other inputs"):
        prepare([halide_file], replace(RECIPE, seed=2), folder)


def test_missing_and_empty_inputs_are_errors(tmp_path, halide_file):
    with pytest.raises(ReadError):
        prepare([tmp_path / "nothing.parquet"], RECIPE, tmp_path / "out")
    with pytest.raises(EmptyInput, match="no files"):
        prepare([], RECIPE, tmp_path / "out")
    with pytest.raises(UserError, match="no split 'dev'"):
        prepare({"dev": [halide_file]}, RECIPE, tmp_path / "out")
    with pytest.raises(EmptyInput, match="no crystal is left"):
        prepare([halide_file], replace(RECIPE, max_tokens=3), tmp_path / "out")


def test_the_report_prints_what_was_left_out(corpus, capsys):
    _, report = corpus
    print_report(replace(report, dropped={"too_long": 7}))
    printed = capsys.readouterr().out
    assert "left out: too long" in printed
    assert "0 to 31" in printed


def test_a_recipe_file_becomes_a_corpus_recipe(tmp_path):
    path = tmp_path / "corpus.yaml"
    path.write_text(
        "seed: 4\ndeduplicate: formula_and_spacegroup\nencoding:\n  format: cif\n  template: cif-crystallm\n"
        "  augmentation:\n    translate_probability: 0.5\n"
    )
    recipe = load_recipe(path, CorpusRecipe)
    assert recipe.deduplicate == "formula_and_spacegroup"
    assert recipe.encoding.augmentation.translate_probability == 0.5


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_message_says_what_to_install(halide_file, tmp_path):
    with pytest.raises(MissingExtra, match=r"crystallm-kit\[ray\]"):
        prepare([halide_file], RECIPE, tmp_path / "out", executor="ray")


@pytest.mark.slow
def test_over_ray_the_corpus_is_the_same(corpus, halide_file, tmp_path):
    pytest.importorskip("ray", reason="needs the extra [ray]")
    prepare([halide_file], RECIPE, tmp_path / "ray", workers=2, executor="ray")
    assert rows(tmp_path / "ray") == rows(corpus[0])


def test_two_processes_make_the_same_corpus(corpus, halide_file, tmp_path):
    report = prepare([halide_file], RECIPE, tmp_path / "two", workers=2)
    assert rows(tmp_path / "two") == rows(corpus[0])
    assert report.sha256 == corpus[1].sha256


KILLED = """
import sys, time
from crystallm_kit.tokens.corpus import CorpusRecipe, prepare
recipe = CorpusRecipe(seed=1, validation_fraction=0.3, test_fraction=0.1, part_entries=8, shard_rows=10)
prepare([sys.argv[1]], recipe, sys.argv[2], on_part=lambda part: time.sleep(0.5))
"""


def test_a_killed_run_goes_on_where_it_was(corpus, halide_file, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(halide_file), str(out)], env=os.environ)
    deadline = time.monotonic() + 60
    while not (out / ".parts" / "part-00001.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    report = prepare([halide_file], RECIPE, out)
    assert report.n_kept_parts >= 2
    assert report.n_new_parts == 5 - report.n_kept_parts
    assert rows(out) == rows(corpus[0])
    assert report.sha256 == corpus[1].sha256
    assert not (out / ".parts").exists()


def test_cif_rows_state_symmetry_and_cell_as_wyckoff_rows_do(corpus, halide_file, tmp_path):
    encoding = EncodingRecipe(format="cif", template="cif-crystallm")
    report = prepare([halide_file], replace(RECIPE, encoding=encoding, max_tokens=2048), tmp_path / "cif")
    assert report.n_unknown_tokens == 0
    columns = ("id", "split", "composition", "spacegroup_number", "cell_formula")
    facts = [[row[name] for name in columns] for row in rows(tmp_path / "cif")]
    assert facts == [[row[name] for name in columns] for row in rows(corpus[0])]


@pytest.fixture(scope="module")
def cif_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifs")
    for name, structure in halides()[:6]:
        CifWriter(structure).write_file(folder / f"{name}.cif")
    return folder


@pytest.mark.parametrize("form", sorted(REPRESENTATIONS))
def test_the_command_prepares_every_format_for_a_base_model(form, cif_folder, byte_level, tmp_path):
    out = tmp_path / "out"
    options = ["--set", "validation_fraction=0", "--set", "max_tokens=4096", "--out", str(out)]
    asked = ["prepare", str(cif_folder), "--format", form, "--tokenizer", str(byte_level), *options]
    assert main(asked) == 0
    manifest = read_manifest(out)
    template = "crystal-text-llm" if form == "compact" else "words-1"
    assert manifest["recipe"]["encoding"]["template"] == template
    assert manifest["info"]["vocabulary"]["n_base"] == manifest["info"]["vocabulary"]["size"]
    tokenizer = load_tokenizer(out / "tokenizer")
    for row in rows(out, "train"):
        assert tokenizer.decode(row["texts"][0][:-1]) == row["text"]


@pytest.mark.parametrize("form", ["compact", "xyz"])
def test_without_a_tokenizer_the_command_says_which_pairs_work(form, cif_folder, tmp_path, capsys):
    assert main(["prepare", str(cif_folder), "--format", form, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "Without a tokenizer: wyckoff with kit-1, cif with cif-crystallm. With one:" in said
    assert not (tmp_path / "out").exists()
