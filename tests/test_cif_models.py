"""Models that write CrystaLLM's CIF, trained from scratch: without an end token, they stop all the same."""

from pathlib import Path

import pytest
import torch
from pymatgen.core import Lattice, Structure

from crystallm_kit.generation import generate, load_model
from crystallm_kit.models.checkpoints import ModelRecipe
from crystallm_kit.records import Conditions, Crystal
from crystallm_kit.structures.files import write
from crystallm_kit.tokens.corpus import CorpusRecipe, prepare
from crystallm_kit.tokens.drawing import StoredCorpus
from crystallm_kit.tokens.encoding import EncodingRecipe
from crystallm_kit.training.loop import train
from crystallm_kit.training.recipe import DataRecipe, OptimizerRecipe, ScheduleRecipe, TrainingRecipe

# Rock salts with their lattice parameters in angstrom.
SALTS = (
    ("Na", "Cl", 5.64), ("K", "Cl", 6.29), ("Li", "F", 4.03),
    ("Mg", "O", 4.21), ("Na", "F", 4.62), ("Rb", "I", 7.34),
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cif")
    crystals = [
        Crystal(a + b, Structure.from_spacegroup(225, Lattice.cubic(length), [a, b], [[0] * 3, [0.5] * 3]))
        for a, b, length in SALTS
    ]
    write(crystals, folder / "salts.extxyz")
    encoding = EncodingRecipe(format="cif", template="cif-crystallm")
    recipe = CorpusRecipe(seed=1, validation_fraction=0.2, test_fraction=0.0, encoding=encoding)
    prepare([str(folder / "salts.extxyz")], recipe, folder / "corpus")
    return folder / "corpus"


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = TrainingRecipe(
        seed=1,
        steps=12,
        batch_tokens=1024,
        ema_decay=0.0,
        model=ModelRecipe(hidden_size=32, n_layers=2, n_heads=2, max_positions=400),
        data=DataRecipe(corpus=corpus),
        optimizer=OptimizerRecipe(lr=2e-2),
        schedule=ScheduleRecipe(warmup_steps=2),
    )
    result = train(recipe, tmp_path_factory.mktemp("run") / "run")
    yield load_model(result.model_folder, device="cpu")
    torch.set_num_threads(before)


def test_a_cif_corpus_has_no_end_token_and_its_texts_end_in_two_newlines(corpus):
    stored = StoredCorpus(corpus / "corpus.npz")
    vocabulary = stored.info.vocabulary
    assert (vocabulary.size, vocabulary.eos_token_id, vocabulary.pad_token_id) == (371, None, None)
    examples = stored.examples(0)
    assert examples.prompt_lengths.tolist() == [0] * stored.n_crystals  # the prompt begins the text itself
    ends = [examples.tokens[end - 2 : end].tolist() for end in examples.offsets[1:]]
    assert ends == [[142, 142]] * stored.n_crystals


def test_the_exported_folder_generates_with_crystallms_stop_rule(model):
    assert model.engine.stop == "\n\n"
    assert model.engine.model.config.eos_token_id is None
    samples = generate(Conditions(formula={"Na": 4, "Cl": 4}), n=12, model=model)
    ended = [s for s in samples if s.verdict.reason != "truncated"]
    assert len(ended) > 3
    prompt = "data_Na4Cl4\n"
    for sample in samples:
        written = sample.text.removeprefix(prompt)
        assert len(written) < len(sample.text)
        assert written.find("\n\n") == (len(written) - 2 if sample in ended else -1)


def test_the_batch_size_changes_nothing(model):
    wanted = [(s.text, s.verdict) for s in generate(n=6, seed=3, model=model)]
    model.engine.batch_size = 1
    assert [(s.text, s.verdict) for s in generate(n=6, seed=3, model=model)] == wanted
