"""checkpoints.py: new models are plain Llamas; a model folder is whole, or refused with what is wrong."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from pymatgen.core import Element

from crystallm_kit.errors import ModelError, RecipeError
from crystallm_kit.models.checkpoints import (
    Manifest,
    ModelRecipe,
    new_model,
    save_model,
)
from crystallm_kit.models.element_embedding import ELEMENTS, element_features, element_rows, period_and_group
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.recipes import from_dict
from crystallm_kit.tokens.drawing import VocabularyInfo

TOY = ModelRecipe(hidden_size=64, n_layers=2, n_heads=2, max_positions=64)
VOCABULARY = VocabularyInfo(32, 0, 1, None, {"Na": 5, "K": 6, "Cl": 7})
MANIFEST = Manifest({"seed": 1}, "wyckoff", {"decimals": 4}, "kit-1", "ab" * 32, "cd" * 32, 1)


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(30)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), eos_token="w1")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "toy"
    return save_model(folder, new_model(TOY, VOCABULARY, seed=1), tokenizer(), MANIFEST)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def refusal(folder) -> str:
    with pytest.raises(ModelError) as caught:
        load_model_folder(folder)
    return str(caught.value)


def test_a_folder_loads_with_the_weights_it_was_written_with(written):
    model, tokenizer, manifest = load_model_folder(written)
    original = new_model(TOY, VOCABULARY, seed=1)
    for (name, weight), (_, wanted) in zip(
        model.named_parameters(), original.named_parameters(), strict=True
    ):
        torch.testing.assert_close(weight, wanted.bfloat16().float(), rtol=0, atol=0, msg=name)
    assert manifest == MANIFEST
    assert tokenizer.eos_token_id == 1
    assert not model.training
    assert type(model).__name__ == "LlamaForCausalLM"
    assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_are_split_into_shards_that_load_together(tmp_path):
    model = new_model(TOY, VOCABULARY, seed=1)
    folder = save_model(tmp_path / "sharded", model, tokenizer(), MANIFEST, max_shard_mb=0.1)
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert max(shard.stat().st_size for shard in shards) < 0.12e6
    loaded, _, _ = load_model_folder(folder)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16().float())
    shards[0].unlink()
    assert f"no {shards[0].name}: the model's weights are missing" in refusal(folder)


def test_saving_replaces_a_folder_and_leaves_nothing_beside_it(tmp_path):
    for seed in (1, 2):
        save_model(
            tmp_path / "m", new_model(TOY, VOCABULARY, seed=seed), tokenizer(), MANIFEST, dtype="float32"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    loaded, _, _ = load_model_folder(tmp_path / "m")
    assert torch.equal(loaded.lm_head.weight, new_model(TOY, VOCABULARY, seed=2).lm_head.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "no config.json; found"),
        ("manifest.json", "no manifest.json, so its prompt template and text format are unknown"),
        ("model.safetensors", "no model.safetensors: the model's weights are missing"),
        ("tokenizer.json", "no tokenizer.json"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(folder, name, message):
    (folder / name).unlink()
    assert message in refusal(folder)
    assert str(folder) in refusal(folder)


def test_a_missing_folder_is_refused(tmp_path):
    assert "no such model folder" in refusal(tmp_path / "none")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_weights_are_refused_before_they_are_read(folder, kept, monkeypatch):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = len(content)
    path.write_bytes(content[: int(kept * size) if isinstance(kept, float) else kept])
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", None
    )  # would fail, if it got there
    message = refusal(folder)
    assert str(path) in message
    assert ("empty file" if kept == 0 else "truncated") in message
    if kept in (0.5, -1):
        assert f"{size:,}" in message


def test_a_pointer_of_git_lfs_is_named_as_what_it_is(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    assert "git-LFS pointer" in refusal(folder)


@pytest.mark.parametrize("field", ["template", "template_sha256", "format"])
def test_a_manifest_without_template_or_format_is_refused(folder, field):
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**data, field: ""}))
    assert f"'{field}' is empty" in refusal(folder)
    del data[field]
    (folder / "manifest.json").write_text(json.dumps(data))
    assert f"key '{field}' is missing" in refusal(folder)
    (folder / "manifest.json").write_text("{")
    assert "not JSON" in refusal(folder)


def test_a_manifest_of_a_later_release_may_hold_more(folder):
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**data, "licence": "CC BY 4.0"}))
    assert load_model_folder(folder)[2] == MANIFEST


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    small = dataclasses.replace(VOCABULARY, size=16)
    folder = save_model(tmp_path / "m", new_model(TOY, small, seed=1), tokenizer(), MANIFEST)
    assert "30 tokens, the model rows for 16" in refusal(folder)


def test_new_models_are_fixed_by_the_seed_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    first, again, other = (new_model(TOY, VOCABULARY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.dtype == torch.float32
    assert first.lm_head.weight.data_ptr() == first.model.embed_tokens.weight.data_ptr()


def test_weights_that_write_to_the_residual_stream_start_smaller():
    layer = new_model(TOY, VOCABULARY, seed=1).model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)  # 1 / sqrt(2 x 2)


def test_heads_that_do_not_divide_the_width_are_refused_with_the_key():
    with pytest.raises(RecipeError, match=r"x: model: hidden_size 64 over n_heads 3"):
        from_dict({"seed": 1, "steps": 1, "model": {"hidden_size": 64, "n_heads": 3}}, _recipe(), where="x")


def _recipe():
    from crystallm_kit.training.recipe import TrainingRecipe

    return TrainingRecipe


def test_alike_elements_start_alike():
    elements = {symbol: i for i, symbol in enumerate(("Na", "K", "Cl", "F", "Fe", "Co", "La", "Ce"), start=4)}
    vocabulary = dataclasses.replace(VOCABULARY, element_token_ids=elements)
    recipe = dataclasses.replace(TOY, hidden_size=256, element_embedding="periodic")
    rows = new_model(recipe, vocabulary, seed=1).model.embed_tokens.weight.detach()

    def alike(one: str, other: str) -> float:
        return torch.cosine_similarity(rows[elements[one]], rows[elements[other]], dim=0).item()

    assert alike("Na", "K") > 0.4 > 0 > alike("Na", "Cl")
    assert alike("F", "Cl") > 0.3
    assert alike("Fe", "Co") > alike("Fe", "La")
    spread = torch.stack([rows[i] for i in elements.values()]).std().item()
    assert spread == pytest.approx(0.02, rel=0.35)


def test_periodic_rows_need_element_tokens():
    recipe = dataclasses.replace(TOY, element_embedding="periodic")
    with pytest.raises(RecipeError, match="names no element tokens"):
        new_model(recipe, dataclasses.replace(VOCABULARY, element_token_ids={}), seed=1)


@pytest.mark.parametrize("symbol", list(ELEMENTS))
def test_the_table_of_elements_agrees_with_pymatgen(symbol):
    import warnings

    element = Element(symbol)
    number, negativity, radius = ELEMENTS[symbol]
    group = 3 if element.is_lanthanoid or element.is_actinoid else element.group
    assert number == element.Z
    assert period_and_group(number) == (element.row if number not in range(57, 72) else 6, group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of elements without an electronegativity
        theirs = element.X
    assert (negativity is None and not theirs > 0) or negativity == pytest.approx(theirs)
    assert 0.2 < radius < 2.7


def test_features_are_standardised_and_rows_repeat():
    features = element_features(list(ELEMENTS))
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(features.std(0), 1, atol=1e-9)
    np.testing.assert_array_equal(
        element_rows(["Na", "K"], 8, spread=0.02, seed=1), element_rows(["Na", "K"], 8, spread=0.02, seed=1)
    )
