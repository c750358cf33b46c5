"""What tests of several rooms share: a toy model, made here and never downloaded."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory) -> Path:
    """Return a model folder with a random Llama of 2 layers, 64 wide, that writes `wyckoff` text."""
    from crystallm_kit.models.checkpoints import Manifest, ModelRecipe, new_model, save_model
    from crystallm_kit.text.prompts import template_named
    from crystallm_kit.tokens.drawing import VocabularyInfo
    from crystallm_kit.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "tokenizers" / "wyckoff")
    vocabulary = VocabularyInfo(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    shape = ModelRecipe(hidden_size=64, n_layers=2, n_heads=2, max_positions=256)
    manifest = Manifest({"seed": 1}, "wyckoff", {}, "kit-1", template_named("kit-1").hash, "0" * 64, 1)
    folder = tmp_path_factory.mktemp("models") / "toy"
    return save_model(folder, new_model(shape, vocabulary, seed=1), ROOT / "tokenizers" / "wyckoff", manifest)
